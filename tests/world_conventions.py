"""For test_distributed.py: the conventions of other libraries, of what a rank returns and which gradients it makes."""

import itertools

import torch
import torch.distributed as dist
from calls import DOUBLE
from torch.nn.functional import cross_entropy, logsigmoid
from world import D, counts_of, difference, differences, world_group

import flashcl
from flashcl.engine.ranks import CONVENTIONS


def conventions(rank, world) -> list[str]:
    """The table of flashcl.Group, for every loss, against one process."""
    counts, wrong = counts_of("uneven", world), []
    x, y = (torch.randn(sum(counts), D, dtype=DOUBLE, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    rows, labels = slice(sum(counts[:rank]), sum(counts[: rank + 1])), torch.arange(sum(counts)) % 3
    calls = {
        "info_nce": lambda a, b, t, bias, c, **of: flashcl.info_nce(a, b, logit_scale=t, **of),
        "siglip": lambda a, b, t, bias, c, **of: flashcl.siglip(a, b, logit_scale=t, logit_bias=bias, **of),
        "nt_xent": lambda a, b, t, bias, c, **of: flashcl.nt_xent(a, b, temperature=1 / t, **of),
        "sup_con": lambda a, b, t, bias, c, **of: flashcl.sup_con(a, c, temperature=1 / t, **of),
    }

    def run(call, rows, group=None):
        leaves = x[rows].clone(), y[rows].clone(), torch.tensor(3.0, dtype=DOUBLE), torch.tensor(-1.0, dtype=DOUBLE)
        loss = call(*[v.requires_grad_() for v in leaves], labels[rows], group=group)
        return loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    for loss, call in calls.items():
        value, dx, dy, *of_scalars = run(call, slice(None))
        for name in CONVENTIONS:
            got, da, db, *own = run(call, rows, world_group(convention=name))
            mean = got.clone()
            for v in (mean, *own):
                dist.all_reduce(v)
            towers = {"global": 1 / world}.get(name, 1.0)
            scalars = {"global_scaled": float(world)}.get(name, 1.0)
            values = {"global_scaled": got / world, "global": got, "global_grad": got}.get(name, mean / world)
            checked = [("value", values, value)]
            checked += [(f"d scalar {i}", a / world, v * scalars) for i, (a, v) in enumerate(zip(own, of_scalars))]
            if name != "local_partial":
                checked += [("dx", da / world, dx[rows] * towers), ("dy", db / world, dy[rows] * towers)]
            wrong += [message for k, a, b in checked for message in difference(f"{loss} {name} {k}", a, b)]
    return wrong


def own_slot_only(rank, world) -> list[str]:
    """local_partial: what others' rows are is a constant, as in a gather without gradients that puts the own rows back in."""
    wrong, n = [], 5
    x, y = (torch.randn(n * world, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    rows, target = slice(n * rank, n * rank + n), torch.arange(n * rank, n * rank + n)

    def clip(a, b, all_a, all_b):
        return (cross_entropy(4 * a @ all_b.T, target) + cross_entropy(4 * b @ all_a.T, target)) / 2

    def siglip(a, b, all_a, all_b):
        sign = -torch.ones(n, n * world, dtype=DOUBLE)
        sign[torch.arange(n), target] = 1
        return -logsigmoid(sign * (4 * a @ all_b.T - 1)).sum() / n

    labels = torch.arange(n * world) % 2

    def nt_xent(a, b, all_a, all_b):
        s = 2 * torch.cat([a, b]) @ torch.cat([all_a, all_b]).T
        s[torch.arange(2 * n), torch.cat([target, target + n * world])] = -torch.inf
        return cross_entropy(s, torch.cat([target + n * world, target]))

    def sup_con(a, b, all_a, all_b):
        s = 2 * a @ all_a.T
        s[torch.arange(n), target] = -torch.inf
        positive = (labels[rows, None] == labels) & s.isfinite()
        return -s.log_softmax(1).where(positive, 0.0).sum(1).div(positive.sum(1)).sum() / n

    def one_way(a, b, all_a, all_b):
        return cross_entropy(4 * a @ all_b.T, target)

    def col_lse(a, b, all_a, all_b):
        return (all_a @ b.T).logsumexp(0).sum()

    calls = {
        nt_xent: lambda a, b, group: flashcl.nt_xent(a, b, temperature=0.5, group=group),
        sup_con: lambda a, b, group: flashcl.sup_con(a, labels[rows], temperature=0.5, group=group) + 0 * b.sum(),
        clip: lambda a, b, group: flashcl.info_nce(a, b, logit_scale=4.0, group=group),
        siglip: lambda a, b, group: flashcl.siglip(a, b, logit_scale=4.0, logit_bias=-1.0, group=group),
        one_way: lambda a, b, group: flashcl.info_nce(a, b, logit_scale=4.0, symmetric=False, group=group),
        col_lse: lambda a, b, group: flashcl.similarity_logsumexp(a, b, axis="cols", group=group).sum(),
    }
    for formula, strategy in itertools.product(calls, ("ring", "gather")):
        a, b = x[rows].clone().requires_grad_(), y[rows].clone().requires_grad_()
        all_a, all_b = (torch.cat([v[: rows.start], own, v[rows.stop :]]) for v, own in ((x, a), (y, b)))
        expected = formula(a, b, all_a, all_b)
        expected = expected, *torch.autograd.grad(expected + 0 * b.sum(), (a, b))
        loss = calls[formula](a, b, world_group(strategy, convention="local_partial"))
        got = loss, *torch.autograd.grad(loss, (a, b))
        wrong += differences(f"{formula.__name__}, {strategy}:", "loss dx dy", got, expected)
    return wrong


def columns_of_some(rank, world) -> list[str]:
    """Ranks that backpropagate through their rows alone still give other ranks' columns what is theirs."""
    wrong, n = [], 5
    x, y = (torch.randn(n * world, D, dtype=DOUBLE, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    own = slice(n * rank, n * rank + n)

    def used(row, col, r):
        return row.sum() if r == world - 1 else row.sum() + 3 * col.sum()

    x.requires_grad_(), y.requires_grad_()
    s = x @ y.T
    parts = zip(s.logsumexp(1).split(n), s.logsumexp(0).split(n))
    expected = torch.autograd.grad(sum(used(row, col, r) for r, (row, col) in enumerate(parts)), (x, y))
    for strategy in ("ring", "gather"):
        a, b = x[own].detach().requires_grad_(), y[own].detach().requires_grad_()
        used(*flashcl.similarity_logsumexp(a, b, group=world_group(strategy)), rank).backward()
        wrong += differences(f"{strategy}:", "dx dy", (a.grad, b.grad), [whole[own] for whole in expected])
    return wrong
