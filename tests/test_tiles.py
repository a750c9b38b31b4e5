"""bench/tiles.py: other tiles of the Triton kernels, timed. Here in the interpreter, where times say nothing."""

import json
import math

import pytest
from measured import script

pytest.importorskip("triton")
from conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("run with the interpreter", allow_module_level=True)

SMALL = ["--n", "70", "--d", "32", "--repeats", "1"]


@pytest.fixture(scope="module")
def tiles():
    return script("tiles")


@pytest.mark.parametrize("kernel", ["sweep", "sweep2", "grad", "grad2", "sigmoid"])
def test_other_tiles_are_timed_beside_that_of_the_table(tiles, kernel, tmp_path):
    rows = tiles.main([*SMALL, "--kernel", kernel, "--tile", "32,32,32,4,1", "--out", str(tmp_path / "t.json")])
    assert [(r["kernel"], r["tile"]) for r in rows] == [(kernel, "table"), (kernel, "32,32,32,4,1")]
    assert all(r["ms"] > 0 and r["error"] < 1e-3 for r in rows) and rows[1]["error"] > 0  # another order of summation
    assert json.loads((tmp_path / "t.json").read_text())["rows"] == rows


def test_a_tile_that_does_not_compile_is_a_result(tiles):
    _, row = tiles.main([*SMALL, "--kernel", "sweep", "--tile", "24,32,32,4,1"])
    assert "ms" not in row and "power of 2" in row["error"]


@pytest.mark.parametrize("factor, error", [(1.1, 0.1), (math.nan, math.nan)])
def test_a_tile_with_other_results_gets_no_time(tiles, monkeypatch, factor, error):
    call = tiles.calls

    def wrong(*args):
        def results(plan):
            *others, last = call(*args)(plan)
            return [*others, last * (factor if plan.tile.BN == 32 else 1.0)]

        return results

    monkeypatch.setattr(tiles, "calls", wrong)
    _, row = tiles.main([*SMALL, "--kernel", "sweep", "--tile", "32,32,32,4,1"])
    assert "ms" not in row and row["error"] == pytest.approx(error, rel=1e-3, nan_ok=True)
