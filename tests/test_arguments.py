"""Wrong arguments: each error names the argument, what came and what was expected. NaN in data is none."""

import copy
import re

import pytest
import torch
from calls import each_of

import flashcl

X, Y, LABELS = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([0, 0, 1])
ONE = torch.ones(())


def info_nce(x=X, y=X, **options):
    options = options if {"temperature", "logit_scale"} & set(options) else options | dict(temperature=0.1)
    return flashcl.info_nce(x, y, **options)


def siglip(x=X, y=X, **options):
    return flashcl.siglip(x, y, **dict(logit_scale=10.0, logit_bias=-10.0) | options)


def nt_xent(z1=X, z2=X, **options):
    return flashcl.nt_xent(z1, z2, **options)


def sup_con(z=X, labels=LABELS, **options):
    return flashcl.sup_con(z, labels, **options)


def logsumexp(x=X, y=X, **options):
    return flashcl.similarity_logsumexp(x, y, **options)


# function: the names of its embeddings, of its scalars
FUNCTIONS = {
    info_nce: (("x", "y"), ("temperature", "logit_scale")),
    siglip: (("x", "y"), ("logit_scale", "logit_bias")),
    nt_xent: (("z1", "z2"), ("temperature",)),
    sup_con: (("z",), ("temperature",)),
    logsumexp: (("x", "y"), ("logit_scale",)),
}
EMBEDDINGS = [(f, name) for f, (names, _) in FUNCTIONS.items() for name in names]
SECOND = [(f, names[1]) for f, (names, _) in FUNCTIONS.items() if len(names) == 2]
SCALARS = [(f, name) for f, (_, names) in FUNCTIONS.items() for name in names]
TEMPERATURES = [f for f, (_, names) in FUNCTIONS.items() if "temperature" in names]
REDUCED = [f for f in FUNCTIONS if f is not logsumexp]


def named(value):
    return getattr(value, "__name__", None)


def raises(error, name, *parts):
    """An error whose text begins with the name of the argument and holds the parts, in order."""
    return pytest.raises(error, match=rf"(?s)^{name}\b.*" + ".*".join(parts))


def test_the_arguments_that_are_not_wrong():
    for function in FUNCTIONS:
        assert all(value.isfinite().all() for value in each_of(function()))


@pytest.mark.parametrize("function, name", EMBEDDINGS, ids=named)
def test_embeddings_must_be_matrices_of_floats(function, name):
    with raises(TypeError, name, "Tensor", "list"):
        function(**{name: [[1.0, 2.0]]})
    for wrong in (X[0], X[None], ONE):
        with raises(ValueError, name, r"\(rows, D\)", str(list(wrong.shape))[1:-1]):
            function(**{name: wrong})
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with raises(TypeError, name, "float", str(dtype)):
            function(**{name: X.to(dtype)})


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse CSR):UserWarning")  # which PyTorch calls prototypes
@pytest.mark.parametrize("function, name", EMBEDDINGS, ids=named)
def test_embeddings_must_be_dense(function, name):
    nested = torch.nested.nested_tensor([X[0], X[1]])
    for wrong, kind in ((X.to_sparse(), "sparse_coo"), (X.to_sparse_csr(), "sparse_csr"), (nested, "nested")):
        with raises(TypeError, name, "dense", kind):
            function(**{name: wrong})


@pytest.mark.parametrize("function", REDUCED, ids=named)
def test_normalize_is_yes_or_no(function):
    for wrong in ("no", X, None):
        with raises(ValueError, "normalize", "True, False"):
            function(normalize=wrong)


@pytest.mark.parametrize("function, name", SECOND, ids=named)
def test_embeddings_must_match(function, name):
    first = FUNCTIONS[function][0][0]
    with raises(ValueError, name, first, "2", "5"):
        function(**{name: torch.ones(3, 5)})
    with raises(TypeError, name, first, "float32", "float64"):
        function(**{name: X.double()})
    with raises(ValueError, name, first, "cpu", "meta"):
        function(**{name: X.to("meta")})


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_no_rows(function):
    names = FUNCTIONS[function][0]
    options = dict(labels=LABELS[:0]) if function is sup_con else {}
    with raises(ValueError, names[0], "at least one row", r"got shape \(0,"):
        function(**dict.fromkeys(names, X[:0]), **options)


@pytest.mark.parametrize("function, name", EMBEDDINGS, ids=named)
def test_no_columns(function, name):
    with raises(ValueError, name, "at least one row and one column", r"got shape \(3, 0\)"):
        function(**dict.fromkeys(FUNCTIONS[function][0], X) | {name: X[:, :0]})


def test_a_rank_may_have_no_rows():
    alone = torch.distributed.ProcessGroup(0, 1)
    assert flashcl.explain(X[:0], Y, group=alone).startswith("0 x 4 logits, D = 2")
    with raises(ValueError, "x", "at least one row"):
        flashcl.explain(X[:0], Y)
    with raises(ValueError, "x", "at least one row and one column"):
        flashcl.explain(X[:0, :0], group=alone)


