"""The calls that the README and docs/drop_in.md give in place of other libraries' losses, run as they stand there.

Beside each is a dense formula, written from what the library computes. The tables are parsed: a row without a formula, and a
formula without a row, are failures. Everything is float64; value and all gradients to 1e-9.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.functional import cross_entropy, normalize
from world import run_world

import flashcl

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "drop_in.md"
WORLD, ROWS, D = 3, 4, 5  # ranks, rows of each, width


# ---- what the pages say ------------------------------------------------------------------------------------------------


def section(page: Path, title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S)[1]


def table(page: Path, title: str) -> dict[str, str]:
    """First cell -> the code of the second."""
    rows = [line.strip("|").split(" | ") for line in section(page, title).splitlines() if line.startswith("| ")]
    return {cells[0].strip(): re.fullmatch(r"`(.*)`", cells[1].strip())[1] for cells in rows[1:]}


def recipes() -> dict[str, str]:
    """Heading -> the code below it."""
    return dict(re.findall(r"^### (.*?)\n.*?```python\n(.*?)```", section(PAGE, "Recipes"), re.M | re.S))


CALLS = table(README, "Migrating from other libraries") | table(PAGE, "More calls") | recipes()
CALLS_OF_RANKS = table(PAGE, "Ranks")


# ---- the tensors they are about ----------------------------------------------------------------------------------------


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensors() -> dict:
    n = 6
    leaves = {name: randn(seed, n, D) for seed, name in enumerate("xynz")}
    leaves |= {"h": randn(5, n, 3, D), "features": randn(6, n, 2, D)}
    leaves |= {name: torch.tensor(v, dtype=torch.float64) for name, v in (("s", 3.0), ("b", -1.5), ("log_s", 1.2))}
    leaves |= {"q": normalize(randn(7, n, D), dim=1), "k": normalize(randn(8, n, D), dim=1)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    # Of the labels, 2 is alone.
    return leaves | {"c": torch.tensor([0, 1, 0, 2, 1, 0]), "queue": normalize(randn(9, 8, D), dim=1), "t": 0.2, "weight": -0.7}


def run(code: str, names: dict) -> torch.Tensor:
    """The value of an expression, or what a recipe calls `loss`."""
    names = {"flashcl": flashcl, "torch": torch, "F": F} | names
    if "\n" not in code:
        return eval(code, names)
    exec(code, names)
    return names["loss"]


def with_gradients(loss: torch.Tensor, names: dict) -> dict[str, torch.Tensor]:
    leaves = {name: v for name, v in names.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach()} | dict(zip(leaves, gradients))


def assert_equal(got: dict, expected: dict) -> None:
    for name, v in expected.items():
        torch.testing.assert_close(got[name], v, rtol=1e-9, atol=1e-11, msg=lambda m: f"{name}: {m}")


# ---- the dense formulas ------------------------------------------------------------------------------------------------


def softmax(logits, first: int = 0, **options):
    """Cross entropy where row i is to find column first + i."""
    return cross_entropy(logits, first + torch.arange(len(logits)), **options)


def both(logits):
    return (softmax(logits) + softmax(logits.T)) / 2


def sigmoid(logits, first: int = 0):
    sign = -torch.ones_like(logits)
    sign[torch.arange(len(logits)), first + torch.arange(len(logits))] = 1
    return -F.logsigmoid(sign * logits).sum() / len(logits)


def cosines(x, y):
    return normalize(x, dim=-1) @ normalize(y, dim=-1).T


def sim_clr(x, y, t):
    """2N anchors, two views of N items; the anchor itself is no candidate."""
    s = torch.cat([x, y]) @ torch.cat([x, y]).T / t
    return cross_entropy(s.masked_fill(torch.eye(len(s), dtype=torch.bool), -torch.inf), torch.arange(len(s)).roll(len(x)))


def of_labels(anchors, candidates, c_anchors, c_candidates, t, first: int = 0):
    """SupCon per anchor, 0 where there is no positive. Anchor i is candidate first + i."""
    own = torch.zeros(len(anchors), len(candidates), dtype=torch.bool)
    own[torch.arange(len(anchors)), first + torch.arange(len(anchors))] = True
    s = (anchors @ candidates.T / t).masked_fill(own, -torch.inf)
    positive = (c_anchors[:, None] == c_candidates) & ~own
    log_p = (s - s.logsumexp(1, keepdim=True)).masked_fill(~positive, 0.0)
    return -log_p.sum(1) / positive.sum(1).clamp(min=1), positive.any(1)


def of_positive_pairs(z, c, t):
    """pytorch-metric-learning's NTXent: a term for each positive pair, whose denominator has no other positive."""
    s = cosines(z, z) / t
    terms = []
    for i in range(len(z)):
        negatives = s[i][c != c[i]].logsumexp(0)
        terms += [torch.logaddexp(s[i, j], negatives) - s[i, j] for j in range(len(z)) if c[j] == c[i] and j != i]
    return torch.stack(terms).mean()


