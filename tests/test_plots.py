"""bench/plots.py: what its axes and curves hold. test_bench_programs.py makes the files."""

from dataclasses import replace

import pytest
from measured import ENVIRONMENT, ROWS, script

from flashcl.cli.bench.results import Results


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    return script("plots")


def curve(panel, label="dense"):
    (line,) = [line for line in panel.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def test_figures_have_their_units_and_scales(plots):
    rows = [replace(ROWS[0], n=n, ms=n / 10, ms_20=n / 12, ms_80=n / 9, extra_mib=n / 2, floor_ms=n / 40) for n in (128, 64)]
    rows.append(replace(rows[0], n=256, status="wrong", ms=None, ms_20=None, ms_80=None, extra_mib=None))
    time, memory = plots.scaling(rows, ["info_nce"]).axes[:2]
    assert curve(time) == ([64, 128], [6.4, 12.8]) and curve(memory) == ([64, 128], [32, 64])
    assert time.get_ylabel().startswith("ms") and memory.get_ylabel() == "peak extra memory, MiB"
    assert time.get_yscale() == memory.get_yscale() == "log"
    wide = [replace(rows[0], n=64, d=d) for d in (16, 32)]
    assert curve(plots.widths(wide).axes[0]) == ([16, 32], [25, 25])


def test_the_roofs(plots):
    """8 x 128^2 x 16 FLOPs for 4 x 128 x 16 x 4 bytes; 2 TFLOP/s and 100 GB/s meet at 20 FLOPs a byte."""
    row = replace(ROWS[0], n=128, d=16, tflops=0.5, matrix_tflops=2.0)
    panel = plots.roofline([row], 100.0).axes[0]
    roof = panel.lines[0]
    assert list(roof.get_xdata())[1] == pytest.approx(20) and list(roof.get_ydata())[1:] == [2, 2]
    x, y = list(roof.get_xdata())[0], list(roof.get_ydata())[0]
    assert y == pytest.approx(x * 0.1)
    assert curve(panel) == ([8 * 128**2 * 16 / (4 * 128 * 16 * 4)], [0.5])


def test_what_figures_leave_out(plots):
    rows = [replace(ROWS[0], n=n, mode=mode) for n in (64, 128) for mode in ("forward", "full")]
    later = Results(ENVIRONMENT | dict(copy_gb_per_s=5.0, date="t"), [])
    figures = dict(plots.figures([Results(ENVIRONMENT, rows), later]))
    panel = figures["float32-sizes"].axes[0]
    assert curve(panel)[0] == [64, 128]
    roof = figures["float32-roofline"].axes[0].lines[0]
    assert list(roof.get_xdata())[1] == pytest.approx(1e12 / 10e9)
    no_such = replace(ROWS[1], provider="quack", note="has no siglip")
    assert "quack" not in plots.absent([no_such]) and "memeff" in plots.absent([ROWS[1], no_such])
    shapes = [replace(ROWS[0], n=n, d=d) for n, d in ((64, 16), (128, 16), (64, 32))]
    assert plots.values_of(shapes, "info_nce", "d", "n") == (16, {64, 128})
