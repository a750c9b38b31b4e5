"""The whole check of a GPU in one command: build, contract tests, sanitizer, core table of the benchmark, summary.

    make gpu-all                     at most 9 minutes
    make gpu-all PART=2/3            a third of the tests and workloads
    make gpu-all MINUTES=4           for shorter slots: what is not done by then is left for the next call
    make gpu-test                    without the benchmark

Results go to $OUT if it is set, else to bench/results. A call goes on from what it finds in either, as long as device,
versions and sources are the same. Exit code 0: all is right; 1: something failed; 2: no GPU; 3: something is left.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
SOURCES = ("flashcl", "triton_kernels", "csrc", "tests", "bench/small_shapes.py", "setup.py", "pyproject.toml")
KERNELS = {"cuda": "csrc", "triton": "triton_kernels"}  # backend: where its kernels are
UNWATCHED = ("float16",)  # by the sanitizer: it takes the ways of bfloat16
WATCHED = [
    f"{kernels} {check}"
    for kernels in ("cuda bfloat16", "triton bfloat16", "triton float32")
    for check in ("memcheck", "racecheck")
]
UNTIL = dict(build=0.3, tests=0.66, sanitizer=0.66, bench=0.97)  # each stage ends at this share of the time
# Most of a test's time is the host's, for compilers and dense formulas: several run at once. With more processes their contexts
# and caches, about 2 GiB each, would leave the largest tests of an 80 GiB GPU no room.
WORKERS = min(12, os.cpu_count() or 1)
PARALLEL = ["-n", str(WORKERS), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else []
TIMEOUT = ["--timeout", "120", "--timeout-method", "thread"] if importlib.util.find_spec("pytest_timeout") else []
FLASHCL = [sys.executable, "-c", "import sys; from flashcl.cli import main; sys.exit(main())"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="1/1", metavar="K/N", help="the K-th of N shares of tests and workloads")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--no-bench", action="store_true", help="build, tests and sanitizer alone")
    args = parser.parse_args()
    if reason := no_gpu():
        print(f"bench/gpu.py: {reason}; nothing was run", file=sys.stderr)
        return 2
    check = Check(args.part, args.minutes * 60, Path(os.environ.get("OUT") or RESULTS), bench=not args.no_bench)
    if check.build():
        with ThreadPoolExecutor(2) as pool:  # side by side: neither is timed
            try:
                for stage in [pool.submit(check.tests), pool.submit(check.sanitizer)]:
                    stage.result()
            except KeyboardInterrupt:
                check.stop()
                raise
        if not args.no_bench:
            check.bench()
    return check.summary()


def no_gpu() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error})"
    if not torch.cuda.is_available():
        return f"no CUDA GPU: torch {torch.__version__} finds none here"
    return None


class Check:
    """One call. `state` is what this and earlier calls found: {"environment": ..., "tests": {id: outcome}, ...}."""

    def __init__(self, part: str, seconds: float, out: Path, bench: bool = True):
        self.part, self.seconds, self.out = part, seconds, out
        self.until = UNTIL if bench else UNTIL | dict(tests=UNTIL["bench"], sanitizer=UNTIL["bench"])
        self.start, self.running, self.stopped = time.monotonic(), set(), False
        self.out.mkdir(parents=True, exist_ok=True)
        self.environment = environment()
        if self.environment.get("commit") == "unknown":  # a copy without history
            os.environ["FLASHCL_COMMIT"] = f"sources {self.environment['sources']}"
        self.state = dict(environment=self.environment, build="not done", tests={}, sanitizer={}, bench="not done")
        earlier = self.take_up("gpu-check.json")
        if earlier.exists():
            before = json.loads(earlier.read_text())
            if before["environment"] == self.environment:
                self.state = before
        if not bench and self.state["bench"] == "not done":
            self.state["bench"] = "left out"

    def take_up(self, name: str) -> Path:
        """A file of an earlier call: in the folder for results or, copied back, in bench/results."""
        if not (self.out / name).exists() and (RESULTS / name).exists():
            shutil.copy(RESULTS / name, self.out / name)
        return self.out / name

    def save(self) -> None:
        (self.out / "gpu-check.json").write_text(json.dumps(self.state, indent=1) + "\n")

    def run(self, stage: str, command: list, limit: float = math.inf, **environment: str) -> tuple[int | None, str]:
        """(exit code, output), the code None where the time of the stage, or its limit in seconds, ended first."""
        left = min(limit, self.start + self.seconds * self.until[stage] - time.monotonic())
        print(f"[{time.monotonic() - self.start:4.0f} s] {stage}", file=sys.stderr, flush=True)
        if left <= 0 or self.stopped:
            return None, ""
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                # The folder triton_kernels must not shadow a package of that name.
                env=os.environ | dict(PYTHONUNBUFFERED="1", PYTHONSAFEPATH="1") | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell starts what it puts in the background with SIGINT ignored, and children inherit it.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            self.running.add(process)
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                code = None
                interrupt(process)
            finally:
                kill(process)
                self.running.discard(process)
                output.seek(0)
                text = output.read().decode(errors="replace")
                with open(self.out / "gpu-log.txt", "a") as log:
                    log.write(text)
        return None if self.stopped else code, text

    def stop(self) -> None:
        """Ends all stages, at Ctrl-C: what they run does not get the signal."""
        self.stopped = True
        for process in list(self.running):
            kill(process)
        self.save()

    # ---- the stages

    def build(self) -> bool:
        """Installs the package into this Python, with the extension where nvcc is. Needs no network."""
        stamp = ROOT / "build/gpu-built"
        if not (stamp.exists() and stamp.read_text() == self.environment["sources"]):
            options = ("-q", "--no-build-isolation", "--no-deps", "--disable-pip-version-check")
            code, text = self.run("build", [sys.executable, "-m", "pip", "install", *options, "-e", "."])
            if code != 0:
                self.state["build"] = f"failed: {cause(text) if code else 'out of time'}"
                return False
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(self.environment["sources"])
        # Launches the first kernels, in the check of itself that a backend makes: one that hangs must not take all the time.
        code, text = self.run("build", [*FLASHCL, "info"], limit=90)
        self.state["build"] = text.strip() if code == 0 else f"failed: {cause(text) if code else 'flashcl info hangs'}"
        self.save()
        return code == 0

    def tests(self) -> None:
        pytest = [
            sys.executable,
            "-c",
            "import sys, pytest; sys.exit(pytest.main())",
            "-p",
            "no:cacheprovider",
            "-m",
            "gpu",
        ]
        _, text = self.run("tests", [*pytest, "--collect-only", "-q"])
        found = [line for line in text.splitlines() if re.match(r"tests/\S+\.py::", line)]
        outcomes = self.state["tests"]
        outcomes |= {name: "not run" for name in found if outcomes.get(name) not in ("PASSED", "SKIPPED")}
        k, n = map(int, self.part.split("/"))
        todo = [name for name in found[k - 1 :: n] if outcomes[name] == "not run"]
        todo.sort(key=lambda name: backend_of(name) not in KERNELS)  # what may be left is what also runs elsewhere
        code = 0
        while todo and code is not None:
            code, text = self.run("tests", [*pytest, "-v", "--tb=short", *PARALLEL, *TIMEOUT, *todo])
            outcomes |= outcomes_in(text)
            todo = [name for name in todo if outcomes[name] == "not run"]
            if code in (2, 3, 4):  # pytest itself failed: see gpu-log.txt
                break
            if code is not None and todo:  # a crash, or a kernel that hung until pytest-timeout ended the process
                outcomes[todo.pop(0)] = "FAILED"
        self.save()

    def sanitizer(self) -> None:
        with ThreadPoolExecutor(len(WATCHED)) as pool:
            verdicts = pool.map(lambda name: self.watch(*name.split()), WATCHED)
            self.state["sanitizer"] = dict(zip(WATCHED, verdicts))
        self.save()

    def watch(self, backend: str, dtype: str, check: str) -> str:
        tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if self.state["sanitizer"].get(f"{backend} {dtype} {check}") == "clean":
            return "clean"
        if reason := self.not_usable(backend):
            return f"nothing to check: {reason}"
        if tool is None:
            return "not run: compute-sanitizer is not here"
        program = [sys.executable, "bench/small_shapes.py", backend, dtype]
        if check == "memcheck":  # calls of the driver that fail may be PyTorch's, which asks what there is
            options = ["--report-api-errors", "no"]
        else:  # of all kernels it takes minutes, and in those of cuBLAS it reports what are no races
            options = [word for name in kernels_of(backend) for word in ("--kernel-name", f"kernel_substring={name}")]
            program += ["--float32-products"]
        # Without PyTorch's cache an access beyond a tensor is one beyond its allocation.
        watch = [tool, "--tool", check, "--error-exitcode", "9", *options, *program]
        return sanitized(*self.run("sanitizer", watch, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))

    def not_usable(self, backend: str) -> str | None:
        match = re.search(rf"^{backend} +not usable: (.*)$", self.state["build"], re.M)
        return match and match[1]

    def bench(self) -> None:
        left = self.start + self.seconds * self.until["bench"] - time.monotonic()
        self.take_up("gpu-bench.json")
        # 0.3 s for each provider: three steps of the slowest that fit, and of the fast ones enough for quantiles.
        which = ["--suite", "core", "--mode", "full", "--seconds", 0.3, "--part", self.part]
        keep = ["--out", self.out / "gpu-bench.json", "--resume", "--overwrite", "--time-limit", max(1, 0.7 * left)]
        code, _ = self.run("bench", [*FLASHCL, "bench", *which, *keep])
        left_over = {None: "not finished", 3: "not finished"}
        self.state["bench"] = (
            f"done, part {self.part}" if code == 0 else left_over.get(code, f"failed with code {code}: see gpu-log.txt")
        )
        self.save()

    # ---- what came of it

    def summary(self) -> int:
        self.save()
        lines, failed, left = [f"{k}: {v}" for k, v in self.environment.items()], [], []
        if self.state["build"].startswith("failed"):
            failed.append(f"build {self.state['build']}")
        for backend in ("torch", *KERNELS, "others"):
            mine = {name: v for name, v in self.state["tests"].items() if backend_of(name) == backend}
            count = {v: list(mine.values()).count(v) for v in sorted(set(mine.values()))}
            lines.append(f"tests, {backend}: " + (", ".join(f"{v} {k.lower()}" for k, v in count.items()) or "none"))
        failed += [f"test {name}" for name, v in self.state["tests"].items() if v in ("FAILED", "ERROR")]
        left += [f"test {name}" for name, v in self.state["tests"].items() if v == "not run"]
        if not self.state["tests"]:
            left.append("all tests")
        for name, verdict in self.state["sanitizer"].items():
            lines.append(f"sanitizer, {name}: {verdict}")
            if verdict.startswith("errors"):
                failed.append(f"sanitizer {name}: {verdict}")
            if verdict.startswith("not"):
                left.append(f"sanitizer {name}")
        lines += [f"benchmark: {self.state['bench']}", *bench_lines(self.out / "gpu-bench.json")]
        if self.state["bench"].startswith("failed"):
            failed.append(f"benchmark {self.state['bench']}")
        if self.state["bench"].startswith("not"):
            left.append("benchmark")
        for backend in KERNELS:
            lines += self.verify(backend)
        for title, items in (("FAILED", failed), ("left", left)):
            lines += [f"{title}: {item}" for item in items[:6]]
            lines += [f"{title}: {len(items) - 6} more"] if len(items) > 6 else []
        lines.append(
            f"{len(failed)} failed, {len(left)} left after {time.monotonic() - self.start:.0f} s; files in {self.out}"
        )
        (self.out / "gpu-summary.txt").write_text("\n".join(lines) + "\n")
        print("\n".join(lines))
        return 1 if failed else 3 if left else 0

    def verify(self, backend: str) -> list[str]:
        """The file that an entry of dispatch.VERIFIED stands on: every test of the backend passed or had a reason to be
        skipped, and the sanitizer is clean."""
        mine = {name: v for name, v in self.state["tests"].items() if backend_of(name) == backend}
        clean = [self.state["sanitizer"].get(name) == "clean" for name in WATCHED if name.startswith(backend)]
        if "PASSED" not in mine.values() or set(mine.values()) - {"PASSED", "SKIPPED"} or not all(clean):
            return []
        path = self.out / f"verified-{backend}-{self.environment['arch']}.json"
        kernels = digest_of(KERNELS[backend])
        record = dict(environment=self.environment, kernels=kernels, tests=mine, sanitizer=self.state["sanitizer"])
        record["not run on a GPU"] = not_run(backend, mine)
        path.write_text(json.dumps(record, indent=1) + "\n")
        return [f"verified: {path.name} (dispatch.VERIFIED may name it)"]


def not_run(backend: str, tests: dict[str, str]) -> list[str]:
    """What a verification of these tests leaves open."""
    skipped = [name for name, outcome in tests.items() if outcome == "SKIPPED"]
    return skipped + [f"compute-sanitizer over {backend} {dtype}" for dtype in UNWATCHED]


def kernels_of(backend: str) -> list[str]:
    """Parts of the (mangled) names of its kernels."""
    if backend == "cuda":
        return ["flashcl"]  # the namespace of csrc/
    sources = "".join(path.read_text() for path in sorted(ROOT.glob("triton_kernels/*.py")))
    return re.findall(r"^def (\w+_kernel)\(", sources, re.M)


def interrupt(process: subprocess.Popen) -> None:
    """As Ctrl-C: pytest then says why tests have failed."""
    os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def kill(process: subprocess.Popen) -> None:
    """Also what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


