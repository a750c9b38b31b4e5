"""A batch whose encoder activations do not fit in memory: encode it in chunks, and keep the activations of one chunk only.

    python examples/chunks.py

Forward, a chunk leaves its inputs and embeddings alone; backward, it is encoded again, with the same dropout, just before
its gradient passes through. So the encoders compute once more forward, memory grows with the batch only by inputs and
embeddings, and gradients are those of the whole batch (as with GradCache: Gao et al. 2021). BatchNorm would see chunks, not
the batch.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from towers import Towers

import flashcl

BATCH, CHUNK = 8192, 512


def encode(tower: nn.Module, inputs: Tensor, chunk: int = CHUNK) -> Tensor:
    return torch.cat([checkpoint(tower, part, use_reentrant=False) for part in inputs.split(chunk)])


def train(steps: int = 5) -> float:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Towers().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        points = torch.randn(BATCH, 64, device=device)
        images, texts = (points + 0.3 * torch.randn_like(points) for _ in range(2))
        x, y = encode(model.image, images), encode(model.text, texts)
        loss = flashcl.info_nce(x, y, logit_scale=model.scale(), normalize=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss of {BATCH:,} pairs after the last step: {train():.3f}")
