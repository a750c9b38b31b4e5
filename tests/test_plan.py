"""`flashcl plan`: its formulas against numbers worked out by hand. test_distributed.py counts those of real ranks."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flashcl.cli import main
from flashcl.cli.bench.results import Results, Row
from flashcl.cli.plan import MESSAGE, WORKSPACE, Plan, count, rate

MILLION = Path(__file__).parents[1] / "bench/results/million-h200.json"
MESSAGES = 3 * MESSAGE  # to each of three others


def test_info_nce_by_hand():
    plan = Plan("info_nce", batch=4096, dim=256, ranks=4)
    forward, backward = plan.walks("ring")
    assert forward.flops == 2 * 1024 * 4096 * 256 and backward.flops == 3 * forward.flops
    assert forward.rows == backward.rows == 3 * 1024 * 256 * 2 and forward.gradients == 0
    assert backward.gradients == 3 * 1024 * 256 * 4
    # ids; then, by all-reduces of 2 * 3 / 4 of their size: the log-sum-exps, and how many rows and ranks there are
    assert forward.vectors == MESSAGES + 3 * 1024 * 4 + 1.5 * 4096 * (4 + 8) + 1.5 * 16
    # ids; weight and top of the columns; the mean product of the positives
    assert backward.vectors == 2 * MESSAGES + 3 * 1024 * 4 + 3 * 1024 * 8 + 1.5 * 2 * 8


def test_a_symmetric_matrix_is_computed_and_sent_once():
    one, both = Plan("nt_xent", batch=2048, dim=64, ranks=5), Plan("info_nce", batch=4100, dim=64, ranks=5)
    assert one.lines == 2 * 410  # of ranks that hold 409 or 410 pairs, two views each
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
        fits, does_not = (Plan("siglip", batch, 512, 8).memory(strategy) for batch in (largest, largest + 8))
        assert fits <= 80e9 < does_not
    assert plan.largest_batch("ring", WORKSPACE) == 0


def test_memory_of_sup_con_by_hand():
    plan = Plan("sup_con", batch=4096, dim=256, ranks=4)
    numbers = 1024 * 256  # of this rank's embeddings
    towers = numbers * (2 + 2 + 4)  # with gradients, in their dtype and in float32
    on_its_way = 2 * numbers * (2 + 4)
    block = 2 * numbers * 4
    class_sums = 2 * numbers * (8 + 4)
    vectors = 1024 * 4 * (4 + 2 * 4 * 4)
    assert plan.memory("ring") == towers + on_its_way + block + class_sums + vectors + WORKSPACE


def test_memory_of_a_million_rows_on_one_gpu():
    """As measured there, less than a tenth above it: what no rank sends is not held either."""
    row = json.loads(MILLION.read_text())["rows"][0]
    planned = Plan("info_nce", batch=row["n"], dim=row["d"], ranks=1).memory("alone")
    assert 1e9 * row["peak_gb"] <= planned <= 1.1e9 * row["peak_gb"]


def test_sizes_and_rates_as_people_write_them():
    assert [count(text) for text in ("4M", "64k", "1000", "1.5K")] == [4 * 2**20, 65536, 1000, 1536]
    assert rate("400Gb") == rate("50GB") == rate("400Gb/s") == 50e9
    for wrong in ("4X", "", "400", "-1M"):
        with pytest.raises(argparse.ArgumentTypeError):
            (rate if wrong == "400" else count)(wrong)


ARGUMENTS = ["plan", "--batch", "4M", "--dim", "1024", "--gpus", "256", "--interconnect", "400Gb"]


def test_the_command(capsys):
    assert main([*ARGUMENTS, "--gpu", "h200"]) == 0
    out = capsys.readouterr().out
    assert "16,384 lines each" in out and "published peak" in out and "A model, not a measurement" in out
    assert "gather" in out and "ring" in out and "largest batch" in out and "auto takes this strategy" in out


# ---- what it prints ------------------------------------------------------------------------------------------------------


def lines_of(capsys, command):
    assert main(["plan", *command.split()]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("batch, taken", [("64k", "ring"), ("4k", "gather")])
def test_the_table_is_that_of_the_plan(capsys, batch, taken):
    """Milliseconds, MB, GB, what is exposed, the largest batch; on the default GPU, whose numbers are NVIDIA's."""
    out = lines_of(capsys, f"--batch {batch} --dim 1024 --gpus 8 --interconnect 16Gb")
    plan = Plan("info_nce", int(batch[:-1]) * 1024, 1024, 8)
    assert "matrix rate 989 TFLOP/s: the published peak of the H200" in out and "interconnect 2.0 GB/s per rank" in out
    shown = {}
    for strategy in ("gather", "ring"):
        for walk in plan.walks(strategy):
            compute, sending = 1e3 * walk.flops / 989e12, 1e3 * walk.bytes / 2e9
            numbers = f"{compute:.2f} {walk.bytes / 1e6:.1f} {sending:.2f} {max(0.0, sending - compute):.2f}"
            assert re.search(rf"^{strategy} +{walk.name} +{numbers.replace(' ', ' +')}$", out, re.M), numbers
        held, largest = plan.memory(strategy), plan.largest_batch(strategy, 141e9)
        end = f"memory of the loss and its inputs {held / 1e9:.2f} of 141 GB; largest batch that fits {largest:,}"
        (shown[strategy],) = [line for line in out.splitlines() if end in line]
    assert ["auto takes this strategy" in shown[name] for name in ("gather", "ring")] == [taken == "gather", taken == "ring"]


def test_a_pair_for_each_rank_is_enough(capsys):
    assert "batch 8 over 8 ranks, 1 lines each" in lines_of(capsys, "--batch 8 --dim 64 --gpus 8 --interconnect 1GB")