def metric_learning_sup_con(z, c):
    z = normalize(z, dim=1)
    loss, counts = of_labels(z, z, c, c, 0.1)
    return loss[counts].mean()


def reference_sup_con(features, c, t, anchors: int | None = None):
    """The code of the SupCon paper: views are columns, the mean is over all anchors, and there is a factor."""
    z, labels = torch.cat(features.unbind(1)), c.repeat(features.shape[1])
    anchors = slice(anchors)
    return t / 0.07 * of_labels(z[anchors], z, labels[anchors], labels, t)[0].mean()


def ranking(x, docs, first: int = 0, scale=20.0):
    """MultipleNegativesRankingLoss; docs: the positives, then the hard negatives."""
    return softmax(scale * cosines(x, docs), first)


def two_directions(x, y, docs):
    q2d, d2q = 20 * cosines(x, docs), 20 * cosines(y, x)
    return ((q2d.logsumexp(1) + d2q.logsumexp(1)) / 2 - q2d.diagonal()).mean()


def four_directions(x, y):
    own = torch.eye(len(x), dtype=torch.bool)
    q2d, q2q, d2d = 20 * cosines(x, y), 20 * cosines(x, x), 20 * cosines(y, y)
    scores = [q2d, q2q.masked_fill(own, -torch.inf), q2d.T, d2d.masked_fill(own, -torch.inf)]
    return (torch.cat(scores, 1).logsumexp(1) - q2d.diagonal()).mean()


def first_of(positive, negatives):
    """The positive is the first of its row's logits."""
    return cross_entropy(torch.cat([positive[:, None], negatives], 1), torch.zeros(len(positive), dtype=torch.long))


def of_own_negatives(x, y, h, t):
    own = torch.einsum("nd,nkd->nk", normalize(x, dim=1), normalize(h, dim=2))
    return softmax(torch.cat([cosines(x, y), own], 1) / t)


def weighted(x, y, n, weight):
    return softmax(torch.cat([cosines(x, y) / 0.05, cosines(x, n) / 0.05 + weight * torch.eye(len(x), dtype=x.dtype)], 1))


def hugging_face(x, y):
    """Rows are texts there."""
    unit = [v / v.pow(2).sum(-1, keepdim=True).pow(0.5) for v in (x, y)]
    return unit[1] @ unit[0].T


