"""Ranks on one machine: bytes sent beside those of rows and gradients by ring, communication behind compute, scaling.

    python bench/distributed.py                      worlds of 1, 2 and 4 processes over loopback, one thread each
    python bench/distributed.py --link 0.2           on a link of 0.2 GB/s a rank

Loopback is as good as free, so a slow link is played: what is sent is not there before it would have come over a link
of that rate, counted from when the last transfer of the rank ended. `exposed` is what a step waits for it, as a share
of the step; `hidden` is the share of the communication that went on behind the tiles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import flashcl
from flashcl.cli.bench.machine import environment
from flashcl.cli.plan import Plan
from flashcl.engine.ranks import Ranks


class Link:
    """Of a rank: transfers one after the other, `rate` bytes per second; None: as fast as loopback."""

    def __init__(self):
        self.rate, self.free, self.seconds = None, 0.0, 0.0

    def send(self, work, size: int) -> Link.Transfer:
        took = size / self.rate if self.rate else 0.0
        self.free = max(self.free, time.perf_counter()) + took
        self.seconds += took
        return Link.Transfer(work if isinstance(work, list) else [work], self.free)

    class Transfer:
        def __init__(self, work: list, arrives: float):
            self.work, self.arrives = work, arrives

        def wait(self) -> None:
            for w in self.work:
                w.wait()
            time.sleep(max(0.0, self.arrives - time.perf_counter()))


def play(link: Link) -> None:
    """Every transfer of rows and gradients goes over the link."""

    def size(t):
        return t.numel() * t.itemsize

    volumes = {
        "start_all_gather": lambda ranks, out, x, *_: size(x) * (ranks.size - 1),
        "start_reduce_scatter": lambda ranks, out, x, *_: size(out) * (ranks.size - 1),
        "start_exchange": lambda ranks, sends, *_: sum(size(t) for _, t in sends),
    }
    for name, volume in volumes.items():

        def over_link(self, *args, real=getattr(Ranks, name), volume=volume):
            return link.send(real(self, *args), volume(self, *args))

        setattr(Ranks, name, over_link)


def measure(rank: int, world: int, folder: str, batch: int, d: int, loss: str, repeat: int, rate: float) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    link, n = Link(), batch // world
    play(link)
    x, y = (torch.nn.functional.normalize(torch.randn(n, d), dim=1).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor(14.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    labels, rows = torch.arange(n) // 4, []
    for strategy in ("ring", "gather") if world > 1 else ("ring",):
        group = flashcl.Group(dist.group.WORLD, strategy=strategy)
        step = {
            "info_nce": lambda: flashcl.info_nce(x, y, logit_scale=scale, group=group).backward(),
            "siglip": lambda: flashcl.siglip(x, y, logit_scale=scale, logit_bias=bias, group=group).backward(),
            "nt_xent": lambda: flashcl.nt_xent(x, y, temperature=1 / scale, group=group).backward(),
            "sup_con": lambda: flashcl.sup_con(x, labels, temperature=1 / scale, group=group).backward(),
        }[loss]
        link.rate = None
        fast = timed(step, repeat)
        link.rate, link.seconds = rate, 0.0
        slow = timed(step, repeat)
        sending = link.seconds / (repeat + 1)
        hidden = 1 - max(0.0, slow - fast) / sending if sending else None
        walks = Plan(loss, batch, d, world, itemsize=4).walks(strategy)
        by_ring = [w for w in Plan(loss, batch, d, world, itemsize=4).walks("ring") if w.flops]  # not the sums of labels
        rows.append(
            dict(
                loss=loss, batch=batch, d=d, world=world, strategy=strategy, step_s=fast, slow_link_step_s=slow,
                link_bytes_per_s=rate, sending_s=sending, sent_mib=sum(w.bytes for w in walks) / 2**20,
                rows_mib=sum(w.rows + w.gradients for w in by_ring) / 2**20, exposed=max(0.0, slow - fast) / slow, hidden=hidden,
            )
        )  # fmt: skip
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def timed(step, repeat: int) -> float:
    times = []
    for _ in range(repeat + 1):  # the first one is not counted
        dist.barrier()
        start = time.perf_counter()
        step()
        dist.barrier()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--losses", nargs="+", default=["info_nce", "siglip", "nt_xent", "sup_con"])
    parser.add_argument("--batch", type=int, default=4096, help="pairs of all ranks; rows of sup_con")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--link", type=float, default=0.1, help="GB/s of the slow link")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results there as JSON")
    args = parser.parse_args()
    results = dict(environment=environment(torch.device("cpu")), rows=[])
    print(*(f"{k}: {v}" for k, v in results["environment"].items()), sep="\n", end="\n\n")
    print(f"{'loss':<10}{'ranks':>6} {'strategy':<9}{'step s':>8}{'sent MiB':>9}{'/ rows':>8}", end="")
    print(f"{'slow link s':>13}{'exposed':>9}{'hidden':>8}")
    for loss in args.losses:
        for world in args.worlds:
            with tempfile.TemporaryDirectory() as folder:
                job = (world, folder, args.batch, args.dim, loss, args.repeat, args.link * 1e9)
                mp.spawn(measure, job, nprocs=world)
                rows = json.loads(Path(folder, "rows.json").read_text())
            results["rows"] += rows
            for r in rows:
                ratio = f"{r['sent_mib'] / r['rows_mib']:.2f}" if r["rows_mib"] else "-"
                hidden = "-" if r["hidden"] is None else f"{100 * r['hidden']:.0f} %"
                print(
                    f"{loss:<10}{world:>6} {r['strategy']:<9}{r['step_s']:>8.3f}{r['sent_mib']:>9.1f}{ratio:>8}"
                    f"{r['slow_link_step_s']:>13.3f}{100 * r['exposed']:>7.0f} %{hidden:>8}",
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
