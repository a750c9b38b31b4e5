"""Losses over the rows of several ranks: gloo on loopback (NCCL: test_nccl.py), worlds of 1 to 4 processes, all cases of a world in one spawn.

What runs in a world, here and in world_*.py, returns messages of what is wrong, a list of them on each rank: an assert on one
rank would leave the others in a collective, and take all else that the world has found with it.
"""

import functools
import itertools
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from calls import DOUBLE, per_row
from torch.nn.parallel import DistributedDataParallel
from world import EXACTLY, D, counts_of, difference, differences, in_the_world, run_world, world_group
from world_contract import contract_cases, holds
from world_conventions import columns_of_some, conventions, own_slot_only
from world_faults import a_rank_stalls, disagreements, nan_agrees_with_nan, orders_that_are_right, what_fails_is_named
from world_traffic import bytes_as_planned, communication_overlaps, explained

import flashcl
from flashcl.contract import LOSSES, evaluate
from flashcl.engine.ranks import Ranks

WORLDS = (1, 2, 3, 4)


# ---- rows that are hard on losses ----------------------------------------------------------------------------------------


def bad_row_on_one_rank(rank, world) -> list[str]:
    """NaN and infinity come out where the dense formula has them, on every rank, and spoil nothing else."""
    wrong, counts = [], counts_of("uneven", world)
    for loss, bad in itertools.product(LOSSES, (torch.nan, torch.inf)):
        c = per_row(loss, "t=1", n=sum(counts), d=D)
        for name, strategy in zip([name for name, v in c.tensors.items() if v.dim() == 2], ("ring", "gather")):
            broken = c.tensors[name].clone()
            broken[2, 1] = bad
            broken = replace(c, tensors=c.tensors | {name: broken})
            got = evaluate(in_the_world(getattr(flashcl, c.function), counts, world_group(strategy)), broken)
            for k, v in evaluate(getattr(flashcl.reference, c.function), broken).items():
                what, finite = f"{loss}, {strategy}, {bad} in {name}: {k}", v.isfinite()
                if torch.equal(got[k].isfinite(), finite):
                    wrong += difference(what, got[k][finite], v[finite], atol=1e-10)
                else:
                    wrong.append(f"{what}: {(got[k].isfinite() != finite).sum()} numbers are finite, or not, alone")
    return wrong


def line_without_pairs(rank, world) -> list[str]:
    """One column in the world, on the first rank, whose first row has no other; then the same of one row."""
    wrong, n = [], 2
    x, y = (torch.randn(k, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(k)) for k in (n * world, 1))
    x.requires_grad_(), y.requires_grad_()
    own = slice(n * rank, n * rank + n), slice(rank, rank + 1)  # of y: none but on rank 0
    for turned, strategy in itertools.product((False, True), ("ring", "gather")):
        turn = reversed if turned else iter
        whole = flashcl.reference.similarity_logsumexp(*turn([x, y]), exclude="diagonal")
        mine = [v[at].detach().requires_grad_() for v, at in zip((x, y), own)]
        got = flashcl.similarity_logsumexp(*turn(mine), exclude="diagonal", group=world_group(strategy))
        expected = [*turn([v[at] for v, at in zip(turn(whole), own)])]
        expected += [v[at] for v, at in zip(grads(whole, (x, y)), own)]
        what, first = f"{strategy}, turned {turned}:", whole[turned][0]
        wrong += differences(what, "rows cols dx dy", [*got, *grads(got, mine)], expected)
        wrong += [f"{what} the first line has a pair, {first:.3g}"] * (not first.isneginf())
    return wrong


def grads(values, leaves):
    return torch.autograd.grad(sum(v.sum() for v in values), leaves)


