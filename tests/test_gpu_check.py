"""bench/gpu.py, stage by stage, with nothing behind it. test_bench_programs.py has the command as a whole."""

import sys
import time
from pathlib import Path

import pytest
from measured import script


@pytest.fixture
def check(monkeypatch, tmp_path):
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "environment", lambda: dict(sources="123"))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "none")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    return lambda part="1/1", **options: gpu.Check(part, 60, tmp_path / "out", **options)


def test_a_part_is_a_share_and_what_passed_is_not_run_again(check, monkeypatch):
    names, asked = [f"tests/test_gpu.py::test_{i}[triton]" for i in range(6)], []

    def run(stage, command, **_):
        if "--collect-only" in command:
            return 0, "\n".join(names)
        asked.append([word for word in command if word in names])
        return 0, "\n".join(f"{name} PASSED" for name in asked[-1])

    for part in ("1/3", "2/3", "2/3"):
        c = check(part)
        monkeypatch.setattr(c, "run", run)
        c.tests()
    assert asked == [names[::3], names[1::3]]
    c = check()
    c.state["tests"][names[0]] = "FAILED"
    monkeypatch.setattr(c, "run", run)
    c.tests()
    assert asked[2:] == [[names[0], *names[2::3]]]


@pytest.mark.parametrize("code, begins", [(0, "done"), (3, "not finished"), (None, "not finished"), (1, "failed")])
def test_what_becomes_of_the_benchmark(check, monkeypatch, code, begins):
    c = check()
    monkeypatch.setattr(c, "run", lambda *_, **__: (code, ""))
    c.bench()
    assert c.state["bench"].startswith(begins)


def test_without_the_benchmark_nothing_is_left_and_the_tests_have_the_time(check, monkeypatch, tmp_path):
    gpu, c = script("gpu"), check(bench=False)
    c.state["tests"] = {"tests/a.py::b": "PASSED"}
    assert c.until["tests"] == c.until["sanitizer"] > check().until["tests"]
    assert c.summary() == 0 and c.state["bench"] == "left out"
    c = check()  # a later call with it
    monkeypatch.setattr(c, "run", lambda *_, **__: (0, ""))
    c.bench()
    assert c.state["bench"].startswith("done") and check(bench=False).state["bench"].startswith("done")
    stages = []
    for stage in ("build", "tests", "sanitizer", "bench"):
        monkeypatch.setattr(gpu.Check, stage, lambda self, stage=stage: stages.append(stage) or True)
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "environment", lambda: c.environment)
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--no-bench"])
    assert gpu.main() == 0 and sorted(stages) == ["build", "sanitizer", "tests"]


@pytest.mark.parametrize("codes, built", [((0, 0), True), ((1, 0), False), ((0, 1), False), ((0, None), False)])
def test_a_build_that_fails_ends_the_check(check, monkeypatch, codes, built):
    c, left = check(), iter(codes)
    monkeypatch.setattr(c, "run", lambda *_, **__: (next(left), "ValueError: no compiler"))
    assert c.build() == built and c.state["build"].startswith("failed") == (not built)
    c.environment["sources"] = "456"
    ran = []
    monkeypatch.setattr(c, "run", lambda stage, command, **_: (ran.append(command), (0, ""))[1])
    c.build()
    assert len(ran) == 2  # other sources are built again


IGNORED = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
PARENT = f"""
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {IGNORED!r}])
print(child.pid, flush=True)
signal.signal(signal.SIGINT, signal.SIG_IGN)
child.wait()
"""


def test_a_stage_ends_with_all_that_it_has_started(check):
    """Also a process that an interrupt does not end."""
    code, text = check().run("tests", [sys.executable, "-c", PARENT], limit=3)
    status, deadline = Path(f"/proc/{int(text.split()[0])}/stat"), time.monotonic() + 10
    while (running := status.exists() and status.read_text().split()[2] != "Z") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert code is None and not running


def test_the_log_has_all_stages(check, tmp_path):
    c = check()
    for word in ("one", "two"):
        c.run("tests", [sys.executable, "-c", f"print('{word}')"])
    assert (tmp_path / "out/gpu-log.txt").read_text() == "one\ntwo\n"


def test_what_the_sanitizer_is_asked(check, monkeypatch):
    gpu, c, ran = script("gpu"), check(), []
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: "/bin/compute-sanitizer")
    c.state["build"] = "cuda       usable: bfloat16"

    def run(stage, command, **environment):
        ran.append((command, environment))
        return 0, "all shapes done\nERROR SUMMARY: 0 errors"

    monkeypatch.setattr(c, "run", run)
    assert c.watch("cuda", "bfloat16", "racecheck") == "clean"
    ((command, environment),) = ran
    assert command[1:3] == ["--tool", "racecheck"] and "--error-exitcode" in command
    assert environment == dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    c.state["sanitizer"]["cuda bfloat16 racecheck"] = "clean"
    assert c.watch("cuda", "bfloat16", "racecheck") == "clean" and len(ran) == 1
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    c.state["sanitizer"] = {"cuda float16 memcheck": c.watch("cuda", "float16", "memcheck")}
    c.state |= dict(tests={"tests/a.py::b[cuda]": "PASSED"}, bench="done")
    assert c.summary() == 3  # something is left