def environment() -> dict[str, str]:
    """Of one kind: results of two calls belong together where all of it is the same."""
    import torch

    try:
        import triton
    except ImportError:
        triton = None
    major, minor = torch.cuda.get_device_capability()
    return dict(
        device=torch.cuda.get_device_name(),
        arch=f"sm{major}{minor}",
        driver=first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        torch=torch.__version__,
        triton=getattr(triton, "__version__", "none"),
        commit=os.environ.get("FLASHCL_COMMIT") or first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        sources=digest_of(*SOURCES),
    )


def digest_of(*paths: str) -> str:
    """Of the sources in files and folders of the repository."""
    digest = hashlib.sha256()
    for path in (ROOT / name for name in paths):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".toml", ".cu", ".cuh", ".h", ".cpp"):
                digest.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def first_line(*command: str) -> str:
    """What a program prints first, "unknown" where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.splitlines() or ["unknown"])[0] if done.returncode == 0 else "unknown"


def cause(text: str) -> str:
    """The line of a long output that names the error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    return next((line for line in reversed(lines) if re.search(r"\w*Error: ", line)), lines[-1])


def outcomes_in(text: str) -> dict[str, str]:
    """{id: outcome} of what `pytest -v` printed, in one process or by workers; a test that was cut off has none."""
    outcome, name = r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", r"(tests/\S+\.py::.+?)"
    found = re.findall(rf"^{name} {outcome}\b", text, re.M)
    # A group that shares a worker stands behind the id: "...[cuda-1]@large".
    found += [(n, o) for o, n in re.findall(rf"^\[gw\d+\] \[ *\d+%\] {outcome} {name}(?:@\w+)?\s*$", text, re.M)]
    return {name: {"XFAIL": "PASSED", "XPASS": "FAILED"}.get(outcome, outcome) for name, outcome in found}


