"""How the tests call the losses: names that many of them need. Nothing here imports conftest, so that ranks may import it."""

import torch

import flashcl
from flashcl.contract import LOSSES, case

SINGLE, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
REDUCED = [loss for loss in LOSSES if not loss.startswith("logsumexp")]  # those that take a reduction

# Where kernels break the contract (docs/accuracy.md), and why: (loss, regime, dtype of the embeddings).
KNOWN = {
    ("sup_con", "duplicates", BF16): "a bfloat16 G along rows that are copies of each other: 1.2 x the tight bound",
}


def per_row(loss, regime="init", **options):
    """A case with a value per row, each of which gets an upstream gradient of its own."""
    return case(loss, regime, **(dict(reduction="none") if loss in REDUCED else {}), **options)


def through(c, backend, before=lambda v: v, after=lambda v: v):
    """flashcl's function for a case, with something done to its embeddings before and to its values after."""

    def function(**arguments):
        arguments = {k: before(v) if k in ("x", "y", "z", "z1", "z2") else v for k, v in arguments.items()}
        return after(getattr(flashcl, c.function)(**arguments, backend=backend))

    return function


def each_of(values):
    """A tuple of what a loss returns: of its one tensor, or of the two of similarity_logsumexp."""
    return values if isinstance(values, tuple) else (values,)


def total_of(values):
    return sum(v.sum() for v in each_of(values))
