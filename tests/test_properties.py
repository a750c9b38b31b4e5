"""What is true of the losses whatever their inputs: properties that need no reference.

hypothesis picks the sizes, the scale, the dtype and a seed; the torch backend gets many examples and small tiles, the
triton backend a few in the interpreter.
"""

import pytest
import torch
from conftest import DTYPES
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import flashcl

pytestmark = pytest.mark.usefixtures("small_tiles")

EXAMPLES = {"torch": 40, "triton": 4}
PHASES = {"torch": (Phase.generate, Phase.shrink), "triton": (Phase.generate,)}  # to shrink takes hundreds of examples


class Draw:
    """Random inputs of one example: sizes N <= M, width D, size of the logits, dtype."""

    def __init__(self, n, more, d, scale, dtype, seed):
        self.n, self.m, self.d, self.scale, self.dtype = n, n + more, d, scale, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        # Values of order log N, logits of order scale: a few units in the last place of either, and of a tile's sum.
        self.close = dict(rtol=64 * torch.finfo(self.wide).eps, atol=16 * torch.finfo(self.wide).eps * (1 + 9 * scale))

    def __repr__(self):
        return f"N={self.n} M={self.m} D={self.d} scale={self.scale} {self.dtype}"

    def rows(self, rows):
        v = torch.randn(rows, self.d, generator=self.generator, dtype=torch.float64)
        return torch.nn.functional.normalize(v, dim=1).to(self.dtype)

    def vector(self, rows):
        return torch.randn(rows, generator=self.generator).to(self.wide)

    def order(self, rows):
        return torch.randperm(rows, generator=self.generator)


def for_all(backend, property_):
    """Runs a property on examples for a backend."""
    drawn = given(
        n=st.integers(1, 40),
        more=st.integers(0, 30),
        d=st.sampled_from([1, 2, 3, 8, 17, 33]),
        scale=st.sampled_from([0.1, 1.0, 14.3, 100.0]),
        dtype=st.sampled_from(DTYPES[backend]),
        seed=st.integers(0, 2**32 - 1),
    )(lambda **sizes: property_(Draw(**sizes)))
    settings(max_examples=EXAMPLES[backend], phases=PHASES[backend])(drawn)()


def assert_close(a, b, draw):
    torch.testing.assert_close(a, b, **draw.close)


def gradients(value, *leaves):
    return torch.autograd.grad(value.sum(), leaves)


def test_info_nce_is_the_mean_of_both_directions(backend):
    def holds(draw):
        x, y = draw.rows(draw.n), draw.rows(draw.n)
        options = dict(logit_scale=draw.scale, reduction="none", backend=backend)
        rows = flashcl.info_nce(x, y, symmetric=False, **options)
        cols = flashcl.info_nce(y, x, symmetric=False, **options)
        assert_close(flashcl.info_nce(x, y, **options), (rows + cols) / 2, draw)

    for_all(backend, holds)


def test_losses_are_not_negative_and_reductions_agree(backend):
    def holds(draw):
        x, y, labels = draw.rows(draw.n), draw.rows(draw.n), torch.arange(draw.n) % 5
        more = torch.cat([y, y[:1]])
        t = dict(temperature=1 / draw.scale, backend=backend)
        for loss in (
            lambda r: flashcl.info_nce(x, y, **t, reduction=r),
            lambda r: flashcl.info_nce(x, more, **t, reduction=r, symmetric=False),
            lambda r: flashcl.nt_xent(x, y, **t, reduction=r),
            lambda r: flashcl.sup_con(x, labels, **t, reduction=r),
            lambda r: flashcl.siglip(x, y, logit_scale=draw.scale, logit_bias=-1.0, reduction=r, backend=backend),
        ):
            none, total = loss("none"), loss("sum")
            assert none.isfinite().all() and (none >= 0).all()
            assert_close(total, none.sum(), draw)
            assert none.dtype == total.dtype == draw.wide and total.shape == ()
        counted = (labels.bincount()[labels] > 1).sum().clamp(min=1)
        mean = flashcl.sup_con(x, labels, **t)
        assert_close(mean, flashcl.sup_con(x, labels, **t, reduction="sum") / counted, draw)
        assert_close(flashcl.nt_xent(x, y, **t), flashcl.nt_xent(x, y, **t, reduction="none").mean(), draw)

    for_all(backend, holds)


