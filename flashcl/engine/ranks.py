"""The ranks that share a batch: the one module that talks to torch.distributed.

Inside operators a group travels as a string (`Group.encode`), since operators know tensors, numbers and strings.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashcl import checks

with suppress(ImportError):  # which PyTorch may do one day: its functions warn that they are deprecated
    import torch.distributed.nn.functional  # noqa: F401

# torch.distributed.nn.functional keeps the world group of the moment when it is imported, as a default of its arguments.
# torch._dynamo imports it at the first call of an operator: the group would outlive destroy_process_group, and with it threads
# that may abort the process at interpreter exit. Imported here, before there is a group, it keeps none.

STRATEGIES = ("auto", "gather", "ring")


class Convention(NamedTuple):
    """What a mean and its gradients are on a rank (`Group` has them in words)."""

    global_mean: bool = False  # the mean of all ranks; else W / N * the sum of own rows
    scalars_times_ranks: bool = False  # the value, and the gradients of logit_scale and bias, are W times as large
    towers_over_ranks: bool = False  # the gradients of embeddings are divided by W
    others_are_constants: bool = False  # no gradient through the rows of other ranks


CONVENTIONS = {
    "local_grad": Convention(),
    "global_grad": Convention(global_mean=True),
    "global": Convention(global_mean=True, towers_over_ranks=True),
    "global_scaled": Convention(global_mean=True, scalars_times_ranks=True),
    "local_partial": Convention(others_are_constants=True),
}


@dataclass(frozen=True)
class Group:
    """Ranks whose rows are one batch, and how they talk: losses take it, or a bare ProcessGroup, as `group`.

    strategy: how rows of other ranks come here. "gather": chunks of all ranks at once, by all-gather; "ring": one rank's
        rows a step, at step k those of rank (r + k) mod W; "auto": "gather" if the rows of all ranks fit one chunk, else "ring".
    chunk_bytes: what one all-gather of "gather" brings here at most; two are in flight.
    convention: what a loss with reduction="mean" returns on a rank and what its gradients mean, W ranks, N rows in all:

        name            value on a rank          towers, averaged over ranks   logit_scale, bias, averaged
        local_grad      W / N * sum of own rows  exact                         exact
        global_grad     global mean              exact                         exact
        global          global mean              exact / W                     exact
        global_scaled   W * global mean          exact                         exact * W
        local_partial   W / N * sum of own rows  none through others' rows     exact

        local_grad      the default; open_clip with local_loss=True, gather_with_grad=True
        global_grad     open_clip with gather_with_grad=True
        global          open_clip's default; SimCSE
        global_scaled   pytorch-metric-learning, DistributedLossWrapper
        local_partial   the same with efficient=True, up to a factor of W

    The gradients of "local_partial" are biased. "global" ones are for reduction="mean" alone. With "sum", "none" and for
    similarity_logsumexp a rank returns what belongs to its own rows, not rescaled: summed over ranks, value and gradients are
    those of one process with all rows.
    Raises ValueError for an unknown strategy or convention, TypeError for what is no ProcessGroup.
    """

    process_group: dist.ProcessGroup
    strategy: str = "auto"
    convention: str = "local_grad"
    chunk_bytes: int = 32 * 2**20

    def __post_init__(self):
        checks.one_of("strategy", self.strategy, STRATEGIES)
        checks.one_of("convention", self.convention, tuple(CONVENTIONS))
        if not isinstance(self.process_group, dist.ProcessGroup) and not torch.compiler.is_compiling():
            # Inside torch.compile a ProcessGroup is of another type, which one depends on the version.
            raise _no_group("process_group", self.process_group, "a torch.distributed ProcessGroup")
        if not isinstance(self.chunk_bytes, int) or isinstance(self.chunk_bytes, bool) or self.chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be a positive integer, got {self.chunk_bytes!r}")

    @property
    def rules(self) -> Convention:
        return CONVENTIONS[self.convention]

    def __deepcopy__(self, memo: dict) -> Group:
        """Itself: a copy of a model talks to the same ranks."""
        return self

    @staticmethod
    def of(group: Group | dist.ProcessGroup | None, reduction: str | None = "mean") -> Group | None:
        """The argument `group` of a loss; reduction None: of a function that has none."""
        if group is None:
            return None
        if not isinstance(group, (Group, dist.ProcessGroup)):
            raise _no_group("group", group, "a torch.distributed ProcessGroup or a flashcl.Group")
        group = group if isinstance(group, Group) else Group(group)
        if group.rules.global_mean and reduction != "mean":
            got = "this function returns no mean" if reduction is None else f"got {reduction!r}"
            raise ValueError(f'convention {group.convention!r} is for losses with reduction="mean", {got}')
        return group

    def encode(self, **same: object) -> str:
        """For an operator. `same`: arguments of the loss in which the ranks must agree, beside what operators see."""
        same = {name: exactly(v) if isinstance(v, torch.Tensor) else v for name, v in same.items()}
        options = self.strategy, self.convention, str(self.chunk_bytes)
        return "\n".join([self.process_group.group_name, *options, json.dumps(same)])


def _no_group(name: str, got: object, expected: str) -> Exception:
    if got is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns on ranks that it leaves out
        return ValueError(f"{name} is one that this rank is no member of: only its members may call the loss")
    return TypeError(f"{name} must be {expected}, got {type(got).__name__}")


def exactly(v: torch.Tensor) -> str:
    """A number in which ranks must agree to the last bit. As text: NaN is equal to NaN."""
    return repr(v.item())


# Bytes of what a rank says, whatever it has to say: so ranks that disagree still understand each other.
MESSAGE = 1024

# How many meetings each group has had. Not by name: a group that is made after another was destroyed may have its name.
_meetings: weakref.WeakKeyDictionary[dist.ProcessGroup, int] = weakref.WeakKeyDictionary()


def meetings(group: dist.ProcessGroup) -> int:
    """How many a group has had: the number of the next one. A loss remembers it, so that its backward does not meet that of
    another loss, which looks alike, where backward passes run in another order on one rank."""
    return _meetings.get(group, 0)


class Ranks:
    """All ranks of a group, met for one operation: each has said what it brings, and all have seen that they fit together."""

    def __init__(self, encoded: str, device: torch.device, what: str):
        name, self.strategy, convention, chunk_bytes, arguments = encoded.split("\n")
        self.rules, self.chunk_bytes = CONVENTIONS[convention], int(chunk_bytes)
        self.group = dist.distributed_c10d._resolve_process_group(name)
        self.rank, self.size, self.device = self.group.rank(), self.group.size(), device
        number = meetings(self.group)
        _meetings[self.group] = number + 1
        self.what = f"{what}, number {number} in this group"
        options = {"strategy": self.strategy, "convention": convention, "chunk_bytes": self.chunk_bytes}
        self.same = {"operation": self.what} | options | json.loads(arguments)
        self.counts: list[tuple[int, ...]] = []  # of each rank

    @staticmethod
    def meet(encoded: str, device: torch.device, what: str, same: dict, counts: tuple[int, ...] = ()) -> Ranks:
        """Every rank sends a message: `same` must be equal in all of them, `counts` may differ."""
        ranks = Ranks(encoded, device, what)
        said = ranks._say(ranks.same | same, counts)
        first, _ = said[0]
        for rank, (facts, _) in enumerate(said):
            if differ := [key for key in first | facts if first.get(key) != facts.get(key)]:
                if "operation" in differ:  # the rest is about something else on each rank
                    differ = [key for key in ("operation", "loss") if key in differ]
                there, here = (", ".join(f"{key} {known.get(key)!r}" for key in differ) for known in (facts, first))
                difference = f"Rank {rank} has {there}; rank 0 has {here}"
                if {"logit_scale", "logit_bias"} & set(differ):
                    difference += ". Are the gradients of a learnable one averaged over ranks, as those of the model are?"
                if "operation" in differ:
                    difference += (
                        ". Each rank must call the same losses, forward and backward, in the same order, "
                        "with the same ones of their arguments requiring gradients"
                    )
                raise RuntimeError(f"flashcl: the ranks of a group must agree ({ranks.what}). {difference}")
        ranks.counts = [tuple(counts) for _, counts in said]
        return ranks

    def _say(self, same: dict, counts: tuple[int, ...]) -> list:
        text = json.dumps([same, counts]).encode()
        if len(text) > MESSAGE:  # ranks could not follow each other any more
            raise RuntimeError(f"flashcl: {len(text)} bytes to agree on, of which {MESSAGE} are sent: {text!r}")
        mine = torch.frombuffer(bytearray(text.ljust(MESSAGE)), dtype=torch.uint8).to(self.device)
        said = self.all_gather(mine, what="what each rank brings").view(self.size, -1).cpu().numpy()
        try:
            return [json.loads(row.tobytes()) for row in said]
        except ValueError:
            raise RuntimeError(
                f"flashcl: in {self.what} rank {self.rank} met another collective operation than its own: "
                "each rank must call the same losses, forward and backward, in the same order"
            ) from None

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"flashcl: rank {self.rank} of {self.size} failed while waiting for {what} ({self.what}). Another rank has died, "
                f"stalled, raised an error of its own, or called flashcl a different number of times. {error}"
            ) from error

    # ---- collectives, of which every rank takes part

    def all_gather(self, x: Tensor, *, what: str = "rows") -> Tensor:
        """x (n, ...), of one shape on all ranks, of all ranks one after the other: (W n, ...)."""
        out = x.new_empty(self.size * len(x), *x.shape[1:])
        self.wait(self.start_all_gather(out, x, what), what)
        return out

    def start_all_gather(self, out: Tensor, x: Tensor, what: str = "rows"):
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the older name, torch < 2.13
        with self._waiting(what):
            return gather(out, x, group=self.group, async_op=True)

    def start_reduce_scatter(self, out: Tensor, x: Tensor, what: str = "gradients"):
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with self._waiting(what):
            return scatter(out, x, group=self.group, async_op=True)

    def sum_(self, x: Tensor) -> Tensor:
        return self._reduce_(x, dist.ReduceOp.SUM)

    def max_(self, x: Tensor) -> Tensor:
        return self._reduce_(x, dist.ReduceOp.MAX)

    def _reduce_(self, x: Tensor, op) -> Tensor:
        with self._waiting("statistics"):
            dist.all_reduce(x, op, group=self.group)
        return x

    def start_exchange(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], what: str = "rows") -> list:
        """Sends to and receives from ranks of the group, at once; what is empty is left out on both sides."""
        ops = [
            dist.P2POp(op, tensor, group=self.group, group_peer=rank)
            for op, batch in ((dist.isend, sends), (dist.irecv, receives))
            for rank, tensor in batch
            if tensor.numel()
        ]
        with self._waiting(what):
            return dist.batch_isend_irecv(ops) if ops else []

    def wait(self, work, what: str = "rows") -> None:
        with self._waiting(what):
            for w in work if isinstance(work, list) else [work]:
                w.wait()

    # ---- vectors of which each rank has its own lines

    def all_lines(self, v: Tensor, sizes: list[int]) -> Tensor:
        """v (..., n_r) of every rank, in the order of ranks: (..., sum of sizes)."""
        longest = max(sizes)
        padded = v.new_zeros(longest, *v.shape[:-1])
        padded[: v.shape[-1]] = v.movedim(-1, 0)
        lines = self.all_gather(padded, what="vectors").view(self.size, longest, *v.shape[:-1])
        return torch.cat([part[:n] for part, n in zip(lines, sizes)]).movedim(0, -1)
