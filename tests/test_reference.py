"""The oracle against things that are not the oracle: loops over the papers' formulas, values by hand, finite differences.

test_reference_properties.py has what needs nothing beside it.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from reference_inputs import DIM, SIZES, assert_equal, randn, rng
from torch.autograd import gradcheck, gradgradcheck

from flashcl import reference

RECTANGLES = [(1, 1), (1, 4), (2, 3), (3, 7), (5, 6), (7, 7)]  # (N, M) with M >= N


def reductions(values, count=None):
    """What "none", "sum" and "mean" have to give for these per-anchor values."""
    count = len(values) if count is None else count
    return {"none": values, "sum": math.fsum(values), "mean": math.fsum(values) / max(count, 1)}


# ----- naive loops, plain Python floats, straight from the formulas -----


def dot(a, b):
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def naive_info_nce(x, y, temperature, symmetric):
    x, y = x.tolist(), y.tolist()
    losses = []
    for i in range(len(x)):
        numerator = math.exp(dot(x[i], y[i]) / temperature)
        loss = -math.log(numerator / math.fsum(math.exp(dot(x[i], y_j) / temperature) for y_j in y))
        if symmetric:
            other = -math.log(numerator / math.fsum(math.exp(dot(x_j, y[i]) / temperature) for x_j in x))
            loss = 0.5 * loss + 0.5 * other
        losses.append(loss)
    return losses


def naive_siglip(x, y, scale, bias):
    x, y = x.tolist(), y.tolist()
    losses = []
    for i in range(len(x)):
        loss = 0.0
        for j in range(len(y)):
            z = 1 if i == j else -1
            loss += -math.log(1 / (1 + math.exp(-z * (scale * dot(x[i], y[j]) + bias))))
        losses.append(loss)
    return losses


def naive_nt_xent(z1, z2, temperature):
    z = z1.tolist() + z2.tolist()
    n = len(z1)
    losses = []
    for i in range(2 * n):
        partner = i + n if i < n else i - n
        denominator = math.fsum(math.exp(dot(z[i], z[k]) / temperature) for k in range(2 * n) if k != i)
        losses.append(-math.log(math.exp(dot(z[i], z[partner]) / temperature) / denominator))
    return losses


def naive_sup_con(z, labels, temperature):
    """The losses, 0 where there is no positive, and the number of anchors that have one."""
    z, labels = z.tolist(), labels.tolist()
    losses, anchors = [], 0
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        if not positives:
            losses.append(0.0)
            continue
        anchors += 1
        denominator = math.fsum(math.exp(dot(z[i], z[a]) / temperature) for a in range(len(z)) if a != i)
        total = math.fsum(math.log(math.exp(dot(z[i], z[p]) / temperature) / denominator) for p in positives)
        losses.append(-total / len(positives))
    return losses, anchors


def naive_logsumexp(x, y, scale, row_bias, col_bias, drop_diagonal):
    x, y, row_bias, col_bias = x.tolist(), y.tolist(), row_bias.tolist(), col_bias.tolist()
    rows, cols = [0.0] * len(x), [0.0] * len(y)
    for i in range(len(x)):
        for j in range(len(y)):
            if not (drop_diagonal and i == j):
                e = math.exp(scale * dot(x[i], y[j]) + row_bias[i] + col_bias[j])
                rows[i] += e
                cols[j] += e

    def log(total):
        return math.log(total) if total > 0 else -math.inf

    return [log(r) for r in rows], [log(c) for c in cols]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("n", SIZES)
def test_info_nce_symmetric_is_the_formula(n, reduction):
    x, y = randn(n, DIM, seed=n), randn(n, DIM, seed=100 + n)
    expected = reductions(naive_info_nce(x, y, 0.7, symmetric=True))[reduction]
    assert_equal(reference.info_nce(x, y, temperature=0.7, reduction=reduction), expected)
    assert_equal(reference.info_nce(x, y, logit_scale=1 / 0.7, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("n, m", RECTANGLES)
def test_info_nce_one_direction_is_the_formula(n, m, reduction):
    x, y = randn(n, DIM, seed=n), randn(m, DIM, seed=100 + m)
    expected = reductions(naive_info_nce(x, y, 0.4, symmetric=False))[reduction]
    assert_equal(reference.info_nce(x, y, temperature=0.4, symmetric=False, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("n", SIZES)
def test_siglip_is_the_formula(n, reduction):
    x, y = randn(n, DIM, seed=n), randn(n, DIM, seed=100 + n)
    expected = reductions(naive_siglip(x, y, 1.3, -0.8))[reduction]
    assert_equal(reference.siglip(x, y, logit_scale=1.3, logit_bias=-0.8, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("n", SIZES)
def test_nt_xent_is_the_formula(n, reduction):
    z1, z2 = randn(n, DIM, seed=n), randn(n, DIM, seed=100 + n)
    expected = reductions(naive_nt_xent(z1, z2, 0.6))[reduction]
    assert_equal(reference.nt_xent(z1, z2, temperature=0.6, reduction=reduction), expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize("n", SIZES)
def test_sup_con_is_the_formula(n, classes, reduction):
    z, labels = randn(n, DIM, seed=n), torch.randint(classes, (n,), generator=rng(n))
    losses, anchors = naive_sup_con(z, labels, 0.6)
    expected = reductions(losses, anchors)[reduction]
    assert_equal(reference.sup_con(z, labels, temperature=0.6, reduction=reduction), expected)


@pytest.mark.parametrize("exclude", [None, "diagonal"])
@pytest.mark.parametrize("n, m", [*RECTANGLES, (4, 1), (7, 3)])
def test_similarity_logsumexp_is_the_formula(n, m, exclude):
    x, y = randn(n, DIM, seed=n), randn(m, DIM, seed=100 + m)
    row_bias, col_bias = randn(n, seed=200), randn(m, seed=300)
    rows, cols = naive_logsumexp(x, y, 1.7, row_bias, col_bias, exclude == "diagonal")
    arguments = {"logit_scale": 1.7, "row_bias": row_bias, "col_bias": col_bias, "exclude": exclude}
    row_lse, col_lse = reference.similarity_logsumexp(x, y, **arguments)
    assert_equal(row_lse, rows)
    assert_equal(col_lse, cols)
    assert_equal(reference.similarity_logsumexp(x, y, axis="rows", **arguments), rows)
    assert_equal(reference.similarity_logsumexp(x, y, axis="cols", **arguments), cols)


def test_similarity_logsumexp_defaults_to_scale_one_and_no_bias():
    x, y = randn(3, DIM, seed=1), randn(5, DIM, seed=2)
    rows, cols = naive_logsumexp(x, y, 1.0, torch.zeros(3), torch.zeros(5), drop_diagonal=False)
    row_lse, col_lse = reference.similarity_logsumexp(x, y)
    assert_equal(row_lse, rows)
    assert_equal(col_lse, cols)


def test_default_temperatures_are_the_papers():
    z1, z2, labels = randn(4, DIM, seed=1), randn(4, DIM, seed=2), torch.tensor([0, 1, 0, 1])
    assert_equal(reference.nt_xent(z1, z2), reductions(naive_nt_xent(z1, z2, 0.5))["mean"])
    assert_equal(reference.sup_con(z1, labels), reductions(naive_sup_con(z1, labels, 0.07)[0])["mean"])


# ----- values computed by hand -----


@pytest.mark.parametrize("n", SIZES)
def test_identical_embeddings_give_the_log_of_the_number_of_candidates(n):
    x = torch.tensor([[0.6, 0.8]], dtype=torch.float64).expand(n, 2)
    more = x[:1].expand(2 * n + 1, 2)
    labels = torch.zeros(n, dtype=torch.long)
    assert_equal(reference.info_nce(x, x, temperature=0.1), math.log(n))
    assert_equal(reference.info_nce(x, more, temperature=0.1, symmetric=False), math.log(2 * n + 1))
    assert_equal(reference.nt_xent(x, x), math.log(2 * n - 1))
    assert_equal(reference.sup_con(x, labels), math.log(n - 1) if n > 1 else 0.0)
    assert_equal(reference.similarity_logsumexp(x, x, logit_scale=3.0, axis="rows"), [3 + math.log(n)] * n)


def test_orthonormal_pairs_by_hand():
    x = torch.eye(4, dtype=torch.float64)
    # Every row of logits holds one 1/t and three 0: loss = log(1 + 3 exp(-1/t)).
    assert_equal(reference.info_nce(x, x, temperature=0.5), math.log1p(3 * math.exp(-2)))
    # Two views: the partner at 1/t, 2N - 2 = 6 others at 0.
    assert_equal(reference.nt_xent(x, x, temperature=0.5), math.log1p(6 * math.exp(-2)))
    # SigLIP: one positive at 10 - 10 = 0 and three negatives at -10 in each row.
    expected = math.log(2) + 3 * math.log1p(math.exp(-10))
    assert_equal(reference.siglip(x, x, logit_scale=10.0, logit_bias=-10.0), expected)


def test_siglip_at_one_pair_and_at_its_initial_values():
    one = torch.tensor([[1.0]], dtype=torch.float64)
    assert_equal(reference.siglip(one, one, logit_scale=10.0, logit_bias=-10.0), math.log(2))
    assert_equal(reference.siglip(one, one, logit_scale=2.0, logit_bias=1.0), math.log1p(math.exp(-3)))
    assert_equal(reference.siglip(one, -one, logit_scale=2.0, logit_bias=1.0), math.log1p(math.exp(1)))


@pytest.mark.parametrize("s", [19.0, 21.0, 30.0, 36.0, 50.0, 500.0])
def test_siglip_is_exact_where_softplus_is_cut_off(s):
    one = torch.tensor([[1.0]], dtype=torch.float64)
    relative = {"rtol": 1e-14, "atol": 0.0}
    # A confident positive: its loss is tiny, and the relative error must be too. Then a confidently wrong one.
    assert_equal(reference.siglip(one, one, logit_scale=s, logit_bias=0.0), math.log1p(math.exp(-s)), **relative)
    assert_equal(reference.siglip(one, one, logit_scale=-s, logit_bias=0.0), s + math.log1p(math.exp(-s)), **relative)


def test_sup_con_by_hand_with_an_anchor_without_a_positive():
    # Unit vectors at 0, 90, 180 and 270 degrees, t = 1; labels a, a, a, b. s: neighbours 0, opposite -1.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    labels = torch.tensor([7, 7, 7, -3])
    lse = math.log(2 + math.exp(-1))  # the same for every anchor: two neighbours and the opposite
    expected = [lse + 0.5, lse, lse + 0.5, 0.0]  # mean over positives of lse - s
    assert_equal(reference.sup_con(z, labels, temperature=1.0, reduction="none"), expected)
    assert_equal(reference.sup_con(z, labels, temperature=1.0), lse + 1 / 3)
    assert_equal(reference.sup_con(z, labels, temperature=1.0, reduction="sum"), 3 * lse + 1)


# ----- PyTorch's own cross-entropy -----


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_info_nce_is_cross_entropy(reduction):
    x, y, target = randn(6, DIM, seed=1), randn(9, DIM, seed=2), torch.arange(6)
    one_way = F.cross_entropy(x @ y.T / 0.1, target, reduction=reduction)
    assert_equal(reference.info_nce(x, y, temperature=0.1, symmetric=False, reduction=reduction), one_way)
    logits = 10 * x @ y[:6].T
    rows = F.cross_entropy(logits, target, reduction=reduction)
    cols = F.cross_entropy(logits.T, target, reduction=reduction)
    assert_equal(reference.info_nce(x, y[:6], logit_scale=10.0, reduction=reduction), (rows + cols) / 2)


# ----- gradients -----

TEMPERATURE, SCALE, BIAS = 0.6, 1.4, -0.7


def leaf(value):
    """A number, or a nested list of numbers, as a float64 leaf that receives a gradient."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def loss_cases():
    """name -> (function of leaves only, those leaves): every differentiable input of every loss."""

    def towers(n, m):
        return randn(n, 2, seed=n, grad=True), randn(m, 2, seed=50 + m, grad=True)

    labels = torch.tensor([0, 1, 0, 2, 0])  # two anchors without a positive
    cases = {
        "info_nce-temperature": (
            lambda x, y, t: reference.info_nce(x, y, temperature=t, reduction="none"),
            (*towers(3, 3), leaf(TEMPERATURE)),
        ),
        "info_nce-scale-rectangle": (
            lambda x, y, s: reference.info_nce(x, y, logit_scale=s, symmetric=False, reduction="none"),
            (*towers(2, 4), leaf([SCALE])),
        ),
        "siglip": (
            lambda x, y, s, b: reference.siglip(x, y, logit_scale=s, logit_bias=b, reduction="none"),
            (*towers(3, 3), leaf(SCALE), leaf([BIAS])),
        ),
        "nt_xent": (
            lambda x, y, t: reference.nt_xent(x, y, temperature=t, reduction="none"),
            (*towers(3, 3), leaf(TEMPERATURE)),
        ),
        "sup_con": (
            lambda z, t: reference.sup_con(z, labels, temperature=t, reduction="none"),
            (towers(5, 5)[0], leaf(TEMPERATURE)),
        ),
        "sup_con-mean": (
            lambda z, t: reference.sup_con(z, labels, temperature=t),
            (towers(5, 5)[0], leaf(TEMPERATURE)),
        ),
    }
    for exclude in (None, "diagonal"):
        cases[f"similarity_logsumexp-{exclude}"] = (
            lambda x, y, s, r, c, e=exclude: reference.similarity_logsumexp(
                x, y, logit_scale=s, row_bias=r, col_bias=c, exclude=e
            ),
            (*towers(3, 4), leaf(SCALE), randn(3, seed=8, grad=True), randn(4, seed=9, grad=True)),
        )
    cases["info_nce-normalize"] = (
        lambda x, y, t: reference.info_nce(x, y, temperature=t, normalize=True),
        (*towers(3, 3), leaf(TEMPERATURE)),
    )
    # One pair: the losses of InfoNCE and NT-Xent are 0 whatever the inputs, SupCon has no pair at all.
    cases["info_nce-one"] = (lambda x, y, t: reference.info_nce(x, y, temperature=t), (*towers(1, 1), leaf(SCALE)))
    cases["siglip-one"] = (
        lambda x, y, s, b: reference.siglip(x, y, logit_scale=s, logit_bias=b),
        (*towers(1, 1), leaf(SCALE), leaf(BIAS)),
    )
    cases["nt_xent-one"] = (lambda x, y, t: reference.nt_xent(x, y, temperature=t), (*towers(1, 1), leaf(SCALE)))
    cases["sup_con-one"] = (
        lambda z, t: reference.sup_con(z, torch.tensor([0]), temperature=t),
        (towers(1, 1)[0], leaf(SCALE)),
    )
    return cases