RANKING = "sentence-transformers `MultipleNegativesRankingLoss(model)`"
FORMULAS = {
    "open_clip `ClipLoss()(x, y, s)`": lambda x, y, s: both(s * x @ y.T),
    "open_clip `SigLipLoss()(x, y, s, b)`": lambda x, y, s, b: sigmoid(s * x @ y.T + b),
    "Transformers `CLIPModel`, `return_loss=True`": lambda x, y, log_s: both(hugging_face(x, y) * log_s.exp()),
    "Transformers `SiglipModel`, `return_loss=True`": lambda x, y, log_s, b: sigmoid(hugging_face(x, y) * log_s.exp() + b),
    f"{RANKING}, and `Cached…`": lambda x, y: ranking(x, y),
    "the same with hard negatives `n`": lambda x, y, n: ranking(x, torch.cat([y, n])),
    'sentence-transformers `MultipleNegativesRankingLoss(model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")`': lambda x, y: two_directions(x, y, y),
    "lightly `NTXentLoss()(x, y)`": lambda x, y: sim_clr(normalize(x, dim=1), normalize(y, dim=1), 0.5),
    "pytorch-metric-learning `SelfSupervisedLoss(NTXentLoss())(x, y)`": lambda x, y: of_positive_pairs(
        torch.cat([x, y]), torch.arange(len(x)).repeat(2), 0.07
    ),
    "pytorch-metric-learning `SupConLoss()(z, c)`": metric_learning_sup_con,
    "SupContrast `SupConLoss(t)(features, c)`": reference_sup_con,
    "SimCSE": lambda x, y: softmax(cosines(x, y) / 0.05),
    "SimCSE with hard negatives `n`": lambda x, y, n: softmax(torch.cat([cosines(x, y), cosines(x, n)], 1) / 0.05),
    "info-nce-pytorch `InfoNCE()(x, y)`": lambda x, y: softmax(cosines(x, y) / 0.1),
    "memeff `MemoryEfficientCLIPLoss(stable=False)(x, y)`": lambda x, y: both(cosines(x, y) / 0.07),
    "inf-cl `cal_inf_loss(x, y, scale=s)`": lambda x, y, s: softmax(s * x @ y.T),
    "siglip-kernel `fused_siglip_loss(x, y, log_s, b)`": lambda x, y, log_s, b: sigmoid(x @ y.T * log_s.exp() + b),
    "cut-cross-entropy `linear_cross_entropy(s * x, y, torch.arange(len(x)), filter_eps=None)`": lambda x, y, s: softmax(s * x @ y.T),
    # docs/drop_in.md
    "sentence-transformers `MultipleNegativesRankingLoss(model, similarity_fct=dot_score, scale=1.0)`": lambda x, y: softmax(x @ y.T),
    'the same, with hard negatives `n`': lambda x, y, n: (
        two_directions(x, y, torch.cat([y, n]))
    ),
    "SupContrast `SupConLoss(t)(features, c)`, one view (V = 1)": lambda features, c, t: reference_sup_con(features[:, :1], c, t),
    'SupContrast `SupConLoss(t, contrast_mode="one")(features, c)`': lambda features, c, t: reference_sup_con(features, c, t, len(c)),
    "SupContrast `SupConLoss(t)(features)`, no labels, two views": lambda features, t: (
        reference_sup_con(features, torch.arange(len(features)), t)
    ),
    "memeff `MemoryEfficientCLIPLoss()(x, y)`, `stable=True` as is its default: the gradient": lambda x, y: (
        both(cosines(x, y) / 0.07) * 0.07 * (len(x) / 0.07) ** 0.5
    ),
    "memeff `MemoryEfficientLiTLoss(stable=False)(x, y)`": lambda x, y: softmax(cosines(x, y.detach()) / 0.07),
    "memeff `MemoryEfficientQwen3Loss(margin=2.0, stable=False)(x, y)`": lambda x, y: softmax(cosines(x, y) / 0.07),
    "inf-cl `cal_flash_loss(x, y, scale=s)`: a loss per row": lambda x, y, s: softmax(s * x @ y.T, reduction="none"),
    "MoCo, a queue of negatives": lambda q, k, queue, t: first_of((q * k).sum(1) / t, q @ queue.T / t),
    "memeff Qwen3, hard negatives of each query's own": lambda x, y, h: of_own_negatives(x, y, h, 0.07),
    "MultipleNegativesRankingLoss, four directions in one softmax": four_directions,
    "SimCSE, a weight on the own hard negative": weighted,
}


def call_by_name(formula, names: dict):
    code = formula.__code__
    return formula(**{name: names[name] for name in code.co_varnames[: code.co_argcount] if name in names})


def test_every_call_has_a_formula():
    assert CALLS.keys() == FORMULAS.keys()
    assert CALLS_OF_RANKS.keys() == FORMULAS_OF_RANKS.keys()


@pytest.mark.parametrize("row", FORMULAS)
def test_call(row):
    names = tensors()
    expected = with_gradients(call_by_name(FORMULAS[row], names), names)
    assert_equal(with_gradients(run(CALLS[row], names), names), expected)


# ---- ranks -------------------------------------------------------------------------------------------------------------
# A formula is the loss of rank r in one process that has the rows of all: x, y, z, n and c are lists of each rank's. What a
# library's gather makes a constant is detached. So the gradient of the sum over r is what arrives at each rank's rows.


def own_slot(parts, r):
    """All rows, gathered without gradients, into which the own rows are put back."""
    return torch.cat([v if i == r else v.detach() for i, v in enumerate(parts)])


def rows_of(r):
    return slice(r * ROWS, (r + 1) * ROWS)


def local(r, x, y, all_x, all_y, s):
    """open_clip's local_loss: own rows of both sides against all of the other."""
    return (softmax(s * x[r] @ all_y.T, r * ROWS) + softmax(s * y[r] @ all_x.T, r * ROWS)) / 2


def sigmoid_of_rank(r, x, y, s, b):
    return sigmoid(s * x[r] @ torch.cat(y).T + b, r * ROWS)


