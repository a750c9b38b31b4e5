"""`flashcl plan`: its formulas against numbers worked out by hand. test_distributed.py holds its bytes against real ones."""

from dataclasses import replace

import pytest

from flashcl.cli import main
from flashcl.cli.bench.results import Results, Row
from flashcl.cli.plan import MESSAGE, WORKSPACE, Plan, count, rate

MESSAGES = 3 * MESSAGE  # to each of three others


def test_info_nce_by_hand():
    plan = Plan("info_nce", batch=4096, dim=256, ranks=4)
    forward, backward = plan.walks("ring")
    assert forward.flops == 2 * 1024 * 4096 * 256 and backward.flops == 3 * forward.flops
    assert forward.rows == backward.rows == 3 * 1024 * 256 * 2 and forward.gradients == 0
    assert backward.gradients == 3 * 1024 * 256 * 4
    # ids; then, by all-reduces of 2 * 3 / 4 of their size: the log-sum-exps, and how many rows and ranks there are
    assert forward.vectors == 2 * MESSAGES + 3 * 1024 * 4 + 1.5 * 4096 * (4 + 8) + 1.5 * 16
    # ids; weight, top and rest of the columns; the mean product
    assert backward.vectors == 2 * MESSAGES + 3 * 1024 * 4 + 3 * 1024 * 12 + 1.5 * 2 * 257 * 4


def test_a_symmetric_matrix_is_computed_and_sent_once():
    one, both = Plan("nt_xent", batch=2048, dim=64, ranks=5), Plan("info_nce", batch=4096 - 4096 % 5, dim=64, ranks=5)
    assert one.lines == 2 * (2048 // 5)
    assert one.flops(8) == pytest.approx(both.flops(8) / 2, rel=1e-2)
    assert one.rows("ring") == 2 * one.lines * 64 * 2 and one.rows("gather") == 4 * one.lines * 64 * 2
    assert Plan("nt_xent", batch=2048, dim=64, ranks=4).rows("ring") == 1.75 * 1024 * 64 * 2


def test_a_gather_pads_its_last_chunk():
    plan = Plan("info_nce", batch=4 * 1000, dim=128, ranks=4, chunk=4 * 300 * 128 * 2)
    assert plan.chunk_lines() == 300
    assert plan.rows("gather") == 3 * 1200 * 128 * 2


def test_memory_and_the_largest_batch():
    plan = Plan("siglip", batch=8 * 4096, dim=512, ranks=8)
    assert WORKSPACE + 2 * 4096 * 512 * 2 < plan.memory("ring") < 2 * WORKSPACE
    for strategy in ("gather", "ring"):
        largest = plan.largest_batch(strategy, 80e9)
        assert largest % 8 == 0
        assert Plan("siglip", largest, 512, 8).memory(strategy) <= 80e9 < Plan("siglip", largest + 8, 512, 8).memory(strategy)
    assert plan.largest_batch("ring", WORKSPACE) == 0


def test_sizes_and_rates_as_people_write_them():
    assert [count(text) for text in ("4M", "64k", "1000", "1.5K")] == [4 * 2**20, 65536, 1000, 1536]
    assert rate("400Gb") == rate("50GB") == rate("400Gb/s") == 50e9
    for wrong in ("4X", "", "400", "-1M"):
        with pytest.raises(ValueError):
            (rate if wrong == "400" else count)(wrong)


ARGUMENTS = ["plan", "--batch", "4M", "--dim", "1024", "--gpus", "256", "--interconnect", "400Gb"]


def test_the_command(capsys):
    assert main([*ARGUMENTS, "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    for words in ("gather", "ring", "largest batch", "what auto takes", "published peak", "A model, not a measurement"):
        assert words in out


def test_a_measured_rate_takes_the_place_of_the_peak(tmp_path, capsys):
    row = Row("info_nce", 65536, 1024, "bfloat16", "full", "flashcl-triton", "ok", tflops=500.0)
    file, rows = tmp_path / "gpu.json", [replace(row, d=256, tflops=100.0), row, replace(row, provider="dense", tflops=900.0)]
    Results(dict(device="a GPU"), rows).save(file)
    assert main([*ARGUMENTS, "--calibrate", str(file)]) == 0
    out = capsys.readouterr().out
    assert "matrix rate 500 TFLOP/s: measured, flashcl-triton at N = 65,536, D = 1024 on a GPU" in out
    with pytest.raises(SystemExit, match="no measured flashcl row for siglip"):
        main([*ARGUMENTS, "--loss", "siglip", "--calibrate", str(file)])


@pytest.mark.parametrize("wrong", ["--gpus 0", "--gpus -8", "--dim 0", "--interconnect 0Gb"])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*ARGUMENTS, *wrong.split()])
    assert "usage" in capsys.readouterr().err


def test_what_cannot_be_planned(tmp_path, capsys):
    assert main([*ARGUMENTS, "--batch", "4"]) == 2 and "without a pair" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--calibrate", str(tmp_path / "nothing.json")]) == 2 and "nothing.json" in capsys.readouterr().err
