"""The oracle beside itself: identities between the losses, edges, dtypes, and arguments that it refuses."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from reference_inputs import DIM, SIZES, assert_equal, randn, rng

from flashcl import reference

# ----- identities and invariances -----


def all_losses(x, y, labels, **options):
    """Every loss on these towers, as a dict; labels are for SupCon on x."""
    return {
        "info_nce": reference.info_nce(x, y, temperature=0.5, **options),
        "one_way": reference.info_nce(x, y, temperature=0.5, symmetric=False, **options),
        "siglip": reference.siglip(x, y, logit_scale=2.0, logit_bias=-1.0, **options),
        "nt_xent": reference.nt_xent(x, y, **options),
        "sup_con": reference.sup_con(x, labels, temperature=0.5, **options),
    }


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("n", SIZES)
def test_nt_xent_is_sup_con_with_one_label_per_sample(n, reduction):
    z1, z2 = randn(n, DIM, seed=1), randn(n, DIM, seed=2)
    labels = torch.arange(n).repeat(2)
    expected = reference.sup_con(torch.cat([z1, z2]), labels, temperature=0.3, reduction=reduction)
    assert_equal(reference.nt_xent(z1, z2, temperature=0.3, reduction=reduction), expected)


def test_permuting_the_rows_permutes_the_losses():
    n = 7
    x, y, labels = randn(n, DIM, seed=1), randn(n, DIM, seed=2), torch.tensor([0, 1, 2, 0, 1, 0, 3])
    order = torch.randperm(n, generator=rng(3))
    before = all_losses(x, y, labels, reduction="none")
    after = all_losses(x[order], y[order], labels[order], reduction="none")
    for name, loss in before.items():
        both_views = torch.cat([order, order + n])
        assert_equal(after[name], loss[both_views if name == "nt_xent" else order])
        assert not torch.equal(loss, after[name])


def test_permuting_one_side_of_similarity_logsumexp_leaves_the_other():
    x, y, order = randn(5, DIM, seed=1), randn(7, DIM, seed=2), torch.randperm(5, generator=rng(3))
    rows, cols = reference.similarity_logsumexp(x, y)
    new_rows, new_cols = reference.similarity_logsumexp(x[order], y)
    assert_equal(new_rows, rows[order])
    assert_equal(new_cols, cols)


def test_swapping_the_towers():
    x, y = randn(6, DIM, seed=1), randn(6, DIM, seed=2)
    assert_equal(reference.info_nce(y, x, temperature=0.2), reference.info_nce(x, y, temperature=0.2))
    scales = {"logit_scale": 2.0, "logit_bias": -1.0}
    assert_equal(reference.siglip(y, x, **scales), reference.siglip(x, y, **scales))
    assert_equal(reference.nt_xent(y, x), reference.nt_xent(x, y))


def test_sup_con_sees_only_which_labels_are_equal():
    z, labels = randn(6, DIM, seed=1), torch.tensor([0, 1, 0, 1, 1, 2])
    renamed = torch.tensor([-5, 2**40, -5, 2**40, 2**40, 0])
    assert_equal(reference.sup_con(z, renamed), reference.sup_con(z, labels))
    same, different = reference.sup_con(z, labels == 0), reference.sup_con(z, (labels == 0).int())
    assert_equal(same, different)


def test_info_nce_is_a_log_sum_exp_less_the_positive():
    x, y = randn(6, DIM, seed=1), randn(6, DIM, seed=2)
    rows, cols = reference.similarity_logsumexp(x, y, logit_scale=3.0)
    positive = 3.0 * (x * y).sum(1)
    assert_equal(reference.info_nce(x, y, logit_scale=3.0, reduction="none"), (rows + cols) / 2 - positive)
    negatives = reference.similarity_logsumexp(x, y, logit_scale=3.0, exclude="diagonal", axis="rows")
    one_way = reference.info_nce(x, y, logit_scale=3.0, symmetric=False, reduction="none")
    assert_equal(one_way, F.softplus(negatives - positive, threshold=1e9))


def test_normalize_divides_each_row_by_its_length():
    x, y = 5 * randn(6, DIM, seed=1), 0.2 * randn(6, DIM, seed=2)
    labels = torch.tensor([0, 1, 0, 1, 1, 2])
    unit_x = x / torch.tensor([[math.hypot(*row)] for row in x.tolist()], dtype=torch.float64)
    unit_y = y / torch.tensor([[math.hypot(*row)] for row in y.tolist()], dtype=torch.float64)
    expected, as_given = all_losses(unit_x, unit_y, labels), all_losses(x, y, labels)
    for name, loss in all_losses(x, y, labels, normalize=True).items():
        assert_equal(loss, expected[name])
        assert (loss - as_given[name]).abs() > 1e-3


# ----- the edges -----


def assert_twice_differentiable(function, *leaves):
    """The gradient and the gradient of the gradient are finite, and no NaN is made and hidden on the way to either."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # anomaly mode warns that it is slow
        with torch.autograd.detect_anomaly(check_nan=True):
            first = torch.autograd.grad(function(*leaves).sum(), leaves, create_graph=True)
            total = sum((g * torch.linspace(0.5, 1.5, g.numel(), dtype=g.dtype).view_as(g)).sum() for g in first)
            second = torch.autograd.grad(total, leaves, allow_unused=True)
    assert all(g.isfinite().all() for g in first)
    assert all(g is None or g.isfinite().all() for g in second)
    return first