def sim_clr_of_rank(r, x, y, t):
    """The anchors of rank r, in their two views, against all rows x, y."""
    z = normalize(torch.cat([x, y]), dim=1)
    s = (z @ z.T / t).masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    own = torch.arange(len(z)).view(2, -1)[:, rows_of(r)].flatten()
    return cross_entropy(s[own], torch.arange(len(z)).roll(len(z) // 2)[own])


def part_of_mean(r, x, y):
    """memeff: the own rows' and columns' part of the mean over all."""
    s = cosines(torch.cat(x), torch.cat(y)) / 0.07
    own = (s.logsumexp(1) + s.logsumexp(0)) / 2 - s.diagonal()
    return own[rows_of(r)].sum() / len(s)


FORMULAS_OF_RANKS = {
    "open_clip `ClipLoss(local_loss=True, gather_with_grad=True)(x, y, s)`": lambda r, x, y, s: local(r, x, y, torch.cat(x), torch.cat(y), s),
    "open_clip `ClipLoss(gather_with_grad=True)(x, y, s)`": lambda r, x, y, s: both(s * torch.cat(x) @ torch.cat(y).T),
    "open_clip `ClipLoss()(x, y, s)`, its default": lambda r, x, y, s: both(s * own_slot(x, r) @ own_slot(y, r).T),
    "open_clip `ClipLoss(local_loss=True)(x, y, s)`": lambda r, x, y, s: local(r, x, y, torch.cat(x).detach(), torch.cat(y).detach(), s),
    "open_clip `SigLipLoss()(x, y, s, b)`, any `dist_impl`": sigmoid_of_rank,
    "sentence-transformers `MultipleNegativesRankingLoss(model, gather_across_devices=True)`": lambda r, x, y: (
        ranking(x[r], torch.cat(y), r * ROWS)
    ),
    "the same with hard negatives `n`": lambda r, x, y, n: ranking(x[r], torch.cat([*y, *n]), r * ROWS),
    "lightly `NTXentLoss(gather_distributed=True)(x, y)`": lambda r, x, y: sim_clr_of_rank(r, torch.cat(x), torch.cat(y), 0.5),
    "pytorch-metric-learning `DistributedLossWrapper(NTXentLoss())`, two rows of each label": lambda r, x, y: (
        WORLD * of_positive_pairs(torch.cat([own_slot(x, r), own_slot(y, r)]), torch.arange(WORLD * ROWS).repeat(2), 0.07)
    ),
    "the same with `efficient=True`": lambda r, x, y: WORLD * sim_clr_of_rank(r, own_slot(x, r), own_slot(y, r), 0.07),
    "pytorch-metric-learning `DistributedLossWrapper(SupConLoss())(z, c)`": lambda r, z, c: (
        WORLD * metric_learning_sup_con(own_slot(z, r), torch.cat(c))
    ),
    "SimCSE, whose gather keeps the gradients of its own rows": lambda r, x, y: softmax(cosines(own_slot(x, r), own_slot(y, r)) / 0.05),
    "memeff `DistributedMemoryEfficientCLIPLoss(stable=False)(x, y)`": part_of_mean,
    "inf-cl `cal_inf_loss(x, y, scale=s)`, the towers": lambda r, x, y, s: softmax(s.detach() * x[r] @ torch.cat(y).T, r * ROWS),
    "siglip-kernel `DistributedSigLIPLoss()(x, y, s, b)`": sigmoid_of_rank,
}


def all_rows_of_ranks(rank: int, world: int) -> dict[str, str]:
    """Row of the table -> what is wrong with it on this rank."""
    return {row: wrong_on_rank(rank, world, row) for row in FORMULAS_OF_RANKS}


def wrong_on_rank(rank: int, world: int, row: str) -> str:
    parts = {name: [v.requires_grad_() for v in randn(seed, world * ROWS, D).split(ROWS)] for seed, name in enumerate("xynz")}
    numbers = {"s": torch.tensor(3.0, dtype=torch.float64), "b": torch.tensor(-1.5, dtype=torch.float64)}
    numbers = {name: v.requires_grad_() for name, v in numbers.items()}
    labels = [torch.tensor([0, 1, 1, r]) for r in range(world)]  # some have all their positives on other ranks, one has none

    losses = [call_by_name(FORMULAS_OF_RANKS[row], parts | numbers | {"c": labels, "r": r}) for r in range(world)]
    expected = with_gradients(sum(losses), {name: v[rank] for name, v in parts.items()} | numbers)
    expected |= {"loss": losses[rank].detach()} | {name: expected[name] / world for name in numbers}

    names = {name: v[rank].detach().requires_grad_() for name, v in parts.items()}
    names |= {name: v.detach().requires_grad_() for name, v in numbers.items()}
    loss = run(CALLS_OF_RANKS[row], names | {"c": labels[rank], "g": dist.group.WORLD, "W": world})
    got = with_gradients(loss, names)
    for name in numbers:
        got[name] = got[name].detach()  # zeros made for a missing gradient require one in torch 2.7
        dist.all_reduce(got[name])
        got[name] /= world
    try:
        assert_equal(got, expected)
    except AssertionError as error:
        return f"rank {rank}: {error}"
    return ""


@pytest.fixture(scope="module")
def found():
    return run_world(WORLD, all_rows_of_ranks)


@pytest.mark.parametrize("row", FORMULAS_OF_RANKS)
def test_call_of_ranks(row, found):
    assert [wrong[row] for wrong in found if wrong[row]] == []


def test_the_citation_is_of_this_version():
    assert f"\nversion: {flashcl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
