"""flashcl bench: what it refuses to time, what becomes a result, what is measured."""

import math
import os
import subprocess
import time
import types
from dataclasses import replace

import pytest
import torch
from measured import no_children, one_commit  # noqa: F401  fixtures

from flashcl import reference
from flashcl.cli import bench, main
from flashcl.cli.bench import exact, machine, measure, providers, results
from flashcl.cli.bench.results import Results
from flashcl.cli.bench.suites import LOSSES, MODES, SUITES, Workload, part

CPU = torch.device("cpu")
SMALL = Workload("info_nce", 48, 16, "float32")


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


@pytest.mark.parametrize("n, d, loss", [(1, 1, "info_nce"), (16, 1, "nt_xent")])
def test_gradients_that_vanish_may_be_zero(n, d, loss):
    """One row has no negative; in one dimension some losses of float32 have nothing left to gain."""
    work = Workload(loss, n, d, "float32")
    case = work.inputs(CPU)
    for name in ("dense", "flashcl-torch"):
        c = measure.Candidate(name, providers.PROVIDERS[name](work, case))
        measure.judge(c, measure.evaluate(c.loss, case), exact.exact(work, case), "float32")
        assert c.status == "ok", c.note


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


def test_both_ways_is_the_mean():
    def one(x, y, scale):
        return torch.nn.functional.cross_entropy(scale * x @ y.T, torch.arange(len(x)))

    x, y, s = SMALL.inputs(CPU).tensors.values()
    torch.testing.assert_close(providers._both_ways(SMALL, one)(x, y, s), right(x, y, s))
    assert providers._both_ways(replace(SMALL, loss="info_nce one-way"), one) is one


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


@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
def test_open_clip_is_called_as_its_losses_are(monkeypatch, no_children, loss):
    """By stand-ins with the signatures of open_clip 3.3.0, which is not installed here."""

    class ClipLoss:
        def __call__(self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False):
            return reference.info_nce(image_features, text_features, logit_scale=logit_scale)

    class SigLipLoss:
        def __call__(self, image_features, text_features, logit_scale, logit_bias, output_dict=False):
            return reference.siglip(image_features, text_features, logit_scale=logit_scale, logit_bias=logit_bias)

    package = types.SimpleNamespace(ClipLoss=ClipLoss, SigLipLoss=SigLipLoss)
    monkeypatch.setattr(providers, "_import", lambda module, name: package)
    work = Workload(loss, 48, 8, "float32")
    (row,) = measure.measure(work, ["open_clip"], CPU, ["full"], 0.01, lambda doing: None)
    assert row.status == "ok" and row.error < 1e-5
    with pytest.raises(providers.Unavailable, match="has no nt_xent"):
        providers.open_clip(Workload("nt_xent", 48, 8, "float32"), None)


def test_memory_that_cannot_be_measured_is_no_failure(offered, monkeypatch):
    monkeypatch.setattr(measure.memory, "measurable", lambda device: False)
    monkeypatch.setattr(measure, "_peak_in_fresh_process", lambda work, name: no_memory())
    rows = offered(right=right)
    assert [(row.status, row.extra_mib) for row in rows.values()] == [("ok", None)] * 2
    assert results.show(list(rows.values())).count("not measured") == 2


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


def test_a_package_does_not_change_how_the_others_multiply(offered, monkeypatch):
    seen = []

    def careless(work, case):
        torch.set_float32_matmul_precision("medium")

        def loss(x, y, logit_scale):
            seen.append(torch.get_float32_matmul_precision())
            return right(x, y, logit_scale)

        return loss

    monkeypatch.setitem(providers.PROVIDERS, "memeff", careless)
    try:
        measure.measure(SMALL, ["memeff"], CPU, ["full"], 0.01, lambda doing: None)
        assert set(seen) == {"highest"}
    finally:
        torch.set_float32_matmul_precision("highest")


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
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="a time, which the other workers would spoil")
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
