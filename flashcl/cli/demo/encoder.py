"""The model of `flashcl demo`: hashed word features, and two small towers that put text and code in one space."""

from __future__ import annotations

import functools
import math
import re
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BUCKETS = 2**15
WIDTH, HIDDEN, DIM = 128, 256, 64
DROPPED_FEATURES = 0.2  # in training: no pair shall be told by a single rare word
MAX_WORDS = 400
MAX_LOGIT_SCALE = 100.0  # as CLIP

# HTTPServer2 -> HTTP, Server, 2; snake_case falls apart because "_" is no letter
_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


@functools.lru_cache(maxsize=None)
def features(word: str) -> tuple[int, ...]:
    """The buckets of a word, of its first five letters as a crude stem, and of its trigrams: parsing meets parse."""
    framed = f"<{word}>"
    names = {word, f"^{word[:5]}", *(framed[i : i + 3] for i in range(len(framed) - 2))}
    # crc32, because Python's hash() of a string differs from one process to the next
    return tuple(zlib.crc32(name.encode()) % BUCKETS for name in sorted(names))


@dataclass
class Bags:
    """Texts as bags of features: text k has ids[starts[k]:starts[k + 1]], with those weights."""

    ids: Tensor  # (F,) int32
    weights: Tensor  # (F,) float32
    starts: Tensor  # (K + 1,) int64

    @classmethod
    def of(cls, texts: Iterable[str]) -> Bags:
        """Each feature once per text, weighted by the square root of its count."""
        ids, counts, lengths = array("i"), array("f"), array("q", [0])
        for text in texts:
            bag: dict[int, int] = {}
            for word, count in Counter(words(text)[:MAX_WORDS]).items():
                for bucket in features(word):
                    bag[bucket] = bag.get(bucket, 0) + count
            ids.extend(bag.keys())
            counts.extend(bag.values())
            lengths.append(len(bag))
        as_tensor = [torch.from_numpy(np.array(values)) for values in (ids, counts, lengths)]
        return cls(as_tensor[0], as_tensor[1].sqrt_(), as_tensor[2].cumsum(0))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def to(self, device: torch.device) -> Bags:
        return Bags(self.ids.to(device), self.weights.to(device), self.starts.to(device))

    def take(self, rows: Tensor) -> Bags:
        """The bags of `rows` (B,) int64, in that order."""
        first, length = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        starts = F.pad(length.cumsum(0), (1, 0))
        shift = torch.repeat_interleave(first - starts[:-1], length)
        where = shift + torch.arange(len(shift), device=shift.device)
        return Bags(self.ids[where], self.weights[where], starts)

    def weighted(self, idf: Tensor) -> Bags:
        """The same bags with weights count * idf, and every bag of norm 1."""
        weights = self.weights * idf[self.ids]
        bag = torch.repeat_interleave(torch.arange(len(self), device=self.ids.device), self.starts.diff())
        squares = weights.new_zeros(len(self)).index_add_(0, bag, weights.square())
        return Bags(self.ids, weights / squares.sqrt().clamp(min=1e-6)[bag], self.starts)

    def inverse_document_frequency(self) -> Tensor:
        """log((K + 1) / (documents with the feature + 1)), (BUCKETS,)."""
        documents = torch.bincount(self.ids, minlength=BUCKETS)
        return torch.log((len(self) + 1) / (documents + 1))


class Head(nn.Module):
    """A linear map plus a small MLP that starts at zero, then L2 normalisation."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, DIM, bias=False)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM, bias=False))
        nn.init.zeros_(self.mlp[-1].weight)

    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(self.linear(z) + self.mlp(z), dim=-1)


class Encoder(nn.Module):
    """Two towers, text and code, and the temperature of their loss.

    They share the table of features and begin with equal heads, so that the untrained model matches texts and codes by
    the words they have in common (a random projection of tf-idf).
    """

    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(BUCKETS, WIDTH, mode="sum")
        self.text_head, self.code_head = Head(), Head()
        self.code_head.load_state_dict(self.text_head.state_dict())
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as CLIP
        # how telling each feature is, in the training texts and in the training codes
        self.register_buffer("text_idf", torch.ones(BUCKETS))
        self.register_buffer("code_idf", torch.ones(BUCKETS))

    @property
    def logit_scale(self) -> Tensor:
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """After each step: a clamp of the value alone would stop the gradient that could bring it back."""
        self.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def encode_text(self, bags: Bags) -> Tensor:
        """(B, DIM), unit vectors, of bags weighted by text_idf."""
        return self.text_head(self._pool(bags))

    def encode_code(self, bags: Bags) -> Tensor:
        """(B, DIM), unit vectors, of bags weighted by code_idf."""
        return self.code_head(self._pool(bags))

    def _pool(self, bags: Bags) -> Tensor:
        weights = F.dropout(bags.weights, DROPPED_FEATURES, self.training)
        return self.table(bags.ids, bags.starts[:-1].to(bags.ids.dtype), per_sample_weights=weights)
