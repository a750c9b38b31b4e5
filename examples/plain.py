"""A plain training loop over ranks: each holds its own rows of the batch, gradients are averaged by hand.

    torchrun --nproc-per-node 2 examples/plain.py
"""

import torch
import torch.distributed as dist
from towers import Towers, batch, finish, start

import flashcl

device = start()
model = Towers().to(device)
for parameter in model.parameters():
    dist.broadcast(parameter.data, 0)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

for step in range(30):
    images, texts = model(*batch(step, device))
    loss = flashcl.info_nce(images, texts, logit_scale=model.scale(), group=dist.group.WORLD)
    optimizer.zero_grad()
    loss.backward()
    for parameter in model.parameters():  # the plain average of the ranks' gradients is that of the whole batch
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    optimizer.step()

finish(loss)