def test_permuting_rows_permutes_losses_and_gradients(backend):
    def holds(draw):
        p, q = draw.order(draw.n), draw.order(draw.n)
        x, y = draw.rows(draw.n).requires_grad_(), draw.rows(draw.n).requires_grad_()
        options = dict(logit_scale=draw.scale, backend=backend)
        loss = flashcl.info_nce(x, y, **options, reduction="none")
        permuted = flashcl.info_nce(x[p], y[p], **options, reduction="none")
        assert_close(permuted, loss[p], draw)
        rows, cols = flashcl.similarity_logsumexp(x, y, **options)
        new_rows, new_cols = flashcl.similarity_logsumexp(x[p], y[q], **options)
        assert_close(new_rows, rows[p], draw)
        assert_close(new_cols, cols[q], draw)
        if draw.wide == draw.dtype:  # in 16 bits a tile rounds G, and other tiles round it otherwise
            for a, b in zip(gradients(loss, x, y), gradients(permuted, x, y)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())

    for_all(backend, holds)


def test_biases_shift(backend):
    def holds(draw):
        x, y, a, b = draw.rows(draw.n), draw.rows(draw.m), draw.vector(draw.n), draw.vector(draw.m)
        options = dict(logit_scale=draw.scale, backend=backend)
        rows, cols = flashcl.similarity_logsumexp(x, y, **options, row_bias=a, col_bias=b)
        shifted_rows, shifted_cols = flashcl.similarity_logsumexp(x, y, **options, row_bias=a + 3, col_bias=b - 1)
        assert_close(shifted_rows, rows + 2, draw)
        assert_close(shifted_cols, cols + 2, draw)
        only_rows = flashcl.similarity_logsumexp(x, y, **options, col_bias=b, axis="rows")
        assert_close(rows, only_rows + a, draw)

    for_all(backend, holds)


def test_gradients_are_probabilities(backend):
    """d row_lse / d s is a softmax: what reaches the row biases is 1 each, what reaches the column biases sums to N."""

    def holds(draw):
        x, y = draw.rows(draw.n), draw.rows(draw.m)
        a, b = draw.vector(draw.n).requires_grad_(), draw.vector(draw.m).requires_grad_()
        options = dict(logit_scale=draw.scale, row_bias=a, col_bias=b, backend=backend)
        for axis, ones, others in (("rows", a, b), ("cols", b, a)):
            da, db = gradients(flashcl.similarity_logsumexp(x, y, axis=axis, **options), ones, others)
            assert_close(da, torch.ones_like(da), draw)
            assert (db >= 0).all()
            assert_close(db.sum(), torch.tensor(float(len(da)), dtype=draw.wide), draw)

    for_all(backend, holds)


def test_log_sum_exps_of_column_blocks_merge(backend):
    def holds(draw):
        x, y = draw.rows(draw.n), draw.rows(draw.m)
        options = dict(logit_scale=draw.scale, backend=backend)
        rows, cols = flashcl.similarity_logsumexp(x, y, **options)
        if draw.m == 1:
            return
        cut = 1 + int(draw.order(draw.m - 1)[0])
        first, second = (flashcl.similarity_logsumexp(x, part, **options) for part in (y[:cut], y[cut:]))
        assert_close(torch.logaddexp(first[0], second[0]), rows, draw)
        assert_close(torch.cat([first[1], second[1]]), cols, draw)

    for_all(backend, holds)


