"""flashcl: contrastive losses over all pairs of two sets of embeddings, without ever storing the logits.

    loss = flashcl.info_nce(x, y, temperature=0.07)        # CLIP, retrieval
    loss = flashcl.siglip(x, y, logit_scale=s, logit_bias=b)
    loss = flashcl.nt_xent(z1, z2)                          # SimCLR
    loss = flashcl.sup_con(z, labels)

The same losses as modules with learnable temperatures: InfoNCELoss, SigLIPLoss, NTXentLoss, SupConLoss.
"""

import importlib

from flashcl.engine.dispatch import explain
from flashcl.engine.ranks import Group
from flashcl.losses.info_nce import info_nce
from flashcl.losses.nt_xent import nt_xent
from flashcl.losses.siglip import siglip
from flashcl.losses.similarity_logsumexp import similarity_logsumexp
from flashcl.losses.sup_con import sup_con
from flashcl.modules import InfoNCELoss, NTXentLoss, SigLIPLoss, SupConLoss

__version__ = "0.1.0"
__all__ = [
    "Group",
    "InfoNCELoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "explain",
    "info_nce",
    "nt_xent",
    "siglip",
    "similarity_logsumexp",
    "sup_con",
]


def __getattr__(name: str):
    # The dense losses are for tests, checks and benchmarks: imported when asked for.
    if name == "reference":
        return importlib.import_module("flashcl.reference")
    raise AttributeError(f"module 'flashcl' has no attribute {name!r}")