def test_the_rate_is_that_of_the_nearest_width_and_the_fastest(tmp_path, capsys):
    row = Row("info_nce", 65536, 1024, "bfloat16", "full", "flashcl-triton", "ok", tflops=500.0)
    rows = [replace(row, provider="flashcl-torch", tflops=5.0), row, replace(row, d=256, tflops=100.0)]
    rows.append(replace(row, provider="flashcl-cuda", status="oom", tflops=None))
    Results(dict(device="a GPU", commit="abc", date="today"), rows).save(tmp_path / "r.json")
    for dim, tflops in ((900, 500), (300, 100)):
        out = lines_of(capsys, f"--batch 4k --dim {dim} --gpus 2 --interconnect 1GB --calibrate {tmp_path / 'r.json'}")
        assert f"matrix rate {tflops} TFLOP/s: measured" in out


def test_ranks_that_hold_different_numbers(capsys):
    assert main([*ARGUMENTS, "--batch", "1000", "--gpus", "3"]) == 0
    assert "over 3 ranks, 334 lines on the largest of them" in capsys.readouterr().out


def test_one_rank_sends_nothing(capsys):
    assert main([*ARGUMENTS, "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\w+) +\w+ +[\d.]+ +0.0 +0.00 +0.00$", out, re.M) == ["alone", "alone"]
    assert "ring" not in out and "gather" not in out


@pytest.mark.parametrize("interconnect, slower", [("50GB", "computing"), ("0.01GB", "sending")])
def test_communication_hides_behind_the_tiles_of_its_walk(capsys, interconnect, slower):
    """The label sums of SupCon have none; the tiles of the other walks take longer than a fast link, not a slow one."""
    command = "plan --loss sup_con --batch 1M --dim 1024 --gpus 4 --gpu a100 --interconnect"
    assert main([*command.split(), interconnect]) == 0
    _, ring = re.findall(r"step ([\d.]+) ms", capsys.readouterr().out)
    labels, *walks = Plan("sup_con", 2**20, 1024, 4).walks("ring")
    sending = [walk.bytes / rate(interconnect) for walk in (labels, *walks)]
    hidden = dict(computing=sum(walk.flops / 312e12 for walk in walks), sending=sum(sending[1:]))
    assert max(hidden, key=hidden.get) == slower
    assert float(ring) == pytest.approx(1e3 * (sending[0] + hidden[slower]), abs=0.06)


@pytest.fixture
def measured(tmp_path):
    """A result file in which what is asked for is neither the first row nor the fastest; TFLOP/s tell rows apart."""
    row = Row("info_nce", 65536, 1024, "bfloat16", "full", "flashcl-triton", "ok", tflops=500.0)
    rows = [
        replace(row, d=256, tflops=100.0),
        row,
        replace(row, provider="dense", tflops=900.0),
        replace(row, dtype="float32", tflops=50.0),
        replace(row, mode="forward", tflops=800.0),
        replace(row, dtype="float16", mode="backward", tflops=700.0),
    ]
    Results(dict(device="a GPU", commit="abc", date="today"), rows).save(tmp_path / "gpu.json")
    return ["--calibrate", str(tmp_path / "gpu.json")]


@pytest.mark.parametrize("dtype, tflops", [("bfloat16", 500), ("float32", 50)])
def test_a_measured_rate_takes_the_place_of_the_peak(measured, capsys, dtype, tflops):
    assert main([*ARGUMENTS, *measured, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    assert f"matrix rate {tflops} TFLOP/s: measured, flashcl-triton at N = 65,536, D = 1024 on a GPU" in out


def test_a_rate_of_another_gpu_is_refused(measured, tmp_path, capsys):
    results = Results.load(tmp_path / "gpu.json")
    results.environment["device"] = "NVIDIA H200, sm_90"
    results.save(tmp_path / "gpu.json")
    assert main([*ARGUMENTS, *measured, "--gpu", "h200"]) == 0
    assert main([*ARGUMENTS, *measured, "--gpu", "a100"]) == 2
    assert "another GPU than --gpu a100: take --gpu h200" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, missing", [("--loss siglip", "siglip in bfloat16"), ("--dtype float16", "info_nce in float16")]
)
def test_a_rate_that_was_not_measured(measured, capsys, asked, missing):
    assert main([*ARGUMENTS, *measured, *asked.split()]) == 2
    assert f"no measured flashcl row for {missing}, forward and backward" in capsys.readouterr().err


def test_float32_has_four_bytes_and_no_published_peak(measured, capsys):
    assert main([*ARGUMENTS, "--dtype", "float32"]) == 2
    assert "the published peaks are those of 16-bit products" in capsys.readouterr().err
    assert main([*ARGUMENTS, *measured, "--dtype", "float32"]) == 0
    forward = Plan("info_nce", 4 * 2**20, 1024, 256, itemsize=4).walks("ring")[0]
    assert forward.rows == 255 * 2**14 * 1024 * 4
    assert re.search(rf"^ring +forward +[\d.]+ +{forward.bytes / 1e6:.1f} ", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("wrong", ["--gpus 0", "--gpus -8", "--dim 0", "--interconnect 0Gb"])
def test_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*ARGUMENTS, *wrong.split()])
    assert "usage" in capsys.readouterr().err


def test_what_cannot_be_planned(tmp_path, capsys):
    assert main([*ARGUMENTS, "--batch", "4"]) == 2 and "without a pair" in capsys.readouterr().err
    assert main([*ARGUMENTS, "--calibrate", str(tmp_path / "nothing.json")]) == 2
    assert "nothing.json" in capsys.readouterr().err