def test_explain():
    assert flashcl.explain(X, Y).startswith("3 x 4 logits, D = 2, torch.float32 on cpu\n")
    assert flashcl.explain(X).startswith("3 x 3 logits")
    with raises(TypeError, "x", "Tensor", "list"):
        flashcl.explain([[1.0]])
    with raises(ValueError, "y", "x", "2", "5"):
        flashcl.explain(X, torch.ones(3, 5))
    with pytest.raises(TypeError, match="group must be a .*ProcessGroup or a flashcl.Group, got object"):
        flashcl.explain(X, group=object())


@pytest.mark.parametrize("function", [siglip, nt_xent, info_nce], ids=named)
def test_towers_of_different_lengths(function):
    with raises(ValueError, FUNCTIONS[function][0][1], "3", "4"):
        function(**dict(zip(FUNCTIONS[function][0], (X, Y))))


def test_each_row_needs_a_positive():
    with raises(ValueError, "y", "at least", "4", "3"):
        info_nce(Y, X, symmetric=False)
    assert info_nce(X, Y, symmetric=False).isfinite()


def test_exactly_one_of_temperature_and_logit_scale():
    with pytest.raises(ValueError, match="exactly one of temperature and logit_scale.*temperature=None"):
        flashcl.info_nce(X, X)
    with raises(ValueError, "exactly one of temperature and logit_scale", "temperature=0.1", "logit_scale=10.0"):
        flashcl.info_nce(X, X, temperature=0.1, logit_scale=10.0)
    with pytest.raises(TypeError, match="logit_bias"):
        flashcl.siglip(X, X, logit_scale=1.0)
    with pytest.raises(TypeError, match="logit_scale"):
        flashcl.siglip(X, X, logit_bias=1.0)


def test_default_temperatures():
    z = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    assert flashcl.nt_xent(z, z.flip(1)) == flashcl.nt_xent(z, z.flip(1), temperature=0.5)
    assert flashcl.sup_con(z, torch.arange(6) % 2) == flashcl.sup_con(z, torch.arange(6) % 2, temperature=0.07)


@pytest.mark.parametrize("function", TEMPERATURES, ids=named)
@pytest.mark.parametrize("value", [0.0, -0.1, 0, float("nan")])
def test_temperature_must_be_positive(function, value):
    with raises(ValueError, "temperature", "positive", str(value)):
        function(temperature=value)


@pytest.mark.parametrize("function", TEMPERATURES, ids=named)
def test_inverse_temperatures_are_numbers_of_their_dtype(function):
    for value in (1e-39, 1e-320):
        with raises(ValueError, "temperature", "1 / temperature at most", str(value)):
            function(temperature=value)
    assert function(temperature=1e-38).dtype == torch.float32  # 1e38


@pytest.mark.parametrize("name", ["logit_scale", "logit_bias"])
@pytest.mark.parametrize("value", [1e39, -1e300])
def test_scalars_are_numbers_of_their_dtype(name, value):
    with raises(ValueError, name, "within", "float32", re.escape(str(value))):
        flashcl.siglip(X, X, **dict(logit_scale=1.0, logit_bias=0.0) | {name: value})


@pytest.mark.parametrize("function, name", SCALARS, ids=named)
def test_scalars(function, name):
    for wrong in (torch.ones(3), torch.ones(2, 2), torch.ones(0)):
        with raises(ValueError, name, "one element", str(list(wrong.shape))[1:-1]):
            function(**{name: wrong})
    for wrong in ("0.1", [0.1], 1j, True):
        with raises(TypeError, name, type(wrong).__name__):
            function(**{name: wrong})
    for wrong in (10**400, -(10**5000)):  # of the second Python makes no text
        with raises(ValueError, name, "float64"):
            function(**{name: wrong})
    for wrong in (ONE.long(), ONE.bool(), ONE.to(torch.complex64)):
        with raises(TypeError, name, str(wrong.dtype)):
            function(**{name: wrong})
    if name not in ("temperature", "logit_scale") or function is not info_nce:
        with raises(TypeError, name, "NoneType"):
            function(**{name: None})


def test_labels():
    for wrong in (torch.arange(2), torch.arange(4), LABELS[None], ONE.long()):
        with raises(ValueError, "labels", r"\(3,\)", str(list(wrong.shape))[1:-1]):
            sup_con(labels=wrong)
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        with raises(TypeError, "labels", "integer", str(dtype)):
            sup_con(labels=LABELS.to(dtype))
    with raises(TypeError, "labels", "Tensor", "list"):
        sup_con(labels=[0, 1, 2])
    with raises(ValueError, "labels", "cpu", "meta"):
        sup_con(labels=LABELS.to("meta"))