@pytest.mark.parametrize("labels", [[3], [0, 1], [4, 2, 0, 1]])
def test_sup_con_without_any_positive_is_a_zero_on_the_graph(labels):
    z, labels = randn(len(labels), DIM, seed=1, grad=True), torch.tensor(labels)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", labels.shape)):
        loss = reference.sup_con(z, labels, reduction=reduction)
        assert loss.requires_grad
        assert torch.equal(loss, torch.zeros(shape, dtype=torch.float64))
        (grad,) = assert_twice_differentiable(lambda z, r=reduction: reference.sup_con(z, labels, reduction=r), z)
        assert torch.equal(grad, torch.zeros_like(z))


def test_sup_con_anchors_without_a_positive_are_still_candidates():
    z = randn(5, DIM, seed=1)
    without = reference.sup_con(z[:4], torch.tensor([0, 0, 1, 1]), reduction="none")
    with_loner = reference.sup_con(z, torch.tensor([0, 0, 1, 1, 9]), reduction="none")
    assert (with_loner[:4] > without).all()  # one more negative in each denominator
    assert with_loner[4] == 0
    mean = reference.sup_con(z, torch.tensor([0, 0, 1, 1, 9]))
    assert_equal(mean, with_loner.sum() / 4)


def test_one_pair_has_nothing_to_contrast():
    x, y = randn(1, DIM, seed=1, grad=True), randn(1, DIM, seed=2, grad=True)
    for function in (
        lambda x, y: reference.info_nce(x, y, temperature=0.1),
        lambda x, y: reference.info_nce(x, y, temperature=0.1, symmetric=False),
        lambda x, y: reference.nt_xent(x, y),
    ):
        assert function(x, y).item() == 0
        for grad in assert_twice_differentiable(function, x, y):
            assert torch.equal(grad, torch.zeros(1, DIM, dtype=torch.float64))


def test_a_row_without_a_pair_is_minus_infinity_and_passes_no_gradient():
    x, y = randn(1, DIM, seed=1, grad=True), randn(4, DIM, seed=2, grad=True)
    # The only row meets columns 1, 2, 3; column 0 meets nothing.
    _, cols = reference.similarity_logsumexp(x, y, exclude="diagonal")
    assert_equal(cols, [-math.inf, *(x @ y[1:].T).flatten().tolist()])
    _, dy = assert_twice_differentiable(
        lambda x, y: reference.similarity_logsumexp(x, y, exclude="diagonal", axis="cols"), x, y
    )
    assert_equal(dy, torch.cat([torch.zeros(1, DIM), x.detach().expand(3, DIM)]))
    # One pair, and it is excluded.
    y = y[:1].detach().requires_grad_()
    for axis in ("rows", "cols"):
        alone = reference.similarity_logsumexp(x, y, exclude="diagonal", axis=axis)
        assert_equal(alone, [-math.inf])
        for grad in assert_twice_differentiable(
            lambda x, y, a=axis: reference.similarity_logsumexp(x, y, exclude="diagonal", axis=a), x, y
        ):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_a_bias_of_minus_infinity_removes_a_row():
    x, y = randn(3, DIM, seed=1, grad=True), randn(4, DIM, seed=2, grad=True)
    row_bias = torch.tensor([0.0, -math.inf, 0.0], dtype=torch.float64)
    rows, cols = reference.similarity_logsumexp(x, y, row_bias=row_bias)
    kept_rows, kept_cols = reference.similarity_logsumexp(x[[0, 2]], y)
    assert rows[1] == -math.inf
    assert_equal(rows[[0, 2]], kept_rows)
    assert_equal(cols, kept_cols)
    dx, _ = assert_twice_differentiable(
        lambda x, y: torch.cat(reference.similarity_logsumexp(x, y, row_bias=row_bias)), x, y
    )
    assert torch.equal(dx[1], torch.zeros(DIM, dtype=torch.float64))
    assert (dx[[0, 2]] != 0).all()