def backend_of(test: str) -> str:
    """By the parameters in its name: test_contract[triton-...]."""
    return next((name for name in ("torch", *KERNELS) if re.search(rf"[\[-]{name}[\]-]", test)), "others")


def sanitized(code: int | None, text: str) -> str:
    """ "clean" only where the program came to its end and the tool says that it found nothing."""
    if code is None:
        return "not finished"
    nothing = re.search(r"SUMMARY: 0 (errors|hazards)", text.replace("displayed ", ""))
    if code == 0 and "all shapes done" in text and nothing:
        return "clean"
    last = [line for line in text.splitlines() if "SUMMARY" in line or "Error" in line][-1:]
    return f"errors, code {code}: {last[0].strip() if last else 'see gpu-log.txt'}"


def bench_lines(path: Path) -> list[str]:
    """A line for each workload: forward and backward of every provider that took part.

    From the file alone: a package that this call has installed is not seen by the process that did it.
    """
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    workloads: dict[str, list[str]] = {}
    for row in rows:
        words = workloads.setdefault(f"{row['loss']} {row['n']:,} x {row['d']} {row['dtype']}", [])
        if row["status"] == "ok":
            rate = row["tflops"] / row["matrix_tflops"]
            words.append(f"{row['provider']} {row['ms']:.4g} ms {rate:.0%} {row['extra_mib']:,.0f} MiB")
        elif row["status"] != "skipped":
            words.append(f"{row['provider']} {row['status'].upper()}")
    title = ["  (median; useful FLOPs in % of the matrix rate of the run; peak extra memory)"] if workloads else []
    return title + [f"  {name}: {'; '.join(words) or 'no provider is here'}" for name, words in workloads.items()]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