CASES = loss_cases()


@pytest.mark.parametrize("case", CASES)
def test_gradients_against_finite_differences(case):
    function, leaves = CASES[case]
    assert gradcheck(function, leaves)


@pytest.mark.parametrize("case", CASES)
def test_second_gradients_against_finite_differences(case):
    function, leaves = CASES[case]
    assert gradgradcheck(function, leaves)


def test_gradients_are_the_closed_form():
    """G_ij = u_i exp(s_ij - row_lse_i) + v_j exp(s_ij - col_lse_j), and what follows from it."""
    n, m, scale = 4, 6, 1.7
    x, y = randn(n, DIM, seed=1, grad=True), randn(m, DIM, seed=2, grad=True)
    logit_scale, row_bias, col_bias = leaf(scale), randn(n, seed=3, grad=True), randn(m, seed=4, grad=True)
    u, v = randn(n, seed=5), randn(m, seed=6)
    lse = reference.similarity_logsumexp(x, y, logit_scale=logit_scale, row_bias=row_bias, col_bias=col_bias)
    actual = torch.autograd.grad(lse, (x, y, logit_scale, row_bias, col_bias), grad_outputs=(u, v))

    with torch.no_grad():
        e = torch.exp(scale * torch.einsum("id,jd->ij", x, y) + row_bias[:, None] + col_bias[None, :])
        g = u[:, None] * e / e.sum(1, keepdim=True) + v[None, :] * e / e.sum(0, keepdim=True)
        dx, dy = scale * g @ y, scale * g.T @ x
        expected = (dx, dy, (x * dx).sum() / scale, g.sum(1), g.sum(0))
    for a, b in zip(actual, expected, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_tower_does_not_change_the_other_gradient(frozen):
    towers = [randn(4, DIM, seed=1, grad=True), randn(4, DIM, seed=2, grad=True)]
    full = torch.autograd.grad(reference.info_nce(*towers, temperature=0.3), towers)[1 - frozen]
    towers[frozen] = towers[frozen].detach()
    (alone,) = torch.autograd.grad(reference.info_nce(*towers, temperature=0.3), [towers[1 - frozen]])
    assert_equal(alone, full)