def test_labels_may_be_bools():
    z, labels = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 0, 1, 0, 0]).bool()
    assert torch.equal(sup_con(z, labels), sup_con(z, labels.long()))


@pytest.mark.parametrize("name, rows", [("row_bias", 3), ("col_bias", 4)])
def test_biases(name, rows):
    assert logsumexp(X, Y, **{name: torch.ones(rows)})[0].shape == (3,)
    for wrong in (torch.ones(5), torch.ones(rows, 1), ONE):
        with raises(ValueError, name, rf"\({rows},\)", str(list(wrong.shape))[1:-1]):
            logsumexp(X, Y, **{name: wrong})
    for dtype in (torch.int64, torch.complex64):
        with raises(TypeError, name, "float", str(dtype)):
            logsumexp(X, Y, **{name: torch.ones(rows, dtype=dtype)})
    with raises(TypeError, name, "Tensor", "float"):
        logsumexp(X, Y, **{name: 1.0})
    with raises(ValueError, name, "cpu", "meta"):
        logsumexp(X, Y, **{name: torch.ones(rows, device="meta")})


@pytest.mark.parametrize("function", REDUCED, ids=named)
@pytest.mark.parametrize("value", ["max", "Mean", None, 1])
def test_reduction(function, value):
    with raises(ValueError, "reduction", "'mean'", "'sum'", "'none'", repr(value)):
        function(reduction=value)


@pytest.mark.parametrize("value", ["rows", None, 2])
def test_symmetric(value):
    with raises(ValueError, "symmetric", "True", "False", repr(value)):
        info_nce(symmetric=value)


@pytest.mark.parametrize(
    "name, value, allowed", [("exclude", "self", "diagonal"), ("axis", "row", "rows"), ("axis", 0, "both")]
)
def test_exclude_and_axis(name, value, allowed):
    with raises(ValueError, name, allowed, repr(value)):
        logsumexp(**{name: value})


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_backend_and_group(function):
    for wrong in ("cpu", "Torch", None):
        with raises(ValueError, "backend", "'torch'", repr(wrong)):
            function(backend=wrong)
    with pytest.raises(TypeError, match="group must be a .*ProcessGroup or a flashcl.Group, got object"):
        function(group=object())
    with pytest.raises(ValueError, match="group is one that this rank is no member of"):
        function(group=torch.distributed.GroupMember.NON_GROUP_MEMBER)  # what new_group returns on ranks that it leaves out


def test_group_options():
    alone = torch.distributed.ProcessGroup(0, 1)
    with raises(ValueError, "strategy", "'ring'", "'tree'"):
        flashcl.Group(alone, strategy="tree")
    with raises(ValueError, "convention", "'local_grad'", "'mean'"):
        flashcl.Group(alone, convention="mean")
    with raises(ValueError, "chunk_bytes", "0"):
        flashcl.Group(alone, chunk_bytes=0)
    for convention in ("global", "global_grad", "global_scaled"):
        with raises(ValueError, "convention", convention, "'sum'"):
            flashcl.nt_xent(X, X, group=flashcl.Group(alone, convention=convention), reduction="sum")
    with raises(ValueError, "convention", "'global'", "no mean"):
        flashcl.similarity_logsumexp(X, X, group=flashcl.Group(alone, convention="global"))
    for wrong in (["ring"], {}):
        with raises(ValueError, "strategy", str(wrong)):
            flashcl.Group(alone, strategy=wrong)
        with raises(ValueError, "convention", str(wrong)):
            flashcl.Group(alone, convention=wrong)
    with raises(ValueError, "chunk_bytes", "True"):
        flashcl.Group(alone, chunk_bytes=True)
    with raises(ValueError, "chunk_bytes", "1.5"):
        flashcl.Group(alone, chunk_bytes=1.5)
    with raises(ValueError, "process_group", "no member"):
        flashcl.Group(torch.distributed.GroupMember.NON_GROUP_MEMBER)
    with raises(TypeError, "process_group", "NoneType"):
        flashcl.Group(None)


def test_a_copied_module_talks_to_the_same_ranks():
    alone = torch.distributed.ProcessGroup(0, 1)
    loss = copy.deepcopy(flashcl.InfoNCELoss(group=alone))
    assert loss.options["group"].process_group is alone


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_options_are_keywords_and_unknown_ones_are_errors(function):
    with pytest.raises(TypeError, match="tau"):
        function(tau=0.1)
    public = getattr(flashcl, "similarity_logsumexp" if function is logsumexp else named(function))
    with pytest.raises(TypeError, match="positional"):
        public(X, X, 0.1)


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite_is_no_error(function, value):
    names = FUNCTIONS[function][0]
    result = function(**{names[0]: torch.full((3, 2), value)})
    assert not (result[0] if isinstance(result, tuple) else result).isfinite().all()
