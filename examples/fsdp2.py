"""FSDP2, fully_shard: parameters and gradients live in shards, the rows of the batch on the ranks.

    torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from towers import Towers, batch, finish, start

import flashcl

device = start()
model = Towers(learnable_scale=False).to(device)  # fully_shard takes no parameter of a single number
mesh = init_device_mesh(device.type, (dist.get_world_size(),))
for tower in (model.image, model.text):
    fully_shard(tower, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(30):
    images, texts = model(*batch(step, device))
    loss = flashcl.nt_xent(images, texts, temperature=0.1, group=dist.group.WORLD)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

finish(loss)
