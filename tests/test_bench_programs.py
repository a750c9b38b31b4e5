"""The programs in bench/: figures, the time of the host, ranks, the check of a GPU."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from measured import ENVIRONMENT, ROOT, ROWS, one_commit, script  # noqa: F401  fixtures

from flashcl.cli.bench.results import Results
from flashcl.engine import dispatch


@pytest.mark.parametrize("program", sorted((ROOT / "bench").glob("*.py")), ids=lambda path: path.name)
def test_every_program_starts(program):
    needs = {"plots": "matplotlib", "host": "triton", "tiles": "triton", "epilogues": "flashcl._C"}
    pytest.importorskip(needs.get(program.stem, "torch"), reason="not installed, or not built", exc_type=ImportError)
    done = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


# ---- the figures


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    return script("plots")


def grown(n, provider="dense", **more):
    return replace(ROWS[0], n=n, provider=provider, ms=n / 10.0, ms_20=n / 12.0, ms_80=n / 9.0, **more)


def test_figures_from_a_file(plots, tmp_path, capsys):
    rows = [grown(64), grown(128), replace(grown(256), status="oom"), grown(64, "flashcl-torch"), ROWS[1]]
    rows += [replace(grown(64), loss="siglip", d=d) for d in (16, 32)]
    Results(ENVIRONMENT, rows).save(tmp_path / "r.json")
    (tmp_path / "other.json").write_text('{"environment": {}, "rows": [1]}')  # of another program
    files = [str(tmp_path / "r.json"), str(tmp_path / "other.json")]
    assert plots.main([*files, "--out", str(tmp_path / "img")]) == 0
    names = sorted(p.name for p in (tmp_path / "img").iterdir())
    assert names == [f"cpu-one-float32-{kind}.png" for kind in ("roofline", "sizes", "widths")]
    assert all((tmp_path / "img" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_figures_show_what_was_measured_and_where_memory_ended(plots):
    rows = [grown(64), grown(128), replace(grown(256), status="oom", ms=None), replace(ROWS[1], n=256)]
    assert plots.several(rows, "d", "n") == ["info_nce"] and not plots.several(rows, "n", "d")
    figure = plots.scaling(rows, ["info_nce"])
    panel = figure.axes[0]
    curves = {line.get_label(): line for line in panel.lines if line.get_gid() is None}
    assert list(curves) == ["dense"] and list(curves["dense"].get_xdata()) == [64, 128]
    assert list(curves["dense"].get_ydata()) == [6.4, 12.8]
    crosses = {line.get_gid(): list(line.get_xdata()) for line in panel.lines if line.get_gid()}
    assert crosses == {"oom dense": [256]}
    words = " ".join(text.get_text() for text in panel.texts)
    assert "dense out of memory" in words and "not measured" not in words
    wrong = replace(rows[0], provider="inf-cl", status="wrong", note="relative error of value 1e-01 against x")
    below = plots.footed(figure, [Results(ENVIRONMENT, rows)], [*rows, wrong]).get_supxlabel()
    assert (
        'memeff: not installed, "so far"' in below
        and "inf-cl: wrong for info_nce, relative error of value 1e-01" in below
    )
    assert "CPU: one, two" in below and "commit abc, today" in below


def test_the_newest_measurement_is_drawn(plots):
    old = Results(ENVIRONMENT | dict(date="2026-01-01"), [grown(64, error=0.5), grown(128, error=0.5)])
    new = Results(
        ENVIRONMENT | dict(date="2026-01-02"), [grown(64, error=0.1), replace(ROWS[1], n=128, provider="dense")]
    )
    assert {row.n: row.error for row in plots.newest([new, old])} == {64: 0.1, 128: 0.5}


def test_figures_of_a_machine_that_cannot_measure_memory(plots):
    figure = plots.scaling([grown(64, extra_mib=None), grown(128, extra_mib=None), grown(256)], ["info_nce"])
    time, memory = ([list(line.get_xdata()) for line in panel.lines] for panel in figure.axes[:2])
    assert time == [[64, 128, 256]] and memory == [[256]]


def test_figures_without_measurements_say_so(plots):
    for figure in (plots.scaling(ROWS[1:], ["info_nce"]), plots.widths(ROWS[1:]), plots.roofline(ROWS[1:], 1.0)):
        for panel in figure.axes:
            if panel.get_visible():
                assert "not measured" in [text.get_text() for text in panel.texts]


def test_no_results_is_an_error(plots, tmp_path, capsys):
    Results(ENVIRONMENT, []).save(tmp_path / "r.json")
    assert plots.main([str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err and not list(tmp_path.glob("*.png"))


# ---- the time of the host


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_host_time_without_a_gpu(backend):
    pytest.importorskip("triton" if backend == "triton" else "flashcl._C", reason=f"backend {backend} is not here")
    command = [sys.executable, ROOT / "bench/host.py", "--stub", "--backend", backend, "--repeats", "5"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    title, *rows = done.stdout.splitlines()
    times = [row.rsplit(maxsplit=2)[1:] for row in rows]
    assert f"({backend} on cpu" in title and len(times) == 5 and all(0 < float(v) < 1e3 for row in times for v in row), done.stdout


# ---- epilogues


@pytest.mark.parametrize("kernel, width", [("sweep", 512), ("grad", 512), ("sigmoid", 768)])
def test_epilogues_fit_beside_the_products(kernel, width):
    """By the model of bench/epilogues.py, which knows no queue: what a GPU says is not known yet."""
    pytest.importorskip("flashcl._C", reason="flashcl._C was not built: no nvcc, or no CUTLASS headers")
    before, visit, instructions = script("epilogues").cost(kernel)
    assert 128 * 2 < instructions * 128 < visit and before + visit < 8 * width


# ---- ranks


def test_ranks_on_one_machine(tmp_path):
    sizes = "--worlds 2 --losses siglip sup_con --batch 64 --dim 8 --repeat 1 --link 0.001".split()
    command = [sys.executable, ROOT / "bench/distributed.py", *sizes, "--out", tmp_path / "r.json"]
    subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["environment"]["command"].endswith("--out " + str(tmp_path / "r.json"))
    assert found["environment"]["command"].startswith("python bench/distributed.py ") and found["environment"]["torch"] == torch.__version__
    assert [(row["world"], row["strategy"]) for row in found["rows"]] == [(2, "ring"), (2, "gather")] * 2
    for row in found["rows"]:
        assert 0 < row["rows_mib"] < row["sent_mib"] and 0 < row["step_s"] < 10 and 0 <= row["exposed"] < 1


# ---- the check of a GPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so():
    done = subprocess.run([sys.executable, ROOT / "bench/gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr and "Traceback" not in done.stderr and not done.stdout


def test_the_cause_of_a_failure_is_named():
    gpu = script("gpu")
    assert gpu.cause("a\n  ValueError: no compiler\n\nhint: see above\n") == "ValueError: no compiler"
    assert gpu.cause("one\ntwo\n") == "two" and gpu.cause("") == "no output"


PYTEST_OUTPUT = """
tests/test_gpu.py::test_contract[triton-dtype0-info_nce one-way-init] PASSED [ 25%]
tests/test_gpu.py::test_contract[torch-dtype0-siglip-init] SKIPPED (no: PASSED) [ 50%]
tests/test_gpu.py::test_shapes[triton-1-1] FAILED [ 75%]
tests/test_gpu.py::test_cut_off[cuda-1]
FAILED tests/test_gpu.py::test_shapes[triton-1-1] - AssertionError
"""
OUTPUT_OF_WORKERS = """
scheduling tests via LoadGroupScheduling

