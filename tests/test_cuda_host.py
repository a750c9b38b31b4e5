"""csrc/ without a GPU, twice: what the CUDA kernels have beside sweep and grad (test_kernels.py).

emulated: csrc/emulate.cpp does to tiles of a CPU product what the kernels do to those of the tensor cores, lane by lane, and
flashcl.backends.cuda takes CPU tensors through it.
ptx: the kernels themselves, as PTX, on a simulated GPU (ptx/). test_cuda_ptx.py has what is of it alone.
"""

import dataclasses
import math
import sys

import numpy
import pytest
import torch
from hypothesis import given, strategies as st
from kernels import assert_close, assert_grads, assert_sweeps, problem, softmax

_C = pytest.importorskip("flashcl._C", reason="flashcl._C was not built: no nvcc, or no CUTLASS headers")

import ptx

from flashcl.backends import cuda as backend, tiled
from flashcl.engine.problem import CLASSES, Problem

TILE = _C.TILE
DTYPES = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("poison")


@pytest.fixture(params=["emulated", "ptx"], scope="module", autouse=True)
def kernels(request):
    if request.param == "emulated":
        yield request.param
        return
    machine = ptx.machine()
    if isinstance(machine, str):
        pytest.skip(machine)
    with pytest.MonkeyPatch.context() as patch:
        for module in (backend, sys.modules[__name__]):
            patch.setattr(module, "_C", machine.module)
        yield request.param


# ---- walks and layouts ---------------------------------------------------------------------------------------------------


@given(tiles_n=st.integers(1, 40), tiles_m=st.integers(1, 40), triangular=st.booleans())
def test_a_walk_meets_every_tile_once(tiles_n, tiles_m, triangular):
    tiles_m = tiles_n if triangular else tiles_m
    walk = _C.schedule(tiles_n, tiles_m, triangular)
    wanted = [(n, m) for _, _, n, m, counts in walk if counts]
    every = [(n, m) for n in range(tiles_n) for m in range(tiles_m) if not triangular or m >= n]
    assert sorted(wanted) == every
    # Beside them only what pairs, in a triangle squares of two by two, have past the edges and below the diagonal.
    assert len(walk) - len(wanted) <= (2 * tiles_n + 1 if triangular else tiles_m)


@given(tiles_n=st.integers(1, 40), tiles_m=st.integers(1, 40), triangular=st.booleans())
def test_the_ctas_of_a_cluster_share_columns(tiles_n, tiles_m, triangular):
    walk = _C.schedule(tiles_n, tiles_n if triangular else tiles_m, triangular)
    for unit, pair in enumerate(zip(*[iter(walk)] * 2)):
        n, m = pair[0][2:4]
        assert n % 2 == 0
        assert [tile[:4] for tile in pair] == [(unit, 0, n, m), (unit, 1, n + 1, m)]


def test_a_wave_shares_rows_and_columns():
    """The tiles that run together on 132 processors read little of x and y: a square would read 23 of their tiles."""
    walk = _C.schedule(512, 512, False)
    read = []
    for start in range(0, len(walk) - 132, 132):
        wave = walk[start : start + 132]
        read.append(len({n for _, _, n, _, _ in wave}) + len({m for _, _, _, m, _ in wave}))
    assert sum(read) / len(read) < 26 and max(read) < 35  # the largest where one group of rows ends and the next begins