def test_no_candidates_and_no_rows():
    x, nothing = randn(3, DIM, seed=1), torch.zeros(0, DIM, dtype=torch.float64)
    rows, cols = reference.similarity_logsumexp(x, nothing)
    assert_equal(rows, [-math.inf] * 3)
    assert_equal(cols, [])
    assert reference.info_nce(nothing, x, temperature=1.0, symmetric=False, reduction="none").shape == (0,)
    assert reference.nt_xent(nothing, nothing, reduction="sum") == 0
    assert reference.sup_con(nothing, torch.zeros(0, dtype=torch.long)) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1e2, 1e3, 1e4])
def test_extreme_logits_stay_finite(size, dtype):
    x, y = randn(6, DIM, seed=1, dtype=dtype), randn(6, DIM, seed=2, dtype=dtype)
    x, y = F.normalize(x, dim=1).requires_grad_(), F.normalize(y, dim=1).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 1, 2])
    for function in (
        lambda x, y: reference.info_nce(x, y, logit_scale=size),
        lambda x, y: reference.info_nce(x, y, temperature=-1 / size),
        lambda x, y: reference.siglip(x, y, logit_scale=size, logit_bias=-size / 2),
        lambda x, y: reference.siglip(x, y, logit_scale=-size, logit_bias=size / 2),
        lambda x, y: reference.nt_xent(x, y, temperature=1 / size),
        lambda x, y: reference.sup_con(torch.cat([x, y]), labels.repeat(2), temperature=1 / size),
        lambda x, y: torch.cat(reference.similarity_logsumexp(x, y, logit_scale=size, exclude="diagonal")),
    ):
        value = function(x, y)
        assert value.isfinite().all()
        assert value.abs().max() < 100 * size
        assert_twice_differentiable(function, x, y)


def test_extreme_logits_by_hand():
    x = torch.eye(3, dtype=torch.float64)
    wrong = x[[1, 2, 0]]  # every positive at 0, one negative at 1e4
    assert_equal(reference.info_nce(x, x, logit_scale=1e4), 0.0)
    assert_equal(reference.info_nce(x, wrong, logit_scale=1e4), 1e4)
    assert_equal(reference.siglip(x, wrong, logit_scale=1e4, logit_bias=0.0), 1e4 + 2 * math.log(2))
    # The excluded self-similarity, at +1e4, has no weight beside a partner at -1e4.
    assert_equal(reference.nt_xent(x[:1], -x[:1], temperature=1e-4), 0.0)
    assert_equal(reference.sup_con(torch.cat([x[:1], -x[:1]]), torch.tensor([0, 0]), temperature=1e-4), 0.0)
    rows, cols = reference.similarity_logsumexp(x, wrong, logit_scale=1e4)
    assert_equal(rows, [1e4] * 3)
    assert_equal(cols, [1e4] * 3)
    assert_equal(reference.similarity_logsumexp(x, x, logit_scale=-1e4, axis="rows"), [math.log(2)] * 3)


