"""The Triton kernels, compiled for GPUs that are not here: no spills, within shared memory, on tensor cores.

Covered are all rows of the table for the generations that differ in code: sm_80 (mma.sync, cp.async), sm_90 (wgmma, TMA) and
sm_100 (tcgen05, TMA). sm_86, sm_89 and sm_120 share the rows of sm_80: a few of their kernels are compiled, in 16 bits.
Sizes that are not multiples of 16 make kernels of their own, compiled where registers are scarcest; so does the size 1.
float16 stands for bfloat16 once: the code differs in a conversion and in the lift of G.
"""

from pathlib import Path

import pytest
from absent_gpus import run_each

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_budget.py")
RUNS = [
    *[(90, "bfloat16", "whole"), (90, "bfloat16", "ragged"), (100, "bfloat16", "whole"), (100, "bfloat16", "ragged")],
    *[(80, "bfloat16", "whole"), (80, "float32", "whole"), (90, "float32", "whole"), (100, "float32", "whole")],
    *[(86, "float16", "whole"), (89, "bfloat16", "single"), (120, "bfloat16", "whole")],
]
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may ask for
INSTRUCTIONS = {80: {"mma", "cp_async"}, 90: {"wgmma", "tma"}, 100: {"tcgen05", "tma"}}
INSTRUCTIONS |= dict.fromkeys((86, 89, 120), INSTRUCTIONS[80])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{run: the resources of every kernel}"""
    return run_each(SCRIPT, RUNS, tmp_path_factory)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: "-".join(map(str, run)))
def test_budget(run, compiled):
    assert isinstance(compiled[run], list), compiled[run]
    assert len(compiled[run]) == (8 if run[0] in (86, 89, 120) else 14)
    for kernel in compiled[run]:
        arch = kernel["arch"]
        assert kernel["memory_of_threads"] == 0, kernel
        assert kernel["shared"] <= SHARED_LIMIT[arch], kernel
        assert INSTRUCTIONS[arch] <= set(kernel["instructions"]), kernel
