"""FSDP2, fully_shard: parameters and gradients live in shards, the rows of the batch on the ranks.

    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from towers import Towers, batch, finish, start

import flashcl


class Model(Towers):
    """With the scale among what it returns: in its forward a parameter is whole, and its gradient is averaged like all others."""

    def __init__(self):
        super().__init__(learnable_scale=False)
        self.log_scale = nn.Parameter(torch.full((1,), 2.66))  # log(1 / 0.07); fully_shard takes none of shape ()

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *super().forward(images, texts), self.log_scale.exp()


device = start()
model = Model().to(device)
mesh = init_device_mesh(device.type, (dist.get_world_size(),))
for tower in (model.image, model.text):
    fully_shard(tower, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(30):
    images, texts, scale = model(*batch(step, device))
    loss = flashcl.nt_xent(images, texts, temperature=1 / scale, group=dist.group.WORLD)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

finish(loss)
