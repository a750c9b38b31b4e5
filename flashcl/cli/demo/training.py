"""The training of `flashcl demo`: the split of the data, runs in lockstep, retrieval on held-out pairs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashcl.cli import memory
from flashcl.cli.demo import report
from flashcl.cli.demo.corpus import Pair
from flashcl.cli.demo.encoder import Bags, Encoder

LEARNING_RATE = 0.03
HELD_OUT = 2_000


@dataclass
class Data:
    """The features of all pairs, and which rows are for training and which are held out."""

    text: Bags
    code: Bags
    train: Tensor  # (T,) int64, on the CPU
    test: Tensor  # (H,) int64

    def to(self, device: torch.device) -> Data:
        return Data(self.text.to(device), self.code.to(device), self.train, self.test)


@dataclass
class Run:
    """One training run and what came of it."""

    loss: str
    batch: int
    losses: list[float]
    seconds_per_step: float
    recall1: float
    recall10: float
    encoder: Encoder


def prepare(pairs: list[Pair], seed: int) -> Data:
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    held_out = min(HELD_OUT, len(pairs) // 5)
    text, code = Bags.of(pair.text for pair in pairs), Bags.of(pair.code for pair in pairs)
    return Data(text, code, order[held_out:], order[:held_out])


def batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Batches for ever. An epoch's remainder is left out: over its end a batch would hold pairs twice."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        yield from (b for b in shuffled.split(size) if len(b) == size)


def initial_encoder(data: Data, seed: int) -> Encoder:
    torch.manual_seed(seed)
    encoder = Encoder()
    encoder.text_idf.copy_(data.text.take(data.train).inverse_document_frequency())
    encoder.code_idf.copy_(data.code.take(data.train).inverse_document_frequency())
    return encoder


class Trainee:
    """An encoder in training with one of memory.LOSSES."""

    def __init__(self, loss: str, encoder: Encoder):
        self.loss, self.encoder = loss, encoder
        self.optimizer = torch.optim.Adam(encoder.parameters(), betas=(0.9, 0.98), fused=True)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, text: Bags, code: Bags, learning_rate: float) -> None:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        x, y = self.encoder.encode_text(text), self.encoder.encode_code(code)
        value = memory.LOSSES[self.loss](x, y, logit_scale=self.encoder.logit_scale)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.encoder.clamp_logit_scale()
        self.losses.append(value.item())
        self.seconds.append(time.perf_counter() - start)

    def result(self, batch: int, data: Data) -> Run:
        found = recall(self.encoder, data)
        return Run(self.loss, batch, self.losses, statistics.median(self.seconds), *found, self.encoder)


def train(
    losses: list[str],
    data: Data,
    device: torch.device,
    batch: int,
    *,
    steps: int,
    seconds: float = math.inf,
    seed: int = 0,
) -> list[Run]:
    """Train an encoder with each of the losses until `steps` or `seconds` are over; the learning rate falls until then.

    They begin equal, see the same batches and drop the same features, and take turns step by step, so that whatever
    else this machine does slows all of them alike.
    """
    trainees = [Trainee(loss, initial_encoder(data, seed).to(device)) for loss in losses]
    idf = trainees[0].encoder
    data = data.to(device)
    text, code = data.text.weighted(idf.text_idf), data.code.weighted(idf.code_idf)
    start = time.perf_counter()
    with report.progress(f"training: {' and '.join(losses)}, batch {batch:,}") as update:
        for step, rows in enumerate(batches(data.train, batch, seed)):
            done = max(step / steps, (time.perf_counter() - start) / seconds)
            if done >= 1:
                break
            rows = rows.to(device)
            texts, codes = text.take(rows), code.take(rows)
            for trainee in trainees:
                torch.manual_seed(seed + step)  # the features to drop
                trainee.step(texts, codes, LEARNING_RATE * (1 + math.cos(math.pi * done)) / 2)
            update(done, f"loss {trainees[-1].losses[-1]:.3f}")
    return [trainee.result(batch, data) for trainee in trainees]


@torch.no_grad()
def recall(encoder: Encoder, data: Data) -> tuple[float, float]:
    """How often the code of a held-out text comes first, and among the first ten, of all held-out codes."""
    encoder.eval()
    rows = data.test.to(encoder.table.weight.device)
    x = encoder.encode_text(data.text.take(rows).weighted(encoder.text_idf))
    y = encoder.encode_code(data.code.take(rows).weighted(encoder.code_idf))
    encoder.train()
    s = x @ y.T
    better = (s > s.diagonal()[:, None]).sum(1)
    return (better < 1).double().mean().item(), (better < 10).double().mean().item()
