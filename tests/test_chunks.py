"""examples/chunks.py: a batch in chunks that are encoded again in the backward pass."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import flashcl

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def chunks(monkeypatch):
    """The names of examples/chunks.py, whose program does not run."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return runpy.run_path(str(EXAMPLES / "chunks.py"))


def test_a_batch_in_chunks_trains(chunks):
    assert "python examples/chunks.py" in chunks["__doc__"]
    assert chunks["train"](steps=3) < 6.0  # the first step has 9.0


def test_a_batch_in_chunks_has_the_gradients_of_the_whole_batch(chunks):
    whole, rebuilt = (gradients_of_a_step(encode) for encode in (lambda tower, inputs: tower(inputs), chunks["encode"]))
    torch.testing.assert_close(rebuilt, whole, rtol=1e-9, atol=1e-12)


def test_a_chunk_meets_the_same_dropout_when_it_is_encoded_again(chunks):
    def once(tower, inputs):
        return torch.cat([tower(part) for part in inputs.split(chunks["CHUNK"])])

    kept, rebuilt = (gradients_of_a_step(encode, dropout=0.5) for encode in (once, chunks["encode"]))
    torch.testing.assert_close(rebuilt, kept, rtol=1e-9, atol=1e-12)


def test_a_batch_in_chunks_keeps_its_inputs_alone(chunks):
    """Until the backward. Of a batch that is not cut the activations of all layers are kept."""
    inputs, kept = torch.randn(4 * chunks["CHUNK"], 64), []
    with saved_tensors_hooks(lambda v: (kept.append(v), v)[1], lambda v: v):
        chunks["encode"](chunks["Towers"]().image, inputs)
    assert len(kept) == 4 and {v.untyped_storage().data_ptr() for v in kept} == {inputs.untyped_storage().data_ptr()}


def gradients_of_a_step(encode, dropout=0.0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.GELU(), torch.nn.Dropout(dropout), torch.nn.Linear(32, 8)).double()
    images, texts = torch.randn(2, 1200, 16, dtype=torch.float64)
    flashcl.info_nce(encode(tower, images), encode(tower, texts), temperature=0.1, normalize=True).backward()
    return [p.grad for p in tower.parameters()]
