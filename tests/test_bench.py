"""flashcl bench: what it refuses to time, what becomes a result, what its files and figures hold."""

import csv
import importlib.util
import json
import math
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

from flashcl.cli import bench, main
from flashcl.cli.bench import exact, machine, measure, providers, results
from flashcl.cli.bench.results import Results, Row
from flashcl.cli.bench.suites import LOSSES, MODES, SUITES, Workload, part

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
SMALL = Workload("info_nce", 48, 16, "float32")


def script(name):
    """bench/<name>.py, which is not installed."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"bench/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    """A commit in the middle of a test would end what --resume may go on with."""
    monkeypatch.setattr(machine, "_commit", lambda: "abc1234")


@pytest.fixture
def no_children(monkeypatch):
    """Memory is not measured: the process that does it knows nothing of a provider that a test has made."""
    monkeypatch.setattr(measure, "_peak_in_fresh_process", lambda work, name: 2**20)


@pytest.fixture
def offered(monkeypatch, no_children):
    """Puts losses of a test beside "dense" as providers; returns the rows that come of it, by provider."""

    def run(work=SMALL, modes=("full",), **losses):
        for name, loss in losses.items():
            monkeypatch.setitem(providers.PROVIDERS, name, lambda work, case, loss=loss: loss)
        rows = measure.measure(work, [*losses, "dense"], CPU, modes, 0.01, lambda doing: None)
        return {row.provider: row for row in rows}

    return run


def right(x, y, logit_scale):
    return torch.nn.functional.cross_entropy(logit_scale * x @ y.T, torch.arange(len(x))) / 2 + (
        torch.nn.functional.cross_entropy(logit_scale * y @ x.T, torch.arange(len(x))) / 2
    )


class WithGradients(torch.autograd.Function):
    """The right value, and gradients that some function has changed."""

    @staticmethod
    def forward(ctx, change, x, y, logit_scale):
        leaves = [v.detach().requires_grad_() for v in (x, y, logit_scale)]
        with torch.enable_grad():
            value = right(*leaves)
        ctx.gradients = change(*torch.autograd.grad(value, leaves))
        return value.detach()

    @staticmethod
    def backward(ctx, upstream):
        return None, *(None if g is None else g * upstream for g in ctx.gradients)


def changed(change):
    return lambda x, y, logit_scale: WithGradients.apply(change, x, y, logit_scale)


# ---- FLOPs, floors, quantiles


@pytest.mark.parametrize(
    "loss, forward, full",
    [
        ("info_nce", 4_398_046_511_104, 17_592_186_044_416),  # 2 and 8 times 65,536^2 x 512
        ("info_nce one-way", 4_398_046_511_104, 13_194_139_533_312),
        ("siglip", 4_398_046_511_104, 13_194_139_533_312),
        ("nt_xent", 2_199_023_255_552, 8_796_093_022_208),
        ("sup_con", 2_199_023_255_552, 8_796_093_022_208),
    ],
)
def test_useful_flops(loss, forward, full):
    work = Workload(loss, 65_536, 512, "bfloat16")
    assert [work.flops(mode) for mode in MODES] == [forward, full - forward, full]


def test_a_row_by_hand():
    """8 x 1000^2 x 100 = 0.8 GFLOP at 2 TFLOP/s: 0.4 ms; five times of 1 to 5 ms."""
    work = Workload("info_nce", 1000, 100, "float32")
    candidate = measure.Candidate("dense", loss=right, error=1e-7, extra_bytes=3 * 2**20)
    row = measure._row(work, candidate, "full", [5.0, 1.0, 4.0, 2.0, 3.0], 2e12)
    assert (row.ms, row.runs, row.extra_mib) == (3.0, 5, 3.0)
    assert (row.ms_20, row.ms_80) == pytest.approx((1.8, 4.2))
    assert row.floor_ms == pytest.approx(0.4) and row.matrix_tflops == pytest.approx(2)
    assert row.tflops == pytest.approx(0.8e9 / 3e-3 / 1e12)
    text = results.show([replace(row, oracle="float64")])
    assert "7.50" in text and "13%" in text  # x floor, % of the matrix rate


def test_compulsory_bytes():
    assert Workload("info_nce", 10, 4, "bfloat16").compulsory_bytes() == 4 * 10 * 4 * 2  # x, y, dx, dy
    assert Workload("nt_xent", 10, 4, "float32").compulsory_bytes() == 2 * 10 * 4 * 4  # z and dz


def test_matrix_products_are_counted_right():
    products = machine.Products(Workload("info_nce", 100, 8, "float32"), machine.Clock(CPU), CPU)
    assert products.flops == 3 * 2 * 100 * 100 * 8
    assert (products.x @ products.y.T).shape == products.g.shape


def test_suites_hold_what_a_loss_can_take():
    for work in {work for suite in SUITES.values() for work in suite}:
        assert work.loss in LOSSES and work.n % 2 == 0 and work.dtype in bench.DTYPES


def test_parts_are_a_partition():
    parts = [part(SUITES["core"], k, 3) for k in (1, 2, 3)]
    assert sorted(map(str, sum(parts, []))) == sorted(map(str, SUITES["core"])) and all(parts)


# ---- the truth


@pytest.mark.parametrize("n, d", [(66, 7), (10, 3)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("affordable", [9, 3, 1])  # times N^2 D: all gradients; those of some rows; in float32
def test_the_truth_is_that_of_the_dense_formula(monkeypatch, affordable, loss, n, d):
    monkeypatch.setitem(exact.BLOCK_BYTES, "cpu", 5 * n * 8)  # several blocks
    work = Workload(loss, n, d, "float64")
    case = work.inputs(CPU)
    dense = measure.evaluate(providers.dense(work, case), case)
    truth = exact.exact(work, case, affordable * n * n * d)
    assert truth.what.split(",")[0] == ("float32" if affordable == 1 else "float64")
    expected = set(dense) if affordable == 9 else {name for name in dense if dense[name].dim() or name == "value"}
    errors = truth.errors(dense)
    assert set(errors) == expected
    assert max(errors.values()) < (1e-5 if affordable == 1 else 1e-12)
    for name in errors:
        # Of a sum that cancels, such as the gradient of a scale, the error is relative to its terms.
        assert truth.errors(dense | {name: dense[name] * 1.01})[name] > (1e-4 if name in truth.magnitudes else 5e-3)
        assert truth.errors(dense | {name: dense[name] * math.nan})[name] == math.inf


def test_the_inputs_are_pairs_in_mid_training():
    for work in (Workload("info_nce", 400, 64, "float32"), Workload("nt_xent", 800, 64, "float32")):
        x, y = (v for v in work.inputs(CPU).tensors.values() if v.dim() == 2)
        assert x.shape == (400, 64)
        assert (x * y).sum(1).mean() == pytest.approx(0.5, abs=0.02) and (x @ y.T).mean() == pytest.approx(0, abs=0.02)


# ---- the gate


@pytest.mark.parametrize(
    "wrong, quantity",
    [
        (lambda x, y, logit_scale: right(x, y, logit_scale) * 1.001, "value"),
        (lambda x, y, logit_scale: right(x, y.roll(1, 0), logit_scale), "value"),
        (changed(lambda dx, dy, ds: (2 * dx, dy, ds)), "grad x"),
        (changed(lambda dx, dy, ds: (dx, dy * math.nan, ds)), "grad y"),
        (changed(lambda dx, dy, ds: (dx, dy, -ds)), "grad logit_scale"),
        (changed(lambda dx, dy, ds: (dx, None, ds)), "no grad y"),
    ],
    ids=["value", "pairs", "factor", "nan", "sign", "missing"],
)
def test_a_wrong_provider_gets_no_time(offered, wrong, quantity):
    rows = offered(wrong=wrong, right=right)
    assert rows["wrong"].status == "wrong" and rows["wrong"].ms is None and rows["wrong"].tflops is None
    assert (
        quantity in rows["wrong"].note
        and "allowed: 1e-04 for the value, 5e-03 for gradients, 5e-02 for their rows" in rows["wrong"].note
    )
    assert rows["right"].status == "ok" and rows["right"].ms > 0 and rows["right"].error < 1e-5
    assert "wrong: relative error" in results.show(list(rows.values()))


def test_gradients_that_skip_unlikely_pairs_are_wrong(offered):
    """What a filter of small probabilities leaves in a contrastive loss, in the coarsest dtype."""
    work = Workload("info_nce", 512, 64, "bfloat16")

    def filtered(x, y, logit_scale):
        s = logit_scale * x.float() @ y.float().T
        keep = s.softmax(1).detach() + s.softmax(0).detach() > 2e-2
        return (
            right(x.float(), y.float(), logit_scale)
            + 0 * s.sum()
            - (s - s.detach())
            .masked_fill(keep, 0)
            .mul((s.softmax(1).detach() + s.softmax(0).detach()) / (2 * len(x)))
            .sum()
        )

    assert offered(work, filtered=filtered)["filtered"].status == "wrong"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("affordable", [9, 3])
@pytest.mark.parametrize("what", [0.0, math.nan])
def test_one_row_that_nobody_wrote_is_seen(dtype, affordable, what):
    """Of 3,000: less than any tolerance for the whole gradient allows. In a sample of rows it is seen too."""
    work = Workload("info_nce", 3000, 16, dtype)
    case = work.inputs(CPU)
    truth, out = exact.exact(work, case, affordable * 3000**2 * 16), measure.evaluate(providers.dense(work, case), case)
    whole, broken = measure.Candidate("whole", right), measure.Candidate("broken", right)
    measure.judge(whole, out, truth, dtype)
    out["grad y"][1234] = what
    assert 1234 not in truth.rows["grad y"] or affordable == 9
    measure.judge(broken, out, truth, dtype)
    assert whole.status == "ok" and broken.status == "wrong" and "a row of grad y" in broken.note


def test_float16_is_trained_with_a_scaled_loss(monkeypatch):
    """Without, dense loses percents of a gradient at 4,096 rows; the gradients come back without the scale."""
    work = Workload("siglip", 4096, 64, "float16")
    case = work.inputs(CPU)
    truth = exact.exact(work, case)
    scaled = max(truth.errors(measure.evaluate(providers.dense(work, case), case)).values())
    monkeypatch.setattr(measure, "LOSS_SCALE", {})
    plain = max(truth.errors(measure.evaluate(providers.dense(work, case), case)).values())
    assert scaled < 5e-3 < 2e-2 < plain


def test_a_scale_without_a_gradient_is_noted(offered):
    row = offered(constant=lambda x, y, logit_scale: right(x, y, logit_scale.detach()))["constant"]
    assert row.status == "ok" and row.note == "no grad logit_scale"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("loss", LOSSES)
def test_flashcl_and_dense_are_right(offered, loss, dtype):
    work = Workload(loss, 64, 24, dtype)
    ours = providers.PROVIDERS["flashcl-torch"](work, work.inputs(CPU))
    rows = offered(work, MODES, ours=ours)
    assert [row.status for row in rows.values()] == ["ok", "ok"]


# ---- what goes wrong is a result


def no_memory():
    torch.empty(2**55)


@pytest.mark.parametrize(
    "fail",
    [
        no_memory,
        lambda: (_ for _ in ()).throw(MemoryError()),
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("x")),
    ],
    ids=["allocator", "python", "cuda"],
)
def test_out_of_memory_is_a_result(offered, fail):
    rows = offered(large=lambda **tensors: fail())
    assert rows["large"].status == "oom" and rows["large"].ms is None and rows["dense"].status == "ok"
    assert "large full" in results.show(list(rows.values())) and "out of memory" in results.show(list(rows.values()))


def test_out_of_memory_beside_the_others(offered):
    calls = []

    def grows(x, y, logit_scale):
        calls.append(1)
        return right(x, y, logit_scale) if len(calls) < 3 else no_memory()

    rows = offered(grows=grows)
    assert len(calls) == 3  # the gate, a warm-up round, a timed round; then no more
    assert rows["grows"].status == "oom" and rows["grows"].ms is None and rows["dense"].runs >= measure.FEWEST


def test_a_process_without_memory_is_out_of_memory():
    """Really: S has 16 MiB, the process may take 8 more than it has."""
    work = Workload("info_nce", 2048, 8, "float32")
    with pytest.raises(MemoryError):
        measure._peak_in_fresh_process(work, "dense", limit=8 * 2**20)


@pytest.mark.parametrize(
    "code, stderr, error",
    [
        (1, "Traceback:\n  x\nMemoryError", MemoryError),
        (-6, "terminate called after throwing an instance of 'std::bad_alloc'", MemoryError),
        (-9, "", MemoryError),
        (1, "Traceback:\n  x\nValueError: no", RuntimeError),
        (0, "", RuntimeError),  # it printed no number
    ],
)
def test_how_a_process_ends(monkeypatch, code, stderr, error):
    ended = subprocess.CompletedProcess([], code, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: ended)
    with pytest.raises(error, match="ValueError: no" if "ValueError" in stderr else None):
        measure._peak_in_fresh_process(SMALL, "dense")


def test_a_provider_that_breaks_is_a_result(offered):
    def broken(**tensors):
        raise ValueError("needs D >= 64\nmore")

    rows = offered(broken=broken)
    assert (rows["broken"].status, rows["broken"].note) == ("failed", "ValueError: needs D >= 64")
    assert rows["dense"].status == "ok"


def test_missing_providers_are_named(capsys, no_children):
    names = "dense,memeff,siglip-kernel,inf-cl,cut-cross-entropy,quack,flex-attention,flashcl-cuda"
    code = main(["bench", "--device", "cpu", "--n", "48", "--d", "8", "--seconds", "0.01", "--provider", names])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")]
    assert code == 0 and [line.split(": ")[1] for line in lines] == names.split(",")[1:]
    assert all(len(line.split(": ", 2)[2]) > 10 for line in lines)  # and why


def test_what_is_not_installed_or_does_not_load_is_unavailable():
    with pytest.raises(providers.Unavailable, match=r"not installed \(pip install no-such-package\)"):
        providers._import("no_such_module", "no-such-package")
    with pytest.raises(providers.Unavailable, match="does not import: ModuleNotFoundError"):
        providers._import("no_such_module", "pytest")


def test_a_broken_gpu_ends_the_process_and_resuming_goes_on(monkeypatch, tmp_path, capsys, no_children):
    """Of the providers, only what the first ones are is certain; the next process tries the others."""
    calls = []

    def breaks(work, case):
        def loss(x, y, logit_scale):
            calls.append(1)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        return loss

    monkeypatch.setitem(providers.PROVIDERS, "memeff", breaks)
    monkeypatch.setattr(measure, "_lost", lambda device: len(calls) == 1)
    path = tmp_path / "r.json"
    sizes = ["--n", "48", "--d", "8", "--seconds", "0.01", "--mode", "full", "--device", "cpu", "--out", str(path)]
    command = ["bench", *sizes, "--provider", "quack,memeff,dense"]
    assert main(command) == 3 and "go on with --resume" in capsys.readouterr().err
    first = {row.provider: row.status for row in Results.load(path).rows}
    assert first == {"quack": "skipped", "memeff": "failed"}
    calls.append(1)  # another process
    assert main([*command, "--resume"]) == 0 and len(calls) == 2
    assert {row.provider: row.status for row in Results.load(path).rows} == first | {"dense": "ok"}


# ---- time


def test_providers_take_turns(offered):
    calls = []

    def counted(name):
        def loss(x, y, logit_scale):
            calls.append(name)
            return right(x, y, logit_scale)

        return loss

    rows = offered(a=counted("a"), b=counted("b"))
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert rows["a"].runs == rows["b"].runs == len(calls) // 2 - 2  # without the gate and the warm-up round


def test_forward_is_an_evaluation_and_full_a_training_step(offered):
    seen = []

    def watched(x, y, logit_scale):
        seen.append((torch.is_grad_enabled(), x.requires_grad))
        return right(x, y, logit_scale)

    offered(modes=MODES, watched=watched)
    assert seen[1:3] == [(False, False), (True, True)] and set(seen) == {(False, False), (True, True)}


def test_time_is_that_of_the_step(offered):
    def slow(x, y, logit_scale):
        time.sleep(0.02)
        return right(x, y, logit_scale)

    times, rate = measure.time_in_turns([measure.Candidate("slow", slow)], SMALL, SMALL.inputs(CPU), MODES, 0.01)
    assert set(times) == {("matrix", "products"), *(("slow", mode) for mode in MODES)} and rate > 0
    for forward, backward, full in zip(*(times["slow", mode] for mode in MODES)):
        assert 20 <= forward < 200 and 0 < backward < full and 20 <= full - backward


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("loss", LOSSES)
def test_on_a_gpu(monkeypatch, loss):
    """Every provider that is installed here is right, or says why it takes no part; no memory is a result."""

    def large(work, case):
        return lambda **tensors: torch.empty(2**50, device="cuda")

    monkeypatch.setitem(providers.PROVIDERS, "large", large)
    work, device = Workload(loss, 512, 128, "bfloat16"), torch.device("cuda")
    rows = measure.measure(work, providers.PROVIDERS, device, MODES, 0.05, lambda doing: None)
    status = {row.provider: row.status for row in rows}
    assert status.pop("large") == "oom" and status["dense"] == status["torch.compile"] == "ok"
    assert {status[name] for name in status if name.startswith("flashcl")} <= {"ok", "skipped"}
    for row in rows:
        if row.status == "ok":
            assert 0 < row.ms_20 <= row.ms <= row.ms_80 < 100 and row.matrix_tflops > 0.1 and 0 < row.extra_mib < 2000
        elif row.status in ("skipped", "failed", "wrong"):
            assert row.note


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_gpu_time_is_that_of_the_device():
    """A copy of 256 MiB takes its bytes over the bandwidth, whatever the host does in the meantime."""
    device = torch.device("cuda")
    clock = machine.Clock(device)
    bandwidth = machine.copy_bandwidth(clock, device)
    assert 1e11 < bandwidth < 2e13
    source = torch.ones(2**28, dtype=torch.int8, device=device)
    source.clone()
    start = clock.mark()
    source.clone()
    end = clock.mark()
    clock.wait()
    assert clock.between(start, end) == pytest.approx(2 * 2**28 / bandwidth * 1e3, rel=0.5)


# ---- the files


ROWS = [
    Row(
        "info_nce",
        64,
        16,
        "float32",
        "full",
        "dense",
        "ok",
        "",
        1.5,
        1.25,
        2.0,
        7,
        0.5,
        1.0,
        0.75,
        3.0,
        1e-7,
        "float64",
    ),
    Row("info_nce", 64, 16, "float32", "full", "memeff", "skipped", 'not installed, "so far"'),
    Row("info_nce", 128, 16, "float32", "full", "dense", "oom"),
]
ENVIRONMENT = dict(
    device="CPU: one, two", driver="none", torch="2", triton="3", commit="abc", date="today", copy_gb_per_s=10.0
)


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
    _, measured = canned(answer, "--out", path, "--resume")
    assert len(measured) == 3 and "beginning anew" in capsys.readouterr().err


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
        (dict(extra_mib=30.0), 1),
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
    assert canned(answer, "--compare", old)[0] == 2  # another device
    device = machine.environment(CPU)["device"]
    Results(ENVIRONMENT | dict(device=device), [replace(ROWS[0], n=4)]).save(old)
    assert canned(answer, "--compare", old)[0] == 2  # nothing in common
    assert "no measurement is in both" in capsys.readouterr().err
    assert canned(answer, "--fail-if-regression")[0] == 2


def test_nt_xent_has_pairs(capsys):
    assert main(["bench", "--loss", "nt_xent", "--n", "7"]) == 2
    assert "nt_xent" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["--n 0", "--n 64:32", "--part 4/3", "--provider nobody", "--loss hinge", "--seconds nan"])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments.split()])
    assert "usage" in capsys.readouterr().err


def test_files_that_are_no_results(tmp_path, capsys):
    path = tmp_path / "r.json"
    assert main(["bench", "--compare", str(path)]) == 2 and str(path) in capsys.readouterr().err
    for text in ("", "[]", '{"environment": {}, "rows": [{"loss": "info_nce"}]}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match="is no result of flashcl bench"):
            main(["bench", "--compare", str(path)])


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


# ---- the figures


@pytest.fixture
def plots():
    pytest.importorskip("matplotlib")
    return script("plots")


def grown(n, provider="dense", **more):
    return replace(ROWS[0], n=n, provider=provider, ms=n / 10.0, ms_20=n / 12.0, ms_80=n / 9.0, **more)


def test_figures_from_a_file(plots, tmp_path, capsys):
    rows = [grown(64), grown(128), replace(grown(256), status="oom"), grown(64, "flashcl-torch"), ROWS[1]]
    Results(ENVIRONMENT, rows).save(tmp_path / "r.json")
    (tmp_path / "other.json").write_text('{"environment": {}, "rows": [1]}')  # of another program
    files = [str(tmp_path / "r.json"), str(tmp_path / "other.json")]
    assert plots.main([*files, "--out", str(tmp_path / "img")]) == 0
    names = sorted(p.name for p in (tmp_path / "img").iterdir())
    assert names == [f"cpu-one-float32-{kind}.png" for kind in ("roofline", "sizes", "widths")]
    assert all((tmp_path / "img" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_figures_show_what_was_measured_and_where_memory_ended(plots):
    rows = [grown(64), grown(128), replace(grown(256), status="oom", ms=None), replace(ROWS[1], n=256)]
    figure = plots.scaling(rows)
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


def test_figures_without_measurements_say_so(plots):
    for figure in (plots.scaling(ROWS[1:]), plots.widths(ROWS[1:]), plots.roofline(ROWS[1:], 1.0)):
        for panel in figure.axes:
            if panel.get_visible():
                assert "not measured" in [text.get_text() for text in panel.texts]


def test_no_results_is_an_error(plots, tmp_path, capsys):
    Results(ENVIRONMENT, []).save(tmp_path / "r.json")
    assert plots.main([str(tmp_path / "r.json"), "--out", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err and not list(tmp_path.glob("*.png"))


# ---- the time of the host


def test_host_time_without_a_gpu():
    pytest.importorskip("triton")
    command = [sys.executable, ROOT / "bench/host.py", "--stub", "--repeats", "5"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    times = [line.rsplit(maxsplit=2)[1:] for line in done.stdout.splitlines()[1:]]
    assert len(times) == 5 and all(0 < float(v) < 1e3 for row in times for v in row), done.stdout


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


def test_outcomes_are_read_from_pytest():
    gpu = script("gpu")
    found = {name.split("::")[1]: outcome for name, outcome in gpu.outcomes_in(PYTEST_OUTPUT).items()}
    assert found == {
        "test_contract[triton-dtype0-info_nce one-way-init]": "PASSED",
        "test_contract[torch-dtype0-siglip-init]": "SKIPPED",
        "test_shapes[triton-1-1]": "FAILED",
    }
    backends = [
        gpu.backend_of(name) for name in (*gpu.outcomes_in(PYTEST_OUTPUT), "tests/test_gpu.py::test_float64[siglip]")
    ]
    assert backends == ["triton", "torch", "triton", "others"]


@pytest.mark.parametrize(
    "code, text, verdict",
    [
        (0, "all shapes done\n========= ERROR SUMMARY: 0 errors", "clean"),
        (0, "all shapes done\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "clean"),
        (9, "all shapes done\n========= ERROR SUMMARY: 3 errors", "errors"),
        (0, "all shapes done\n========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", "errors"),
        (0, "========= ERROR SUMMARY: 0 errors", "errors"),  # the program did not come to its end
        (0, "all shapes done", "errors"),  # nobody watched
        (None, "", "not finished"),
    ],
)
def test_the_sanitizer_is_believed_only_when_clean(code, text, verdict):
    assert script("gpu").sanitized(code, text).startswith(verdict)


CLEAN = {f"triton {check}": "clean" for check in ("memcheck", "racecheck")}
PASSED = {"tests/test_gpu.py::a[triton-1]": "PASSED", "tests/test_gpu.py::b[triton-2]": "SKIPPED"}


@pytest.mark.parametrize(
    "change, code, verified",
    [
        (dict(), 0, True),
        (dict(tests=PASSED | {"tests/test_gpu.py::c[triton-3]": "FAILED"}), 1, False),
        (dict(tests=PASSED | {"tests/test_gpu.py::c[triton-3]": "not run"}), 3, False),
        (dict(tests={}), 3, False),
        (dict(sanitizer=CLEAN | {"triton racecheck": "errors, code 9"}), 1, False),
        (dict(sanitizer=CLEAN | {"triton racecheck": "not finished"}), 3, False),
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
    check.state |= dict(build="triton     usable", tests=PASSED, sanitizer=CLEAN, bench="done") | change
    assert check.summary() == code
    assert (tmp_path / "verified-triton-sm90.json").exists() == verified
    assert not (tmp_path / "verified-cuda-sm90.json").exists()
    assert (tmp_path / "gpu-summary.txt").read_text() == capsys.readouterr().out
    assert gpu.Check("1/1", 60, tmp_path).state == check.state  # the next call goes on from it
    monkeypatch.setattr(gpu, "environment", lambda: dict(device="a GPU", arch="sm90", sources="456"))
    assert gpu.Check("1/1", 60, tmp_path).state["tests"] == {}  # but not with other sources


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
    code, text = check.run("tests", [sys.executable, "-c", "import time; print('begun'); time.sleep(60)"])
    assert (code, text) == (None, "begun\n") and time.monotonic() - start < 20
    assert check.run("build", [sys.executable, "-c", "print('late')"]) == (None, "")  # its share is over
