"""How `flashcl bench` and the programs in bench/ time: what is cold, what warms up, what is divided by what."""

import pytest
import torch
from measured import script
from torch.utils._python_dispatch import TorchDispatchMode

from flashcl.backends import onednn
from flashcl.cli.bench import machine, measure, providers
from flashcl.cli.bench.suites import LOSSES, MODES, Workload

CPU = torch.device("cpu")
SMALL = Workload("info_nce", 48, 16, "float32")


class Recording(machine.Clock):
    """The order of what a clock is asked for; a mark is worth 1 ms."""

    def __init__(self, device):
        super().__init__(device)
        self.asked = []

    def cold(self):
        self.asked.append("cold")

    def mark(self):
        self.asked.append("mark")
        return len(self.asked)

    def between(self, start, end):
        return float(end - start)


def dense(**tensors):
    return providers.dense(SMALL, SMALL.inputs(CPU))(**tensors)


def test_caches_are_cold_before_everything_that_is_timed():
    clock = Recording(CPU)
    machine.Products(SMALL, clock, CPU)()
    assert clock.asked == ["cold", "mark", "mark"]
    clock.asked.clear()
    leaves = {k: v.clone().requires_grad_() for k, v in SMALL.inputs(CPU).tensors.items()}
    measure._run_once(dense, leaves, clock, MODES)
    assert clock.asked == ["cold", "mark", "mark", "cold", "mark", "mark", "mark"]
    clock.asked.clear()
    machine.copy_bandwidth(clock, CPU)
    assert clock.asked == ["cold", "mark", "mark"] * 12


def test_cold_overwrites_what_the_caches_hold():
    clock = machine.Clock.__new__(machine.Clock)  # as on a GPU
    clock.gpu, clock.filler = True, torch.ones(8, dtype=torch.int8)
    clock.cold()
    assert not clock.filler.any()


def test_the_copy_is_read_and_written_and_the_first_do_not_count():
    class Slow(machine.Clock):
        times = iter([100.0, 100.0, *[2.0] * 10])

        def between(self, start, end):
            return next(self.times)

    assert machine.copy_bandwidth(Slow(CPU), CPU) == 2 * 2**28 / 2e-3


@pytest.mark.parametrize("library", ["MKL", "oneDNN"])
def test_all_three_products_are_made(library, monkeypatch):
    """Each by the library that is the fastest on the CPU."""
    monkeypatch.setattr(onednn, "_available", lambda: library == "oneDNN")
    made = {"MKL": torch.ops.aten.mm.default, "oneDNN": torch.ops.mkldnn._linear_pointwise.default}[library]

    class Count(TorchDispatchMode):
        flops = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            if operator is made:
                self.flops += 2 * result.numel() * args[0].shape[1]
            return result

    products = machine.Products(Workload("info_nce", 2048, 128, "float32"), machine.Clock(CPU), CPU)
    with Count() as count:
        products()
    assert count.flops == products.flops == 6 * machine.CHUNK["cpu"] * 2048 * 128


def test_the_rate_of_products_and_the_number_of_rounds(monkeypatch):
    """A clock whose marks are 1 ms apart: FLOPs over their own time; `seconds` for each provider."""
    monkeypatch.setattr(machine, "Clock", Recording)
    right = [measure.Candidate(name, dense) for name in ("a", "b")]
    times, rate = measure.time_in_turns(right, SMALL, SMALL.inputs(CPU), ["full"], 0.2)
    assert rate == 3 * 2 * 48 * 48 * 16 / 1e-3
    assert set(times["a", "full"]) == {2.0} and set(times["a", "backward"]) == {1.0}  # from the first mark to the third


# ---- bench/kernels.py, million.py, tiles.py, host.py: what needs no GPU


@pytest.mark.parametrize(
    "kernel, part",
    [
        ("_ZN7flashcl5tiles_SweepArgs", "sweep"), ("x_GradArgs_y", "grad"), ("x_SigmoidArgs_y", "grad"),
        ("sweep_kernel", "sweep"), ("sigmoid_grad_kernel", "grad"),
        ("nvjet_sm90_tst", "products"), ("cutlass_80_gemm", "products"), ("finish", "other"),
    ],
)  # fmt: skip
def test_parts_of_a_step_are_told_by_the_names_of_kernels(kernel, part):
    assert script("kernels").part_of(kernel) == part


@pytest.mark.parametrize("loss", LOSSES)
def test_flops_of_the_parts_are_those_of_the_step(loss):
    work = Workload(loss, 100, 8, "bfloat16")
    parts = script("kernels").flops(work)
    again = {"info_nce one-way": work.flops("forward")}.get(loss, 0.0)
    assert sum(parts.values()) == work.flops("full") + again
    assert parts["sweep"] == (0 if loss == "siglip" else work.flops("forward"))


def test_the_errors_of_a_million_rows_are_those_of_the_results():
    million = script("million")
    x, y, scale = (v.requires_grad_() for v in Workload("info_nce", 300, 16, "float32").inputs(CPU).tensors.values())
    loss, (dx, *_) = million.step(x, y, scale, "torch")
    right = million.errors(x, y, scale, "torch", loss, dx)
    assert all(error < 1e-5 for error in right.values())
    assert million.errors(x, y, scale, "torch", loss - 0.5, dx)["loss"] == pytest.approx(0.5, rel=1e-3)
    assert million.errors(x, y, scale, "torch", loss, 1.25 * dx)["gradient"] == pytest.approx(0.25, rel=1e-3)


class Played(Recording):
    """Of which each call of `between` is one of `ms`."""

    ms = (100.0, 2.0, 2.0, 6.0)

    def __init__(self, device):
        super().__init__(device)
        self.left = iter(self.ms)

    def between(self, start, end):
        return next(self.left)


def test_the_matrix_rate_of_a_million_rows(monkeypatch):
    million = script("million")
    monkeypatch.setattr(million, "Clock", Played)
    work = Workload("info_nce", 64, 8, "float32")
    assert million.matrix_tflops(work, CPU, 3) == pytest.approx(6 * 64 * 64 * 8 / 2e-3 / 1e12)


def test_the_time_of_a_tile_is_the_median_of_cold_calls_after_the_first():
    pytest.importorskip("triton")
    clock = Played(CPU)
    clock.left = iter([5.0, 2.0, 2.5])
    assert script("tiles").milliseconds(lambda: clock.asked.append("call"), clock, 3) == 2.5
    assert clock.asked == ["cold", "mark", "call", "mark"] * 4


def test_host_time_is_of_steps_after_the_first_fifty(monkeypatch):
    pytest.importorskip("triton")
    host = script("host")
    now, count = [0.0], [0]

    def loss(x):
        assert x.grad is None
        count[0] += 1
        now[0] += 1.0 if count[0] <= 50 else 1e-3 * (count[0] - 50)  # then 1, 2, ... 10 ms
        return x.sum()

    monkeypatch.setattr(host.time, "perf_counter", lambda: now[0])
    median, low = host.milliseconds(loss, [torch.ones(2, requires_grad=True)], 10)
    assert (median, low) == (pytest.approx(5.5), pytest.approx(3.0))
