"""How one workload is measured: every provider's answer first, then its memory, then the time of all that are right.

A provider that is missing, wrong, too large or broken is a result with that status and a reason, and gets no time. The
others take turns, round after round, so that what else happens on a machine falls on all of them.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flashcl.cli import memory
from flashcl.cli.bench import machine
from flashcl.cli.bench.exact import Exact, exact
from flashcl.cli.bench.providers import PROVIDERS, Loss, Unavailable
from flashcl.cli.bench.results import Row
from flashcl.cli.bench.suites import Workload
from flashcl.contract import Case

# Relative L2 error of (the value, a gradient, one row of a gradient) from which on a provider computes something else.
# Wide enough for dense formulas that round every logit to 16 bits and for TF32 products; how exact each provider is
# stands in the results. `flashcl check` is the strict test.
TOLERANCE = {
    "float64": (1e-9, 1e-7, 1e-5),
    "float32": (1e-4, 5e-3, 5e-2),
    "float16": (5e-3, 2e-2, 2e-1),
    "bfloat16": (2e-2, 5e-2, 3e-1),
}
# float16 is trained with a scaled loss: without, dense formulas flush pairs of weight 1 / N to zero.
LOSS_SCALE = {torch.float16: 1024.0}
FEWEST, MOST = 3, 100  # rounds
# PyTorch on a GPU, cuBLAS, PyTorch on a CPU, Python, C++
OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "MemoryError",
    "std::bad_alloc",
)
Report = Callable[[str], None]


@dataclass
class Candidate:
    """One provider at one workload, as far as it has come."""

    name: str
    loss: Loss | None = None
    status: str = "ok"
    note: str = ""
    error: float | None = None  # the worst of its value and gradients
    extra_bytes: int | None = None

    def drop(self, error: BaseException) -> None:
        self.status, self.note = _verdict(error)
        self.loss = None


class DeviceLost(Exception):
    """A provider broke the CUDA context of this process: no later call succeeds. Holds the rows that are certain."""

    def __init__(self, rows: list[Row]):
        super().__init__("a provider broke the CUDA context of this process")
        self.rows = rows


def measure(
    work: Workload, names: Iterable[str], device: torch.device, modes: Iterable[str], seconds: float, report: Report
) -> list[Row]:
    try:
        case = work.inputs(device)
    except RuntimeError as error:  # too large for anyone
        return [_row(work, c, mode) for c in _all_dropped(names, error) for mode in modes]
    candidates = [_prepare(name, work, case) for name in names]
    torch.set_float32_matmul_precision("highest")  # packages may have changed it when they were imported
    here = [c for c in candidates if c.loss]
    if not here:
        return [_row(work, c, mode) for c in candidates for mode in modes]
    report("the exact answer")
    truth = exact(work, case)
    for c in here:
        report(f"{c.name}: memory and correctness")
        _try(c, work, case, truth)
        if _lost(device):
            raise DeviceLost(
                [_row(work, c, mode, truth=truth) for c in candidates if c.status != "ok" for mode in modes]
            )
        _release(device)
    right = [c for c in here if c.loss]
    report(f"time of {', '.join(c.name for c in right) or 'none'}")
    try:
        times, rate = time_in_turns(right, work, case, modes, seconds)
    except RuntimeError as error:
        if not _lost(device):
            raise
        for c in right:
            c.drop(error)
        raise DeviceLost([_row(work, c, mode, truth=truth) for c in candidates for mode in modes]) from None
    return [_row(work, c, mode, times.get((c.name, mode)), rate, truth) for c in candidates for mode in modes]


def _try(c: Candidate, work: Workload, case: Case, truth: Exact) -> None:
    """One answer of a candidate, judged, and its memory."""
    try:
        on_cpu = case.device.type == "cpu"
        if on_cpu and memory.measurable(case.device):  # first, in a process that may run out of memory in our place
            c.extra_bytes = _peak_in_fresh_process(work, c.name)
        judge(c, evaluate(c.loss, case), truth, work.dtype)
        if not on_cpu and c.loss:
            c.extra_bytes = _peak_on_gpu(c.loss, case)
    except Exception as error:
        c.drop(error)


def _all_dropped(names: Iterable[str], error: BaseException) -> list[Candidate]:
    candidates = [Candidate(name) for name in names]
    for c in candidates:
        c.drop(error)
    return candidates


def _prepare(name: str, work: Workload, case: Case) -> Candidate:
    c = Candidate(name)
    try:
        c.loss = PROVIDERS[name](work, case)
    except Exception as error:
        c.drop(error)
    return c


def _verdict(error: BaseException) -> tuple[str, str]:
    """(status, reason). Only text is kept: an exception holds on to the tensors of its frames."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, Unavailable):
        return "skipped", text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in OUT_OF_MEMORY):
        return "oom", ""
    return "failed", f"{type(error).__name__}: {text}"[:200]


