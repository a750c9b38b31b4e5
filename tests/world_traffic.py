"""For test_distributed.py: what is sent, how much of it, and when."""

import contextlib
import os
import socket
import struct
from collections import Counter
from unittest import mock

import torch
import torch.distributed as dist
from calls import DOUBLE
from world import D, world_group

import flashcl
from flashcl.cli.plan import LOSSES, Plan
from flashcl.engine import dispatch
from flashcl.engine.exchange import exchange
from flashcl.engine.ranks import Ranks


def explained(rank, world) -> list[str]:
    """`explain` says which strategy "auto" takes, and why; the losses take the same."""
    wrong = []
    for chunk_bytes, strategy in ((world * 8 * D * 4, "gather"), (world * 8 * D * 4 - 1, "ring")):
        group = flashcl.Group(dist.group.WORLD, chunk_bytes=chunk_bytes)
        text = flashcl.explain(torch.zeros(8, D), group=group)
        if f"{world} ranks, {strategy}: the rows of all ranks" not in text:
            wrong.append(text)
        taken = type(exchange(Ranks(group.encode(), torch.device("cpu"), "a test"), torch.zeros(8, D), [8] * world, None))
        if taken.__name__.lower() != strategy:
            wrong.append(f"{taken} is not {strategy}")
    asked = flashcl.explain(torch.zeros(8, D), group=world_group("ring"))
    return wrong + [asked] * ("ring: asked for" not in asked)


def communication_overlaps(rank, world) -> list[str]:
    """The next rows travel while the last are computed with, gradients behind the computation that follows."""
    wrong, events = [], []

    def record(owner, name, event):
        real = getattr(owner, name)

        def recording(*args, **options):
            if (said := event(*args)) and said != events[-1:]:
                events.extend(said)
            return real(*args, **options)

        return mock.patch.object(owner, name, recording)

    backend = dispatch.load("torch")
    with contextlib.ExitStack() as stack:
        for owner, name, event in (
            (Ranks, "start_exchange", lambda ranks, sends, receives, what="rows": [f"start {what}"]),
            (Ranks, "start_all_gather", lambda ranks, out, x, what="rows": ["start rows"] * (what == "rows")),
            (Ranks, "start_reduce_scatter", lambda *args: ["start gradients"]),
            (Ranks, "wait", lambda ranks, work, what="rows": [f"wait {what}"] * (what in ("rows", "gradients"))),
            (backend, "sweep", lambda *args: ["compute"]),
            (backend, "grad", lambda *args: ["compute"]),
        ):
            stack.enter_context(record(owner, name, event))
        for strategy, steps in (("ring", world - 1), ("gather", 3)):
            x, y = (torch.randn(8, D, requires_grad=True) for _ in range(2))
            loss = flashcl.info_nce(x, y, temperature=1.0, group=world_group(strategy))
            forward = ["start rows", "compute"]
            backward = list(forward)
            for k in range(1, steps + 1):
                step = ["wait rows", *["start rows"] * (k < steps), "compute"]
                forward += step
                backward += [*step, *["wait gradients"] * (k > 1), "start gradients"]
            backward.append("wait gradients")
            wrong += [f"{strategy}: {events} is not {forward}"] * (events != forward)
            events.clear()
            loss.backward()
            wrong += [f"{strategy}: {events} is not {backward}"] * (events != backward)
            events.clear()
    return wrong


def bytes_as_planned(rank, world) -> list[str]:
    """`flashcl plan` counts the bytes of a step: to the byte as handed to the collectives, nearly as sockets saw them."""
    sent, wrong, n, d = count_sent_bytes(), [], 600, 256
    for loss in LOSSES:
        for strategy in ("ring", "gather"):
            group = flashcl.Group(dist.group.WORLD, strategy=strategy)
            x, y = (torch.randn(n, d).requires_grad_() for _ in range(2))
            t, b = (torch.tensor(v, requires_grad=True) for v in (2.0, 1.0))
            step = {
                "info_nce": lambda: flashcl.info_nce(x, y, logit_scale=t, group=group),
                "siglip": lambda: flashcl.siglip(x, y, logit_scale=t, logit_bias=b, group=group),
                "nt_xent": lambda: flashcl.nt_xent(x, y, temperature=1 / t, group=group),
                "sup_con": lambda: flashcl.sup_con(x, torch.arange(n) // 3, temperature=1 / t, group=group),
            }[loss]
            walks = Plan(loss, n * world, d, world, itemsize=4).walks(strategy)
            planned = world * sum(walk.bytes for walk in walks)
            # gloo's reduce-scatter sends twice what it must: as an all-reduce.
            really = planned + world * sum(walk.gradients for walk in walks) * (strategy == "gather")
            counted, moved = measured_bytes(step, sent)
            if abs(counted - planned) > 1:
                wrong.append(f"{loss} {strategy}: {counted} bytes handed over, {planned} planned")
            if not really <= moved <= 1.01 * really:
                wrong.append(f"{loss} {strategy}: {moved} bytes over sockets, {really} planned")
    return wrong


def count_sent_bytes() -> Counter:
    """Counts, from now on, what this rank hands to each collective, by the volume of its usual algorithm."""
    sent = Counter()

    def size(t):
        return t.numel() * t.itemsize

    volumes = {
        "start_all_gather": lambda ranks, out, x, *_: (ranks.size - 1) * size(x),
        "start_reduce_scatter": lambda ranks, out, x, *_: (ranks.size - 1) * size(out),
        "_reduce_": lambda ranks, x, *_: 2 * (ranks.size - 1) / ranks.size * size(x),
        "start_exchange": lambda ranks, sends, *_: sum(size(t) for _, t in sends),
    }
    for name, volume in volumes.items():

        def counting(self, *args, real=getattr(Ranks, name), volume=volume, **options):
            sent["bytes"] += volume(self, *args)
            return real(self, *args, **options)

        setattr(Ranks, name, counting)
    return sent


def measured_bytes(step, sent: Counter) -> tuple[float, float]:
    """What all ranks handed over in one step, and what their sockets received."""
    step().backward()  # the first one may connect ranks
    dist.barrier()
    sent.clear()
    before = received_bytes()
    dist.barrier()
    step().backward()
    dist.barrier()
    total = torch.tensor([sent["bytes"], received_bytes() - before], dtype=DOUBLE)
    dist.all_reduce(total)
    return tuple(total.tolist())


def received_bytes() -> int:
    """What all TCP connections of this process have received, without headers: tcpi_bytes_received of Linux's struct tcp_info."""
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # of what is no connection, or has been closed
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(fd))) as s:
                    total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136), 128)[0]
    return total
