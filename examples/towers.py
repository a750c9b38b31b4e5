"""What the examples share: two small towers, and pairs of noisy views of random points to train them on."""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class Towers(nn.Module):
    def __init__(self, width: int = 64, dim: int = 32, learnable_scale: bool = True):
        super().__init__()
        self.image, self.text = (nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, dim)) for _ in range(2))
        if learnable_scale:
            self.log_scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07)

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(texts), dim=1)

    def scale(self) -> Tensor:
        return self.log_scale.exp()


def batch(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of this rank: ranks may hold different numbers of them."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    points = torch.randn(64 + 16 * dist.get_rank(), 64, generator=generator)
    noise = [0.3 * torch.randn(points.shape, generator=generator) for _ in range(2)]
    return (points + noise[0]).to(device), (points + noise[1]).to(device)


def start() -> torch.device:
    torch.manual_seed(0)
    gpus = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpus else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    return device


def finish(loss: Tensor) -> None:
    """The mean of what the ranks return is the loss of the whole batch."""
    loss = loss.detach().clone()
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        print(f"loss of the whole batch after the last step: {loss.item() / dist.get_world_size():.3f}")
    dist.destroy_process_group()
