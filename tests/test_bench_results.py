"""flashcl bench: what its files hold, how it is interrupted, resumed and compared, and the command itself."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from measured import ENVIRONMENT, ROWS, one_commit  # noqa: F401  fixtures

from flashcl.cli import main
from flashcl.cli.bench import machine, measure, results
from flashcl.cli.bench.results import BadFile, Results
from flashcl.cli.bench.suites import MODES, Workload, grid


def test_results_come_back_as_they_were(tmp_path):
    path = tmp_path / "r.json"
    Results(ENVIRONMENT, ROWS).save(path)
    again = Results.load(path)
    assert again.environment == ENVIRONMENT and again.rows == ROWS
    with open(path.with_suffix(".csv"), newline="") as file:
        lines = list(csv.DictReader(file))
    for line, row in zip(lines, ROWS, strict=True):
        expected = {k: "" if v is None else str(v) for k, v in (asdict(row) | ENVIRONMENT).items()}
        assert line == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.csv", "r.json"]


def test_a_new_measurement_takes_the_place_of_the_old():
    found = Results(ENVIRONMENT, list(ROWS))
    found.add([replace(ROWS[0], ms=9.0)])
    assert [row.ms for row in found.rows] == [None, None, 9.0]


@pytest.fixture
def canned(monkeypatch):
    """`flashcl bench` with measurements that a test makes up; returns (exit code, workloads it measured)."""

    def run(answer, *args):
        measured = []

        def fake(work, names, device, modes, seconds, report):
            measured.append(work)
            return answer(work)

        monkeypatch.setattr(measure, "measure", fake)
        monkeypatch.setattr(machine, "copy_bandwidth", lambda clock, device: 1e9)
        sizes = ["--n", "64:256", "--d", "16", "--provider", "dense", "--mode", "full", "--device", "cpu"]
        return main(["bench", *sizes, *map(str, args)]), measured

    return run


def answer(work):
    return [replace(ROWS[0], n=work.n)]


def test_an_interrupt_leaves_a_valid_file(canned, tmp_path, capsys):
    def interrupted(work):
        if work.n == 256:
            raise KeyboardInterrupt
        return answer(work)

    code, _ = canned(interrupted, "--out", tmp_path / "r.json")
    assert code == 130 and "2 of 3 workloads" in capsys.readouterr().err
    assert [row.n for row in Results.load(tmp_path / "r.json").rows] == [64, 128]
    code, measured = canned(answer, "--out", tmp_path / "r.json", "--resume")
    assert code == 0 and [work.n for work in measured] == [256]
    assert [row.n for row in Results.load(tmp_path / "r.json").rows] == [64, 128, 256]


def test_a_real_ctrl_c(tmp_path):
    path = tmp_path / "r.json"
    sizes = ["--n", "32:4096", "--d", "8", "--provider", "dense", "--seconds", "0.01", "--device", "cpu"]
    command = [Path(sys.executable).with_name("flashcl"), "bench", *sizes, "--out", path]
    # A job in the background of a script ignores interrupts, and hands that on to its children.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    for line in process.stdout:  # the table of the first workload comes after its file
        if line.startswith("info_nce 32"):
            break
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    assert {row.n for row in Results.load(path).rows} >= {32}
    assert {row.n for row in Results.load(path).rows}.isdisjoint({4096})


def test_what_is_of_another_state_is_not_resumed(canned, tmp_path, capsys):
    path = tmp_path / "r.json"
    canned(answer, "--out", path)
    data = json.loads(path.read_text())
    data["environment"]["commit"] = "another"
    path.write_text(json.dumps(data))
    assert canned(answer, "--out", path, "--resume") == (2, [])
    assert "of another machine, commit or version: --overwrite" in capsys.readouterr().err
    assert json.loads(path.read_text()) == data
    assert len(canned(answer, "--out", path, "--resume", "--overwrite")[1]) == 3
    assert canned(answer, "--out", path, "--resume", "--overwrite") == (0, [])  # those are of this state


def test_results_are_not_lost_unasked(canned, tmp_path, capsys):
    path = tmp_path / "r.json"
    canned(answer, "--out", path)
    before = path.read_text()
    assert canned(answer, "--out", path) == (2, []) and path.read_text() == before
    assert "exists, and --resume would keep it: --overwrite replaces it" in capsys.readouterr().err
    code, measured = canned(answer, "--out", path, "--overwrite")
    assert code == 0 and len(measured) == 3


def test_nothing_measured_is_no_success(canned, capsys):
    assert canned(lambda work: [replace(ROWS[1], n=work.n)])[0] == 2
    assert "nothing was measured" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, needs", [("--resume", "--out"), ("--overwrite", "--out"), ("--fail-if-regression", "--compare")])
def test_options_that_need_another(arguments, needs, capsys):
    assert main(["bench", arguments]) == 2 and f"{arguments} needs {needs}" in capsys.readouterr().err


def test_a_suite_has_its_own_workloads(capsys):
    assert main(["bench", "--suite", "quick", "--n", "64"]) == 2
    assert "--suite has workloads of its own" in capsys.readouterr().err


def test_a_time_limit_leaves_the_rest(canned, tmp_path, capsys):
    code, measured = canned(answer, "--out", tmp_path / "r.json", "--time-limit", 1e-9)
    assert code == 3 and measured == [] and "3 workloads are left" in capsys.readouterr().err
    assert Results.load(tmp_path / "r.json").rows == []


@pytest.mark.parametrize(
    "change, code",
    [
        (dict(), 0),
        (dict(ms=1.6, ms_20=1.4, ms_80=2.1), 0),  # within a tenth
        (dict(ms=1.9, ms_20=1.6, ms_80=2.5), 0),  # the distributions overlap
        (dict(ms=0.5, ms_20=0.4, ms_80=0.6), 0),
        (dict(ms=3.0, ms_20=2.5, ms_80=3.5), 1),
        (dict(ms=3.0, ms_20=2.5, ms_80=3.5, floor_ms=1.5), 0),  # matrix products took twice as long, too
        (dict(ms=3.4, ms_20=2.5, ms_80=3.5, floor_ms=1.5), 1),
        (dict(extra_mib=19.2), 0),  # 3 MiB before: a tenth of them and the noise of 16
        (dict(extra_mib=19.4), 1),
        (dict(extra_mib=None), 0),
        (dict(status="oom"), 1),
        (dict(status="wrong"), 1),
        (dict(status="failed"), 1),
    ],
)
def test_regressions(canned, tmp_path, capsys, change, code):
    canned(answer, "--out", tmp_path / "old.json")

    def now(work):
        return [replace(row, **change) if work.n == 128 else row for row in answer(work)]

    assert canned(now, "--compare", tmp_path / "old.json", "--fail-if-regression")[0] == code
    assert f"{code} regressions in 3 measurements" in capsys.readouterr().out
    assert canned(now, "--compare", tmp_path / "old.json")[0] == 0


def test_an_incomparable_file_is_no_success(canned, tmp_path, capsys):
    old = tmp_path / "old.json"
    Results(ENVIRONMENT, [replace(ROWS[0], n=128)]).save(old)
    assert canned(answer, "--compare", old) == (2, [])  # another device: nothing is measured
    device = machine.environment(torch.device("cpu"))["device"]
    Results(ENVIRONMENT | dict(device=device), [replace(ROWS[0], n=4)]).save(old)
    assert canned(answer, "--compare", old)[0] == 2  # nothing in common
    assert "no measurement is in both" in capsys.readouterr().err
    assert canned(answer, "--fail-if-regression")[0] == 2


@pytest.mark.parametrize("share, warned", [(0.25, False), (0.3, True)])
def test_a_busy_machine_is_warned_of(canned, monkeypatch, capsys, share, warned):
    monkeypatch.setattr(os, "getloadavg", lambda: (share * os.cpu_count(), 0.0, 0.0))
    assert canned(answer)[0] == 0
    assert ("other programs use the cores" in capsys.readouterr().err) == warned


def test_nt_xent_has_pairs(capsys):
    assert main(["bench", "--loss", "nt_xent", "--n", "7"]) == 2
    assert "nt_xent" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", ["--n 0", "--n 64:32", "--part 4/3", "--part x", "--part 1/", "--provider nobody", "--loss hinge", "--seconds nan"]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments.split()])
    assert "usage" in capsys.readouterr().err


def test_results_go_to_a_json_file(tmp_path, capsys):
    """The CSV beside it must not take its name."""
    for wrong in (tmp_path / "r.csv", tmp_path):
        assert main(["bench", "--device", "cpu", "--out", str(wrong)]) == 2
        assert f"--out must be a file named *.json (*.csv is written beside it), got {wrong}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_inputs_that_do_not_fit_are_a_result(monkeypatch):
    def inputs(self, device):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Workload, "inputs", inputs)
    rows = measure.measure(Workload("info_nce", 64, 8, "float32"), ["dense"], torch.device("cpu"), MODES, 0.01, print)
    assert [(row.provider, row.mode, row.status) for row in rows] == [("dense", mode, "oom") for mode in MODES]


def test_files_that_are_no_results(tmp_path, capsys):
    path = tmp_path / "r.json"
    assert main(["bench", "--compare", str(path)]) == 2 and str(path) in capsys.readouterr().err
    for text in ("", "[]", '{"environment": {}, "rows": [{"loss": "info_nce"}]}', '{"environment": {}, "rows": []}'):
        path.write_text(text)
        with pytest.raises(BadFile, match=f"^{path} is no result of flashcl bench: "):
            Results.load(path)
        assert main(["bench", "--compare", str(path)]) == 2
        assert capsys.readouterr().err.startswith(f"flashcl: {path} is no result of flashcl bench: ")


def test_the_command_as_a_user_runs_it(tmp_path):
    command = [
        Path(sys.executable).with_name("flashcl"),
        "bench",
        "--loss",
        "siglip",
        "--n",
        "2048",
        "--d",
        "8",
        "--device",
        "cpu",
    ]
    options = ["--seconds", "0.01", "--provider", "dense", "--out", tmp_path / "r.json"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "[1/1] siglip 2,048 x 8 float32" in done.stderr and "matrix rate" in done.stdout
    assert "float32 counts as right up to a relative L2 error of 1e-04 for the value" in done.stdout
    found = Results.load(tmp_path / "r.json")
    assert {(row.provider, row.mode, row.status) for row in found.rows} == {("dense", mode, "ok") for mode in MODES}
    assert found.environment["torch"] == torch.__version__ and found.environment["command"].startswith(
        "flashcl bench --loss siglip"
    )
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|unknown", found.environment["commit"])
    for row in found.rows:
        assert row.ms_20 <= row.ms <= row.ms_80 and row.runs >= measure.FEWEST and row.error < 1e-5
        assert row.floor_ms == pytest.approx(row.work.flops(row.mode) / row.matrix_tflops / 1e9)
        assert 16 < row.extra_mib < 512  # S has 16 MiB, the gradients 128 KiB


def test_the_table_has_its_numbers_in_their_columns():
    row = replace(ROWS[0], ms=12.5, ms_20=11.25, ms_80=14.5, tflops=0.25, matrix_tflops=2.0, floor_ms=5.0)
    row.extra_mib, row.error = 1536.0, 2e-6
    _, _, line, note = results.show([row]).splitlines()
    assert line.split() == "dense full 12.5 11.25 14.5 0.25 12% 2.50 1.5 GiB 2e-06".split()
    assert note == "matrix rate 2 TFLOP/s; error against float64"
    assert "dense: no grad logit_scale" in results.show([replace(row, note="no grad logit_scale")])


def test_what_a_comparison_says():
    def text(was, now):
        (change,) = results.compare(Results(ENVIRONMENT, [now]), Results(ENVIRONMENT, [was]))
        return change.text, change.regression

    was = replace(ROWS[0], ms=2.0, ms_20=1.9, ms_80=2.1, extra_mib=100.0)
    slow = replace(was, ms=3.0, ms_20=2.9, ms_80=3.1)
    assert text(was, slow) == ("info_nce 64 x 16 float32 dense full: 2 -> 3 ms (x 1.50), 100 -> 100 MiB SLOWER", True)
    assert text(was, replace(was, extra_mib=200.0))[0].endswith("ms (x 1.00), 100 -> 200 MiB MORE MEMORY")
    assert text(ROWS[2], replace(ROWS[2], status="ok", ms=1.0)) == ("info_nce 128 x 16 float32 dense full: oom -> ok", False)
    assert text(ROWS[2], replace(ROWS[2], status="failed"))[1] is False


def test_an_error_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    Results(ENVIRONMENT, ROWS).save(path)
    before = path.read_text()

    def full(self, text, **how):
        Path.write_bytes(self, text.encode()[:10])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        Results(ENVIRONMENT, ROWS[:1]).save(path)
    assert path.read_text() == before


def test_small_workloads_come_first():
    works = grid(("info_nce", "siglip"), (64, 128), (8,), ("float32",))
    assert [(w.n, w.loss) for w in works] == [(64, "info_nce"), (64, "siglip"), (128, "info_nce"), (128, "siglip")]