def labels_all_distinct(rank, world) -> list[str]:
    """No anchor on any rank: the mean is 0, and so are the gradients."""
    wrong, z = [], torch.randn(5, D, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    t = torch.tensor(0.1, requires_grad=True)
    for strategy in ("ring", "gather"):
        loss = flashcl.sup_con(z, torch.arange(5 * rank, 5 * rank + 5), temperature=t, group=world_group(strategy))
        got = [loss, *torch.autograd.grad(loss, (z, t))]
        wrong += differences(f"{strategy}:", "loss dz dt", got, [torch.zeros_like(v) for v in got], **EXACTLY)
    return wrong


def strided_rows(rank, world) -> list[str]:
    """The same bits as of contiguous copies."""
    wrong, n = [], 5
    wide = torch.randn(2 * n, 2 * D, dtype=DOUBLE, generator=torch.Generator().manual_seed(rank))
    for strategy in ("ring", "gather"):
        runs = []
        for layout in (lambda v: v, torch.Tensor.contiguous):
            leaves = [layout(v.detach()).requires_grad_() for v in (wide[:n, ::2], wide.T[:D, n:].T)]
            loss = flashcl.info_nce(*leaves, temperature=1.0, group=world_group(strategy))
            runs.append([loss, *torch.autograd.grad(loss, leaves)])
        wrong += differences(f"{strategy}:", "loss dx dy", *runs, **EXACTLY)
    return wrong


def deterministic(rank, world) -> list[str]:
    """The same inputs give the same bits."""
    generator = torch.Generator().manual_seed(rank)
    x, y = (torch.randn(9, D, generator=generator).requires_grad_() for _ in range(2))
    runs = []
    for _ in range(3):
        loss = flashcl.info_nce(x, y, temperature=0.1, group=world_group("ring"))
        runs.append([loss, *torch.autograd.grad(loss, (x, y))])
    return [message for run in runs[1:] for message in differences("again:", "loss dx dy", run, runs[0], **EXACTLY)]


# ---- real training loops -------------------------------------------------------------------------------------------------


def towers_under_ddp(rank, world) -> list[str]:
    """The gradients of DistributedDataParallel are those of one process with the whole batch."""
    torch.manual_seed(0)
    counts = counts_of("uneven", world)
    data = torch.randn(sum(counts), 9, dtype=DOUBLE)
    model = torch.nn.ModuleDict(dict(a=torch.nn.Linear(9, D), b=torch.nn.Linear(9, D), loss=flashcl.SigLIPLoss())).double()

    class Step(torch.nn.Module):
        def __init__(self, group):
            super().__init__()
            self.towers, self.loss = model, flashcl.SigLIPLoss(group=group).double()

        def forward(self, rows):
            return self.loss(self.towers["a"](rows), self.towers["b"](rows))

    alone = Step(None)
    alone(data).backward()
    expected = [p.grad.clone() for p in alone.parameters() if p.grad is not None]
    model.zero_grad()
    del model["loss"]
    ddp = DistributedDataParallel(Step(dist.group.WORLD))
    start = sum(counts[:rank])
    ddp(data[start : start + counts[rank]]).backward()
    got = {name: p.grad for name, p in ddp.named_parameters()}
    if not len(got) == len(expected) == 6:
        return [f"{len(got)} gradients of {len(expected)}, not 6 of 6"]
    return differences("d", " ".join(got), got.values(), expected)


def frozen_tower(rank, world) -> list[str]:
    """A tower without gradient changes nothing for the other, and nothing of it travels back."""
    x, y = (torch.randn(6, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(k + rank)) for k in (0, 50))
    wrong, gradients, returned = [], [], []

    def start(ranks, sends, receives, what="rows", real=Ranks.start_exchange):
        returned[-1] += what == "gradients"
        return real(ranks, sends, receives, what)

    with mock.patch.object(Ranks, "start_exchange", start):
        for frozen in (False, True):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_(not frozen)
            returned.append(0)
            flashcl.info_nce(a, b, temperature=0.2, group=world_group("ring")).backward()
            gradients.append(a.grad)
            wrong += [f"frozen {frozen}, with a gradient {b.grad is not None}"] * ((b.grad is None) != frozen)
    wrong += [f"gradients were sent {returned} times"] * (returned != [world - 1, 0])
    return wrong + difference("dx", *gradients, **EXACTLY)


def compiled(rank, world) -> list[str]:
    """Under torch.compile: the same bits, and no operation with ranks in a graph, where compilers reorder."""
    wrong, group, targets = [], dist.group.WORLD, []

    def recording(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    calls = {
        "info_nce": lambda x, y, t: flashcl.info_nce(2 * x, y, temperature=t, group=group),
        "siglip": lambda x, y, t: flashcl.siglip(x, y, logit_scale=1 / t, logit_bias=-t, group=group),
        "nt_xent": lambda x, y, t: flashcl.nt_xent(x, y, temperature=t, group=group),
        "sup_con": lambda x, y, t: flashcl.sup_con(x + y, torch.arange(len(x)) // 3, temperature=t, group=group),
    }
    for name, call in calls.items():
        generator = torch.Generator().manual_seed(rank)
        x, y = (torch.randn(7, D, generator=generator).requires_grad_() for _ in range(2))
        t = torch.tensor(0.3, requires_grad=True)
        results = []
        for f in (call, torch.compile(call, backend=recording)):
            loss = f(x, y, t)
            results.append([loss, *torch.autograd.grad(loss, (x, y, t))])
        eager, got = results
        wrong += differences(f"{name}:", "loss dx dy dt", got, eager, **EXACTLY)
        wrong += [f"{name}: no gradient" for g in got[1:] if not g.any()]
    wrong += [f"{target} in a graph" for target in targets if "flashcl" in target]
    return wrong if any("mul" in target for target in targets) else [*wrong, f"not compiled: {targets}"]


# ---- one spawn per world -------------------------------------------------------------------------------------------------

# In which worlds: what takes long there runs where it says most, in one of an even and one of an odd number of ranks.
OTHERS = {
    bad_row_on_one_rank: (2, 3),
    line_without_pairs: WORLDS,
    labels_all_distinct: WORLDS,
    towers_under_ddp: WORLDS,
    frozen_tower: WORLDS,
    compiled: (2,),
    deterministic: WORLDS,
    explained: WORLDS,
    conventions: WORLDS,
    own_slot_only: WORLDS,
    columns_of_some: WORLDS,
    communication_overlaps: WORLDS[1:],
    bytes_as_planned: (2, 3),
    a_rank_stalls: WORLDS[1:],
    nan_agrees_with_nan: WORLDS[1:],
    strided_rows: WORLDS[1:],
    what_fails_is_named: WORLDS[1:],
    orders_that_are_right: (2,),
    disagreements: WORLDS[1:],  # the last: it leaves one rank a meeting behind
}


def everything(rank, world) -> dict[str, list[str]]:
    wrong = {name: holds(loss, counts_of(kind, world), **how) for name, loss, kind, how in contract_cases()}
    return wrong | {f.__name__: f(rank, world) for f, worlds in OTHERS.items() if world in worlds}


def names(world: int) -> list[str]:
    return [name for name, *_ in contract_cases()] + [f.__name__ for f, worlds in OTHERS.items() if world in worlds]


@functools.cache
def results(world: int) -> list[dict[str, list[str]]]:
    return run_world(world, everything)


@pytest.mark.parametrize("world, name", [(world, name) for world in WORLDS for name in names(world)])
def test_world(world, name):
    assert [f"rank {rank}: {message}" for rank, wrong in enumerate(results(world)) for message in wrong[name]] == []


def test_the_comparison_can_fail():
    """A loss of the ranks' own rows only, without the rows of the others, is no loss of the world."""
    wrong = run_world(2, negatives_forgotten)[0]
    assert any(w.startswith("value") for w in wrong) and any(w.startswith("grad x") for w in wrong)


def negatives_forgotten(rank, world) -> list[str]:
    with mock.patch.object(flashcl, "info_nce", lambda group, real=flashcl.info_nce, **arguments: real(**arguments)):
        return holds("info_nce", [12, 12], dtype=DOUBLE, strategy="ring")
