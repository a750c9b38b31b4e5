"""How the rows of other ranks come here, and how gradients for them go home.

A matrix of logits over W ranks is W x W rectangles, one per pair of ranks (r, q): rank r computes the rectangles of its row,
each against lines that rank q holds. Of a symmetric matrix it computes half of them (`shared`). Both strategies bring the
next lines while the tiles of the last are computed, and send gradients home behind the computation that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flashcl.engine.ranks import Ranks


class Piece(NamedTuple):
    rank: int
    lines: slice  # of that rank


class Block(NamedTuple):
    """One call of a backend."""

    rows: slice  # of this rank
    pieces: list[Piece]  # of other ranks, or this whole rank
    y: Tensor  # (m, D) the lines of the pieces, one after the other
    at: slice  # where these are in what has arrived with them


Share = Callable[[int, int], tuple[slice, slice]]  # of the pair (r, q): rows of r and lines of q that r computes


def everything(sizes: list[int], lines: list[int]) -> Share:
    return lambda r, q: (slice(0, sizes[r]), slice(0, lines[q]))


def half(sizes: list[int]) -> Share:
    """Each pair of different ranks once: r computes those up to W / 2 further, of the opposite rank each does one half."""
    world = len(sizes)

    def share(r: int, q: int) -> tuple[slice, slice]:
        distance = (q - r) % world
        if 2 * distance < world:
            return slice(0, sizes[r]), slice(0, sizes[q])
        middle = (sizes[max(r, q)] + 1) // 2
        if 2 * distance > world:
            return slice(0, 0), slice(0, 0)
        if r < q:
            return slice(0, sizes[r]), slice(0, middle)
        return slice(middle, sizes[r]), slice(0, sizes[q])

    return share


def _whole(rows: slice, rank: int, lines: slice, y: Tensor) -> Block:
    """All that has arrived: lines of one rank."""
    return Block(rows, [Piece(rank, lines)], y, slice(0, y.shape[0]))


@dataclass
class _Exchange:
    ranks: Ranks
    y: Tensor  # (m_r, D) lines of this rank
    lines: list[int]  # how many each rank has
    share: Share
    home: Tensor | None  # (m_r, D) where gradients for y are added; None: nothing goes home

    def own(self) -> Block:
        r = self.ranks.rank
        rows, _ = self.share(r, r)
        return _whole(rows, r, slice(0, len(self.y)), self.y)

    def walk(self) -> Iterator[Block]:
        """The blocks of this rank, its own first. give_back may be called once for each before the next is asked for.

        What is sent is held until it has left: not every process group keeps a reference.
        """
        raise NotImplementedError

    def give_back(self, block: Block, dy: Tensor) -> None:
        """dy (m, D): the gradient for block.y, of another rank"""
        raise NotImplementedError


@dataclass
class Ring(_Exchange):
    """Step k = 1 ... W - 1: lines come from the rank k further while those of this rank go to the rank k before.

    One batch of a send and a receive per step, of exactly the lines that are needed there; the gradient goes straight back.
    Memory: the lines of two ranks, and gradients of two.
    """

    _outgoing: Tensor | None = field(default=None, init=False)

    def walk(self) -> Iterator[Block]:
        ranks, r, size = self.ranks, self.ranks.rank, self.ranks.size
        coming, returning = self._fetch(1), None
        yield self.own()
        for k in range(1, size):
            work, lines = coming
            ranks.wait(work)
            coming = self._fetch(k + 1)
            q = (r + k) % size
            rows, columns = self.share(r, q)
            if rows.stop > rows.start and columns.stop > columns.start:
                yield _whole(rows, q, columns, lines)
            if self.home is not None:
                self._add(returning)
                returning = self._return(k)
        self._add(returning)

    def give_back(self, block: Block, dy: Tensor) -> None:
        assert self._outgoing is None, "once for each block"
        self._outgoing = dy

    def _wanted(self, r: int, q: int) -> slice:
        """The lines of q that r needs: none if it has no row for them."""
        rows, columns = self.share(r, q)
        return columns if rows.stop > rows.start else slice(0, 0)

    def _fetch(self, k: int) -> tuple[list, Tensor] | None:
        ranks, r, size = self.ranks, self.ranks.rank, self.ranks.size
        if k >= size:
            return None
        to, source = (r - k) % size, (r + k) % size
        wanted = self._wanted(r, source)
        lines = self.y.new_empty(wanted.stop - wanted.start, self.y.shape[1])
        return ranks.start_exchange([(to, self.y[self._wanted(to, r)])], [(source, lines)]), lines

    def _return(self, k: int) -> tuple[list, Tensor, Tensor, slice]:
        ranks, r, size = self.ranks, self.ranks.rank, self.ranks.size
        to, source = (r + k) % size, (r - k) % size
        mine, outgoing = self._wanted(source, r), self._outgoing
        if outgoing is None:
            outgoing = self.home[:0]
        received = torch.empty_like(self.home[mine])
        self._outgoing = None
        return ranks.start_exchange([(to, outgoing)], [(source, received)], "gradients"), outgoing, received, mine

    def _add(self, returning: tuple[list, Tensor, Tensor, slice] | None) -> None:
        if returning is not None:
            work, _, received, mine = returning
            self.ranks.wait(work, "gradients")
            self.home[mine] += received


@dataclass
class Gather(_Exchange):
    """Chunks of C lines of every rank by all-gather, two chunks in flight; gradients go home by reduce-scatter.

    Memory: 2 W C D elements, and gradients of two chunks. Ranks with fewer lines send zeros, which no block shows.
    """

    _gradients: Tensor | None = field(default=None, init=False)  # (W C, D) of one chunk

    def walk(self) -> Iterator[Block]:
        chunks = -(-max(self.lines) // self._rows)
        coming, returning = self._fetch(0) if self.ranks.size > 1 else None, None
        yield self.own()
        for c in range(chunks if self.ranks.size > 1 else 0):
            work, gathered, mine = coming
            self.ranks.wait(work)
            coming = self._fetch(c + 1) if c + 1 < chunks else None
            if self.home is not None:
                self._gradients = self.home.new_zeros(gathered.shape)
            for rows, pieces, at in self._runs(c):
                yield Block(rows, pieces, gathered[at], at)
            if self.home is not None:
                self._add(returning)
                returning = self._return(c)
        self._add(returning)

    @property
    def _rows(self) -> int:
        """C"""
        row = self.ranks.size * self.y.shape[1] * self.y.itemsize
        return max(1, min(max(self.lines), self.ranks.chunk_bytes // row))

    def _fetch(self, c: int) -> tuple:
        mine = self.y.new_zeros(self._rows, self.y.shape[1])
        part = self.y[c * self._rows : (c + 1) * self._rows]
        mine[: len(part)] = part
        gathered = self.y.new_empty(self.ranks.size * self._rows, self.y.shape[1])
        return self.ranks.start_all_gather(gathered, mine), gathered, mine

    def _runs(self, c: int) -> Iterator[tuple[slice, list[Piece], slice]]:
        """Pieces of the chunk that lie side by side in it and meet the same rows: one call of a backend each."""
        run = None
        for q in range(self.ranks.size):
            rows, columns = self.share(self.ranks.rank, q)
            start, stop = max(columns.start, c * self._rows), min(columns.stop, (c + 1) * self._rows)
            if q == self.ranks.rank or start >= stop or rows.start >= rows.stop:
                continue
            piece, first = Piece(q, slice(start, stop)), q * self._rows + start - c * self._rows
            at = slice(first, first + stop - start)
            if run is not None and run[0] == rows and run[2].stop == at.start:
                run = rows, [*run[1], piece], slice(run[2].start, at.stop)
                continue
            if run is not None:
                yield run
            run = rows, [piece], at
        if run is not None:
            yield run

    def give_back(self, block: Block, dy: Tensor) -> None:
        self._gradients[block.at] += dy

    def _return(self, c: int) -> tuple:
        received = self.home.new_empty(self._rows, self.home.shape[1])
        return self.ranks.start_reduce_scatter(received, self._gradients), self._gradients, received, c * self._rows

    def _add(self, returning: tuple | None) -> None:
        if returning is not None:
            work, _, received, start = returning
            self.ranks.wait(work, "gradients")
            mine = self.home[start : start + len(received)]
            mine += received[: len(mine)]


def exchange(ranks: Ranks, y: Tensor, lines: list[int], share: Share, home: Tensor | None = None) -> Ring | Gather:
    """The strategy of the group, or of "auto"."""
    strategy = choose_strategy(ranks.strategy, sum(lines), y.shape[1] * y.itemsize, ranks.chunk_bytes)
    kind = {"gather": Gather, "ring": Ring}[strategy]
    return kind(ranks, y.contiguous(), lines, share, home)


def choose_strategy(strategy: str, lines: int, line_bytes: int, chunk_bytes: int) -> str:
    """ "auto": the ring moves fewer bytes (no padding, half of a symmetric matrix); where one all-gather brings everything,
    its one latency counts for more than that."""
    if strategy != "auto":
        return strategy
    return "gather" if lines * line_bytes <= chunk_bytes else "ring"
