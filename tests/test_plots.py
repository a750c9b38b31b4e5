"""bench/plots.py: what its axes and curves hold. test_bench_programs.py makes the files."""

import json
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


def test_the_roofline_of_kernels(plots, tmp_path):
    """N = 64, D = 16, 2 bytes a number: embeddings 4 KiB, G 8 KiB. A part without a rate (siglip has no sweep) has no point."""
    row = dict(loss="info_nce", n=64, d=16, dtype="bfloat16", backend="cuda", matrix_tflops=0.5)
    parts = dict(sweep=(4.0, 0.1), grad=(8.0, 0.2), products=(16.0, 0.4))
    row |= {part: dict(ms=us / 1e3, launches=1.0, tflops=rate) for part, (us, rate) in parts.items()}
    siglip = row | dict(loss="siglip", backend="triton", sweep=dict(ms=0.0, launches=0.0))
    figure = plots.kernel_roofline([row, siglip], 100.0)
    panel = figure.axes[0]
    moved = dict(sweep=4096, grad=4096 + 8192, products=2 * 4096 + 2 * 8192)
    for part, (us, rate) in parts.items():
        at, rates = curve(panel, f"{part}, cuda")
        assert at == pytest.approx([rate * us * 1e6 / moved[part]]) and rates == [rate]
    assert max(panel.lines[0].get_ydata()) == 0.5 and not curve(panel, "sweep, triton")[0]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "copy_gb_per_s"} | dict(commit="parts", date="then")
    files = dict(k=dict(environment=environment, rows=[row]), other=dict(environment={}))
    files["before"] = dict(environment=environment | dict(date="before then", commit="old"), rows=[row])
    for name, data in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    found = plots.load_parts(tmp_path.glob("*.json"))
    table = Results(ENVIRONMENT, [replace(ROWS[0], dtype="bfloat16")])
    names = dict(plots.figures([table], found[plots.slug(ENVIRONMENT["device"])]))
    assert list(names) == ["bfloat16-roofline", "bfloat16-kernels"] and len(found) == 1
    assert "commit parts, then" in names["bfloat16-kernels"].get_supxlabel()