def test_log_sum_exp_lies_between_its_bounds(backend):
    """max <= lse <= max + log M, and transposing the problem swaps the outputs."""

    def holds(draw):
        x, y = draw.rows(draw.n), draw.rows(draw.m)
        options = dict(logit_scale=draw.scale, backend=backend)
        rows, cols = flashcl.similarity_logsumexp(x, y, **options)
        top = (draw.scale * x.double() @ y.double().T).amax(dim=1)
        assert (rows >= top - draw.close["atol"]).all()
        assert (rows <= top + torch.tensor(float(draw.m)).log() + draw.close["atol"]).all()
        swapped = flashcl.similarity_logsumexp(y, x, **options)
        assert_close(swapped[0], cols, draw)
        assert_close(swapped[1], rows, draw)

    for_all(backend, holds)


def test_excluding_the_diagonal_leaves_the_negatives(backend):
    def holds(draw):
        x, y = draw.rows(draw.n), draw.rows(draw.m)
        options = dict(logit_scale=draw.scale, backend=backend)
        rows, _ = flashcl.similarity_logsumexp(x, y, **options)
        others = flashcl.similarity_logsumexp(x, y, **options, exclude="diagonal", axis="rows")
        positive = draw.scale * (x.to(draw.wide) * y[: draw.n].to(draw.wide)).sum(1)
        assert_close(torch.logaddexp(others, positive), rows, draw)
        loss = flashcl.info_nce(x, y, **options, symmetric=False, reduction="none")
        assert_close(loss, rows - positive, draw)

    for_all(backend, holds)


def test_nt_xent_is_sup_con_of_pairs(backend):
    def holds(draw):
        z1, z2 = draw.rows(draw.n).requires_grad_(), draw.rows(draw.n).requires_grad_()
        t = dict(temperature=1 / draw.scale, reduction="none", backend=backend)
        labels = draw.order(draw.n).repeat(2)
        pairs = flashcl.nt_xent(z1, z2, **t)
        assert_close(pairs, flashcl.sup_con(torch.cat([z1, z2]), labels, **t), draw)
        assert_close(pairs, flashcl.nt_xent(z2, z1, **t).roll(draw.n), draw)

    for_all(backend, holds)


def test_sup_con_sees_only_which_labels_are_equal(backend):
    def holds(draw):
        z, labels = draw.rows(draw.m), draw.order(draw.m) // 3
        t = dict(temperature=1 / draw.scale, reduction="none", backend=backend)
        loss = flashcl.sup_con(z, labels, **t)
        assert_close(loss, flashcl.sup_con(z, 2**40 - 7 * labels, **t), draw)
        alone = labels.bincount()[labels] == 1
        assert (loss[alone] == 0).all()

    for_all(backend, holds)


def test_siglip_of_a_row_knows_no_other_row(backend):
    """A row of x pays for its own pairs, whatever the other rows of x are."""

    def holds(draw):
        x, y = draw.rows(draw.n), draw.rows(draw.n)
        options = dict(logit_scale=draw.scale, logit_bias=-draw.scale / 2, reduction="none", backend=backend)
        others = draw.rows(draw.n)
        others[0] = x[0]
        assert_close(flashcl.siglip(others, y, **options)[0], flashcl.siglip(x, y, **options)[0], draw)

    for_all(backend, holds)


def test_normalize_makes_the_length_irrelevant(backend):
    def holds(draw):
        x, y = draw.rows(draw.n), draw.rows(draw.n)
        options = dict(logit_scale=draw.scale, normalize=True, backend=backend)
        # Powers of two, which change no digit; gradients along an embedding vanish.
        scaled = (4 * x).requires_grad_()
        loss = flashcl.info_nce(scaled, 0.5 * y, **options)
        assert_close(loss, flashcl.info_nce(x, y, **options), draw)
        (dx,) = gradients(loss, scaled)
        along = (dx.double() * scaled.detach().double()).sum(1)
        assert (along.abs() <= 8 * torch.finfo(draw.dtype).eps * (1 + draw.scale)).all()

    for_all(backend, holds)