tests/test_gpu.py::test_cut_off[cuda-1]
tests/test_gpu.py::test_contract[triton-dtype0-info_nce one-way-init]
[gw0] [  2%] PASSED tests/test_gpu.py::test_contract[triton-dtype0-info_nce one-way-init]
tests/test_gpu.py::test_beyond_2_to_the_31[cuda-(4300000, 96, 512)]@large
[gw1] [ 50%] SKIPPED tests/test_gpu.py::test_contract[torch-dtype0-siglip-init]
[gw1] [ 75%] PASSED tests/test_gpu.py::test_beyond_2_to_the_31[cuda-(4300000, 96, 512)]@large
[gw0] [100%] FAILED tests/test_gpu.py::test_shapes[triton-1-1]
FAILED tests/test_gpu.py::test_shapes[triton-1-1] - AssertionError
"""


def test_what_info_says_of_a_backend_is_understood(monkeypatch, tmp_path):
    """On a GPU that serves only 16 bits, which the kernels of csrc/ do, the sanitizer has something to watch."""
    from flashcl.cli import info

    gpu = script("gpu")
    monkeypatch.setattr(gpu, "environment", lambda: dict(sources="123"))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "none")
    check = gpu.Check("1/1", 60, tmp_path)
    for served, reason in (({torch.bfloat16, torch.float16}, None), (set(), "too old")):
        here = lambda name, _, dtype: None if name == "torch" or dtype in served else "too old"  # noqa: E731
        monkeypatch.setattr(info.dispatch, "unusable", here)
        check.state["build"] = "\n".join(f"{name:<10} {value}" for name, value in info.report())
        assert check.not_usable("cuda") == reason
        assert ("usable: bfloat16, float16" in check.state["build"]) == bool(served)


def test_outcomes_are_read_from_pytest():
    gpu = script("gpu")
    found = {name.split("::")[1]: outcome for name, outcome in gpu.outcomes_in(PYTEST_OUTPUT).items()}
    assert found == {
        "test_contract[triton-dtype0-info_nce one-way-init]": "PASSED",
        "test_contract[torch-dtype0-siglip-init]": "SKIPPED",
        "test_shapes[triton-1-1]": "FAILED",
    }
    large = {"test_beyond_2_to_the_31[cuda-(4300000, 96, 512)]": "PASSED"}
    assert {k.split("::")[1]: v for k, v in gpu.outcomes_in(OUTPUT_OF_WORKERS).items()} == found | large
    backends = [
        gpu.backend_of(name) for name in (*gpu.outcomes_in(PYTEST_OUTPUT), "tests/test_gpu.py::test_float64[siglip]")
    ]
    assert backends == ["triton", "torch", "triton", "others"]


def test_a_crash_fails_its_test_and_the_others_run(monkeypatch, tmp_path):
    """Each call of pytest goes on behind the test in which the last one ended."""
    gpu, calls = script("gpu"), []
    monkeypatch.setattr(gpu, "environment", lambda: dict(sources="123"))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "none")
    names = [f"tests/test_gpu.py::test_{i}[triton]" for i in range(4)]

    def pytest_that_crashes_in_the_second(stage, command):
        if "--collect-only" in command:
            return 0, "\n".join(names)
        calls.append([name for name in command if name in names])
        ends = names[1] in calls[-1]
        lines = [f"{name} PASSED" for name in calls[-1]]
        return (-11, f"{names[0]} PASSED\n{names[1]} ") if ends else (0, "\n".join(lines))

    check = gpu.Check("1/1", 60, tmp_path)
    monkeypatch.setattr(check, "run", pytest_that_crashes_in_the_second)
    check.tests()
    assert calls == [names, names[2:]]
    assert list(check.state["tests"].values()) == ["PASSED", "FAILED", "PASSED", "PASSED"]
    check.state["tests"] = {}
    monkeypatch.setattr(check, "run", lambda stage, command: (4 if "-v" in command else 0, "\n".join(names)))
    check.tests()
    assert set(check.state["tests"].values()) == {"not run"}  # pytest did not start


RACE = """========= Error: Race reported between Read access at {0}+0xa50
=========     and Write access at {0}+0x3070 [384 hazards]
=========
"""
INTERNAL = "========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.\n"


@pytest.mark.parametrize(
    "code, text, verdict",
    [
        (0, "all shapes done\n========= ERROR SUMMARY: 0 errors", "clean"),
        (0, "all shapes done\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
        (9, "all shapes done\n========= ERROR SUMMARY: 3 errors", "errors"),
        (0, "all shapes done\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", "errors"),
        (0, "========= ERROR SUMMARY: 0 errors", "errors"),  # the program did not come to its end
        (0, "all shapes done", "errors"),  # nobody watched
        (9, f"{RACE.format('nvjet_sm90_96x64')}all shapes done\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error)", "errors"),
        (9, f"{RACE.format('flashcl::tiles')}all shapes done\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error)", "errors"),
        (9, f"{RACE.format('nvjet')}all shapes done\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors)", "errors"),
        (9, f"{RACE.format('nvjet')}========= RACECHECK SUMMARY: 1 hazard displayed (1 error)", "errors"),
        (9, f"{INTERNAL}all shapes done\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error)", "errors"),
        (None, "", "not finished"),
    ],
)
def test_the_sanitizer_is_believed_only_when_clean(code, text, verdict):
    assert script("gpu").sanitized(code, text).startswith(verdict)


CLEAN = {f"triton {dtype} {check}": "clean" for dtype in ("bfloat16", "float32") for check in ("memcheck", "racecheck")}
PASSED = {"tests/test_gpu.py::a[triton-1]": "PASSED", "tests/test_gpu.py::b[triton-2]": "SKIPPED"}


@pytest.mark.parametrize(
    "change, code, verified",
    [
        (dict(), 0, True),
        (dict(tests=PASSED | {"tests/test_gpu.py::c[triton-3]": "FAILED"}), 1, False),
        (dict(tests=PASSED | {"tests/test_gpu.py::c[triton-3]": "not run"}), 3, False),
        (dict(tests={}), 3, False),
        (dict(sanitizer=CLEAN | {"triton bfloat16 racecheck": "errors, code 9"}), 1, False),
        (dict(sanitizer=CLEAN | {"triton float32 racecheck": "not finished"}), 3, False),
        (dict(sanitizer={k: v for k, v in CLEAN.items() if "float32" not in k}), 0, False),
        (dict(bench="failed with code 1"), 1, True),
        (dict(bench="not finished"), 3, True),
        (dict(build="failed: no compiler"), 1, True),
    ],
    ids=str,
)
def test_the_summary_of_a_check(monkeypatch, tmp_path, capsys, change, code, verified):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "environment", lambda: dict(device="a GPU", arch="sm90", sources="123"))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "none")
    check = gpu.Check("1/1", 60, tmp_path)
    info = "triton     usable: float32, bfloat16, float16"
    check.state |= dict(build=info, tests=PASSED, sanitizer=CLEAN, bench="done") | change
    assert check.summary() == code
    assert (tmp_path / "verified-triton-sm90.json").exists() == verified
    assert not (tmp_path / "verified-cuda-sm90.json").exists()
    if verified:
        record = json.loads((tmp_path / "verified-triton-sm90.json").read_text())
        assert record["not run on a GPU"] == ["tests/test_gpu.py::b[triton-2]", "compute-sanitizer over triton float16"]
    assert (tmp_path / "gpu-summary.txt").read_text() == capsys.readouterr().out
    assert gpu.Check("1/1", 60, tmp_path).state == check.state  # the next call goes on from it
    monkeypatch.setattr(gpu, "environment", lambda: dict(device="a GPU", arch="sm90", sources="456"))
    assert gpu.Check("1/1", 60, tmp_path).state["tests"] == {}  # but not with other sources


@pytest.mark.parametrize("backend, generation", [(k, v) for k, verified in dispatch.VERIFIED.items() for v in verified])
def test_a_verified_generation_stands_on_a_file(backend, generation):
    """All tests of the backend and the sanitizer, and of these very kernels: who edits one has to run them on a GPU again."""
    arch, gpu = "sm{}{}".format(*generation), script("gpu")
    record = json.loads((gpu.RESULTS / f"verified-{backend}-{arch}.json").read_text())
    assert record["environment"]["arch"] == arch
    assert set(record["tests"].values()) <= {"PASSED", "SKIPPED"} and "PASSED" in record["tests"].values()
    assert {record["sanitizer"][name] for name in gpu.WATCHED if name.startswith(backend)} == {"clean"}
    assert record["kernels"] == gpu.digest_of(gpu.KERNELS[backend])
    left_open = record["not run on a GPU"]
    assert left_open == gpu.not_run(backend, record["tests"]) and f"compute-sanitizer over {backend} float16" in left_open
    assert f"tests/test_gpu.py::test_a_second_device[{backend}-siglip]" in left_open


def test_the_summary_has_a_line_for_each_workload(tmp_path):
    rows = [*ROWS, replace(ROWS[0], provider="memeff"), replace(ROWS[2], provider="inf-cl", status="wrong")]
    Results(ENVIRONMENT, rows).save(tmp_path / "r.json")
    assert script("gpu").bench_lines(tmp_path / "r.json")[1:] == [
        "  info_nce 64 x 16 float32: dense 1.5 ms 50% 3 MiB; memeff 1.5 ms 50% 3 MiB",
        "  info_nce 128 x 16 float32: dense OOM; inf-cl WRONG",
    ]
    assert script("gpu").bench_lines(tmp_path / "none.json") == []


def test_a_stage_ends_with_its_time(monkeypatch, tmp_path):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "environment", lambda: dict(sources="123"))
    check = gpu.Check("1/1", 4, tmp_path)
    assert check.run("tests", [sys.executable, "-c", "print('done')"]) == (0, "done\n")
    start = time.monotonic()
    program = "import time\nprint('begun')\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what was found so far')"
    code, text = check.run("tests", [sys.executable, "-c", program])
    assert (code, text) == (None, "begun\nwhat was found so far\n") and time.monotonic() - start < 20
    assert check.run("build", [sys.executable, "-c", "print('late')"]) == (None, "")  # its share is over
    check = gpu.Check("1/1", 600, tmp_path)
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    start = time.monotonic()
    code, _ = check.run("tests", sleep, limit=1)
    assert code is None and time.monotonic() - start < 20
    with ThreadPoolExecutor(1) as pool:
        stage = pool.submit(check.run, "tests", sleep)
        while not check.running:
            time.sleep(0.01)
        check.stop()
        assert stage.result()[0] is None and time.monotonic() - start < 20
    assert check.run("tests", sleep) == (None, "")
