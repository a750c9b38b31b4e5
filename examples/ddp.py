"""DistributedDataParallel: it averages the ranks' gradients, which is all that flashcl expects of it.

    torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from towers import Towers, batch, finish, start

import flashcl


def train(device: torch.device) -> Tensor:
    """A function, so that the models, which keep the group, are gone before `finish` destroys it."""
    model = DistributedDataParallel(Towers(learnable_scale=False).to(device))
    criterion = flashcl.SigLIPLoss(group=dist.group.WORLD).to(device)
    criterion = DistributedDataParallel(criterion)  # the gradients of its scale and bias must be averaged as well
    optimizer = torch.optim.AdamW([*model.parameters(), *criterion.parameters()], lr=1e-3)

    for step in range(30):
        loss = criterion(*model(*batch(step, device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


finish(train(start()))