def _lost(device: torch.device) -> bool:
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- the answer ------------------------------------------------------------------------------------------------------


def evaluate(loss: Loss, case: Case) -> dict[str, Tensor]:
    """{"value": ..., "grad x": ...}, without the gradients that a provider does not have."""
    leaves = {name: v.detach().clone().requires_grad_() for name, v in case.tensors.items()}
    value = loss(**leaves)
    scale = _loss_scale(leaves)
    named = {f"grad {k}": g if scale == 1 else g.float() / scale for k, g in backward(value, leaves).items()}
    return dict(value=value.detach()) | named


def backward(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients that there are, of the loss times its scale."""
    upstream = torch.full_like(value, _loss_scale(leaves))
    gradients = torch.autograd.grad(value, list(leaves.values()), upstream, allow_unused=True)
    return {name: g for name, g in zip(leaves, gradients) if g is not None}


def _loss_scale(leaves: dict[str, Tensor]) -> float:
    return next((LOSS_SCALE[v.dtype] for v in leaves.values() if v.dtype in LOSS_SCALE), 1.0)


def judge(c: Candidate, out: dict[str, Tensor], truth: Exact, dtype: str) -> None:
    """Gradients of embeddings must be there and right; a scale or bias may have none, which is noted."""
    errors, rows = truth.errors(out), truth.worst_rows(out)
    c.error = max(errors.values())
    for_value, for_gradients, for_rows = TOLERANCE[dtype]
    wrong = [f"{k} {e:.1e}" for k, e in errors.items() if not e <= (for_value if k == "value" else for_gradients)]
    wrong += [f"a row of {k} {e:.1e}" for k, e in rows.items() if not e <= for_rows]
    missing = [k for k in truth.values if k not in out]
    wrong += [f"no {k}" for k in missing if truth.values[k].dim()]
    if wrong:
        c.note = f"relative error of {', '.join(wrong)} against {truth.what}; allowed: {allowed(dtype)}"
        c.status, c.loss = "wrong", None
    elif missing:
        c.note = f"no {', no '.join(missing)}"


def allowed(dtype: str) -> str:
    return "{:.0e} for the value, {:.0e} for gradients, {:.0e} for their rows".format(*TOLERANCE[dtype])


# ---- memory ----------------------------------------------------------------------------------------------------------


def _peak_on_gpu(loss: Loss, case: Case) -> int:
    """Bytes that forward and backward held at most beyond the inputs, the gradients among them."""
    leaves = {name: v.detach().clone().requires_grad_() for name, v in case.tensors.items()}
    _release(case.device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward(loss(**leaves), leaves)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_in_fresh_process(work: Workload, name: str, limit: int | None = None) -> int:
    """On a CPU: the peak resident set of a process that does nothing else and may take only what is free."""
    job = dict(work=asdict(work), name=name, limit=limit or int(0.9 * memory.available(torch.device("cpu"))))
    command = [sys.executable, "-c", "from flashcl.cli.bench import measure; measure.child()", json.dumps(job)]
    process = subprocess.run(command, env=memory.child_environment(), capture_output=True, text=True)
    last = (process.stdout.splitlines() or [""])[-1]
    if process.returncode == 0 and last.isdigit():
        return int(last)
    if process.returncode == -9 or any(sign in process.stderr for sign in OUT_OF_MEMORY):  # -9: the system ended it
        raise MemoryError
    raise RuntimeError((process.stderr.splitlines() or [f"ended with code {process.returncode}"])[-1])


def child() -> None:
    """The measuring process: takes a job as JSON, prints bytes."""
    import resource  # here, because Windows has none

    job = json.loads(sys.argv[1])
    work, device = Workload(**job["work"]), torch.device("cpu")
    case = work.inputs(device)
    loss = PROVIDERS[job["name"]](work, case)
    leaves = {name: v.detach().clone().requires_grad_() for name, v in case.tensors.items()}
    resource.setrlimit(resource.RLIMIT_DATA, (memory.status("VmData") + job["limit"],) * 2)
    backward(loss(**leaves), leaves)  # starts threads and libraries, which stay, and compiles
    before = memory.reset_peak(device)
    backward(loss(**leaves), leaves)
    print(max(0, memory.read_peak(device) - before))


# ---- time ------------------------------------------------------------------------------------------------------------


def time_in_turns(
    right: list[Candidate], work: Workload, case: Case, modes: Iterable[str], seconds: float
) -> tuple[dict[tuple[str, str], list[float]], float]:
    """({(provider, mode): milliseconds}, FLOP/s of the matrix products). About `seconds` are spent on each provider,
    within FEWEST and MOST rounds of all."""
    clock = machine.Clock(case.device)
    products = machine.Products(work, clock, case.device)
    leaves = {name: v.detach().clone().requires_grad_() for name, v in case.tensors.items()}
    turns = {c.name: partial(_run_once, c.loss, leaves, clock, modes) for c in right}
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    rounds, done = FEWEST + 1, 0
    while done < rounds:
        start, marks = clock.mark(), dict(matrix=products())
        for c in right:
            if c.name in turns:
                try:
                    marks[c.name] = turns[c.name]()
                except Exception as error:  # memory that a provider had alone and does not have beside the others
                    c.drop(error)
                    del turns[c.name]
                    _release(case.device)
        end = clock.mark()
        clock.wait()
        done += 1
        if done == 1:  # it warms up
            continue
        for name, by_mode in marks.items():
            for mode, pair in by_mode.items():
                times[name, mode].append(clock.between(*pair))
        if done == 2:  # the first timed round says how many there can be
            per_round = max(clock.between(start, end) / 1e3, 1e-6)
            rounds = 1 + min(MOST, max(FEWEST, int(seconds * len(turns) / per_round)))
    return times, products.flops / (statistics.median(times["matrix", "products"]) / 1e3)


def _run_once(loss: Loss, leaves: dict[str, Tensor], clock: machine.Clock, modes: Iterable[str]) -> dict[str, tuple]:
    """{mode: (start, end)}: "forward" without gradients, as in an evaluation; "backward" and "full" as in training."""
    marks = {}
    if "forward" in modes:
        constants = {name: v.detach() for name, v in leaves.items()}  # as towers without gradients give them
        clock.cold()
        start = clock.mark()
        with torch.no_grad():
            loss(**constants)
        marks["forward"] = start, clock.mark()
    if "backward" in modes or "full" in modes:
        clock.cold()
        start = clock.mark()
        value = loss(**leaves)
        middle = clock.mark()
        backward(value, leaves)
        end = clock.mark()
        marks |= {"backward": (middle, end), "full": (start, end)}
    return marks


def _row(
    work: Workload,
    c: Candidate,
    mode: str,
    times: list[float] | None = None,
    rate: float | None = None,
    truth: Exact | None = None,
) -> Row:
    row = Row(**asdict(work), mode=mode, provider=c.name, status=c.status, note=c.note)
    row.error, row.oracle = c.error, truth.what if truth and c.error is not None else None
    if c.status == "ok":
        row.extra_mib = None if c.extra_bytes is None else c.extra_bytes / 2**20
        row.ms, row.ms_20, row.ms_80 = (float(v) for v in np.quantile(times, (0.5, 0.2, 0.8)))
        row.runs = len(times)
        row.tflops = work.flops(mode) / row.ms / 1e9
        row.matrix_tflops = rate / 1e12
        row.floor_ms = work.flops(mode) / rate * 1e3
    return row