# ----- dtypes -----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_results_are_float32_or_float64(dtype):
    x, y = randn(4, DIM, seed=1, dtype=dtype, grad=True), randn(4, DIM, seed=2, dtype=dtype, grad=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    labels = torch.tensor([0, 1, 0, 1])
    for reduction in ("none", "sum", "mean"):
        for normalize in (False, True):
            for loss in all_losses(x, y, labels, reduction=reduction, normalize=normalize).values():
                assert loss.dtype == wide
    # Neither a one-element tensor nor a bias vector of another dtype decides the dtype of the result.
    for other in (torch.float32, torch.float64):
        one, vector = torch.ones(1, dtype=other, requires_grad=True), torch.ones(4, dtype=other, requires_grad=True)
        lse = reference.similarity_logsumexp(x, y, logit_scale=one, row_bias=vector, col_bias=vector)
        loss = reference.siglip(x, y, logit_scale=one, logit_bias=one)
        assert {lse[0].dtype, lse[1].dtype, loss.dtype} == {wide}
        grads = torch.autograd.grad(lse[0].sum() + loss, (x, y, one, vector))
        assert [g.dtype for g in grads] == [dtype, dtype, other, other]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_plain_pytorch_formula(dtype):
    x, y = randn(6, DIM, seed=1, dtype=dtype), randn(6, DIM, seed=2, dtype=dtype)
    target, scale, bias = torch.arange(6), torch.tensor([3.3]), torch.tensor(-1.7)
    logits = x @ y.T * 3.3
    assert logits.dtype == dtype

    clip = (F.cross_entropy(logits.float(), target) + F.cross_entropy(logits.T.float(), target)) / 2
    assert_equal(reference.info_nce(x, y, logit_scale=scale), clip, rtol=1e-6)
    rows, cols = reference.similarity_logsumexp(x, y, logit_scale=scale)
    assert_equal(rows, logits.float().logsumexp(1), rtol=1e-6)
    assert_equal(cols, logits.float().logsumexp(0), rtol=1e-6)
    z = 2 * torch.eye(6) - 1
    expected = F.softplus(-z * (logits + -1.7).float()).sum() / 6
    assert_equal(reference.siglip(x, y, logit_scale=scale, logit_bias=bias), expected, rtol=1e-6)
    # ... which is not what the same embeddings give in float64, but near it.
    exact = reference.info_nce(x.double(), y.double(), logit_scale=3.3)
    assert 1e-7 < abs(clip.item() - exact.item()) < 0.05 * exact.item()


def test_float32_is_near_float64():
    x, y, labels = randn(7, DIM, seed=1), randn(7, DIM, seed=2), torch.tensor([0, 1, 2, 0, 1, 0, 3])
    x, y = x.float(), y.float()
    exact = all_losses(x.double(), y.double(), labels)
    for name, loss in all_losses(x, y, labels).items():
        assert_equal(loss, exact[name], rtol=2e-6)


# ----- wrong arguments -----

X, Y, LABELS = torch.ones(3, 2), torch.ones(4, 2), torch.zeros(3).long()
WRONG = {
    "no temperature": (ValueError, "temperature and logit_scale", lambda: reference.info_nce(X, X)),
    "both": (ValueError, "exactly one", lambda: reference.info_nce(X, X, temperature=1.0, logit_scale=1.0)),
    "not square": (ValueError, "y: .*3.*4", lambda: reference.info_nce(X, Y, temperature=1.0)),
    "too few": (ValueError, "y: .*4.*3", lambda: reference.info_nce(Y, X, temperature=1.0, symmetric=False)),
    "siglip": (ValueError, "y: .*3.*4", lambda: reference.siglip(X, Y, logit_scale=1.0, logit_bias=0.0)),
    "nt_xent": (ValueError, "z2: .*3.*4", lambda: reference.nt_xent(X, Y)),
    "width": (ValueError, "y: .*2 features.*3", lambda: reference.similarity_logsumexp(X, torch.ones(3, 3))),
    "one-dimensional": (ValueError, "x: ", lambda: reference.similarity_logsumexp(X[0], X)),
    "mixed dtypes": (TypeError, "y: .*float32.*float64", lambda: reference.similarity_logsumexp(X, X.double())),
    "integers": (TypeError, "x: .*int64", lambda: reference.similarity_logsumexp(X.long(), X.long())),
    "a list": (TypeError, "y: .*list", lambda: reference.similarity_logsumexp(X, [[1.0, 2.0]])),
    "two scales": (ValueError, r"logit_scale: .*\(3,\)", lambda: reference.info_nce(X, X, logit_scale=X[:, 0])),
    "a string": (TypeError, "temperature: .*str", lambda: reference.nt_xent(X, X, temperature="0.5")),
    "no bias": (TypeError, "logit_bias: ", lambda: reference.siglip(X, X, logit_scale=1.0, logit_bias=None)),
    "row_bias": (ValueError, r"row_bias: .*3.*4", lambda: reference.similarity_logsumexp(X, Y, row_bias=Y[:, 0])),
    "col_bias": (TypeError, "col_bias: .*float", lambda: reference.similarity_logsumexp(X, Y, col_bias=1.0)),
    "labels shape": (ValueError, r"labels: .*\(3,\).*\(4,\)", lambda: reference.sup_con(X, torch.arange(4))),
    "labels dtype": (TypeError, "labels: .*float32", lambda: reference.sup_con(X, torch.zeros(3))),
    "reduction": (ValueError, "reduction: .*'max'", lambda: reference.sup_con(X, LABELS, reduction="max")),
    "exclude": (ValueError, "exclude: .*'self'", lambda: reference.similarity_logsumexp(X, Y, exclude="self")),
    "axis": (ValueError, "axis: .*1", lambda: reference.similarity_logsumexp(X, Y, axis=1)),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case):
    error, message, call = WRONG[case]
    with pytest.raises(error, match=message):
        call()
