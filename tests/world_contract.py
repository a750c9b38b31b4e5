"""For test_distributed, test_kernels_over_ranks and test_nccl: the losses of a world are as good as those of one process."""

import functools

import torch.distributed as dist
from calls import BF16, DOUBLE, REDUCED, SINGLE
from world import D, counts_of, difference, in_the_world, world_group

import flashcl
from flashcl.contract import LOSSES, case, evaluate, violations


def holds(loss, counts, *, dtype, strategy, regime="init", device="cpu", backend="auto", **options) -> list[str]:
    """Float64 to 1e-10 of the dense formula, other dtypes by the contract."""
    c = case(loss, regime, n=sum(counts), d=D, **options)
    function = in_the_world(functools.partial(getattr(flashcl, c.function), backend=backend), counts, world_group(strategy))
    if dtype != DOUBLE and dist.get_rank() == 0:
        return [str(finding) for finding in violations(c, dtype, device=device, function=function)]
    got = evaluate(function, c.to(dtype, device))
    if dtype != DOUBLE:
        return []  # this rank has done its share
    expected = evaluate(getattr(flashcl.reference, c.function), c)
    near = {k: dict(rtol=0, atol=1e-10 * v.abs().max().item()) for k, v in expected.items()}
    return [message for k, v in expected.items() for message in difference(k, got[k].cpu(), v, **near[k])]


def contract_cases():
    """(name, loss, how rows are dealt out, what else `holds` takes)"""
    for loss in LOSSES:
        for kind, dtype in (("even", DOUBLE), ("uneven", DOUBLE), ("one empty", DOUBLE), ("uneven", SINGLE)):
            for strategy in ("ring", "gather"):
                yield f"{loss}-{kind}-{strategy}-{str(dtype)[6:]}", loss, kind, dict(dtype=dtype, strategy=strategy)
        ring = dict(strategy="ring")
        yield f"{loss}-converged-bfloat16", loss, "uneven", ring | dict(dtype=BF16, regime="converged")
        yield f"{loss}-large", loss, "even", ring | dict(dtype=SINGLE, regime="large", seed=1)
        if loss in REDUCED:
            for reduction in ("none", "sum"):
                yield f"{loss}-{reduction}", loss, "uneven", ring | dict(dtype=DOUBLE, reduction=reduction)


def on_gpus(rank, world, *, loss) -> dict[str, list[str]]:
    """All cases of a loss, by name."""
    cases = [(name, kind, how) for name, of, kind, how in contract_cases() if of == loss]
    return {name: holds(loss, counts_of(kind, world), device="cuda", **how) for name, kind, how in cases}


def wrong(said: list[dict[str, list[str]]]) -> dict[str, list[str]]:
    """What the ranks have found, where they have found anything."""
    return {f"rank {rank}: {name}": found for rank, of_rank in enumerate(said) for name, found in of_rank.items() if found}
