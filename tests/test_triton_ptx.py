"""The Triton kernels as Triton compiles them, on a simulated GPU (ptx/): sm_80 by mma.sync and cp.async, sm_90 by wgmma and TMA.

sm_100 and its tcgen05 are compiled (test_compile_budget.py), and not run.
"""

from pathlib import Path

import pytest
import torch

import ptx
from absent_gpus import run_each
from calls import KNOWN

from flashcl.contract import LOSSES, REGIMES

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_ptx.py")
RUNS = [(80, "bfloat16"), (80, "float32"), (90, "bfloat16"), (90, "float16"), (90, "float32")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """{run: what its process said, or its errors}"""
    if isinstance(machine := ptx.machine(), str):
        pytest.skip(machine)
    return run_each(SCRIPT, RUNS, tmp_path_factory)


@pytest.mark.parametrize("arch, dtype", RUNS)
def test_statistics_and_gradients(ran, arch, dtype):
    said = ran[arch, dtype]
    assert isinstance(said, list), said
    problems = [line for line in said if "problem" in line]
    assert len(problems) == 9
    of_gradients = {"bfloat16": 4e-3, "float16": 6e-4, "float32": 2e-6}[dtype]  # of a rounded G
    for line in problems:
        for name, error in line["errors"].items():
            assert error <= (of_gradients if name.endswith((" dx", " dy")) else 1e-6), (line["problem"], name, error)


@pytest.mark.parametrize("arch, dtype", RUNS)
def test_contract(ran, arch, dtype):
    said = ran[arch, dtype]
    assert isinstance(said, list), said
    cases = {line["case"]: line["violations"] for line in said if "case" in line}
    assert len(cases) == len(LOSSES) * len(REGIMES)
    known = {f"{loss} {regime}" for loss, regime, of in KNOWN if of == getattr(torch, dtype)}
    assert {case for case, violations in cases.items() if violations} == known, cases
    assert len(said[-1]["kernels"]) == 5  # all of triton_kernels/ has run
