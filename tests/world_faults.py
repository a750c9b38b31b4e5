"""For test_distributed.py: every rank gets an error that names what differed, or what it waited for; and no other order is one."""

import functools
import math
import time
from contextlib import nullcontext
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from calls import DOUBLE, SINGLE
from torch.utils.checkpoint import checkpoint
from world import D, difference, refused, world_group

import flashcl
from flashcl.engine.ranks import Ranks


def disagreements(rank, world) -> list[str]:
    """One rank, the last, differs: each rank is told in what. Afterwards the group works as before."""
    odd, group = rank == world - 1, dist.group.WORLD

    def leaf(d=D, dtype=DOUBLE):
        return torch.ones(4, d, dtype=dtype).requires_grad_()

    def info_nce(x, y=None, temperature=0.5, **options):
        return flashcl.info_nce(x, leaf(x.shape[1], x.dtype) if y is None else y, temperature=temperature, group=group, **options)

    wrong = refused(lambda: info_nce(leaf(D + odd)), "agree", f"D {D + 1}", f"D {D}")
    wrong += refused(lambda: info_nce(leaf(dtype=SINGLE if odd else DOUBLE)), "agree", "dtype 'torch.float32'")
    wrong += refused(lambda: info_nce(leaf(), temperature=0.25 if odd else 0.5), "agree", "logit_scale")
    wrong += refused(lambda: info_nce(leaf(), symmetric=not odd), "agree", "symmetric False", "symmetric True")
    other = lambda: flashcl.nt_xent(leaf(), leaf(), temperature=0.5, group=group)  # noqa: E731
    wrong += refused(other if odd else lambda: info_nce(leaf()), "agree", "loss 'nt_xent'", "loss 'info_nce'")
    learnable = torch.ones((), dtype=DOUBLE, requires_grad=bool(odd))
    scale = lambda: flashcl.info_nce(leaf(), leaf(), logit_scale=learnable, group=group)  # noqa: E731
    wrong += refused(lambda: scale().backward(), "agree", "requir", "gradient")
    strategy = flashcl.Group(group, strategy="gather" if odd else "ring")
    wrong += refused(lambda: flashcl.info_nce(leaf(), leaf(), temperature=1.0, group=strategy), "agree", "strategy 'gather'")
    chunks = flashcl.Group(group, chunk_bytes=2**20 if odd else 64)
    wrong += refused(lambda: flashcl.info_nce(leaf(), leaf(), temperature=1.0, group=chunks), "agree", "chunk_bytes 64")
    convention = flashcl.Group(group, convention="global" if odd else "global_grad")
    wrong += refused(lambda: flashcl.info_nce(leaf(), leaf(), temperature=1.0, group=convention), "agree", "convention 'global'")
    with torch.no_grad() if odd else nullcontext():
        wrong += refused(lambda: info_nce(leaf()), "agree", "any gradient wanted False", "any gradient wanted True")
    one = leaf().detach() if odd else leaf()
    wrong += refused(lambda: info_nce(one, one), "agree", "any gradient wanted False", "any gradient wanted True")
    for bias in ("row_bias", "col_bias"):
        given = {bias: torch.zeros(4, dtype=DOUBLE)} if odd else {}
        lse = functools.partial(flashcl.similarity_logsumexp, leaf(), leaf(), group=group, **given)
        wrong += refused(lse, "agree", f"{bias} given True", f"{bias} given False")
    wrong += refused(lambda: info_nce(leaf(), normalize=odd), "agree", "normalize True", "normalize False")
    for call in (
        lambda: flashcl.siglip(leaf(), leaf(), logit_scale=1.0, logit_bias=0.0, normalize=odd, group=group),
        lambda: flashcl.nt_xent(leaf(), leaf(), normalize=odd, group=group),
        lambda: flashcl.sup_con(leaf(), torch.arange(4) % 2, normalize=odd, group=group),
    ):
        wrong += refused(call, "agree", "normalize True", "normalize False")
    axis = "rows" if odd else "cols"
    wrong += refused(lambda: flashcl.similarity_logsumexp(leaf(), leaf(), axis=axis, group=group), "agree", "axis 'rows'")
    with torch.no_grad():
        wrong += refused(lambda: info_nce(leaf(), reduction="sum" if odd else "mean"), "agree", "reduction 'sum'")
    bias = dict(logit_scale=1.0, logit_bias=float(odd), group=group)
    wrong += refused(lambda: flashcl.siglip(leaf(), leaf(), **bias), "agree", "logit_bias '1.0'", "logit_bias '0.0'", "averaged")
    siglip = functools.partial(flashcl.siglip, logit_scale=1.0, logit_bias=0.0, group=group)
    wrong += refused(lambda: siglip(one, one, reduction="none"), "agree", "any gradient wanted False")
    frozen = info_nce(leaf().detach() if odd else leaf())
    wrong += refused(frozen.backward, "agree", "gradients wanted", "x")
    ahead = info_nce(leaf())
    behind = (lambda: info_nce(leaf())) if odd else ahead.backward
    wrong += refused(behind, "agree", "operation 'the gradients", "operation 'the statistics")
    for call in LIKE_LOSSES:
        first, second = call(leaf(), group), call(leaf(), group)  # alike in all but their place
        wrong += refused((second if odd else first).backward, "agree", "its loss begun at number")
    loss = siglip(leaf(), leaf()) * (2.0 if odd else 1.0)
    wrong += refused(loss.backward, "upstream gradient", 'reduction="none"')
    wrong += refused(lambda: info_nce(leaf()[:0], leaf()[:0]), "no rank of the group has rows")
    no_columns = functools.partial(flashcl.similarity_logsumexp, leaf(), leaf()[:0], axis="rows", group=group)
    wrong += refused(no_columns, "no rank of the group has rows")
    if odd:
        dist.all_gather([torch.empty(1024, dtype=torch.uint8) for _ in range(world)], torch.full((1024,), 7, dtype=torch.uint8))
    else:
        wrong += refused(lambda: info_nce(leaf()), "another collective operation")
    # That meeting was no flashcl call on the odd rank, so that its number is one behind: told, not passed over.
    wrong += refused(lambda: info_nce(leaf()), "agree", "operation", "number")
    return wrong