def test_every_accumulator_has_a_place():
    places = _C.fragment()
    assert sorted((row, col) for *_, row, col in places) == [(i, j) for i in range(TILE) for j in range(TILE)]
    for warp in range(4):  # one lane of each: all are alike
        assert sorted(p for w, lane, p, *_ in places if (w, lane) == (warp, 0)) == list(range(128))
    by_row = {}
    for warp, lane, _, row, _ in places:
        by_row.setdefault(row, set()).add((warp, lane // 4))
    assert all(len(quads) == 1 for quads in by_row.values())  # a row lies in one quad of one warp


@pytest.mark.skipif("90a" not in _C.build_info()["architectures"], reason="built without sm_90a")
def test_places_are_where_wgmma_leaves_them():
    assert _C.fragment_is_right()


def test_blocks_are_bounded_and_cover_the_matrix_once():
    most = tiled.WORKSPACE // 2  # numbers of G in 16 bits
    edge = math.isqrt(most)
    thin = ((1, 2**24), (2**24, 1), (64, 2**22), (2**22, TILE + 1))
    for N, M in (*thin, (1, 1), (1, 10**6), (10**6, 1), (4 * edge, 4 * edge), (10**6, 10**6), (4096, 10**6), (edge + 1, edge), (0, 3)):
        x, y = torch.empty(1, 1).expand(N, 1), torch.empty(1, 1).expand(M, 1)
        for triangular in {False, N == M}:
            p = Problem(x, y, torch.ones(1), triangular=triangular)
            for blocks in (list(tiled.blocks(p, most, TILE)), list(backend._strips(p, most))):
                cells = [(i.stop - i.start) * (j.stop - j.start) for i, j in blocks]
                room = [math.prod(tiled.whole(lines.stop - lines.start, TILE) for lines in block) for block in blocks]
                assert all(r <= most for r in room) and all(i.start % TILE == 0 == j.start % TILE for i, j in blocks)
                own = sum((i.stop - i.start) ** 2 for i, j in blocks if i.start == j.start)
                assert sum(cells) + (sum(cells) - own if triangular else 0) == N * M


def strips_of(p):
    return list(backend._strips(p, tiled.WORKSPACE // 2))


def test_a_triangle_is_cut_into_strips_where_one_would_be_higher_than_the_lowest():
    for N, strips in ((backend._LOWEST_STRIP, 1), (backend._LOWEST_STRIP + 1, 2)):
        x = torch.empty(1, 1).expand(N, 1)
        assert len(strips_of(Problem(x, x, torch.ones(1), triangular=True))) == strips


@pytest.mark.parametrize("program", CLASSES)
def test_one_strip_of_a_triangle(program):
    """Small problems as they are, in one strip; test_kernels.py has them cut."""
    for N in (1, 300, 600):
        p = problem(N, N, 8, program, triangular=True)
        assert len(strips_of(p)) == 1
        assert_sweeps(backend, p)
        assert_grads(backend, p, softmax(p))


@pytest.mark.parametrize("program", ["different", "by_label"])
def test_strips_lower_than_blocks(program, monkeypatch):
    """Blocks of 4 x 4 tiles: strips of one tile on the diagonal, whole blocks, which are larger, beside it."""
    monkeypatch.setattr(backend, "_LOWEST_STRIP", TILE)
    p = problem(1000, 1000, 16, program, triangular=True)
    sizes = [backend._whole(i) * backend._whole(j) for i, j in backend._strips(p, (4 * TILE) ** 2)]
    assert sizes[0] < max(sizes)
    assert_grads(backend, p, softmax(p), workspace=2 * (4 * TILE) ** 2)


def test_aligned_rows_are_not_copied():
    wide = torch.randn(40, 80).bfloat16()
    for x, same in ((wide[:, 16:40], True), (wide[:, 3:27], False), (wide[:, ::2], False), (wide[:1, :24].expand(40, 24), False)):
        padded = tiled.aligned(x, 8)
        assert (padded is x) == same and torch.equal(padded[:, : x.shape[1]], x)
    overlapping = torch.zeros(64).as_strided((4, 16), (8, 1))
    assert tiled.aligned(overlapping, 8).stride() == tiled.aligned(torch.zeros(1, 16).expand(4, 16), 8).stride() == (16, 1)


# ---- folds ---------------------------------------------------------------------------------------------------------------


def log_sum_exp(top, total):
    """In nats, of a top in bits."""
    return math.log(2) * (top.double() + total.double().log2())


def statistics(T, n=50):
    """Statistics (2, 2, T, n) of T tiles, lines 0 to 2 of which are empty, infinite and NaN, and their log-sum-exps (2, n)."""
    g = torch.Generator().manual_seed(T)
    top, total = torch.randn(2, T, n, generator=g) * 20, torch.rand(2, T, n, generator=g) + 0.5
    empty = torch.rand(2, T, n, generator=g) < 0.3
    empty[:, :, 0] = True
    top[empty], total[empty] = -torch.inf, 0.0
    top[:, -1, 1], total[:, -1, 1] = torch.inf, torch.inf
    total[:, 0, 2] = torch.nan
    return torch.stack([top, total], 1), log_sum_exp(top, total).logsumexp(1)


@pytest.mark.parametrize("T", [1, 7, 8, 9, 40])
def test_fold(T):
    """Statistics of T tiles onto those of earlier ones."""
    sums, lse = statistics(T)
    out = torch.zeros(2, 2, 60)
    out[:, 0] = -torch.inf
    out[0, 0, 3:9], out[0, 1, 3:9] = 30.0, 2.0
    want = torch.logaddexp(lse, log_sum_exp(out[:, 0, :50], out[:, 1, :50]))
    _C.fold(sums, out[:, :, :50])
    assert_close(log_sum_exp(out[:, 0, :50], out[:, 1, :50]), want, 1e-6, relative=False)
    assert (out[:, 0, 50:] == -torch.inf).all() and not out[:, 1, 50:].any()  # a slice, and nothing beside it


@pytest.mark.parametrize("T", [1, 7, 8, 9, 40])
def test_the_first_fold_reads_nothing_and_the_last_leaves_log_sum_exps(T):
    sums, lse = statistics(T)
    at_once = torch.full((2, 2, 60), torch.nan)
    _C.fold(sums, at_once[:, :, :50], first=True, last=True)
    high, low = at_once[:, 0, :50], at_once[:, 1, :50]
    assert_close(high.double() + low, lse, 1e-6, relative=False)  # 2^(top - top') is of float32
    assert at_once[:, :, 50:].isnan().all()

    finite = lse.isfinite()
    assert (low.abs() <= high.abs() * 2**-24)[finite].all()
    assert torch.equal(high[finite], (high.double() + low).float()[finite])
    assert (high[:, 0] == -torch.inf).all() and (high[:, 1] == torch.inf).all() and not low[:, :2].any()
    assert high[:, 2].isnan().all() and low[:, 2].isnan().all()

    several = torch.full((2, 2, 50), torch.nan)
    pieces = sums.split(3, dim=2)
    for k, piece in enumerate(pieces):
        _C.fold(piece.contiguous(), several, first=k == 0, last=k == len(pieces) - 1)
    assert_close(several.double().sum(1), lse, 2e-6, relative=False)


def test_what_a_float_loses_of_a_log_sum_exp_is_its_low_part():
    """At |s| = 1e4 one float32 is off by 5e-4."""
    top, total = torch.linspace(-1e4, 1e4, 999), torch.rand(999) + 1
    out = torch.empty(1, 2, 999)
    _C.fold(torch.stack([top, total])[None, :, None].contiguous(), out, first=True, last=True)
    want = log_sum_exp(top, total)
    assert (out[0].double().sum(0) - want).abs().max() < 2e-11 < 1e-4 < (out[0, 0] - want).abs().max()


# ---- G -------------------------------------------------------------------------------------------------------------------


def raw_grad(p, weight, lse):
    """G by the kernel from coefficients as they are, (1, whole tiles) of the rows and perhaps of the columns."""
    (N, M), (tiles_n, tiles_m) = (len(p.x), len(p.y)), (-(-len(v) // TILE) for v in (p.x, p.y))
    g = torch.full((tiles_n * TILE, tiles_m * TILE), torch.nan, dtype=p.x.dtype)
    sides = dict(row_weight=weight[0], row_lse=lse[0])
    if len(weight) == 2:
        sides |= dict(col_weight=weight[1], col_lse=lse[1])
    _C.grad(_C.Block(p.x, p.y, p.logit_scale), **sides, g=g)
    assert not g[N:].any() and not g[:, M:].any()
    return g[:N, :M].double()


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("spread", [1, 30], ids=["one exp", "two exps"])
def test_lines_without_pairs_have_no_gradient_whatever_their_weight(sides, spread):
    """Their log-sum-exp is -inf, and says nothing of how close those of the tile are."""
    p = problem(200, 300, 16, scale=0.2)
    lse = [torch.full((1, n), 3.0) + spread * torch.rand(1, n) for n in (256, 384)[:sides]]
    weight = [torch.rand(1, v.shape[1]) + 0.5 for v in lse]
    empty = [[0, 33, 199], [5, 131, 299]][:sides]
    for v, w, lines, size in zip(lse, weight, empty, (200, 300)):
        v[0, lines] = -torch.inf
        w[0, lines] = torch.tensor([torch.nan, torch.inf, 3.0])
        v[0, size:], w[0, size:] = torch.nan, torch.nan  # past the edge: looked at by nobody
    s = 0.2 * p.x.double() @ p.y.double().T
    parts = [(s - v[0, :n].double().reshape(shape)).exp() * w[0, :n].double().reshape(shape)
             for v, w, n, shape in zip(lse, weight, (200, 300), ((-1, 1), (1, -1)))]  # fmt: skip
    parts[0][empty[0]] = 0
    if sides == 2:
        parts[1][:, empty[1]] = 0
    got, want = raw_grad(p, weight, lse), sum(parts)
    assert got.isfinite().all() and ((got - want).abs() <= 2**-8 * want.abs() + 1e-30).all()


def test_log_sum_exps_that_are_not_finite_stay_in_their_lines():
    """Of no line, some lines or all lines of a tile; +inf, where a logit is; NaN."""
    p = problem(128, 128, 8, scale=0.2)
    s = 0.2 * p.x.double() @ p.y.double().T
    finite, third = torch.full((1, 128), 2.0), torch.arange(128) == 3
    some = [torch.where(third, value, finite) for value in (-torch.inf, torch.inf, torch.nan)]
    lines, ones = [finite, torch.full((1, 128), -torch.inf), *some], [torch.ones(1, 128)] * 2
    for rows in lines:
        for cols in lines:
            row, col = (torch.where(v == -torch.inf, torch.inf, v).double() for v in (rows, cols))
            want = (s - row.T).exp() + (s - col).exp()
            assert_close(raw_grad(p, ones, [rows, cols]), want, 2**-8)


# ---- rows ----------------------------------------------------------------------------------------------------------------


ROWS = [(1, 1, 1, 0), (1, 1, 24, 5), (5, 7, 8, 3), (7, 5, 300, -2), (33, 33, 13, 32), (9, 40, 257, 39), (3, 3, 1000, 1)]


def rows_of(n, d, dtype, how, seed=0):
    """(n, d) side by side, with gaps between the rows, at an odd address, or one row n times."""
    wide = torch.randn(n, d + 11, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return dict(
        contiguous=wide[:, :d].contiguous(),
        strided=torch.cat([wide, wide[:, :5]], 1)[:, :d] if d % 8 else wide[:, :d],
        shifted=wide[:, 3 : d + 3],
        expanded=wide[:1, :d].expand(n, d),
    )[how]


LAYOUTS = ["contiguous", "strided", "shifted", "expanded"]


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_partner_products(dtype, how):
    for N, M, D, shift in ROWS:
        x, y = rows_of(N, D, dtype, how), rows_of(M, D, dtype, "contiguous", seed=1)
        out = torch.full((N,), torch.nan, dtype=torch.float64)
        _C.partner_products(x, y, shift, out)
        partner = (torch.arange(N) + shift) % M
        want = (x.double() * y.double()[partner]).sum(1)
        assert (out - want).abs().max() <= 1e-14 * D  # products of 16 bits are exact in float32


def test_partner_products_of_rows_that_are_not_finite():
    x, y = torch.randn(2, 40, 20).bfloat16()
    x[3, 19], y[7, 0], x[11, 2] = torch.nan, torch.inf, -torch.inf
    out = torch.empty(40, dtype=torch.float64)
    _C.partner_products(x, y, 1, out)
    want = (x.double() * y.double().roll(-1, 0)).sum(1)
    assert_close(out, want, 1e-14)
    assert (~out.isfinite()).nonzero().flatten().tolist() == [3, 6, 11]
    _C.partner_products(x[:0], y, 1, out)  # nothing to do


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("to", [*DTYPES, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_finish(dtype, to, how):
    for R, C, D, shift in ROWS:
        acc, other = torch.randn(R, D), rows_of(C, D, dtype, how)
        for n in {R, R // 2}:
            weight, scale = torch.randn(n), torch.tensor([-0.7])
            out = torch.full((R, D + 8), torch.nan, dtype=to)
            _C.finish(acc, other, weight, shift, scale, out[:, :D])
            want = acc.double()
            want[:n] += weight.double()[:, None] * other.double()[(torch.arange(n) + shift) % C]
            want *= scale.double()
            size = acc.double().abs() + (want / scale.double() - acc.double()).abs()  # of what is added
            assert ((out[:, :D].double() - want).abs() <= torch.finfo(to).eps / 2 * want.abs() + 2e-7 * size + 1e-7).all()
            assert out[:, D:].isnan().all()


def test_finish_in_place_without_partners_and_with_rows_that_are_not_finite():
    acc, other, scale = torch.randn(20, 12), torch.randn(9, 12).bfloat16(), torch.tensor([2.0])
    before, weight = acc.clone(), torch.randn(12)
    weight[5], other[(3 + 4) % 9] = torch.nan, torch.inf
    _C.finish(acc, other, weight, 4, scale, acc)
    want = before.double()
    want[:12] += weight.double()[:, None] * other.double()[(torch.arange(12) + 4) % 9]
    assert_close(acc, want * 2, 1e-6)
    assert (~acc.isfinite()).any(1).nonzero().flatten().tolist() == [3, 5]

    out = torch.empty(20, 12, dtype=torch.float16)
    _C.finish(before, None, None, 0, scale, out)
    assert torch.equal(out, (before * 2).half())
    _C.finish(before[:0], other, weight[:0], 3, scale, out[:0])
    _C.finish(before, other[:0], weight[:0], 0, scale, out)
    assert torch.equal(out, (before * 2).half())


# ---- what is refused -----------------------------------------------------------------------------------------------------


def test_unusable():
    assert "CUDA devices, not on cpu" in backend.unusable(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    "arch, dtype, built, why",
    [
        ((9, 0), torch.bfloat16, ["90a"], None),
        ((10, 0), torch.bfloat16, ["90a"], "sm_90, this is sm_100"),
        ((9, 0), torch.bfloat16, ["80"], "without 90a"),
        ((9, 0), torch.float32, ["90a"], "bfloat16 and float16, not torch.float32"),
    ],
)
def test_unusable_on_a_gpu(monkeypatch, arch, dtype, built, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: arch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backend, "_failed_check", lambda index: None)
    monkeypatch.setattr(_C, "build_info", lambda: dict(architectures=built))
    reason = backend.unusable(torch.device("cuda", 0), dtype)
    assert reason is None if why is None else why in reason


def test_a_self_check_that_gives_nan_has_failed(monkeypatch):
    monkeypatch.setattr(backend, "self_check", lambda device: [("dx", math.nan, 8e-3)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    with pytest.warns(UserWarning, match="dx is off by nan"):
        assert "dx is off by nan" in backend._failed_check.__wrapped__(0)


def failed_checks():
    return {name for name, error, allowed in backend.self_check(torch.device("cpu")) if not error <= allowed}


def test_the_self_check_sees_small_faults(monkeypatch):
    sweep, grad = backend.sweep, backend.grad

    def wrong_grad(*args, **options):
        g = grad(*args, **options)
        off = {k: 1.02 * v for k in ("dx", "dy", "row_sum") if (v := getattr(g, k)) is not None}
        return dataclasses.replace(g, **off)

    def wrong_sweep(*args, **options):
        s = sweep(*args, **options)
        for lse in (s.row, s.col):
            lse.parts.mul_(1 + 1e-5)
        return s

    with monkeypatch.context() as patch:
        patch.setattr(backend, "grad", wrong_grad)
        assert failed_checks() == {"dx", "dy", "softplus", "dx of softplus"}
    monkeypatch.setattr(backend, "sweep", wrong_sweep)
    assert failed_checks() >= {"row_lse", "col_lse"}


def test_the_self_check_passes_and_would_not_pass_anything(monkeypatch):
    device = torch.device("cpu")
    assert all(error <= allowed for _, error, allowed in backend.self_check(device))
    pad = tiled.pad
    monkeypatch.setattr(tiled, "pad", lambda v, tile, value=None: pad(v.roll(1, -1), tile, value))  # a wrong index map
    assert not any(error <= allowed for _, error, allowed in backend.self_check(device))


def test_the_self_check_minds_no_defaults():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            checked = backend.self_check(torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)
    assert all(error <= allowed for _, error, allowed in checked)


def test_tensors_come_by_either_way_of_dlpack():
    """PyTorch's by its table of C functions, if it has one; those of other libraries, and of older versions, by __dlpack__."""
    tops = torch.randn(1, 2, 3, 256).abs()
    out, other = torch.empty(1, 2, 200), numpy.empty((1, 2, 200), numpy.float32)
    _C.fold(tops, out, first=True, last=True)
    _C.fold(tops.numpy(), other, first=True, last=True)
    assert torch.equal(out, torch.from_numpy(other))
    shifted = torch.nn.functional.pad(tops, (0, 1))[..., 1:]
    for wrong in (tops.double(), tops[..., ::2], tops[0], shifted, tops.numpy()[0], None, 3):
        with pytest.raises((TypeError, ValueError)):
            _C.fold(wrong, out, first=True, last=True)
    read_only = numpy.zeros((1, 2, 200), numpy.float32)
    read_only.flags.writeable = False
    with pytest.raises(TypeError):
        _C.fold(tops, read_only, first=True, last=True)


def test_arguments_are_checked():
    x, one = torch.zeros(4, 8).bfloat16(), torch.ones(1)
    for wrong, what in (
        (dict(x=x[:, :4]), "multiple of 8"),
        (dict(x=torch.zeros(4, 20).bfloat16()[:, 4:12]), "16-byte"),
        (dict(x=x.half()), "dtype"),
        (dict(y=torch.zeros(4, 16).bfloat16()), "columns of x"),
        (dict(x=x[:0]), "rows"),
        (dict(row_bias=torch.zeros(4)), "row_bias has fewer elements"),
        (dict(row_id=torch.zeros(128, dtype=torch.int32)), "ranges"),
        (dict(triangular=True), "one x"),
    ):
        with pytest.raises(ValueError, match=what):
            _C.Block(**dict(x=x, y=x.clone(), logit_scale=one) | wrong)
    with pytest.raises(TypeError):
        _C.Block(x, x, one.double())  # never converted behind one's back
    with pytest.raises(TypeError):
        _C.Block(x, x, one, row_id=torch.zeros(128, dtype=torch.int64))
    with pytest.raises(ValueError, match="of positives"):
        _C.sweep(_C.Block(x, x, one), torch.zeros(1, 2, 1, 128), torch.zeros(128), torch.zeros(1, 128))
    with pytest.raises(ValueError, match="row_sums has fewer elements"):
        _C.sweep(_C.Block(x, x, one), torch.zeros(1, 2, 1, 127))


def test_rows_are_checked():
    x, y, one = torch.zeros(4, 8).bfloat16(), torch.zeros(5, 8).bfloat16(), torch.ones(1)
    acc, wide = torch.zeros(4, 8), torch.zeros(4, dtype=torch.float64)
    for wrong, what in (
        (dict(x=acc, y=torch.zeros(5, 8)), "16-bit"),
        (dict(x=x.half()), "16-bit"),
        (dict(y=y[:, :7]), "columns of x"),
        (dict(y=y[:0]), "and rows"),
        (dict(x=torch.zeros(8, 4).bfloat16().T), "contiguous"),
        (dict(out=wide[:3]), "fewer elements"),
    ):
        with pytest.raises(ValueError, match=what):
            _C.partner_products(**dict(x=x, y=y, shift=0, out=wide) | wrong)
    for wrong, what in (
        (dict(acc=x), "acc must be float32"),
        (dict(out=x[:3]), "shape of acc"),
        (dict(other=acc), "other must be"),
        (dict(weight=torch.ones(5)), "no more rows"),
        (dict(weight=None), "comes with"),
        (dict(out=torch.zeros(4, 8, dtype=torch.float64)), "out must be"),
    ):
        with pytest.raises(ValueError, match=what):
            _C.finish(**dict(acc=acc, other=y, weight=torch.ones(4), shift=0, scale=one, out=x) | wrong)