LIKE_LOSSES = [
    lambda x, group: flashcl.info_nce(x, x * x, temperature=0.5, group=group),
    lambda x, group: flashcl.siglip(x, x * x, logit_scale=1.0, logit_bias=0.0, group=group),
    lambda x, group: flashcl.siglip(x, x * x, logit_scale=1.0, logit_bias=0.0, reduction="none", group=group).sum(),
    lambda x, group: flashcl.sup_con(x, torch.arange(len(x)) % 2, group=group),
    lambda x, group: flashcl.similarity_logsumexp(x, x * x, axis="rows", group=group).sum(),
]


def orders_that_are_right(rank, world) -> list[str]:
    """Whatever all ranks do alike: last come, first served; a loss between; encoded again in the backward; two groups at once."""
    group, another = dist.group.WORLD, dist.new_group()
    inputs = [torch.randn(4, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(9 * rank + k)) for k in range(3)]

    def leaves():
        return [x.clone().requires_grad_() for x in inputs]

    wrong = []
    for k, call in enumerate(LIKE_LOSSES):
        at_once = leaves()
        for x in at_once:
            call(x, group).backward()
        reversed_, again, mixed = leaves(), leaves(), leaves()
        for loss in [call(x, group) for x in reversed_][::-1]:
            with torch.no_grad():
                call(inputs[0], group)
            loss.backward()
        for x, reentrant in zip(again, (False, True, False)):
            checkpoint(call, x, group, use_reentrant=reentrant).backward()
        for loss in [call(x, g) for x, g in zip(mixed, (group, another, group))][::-1]:
            loss.backward()
        for name, found in (("reversed", reversed_), ("again", again), ("two groups", mixed)):
            wrong += [f"{k}, {name}: {d}" for x, y in zip(found, at_once) for d in difference("grad", x.grad, y.grad)]
    return wrong


def nan_agrees_with_nan(rank, world) -> list[str]:
    x, group = torch.ones(3, D).requires_grad_(), dist.group.WORLD
    wrong = ["the loss is no NaN"] * (not flashcl.info_nce(x, x, logit_scale=math.nan, group=group).isnan())
    loss = flashcl.siglip(x, x, logit_scale=1.0, logit_bias=0.0, group=group)
    (dx,) = torch.autograd.grad(loss * math.nan, x)
    return wrong + ["the gradient is no NaN"] * (not dx.isnan().all())


def what_fails_is_named(rank, world) -> list[str]:
    x = torch.ones(3, D)
    loss = functools.partial(flashcl.info_nce, x, x, temperature=1.0, group=dist.group.WORLD)
    with mock.patch.object(dist, "all_reduce", side_effect=RuntimeError("gone")):
        wrong = refused(loss, "failed while waiting for statistics", "gone")
    long = lambda: Ranks.meet(world_group().encode(), torch.device("cpu"), "x" * 1100, {})  # noqa: E731
    return wrong + refused(long, "bytes to agree on, of which 1024 are sent")


def a_rank_stalls(rank, world) -> list[str]:
    group = dist.new_group(timeout=timedelta(seconds=2))
    if rank == world - 1:
        return []
    start, x = time.monotonic(), torch.ones(3, D)
    loss = functools.partial(flashcl.info_nce, x, x, temperature=1.0, group=group)
    wrong = refused(loss, "failed while waiting", f"rank {rank} of {world}")
    took = time.monotonic() - start
    return wrong + [f"it took {took} s"] * (took > 20)
