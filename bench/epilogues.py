"""What the epilogues of the CUDA kernels cost, by a model of one warp: no GPU is needed.

    python bench/epilogues.py                the kernels of the extension that is installed, bfloat16
    python bench/epilogues.py --blocks grad  the blocks of instructions along the way through one kernel

A consumer of csrc/tiles_sm90.cuh has the tensor cores to itself while it multiplies. What it does before and after must fit
into the time in which the other one multiplies, 8 D clocks for a tile of 128 x 128, or the tensor cores wait.

The model issues the instructions in order, as far apart as their control codes say, and waits for results where these say so.
From the code come the instructions and those codes; the latencies below are assumptions (of memory: from L2, without a queue).
Of the ways through the code it takes the quickest that does what has to be done, which is the common one: no pair is masked,
log-sum-exps lie close to each other.
"""

from __future__ import annotations

import argparse
import functools
import heapq
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from flashcl import _C

KERNELS = {
    "sweep": r"SweepI.*Different",
    "sweep by label": r"SweepI.*ByLabel",
    "grad": r"GradI.*Different",
    "grad by label": r"GradI.*ByLabel",
    "sigmoid": r"SigmoidI",
}
LATENCY = Counter(MUFU=22, LDS=26, SHFL=24, LDG=400, LDC=40, ULDC=40, S2R=30, S2UR=30, VOTE=12, STS=10, R2UR=12)
OTHER_LATENCY = 20  # of what signals that it is done; for all else the control codes leave time enough
# Clocks for which an instruction keeps others of its kind waiting, of one warp in a quarter of a multiprocessor.
PIPES = {
    "special": (8, {"MUFU"}),
    "integer": (2, {"FMNMX", "FSETP", "FSEL", "SEL", "IADD3", "LOP3", "ISETP", "SHF", "PRMT", "F2FP", "PLOP3", "LEA", "R2P"}),
    "memory": (2, {"LDS", "STS", "SHFL", "STG", "LDG", "STSM"}),
}


class Instruction(NamedTuple):
    address: int
    text: str
    control: int

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].split(".")[0]

    @property
    def target(self) -> int | None:
        match = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)$", self.text)
        return int(match[1], 16) if match else None

    @property
    def may_fall_through(self) -> bool:
        conditional = self.text.startswith("@") or re.search(r"BRA\S*\s+!?U?P", self.text)
        return bool(conditional) or (self.target is None and "EXIT" not in self.text)


class Block(NamedTuple):
    """Instructions without a branch but at their end."""

    code: list[Instruction]
    next: list[int]  # numbers of the first instructions of the blocks that may follow


@functools.cache
def machine_code() -> dict[str, list[Instruction]]:
    """By mangled name."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton  # which brings one

        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-sass", _C.__file__], capture_output=True, text=True, check=True).stdout
    functions = {}
    for name, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", text, re.DOTALL):
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s*/\* 0x[0-9a-f]+ \*/\s+/\* 0x([0-9a-f]+) \*/", body)
        functions[name] = [Instruction(int(at, 16), text.strip(), int(control, 16)) for at, text, control in lines]
    return functions


def clocks(code: list[Instruction]) -> int:
    """From the first instruction to the end of the last one, issued alone."""
    now, done, busy = 0, [0] * 6, Counter()
    for i in code:
        stall, write, read, waits = (i.control >> at & mask for at, mask in ((41, 15), (46, 7), (49, 7), (52, 63)))
        now = max([now, *(done[k] for k in range(6) if waits >> k & 1)])
        for pipe, (takes, opcodes) in PIPES.items():
            if i.opcode in opcodes:
                now = max(now, busy[pipe])
                busy[pipe] = now + takes
        if write < 6:
            done[write] = max(done[write], now + (LATENCY[i.opcode] or OTHER_LATENCY))
        if read < 6:
            done[read] = max(done[read], now + LATENCY["STS"])
        now += max(stall, 1)
    return now


def blocks(code: list[Instruction], also: set[int]) -> dict[int, Block]:
    """By the number of their first instruction; blocks begin at `also`, too."""
    number = {i.address: n for n, i in enumerate(code)}
    first = {0} | also | {number[i.target] for i in code if i.target is not None}
    first |= {n + 1 for n, i in enumerate(code) if i.target is not None or not i.may_fall_through}
    first = sorted(n for n in first if n < len(code))
    out = {}
    for begin, end in zip(first, [*first[1:], len(code)]):
        last = code[end - 1]
        jump = [] if last.target is None else [number[last.target]]
        out[begin] = Block(code[begin:end], [*jump, end] if last.may_fall_through else jump)
    return out


def quickest(
    all_blocks: dict[int, Block], start: int, goal: int, counts: Callable[[Instruction], bool], least: int
) -> list[int]:
    """The blocks from start to before goal that take the fewest clocks, with at least so many instructions that count."""
    cost = {n: (clocks(b.code), sum(map(counts, b.code))) for n, b in all_blocks.items()}
    before, queue = {(start, 0): (0, None)}, [(0, (start, 0))]
    while queue:
        now, place = heapq.heappop(queue)
        n, count = place
        if n == goal and count == least:
            way = []
            while (place := before[place][1]) is not None:
                way.append(place[0])
            return way[::-1]
        if now > before[place][0] or n == goal or n not in all_blocks:
            continue
        for follower in all_blocks[n].next:
            there, then = (follower, min(count + cost[n][1], least)), now + cost[n][0]
            if then < before.get(there, (then + 1,))[0]:
                before[there] = then, place
                heapq.heappush(queue, (then, there))
    raise SystemExit("no way through the code: it does not look as this program expects")


class Parts(NamedTuple):
    """The blocks on the way of a consumer through one tile."""

    before: list[Block]  # its place, and what is staged in shared memory
    visit: list[Block]  # the accumulators; with G, its way to shared memory


def parts(code: list[Instruction]) -> Parts:
    def where(pattern: str) -> list[int]:
        return [n for n, i in enumerate(code) if re.search(pattern, i.text)]

    start, product, (ready, over) = where("USETMAXREG.TRY_ALLOC")[0] + 1, where("HGMMA")[0], where(r"BAR\.SYNC.*, 0x80")
    every = blocks(code, {start, product, ready + 1, over})
    matrix = {n for n, i in enumerate(code) if i.opcode == "STSM"}
    # With columns, grad looks for the lowest log-sum-exp of a tile: two reductions over the warp.
    needed = ("REDUX", 2) if any(code[n].opcode == "REDUX" for n in range(start, ready)) else ("STS", 1)
    before = quickest(every, start, product, lambda i: i.opcode == needed[0], needed[1])
    visit = quickest(every, ready + 1, over, lambda i: "MUFU.EX2" in i.text or i.opcode == "STSM", 128 + len(matrix))
    return Parts([every[n] for n in before], [every[n] for n in visit])


def code_of(kernel: str) -> list[Instruction]:
    (code,) = (c for n, c in machine_code().items() if "5tiles" in n and "bfloat16" in n and re.search(KERNELS[kernel], n))
    return code


def cost(kernel: str) -> tuple[int, int, float]:
    """Clocks before the visit of a tile, clocks of the visit, and instructions of the visit for a logit."""
    before, visit = ([i for block in part for i in block.code] for part in parts(code_of(kernel)))
    return clocks(before), clocks(visit), len(visit) / 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", choices=KERNELS, help="what the visit of this kernel is made of")
    options = parser.parse_args()
    if options.blocks:
        for block in parts(code_of(options.blocks)).visit:
            most = ", ".join(f"{n} {opcode}" for opcode, n in Counter(i.opcode for i in block.code).most_common(8))
            print(f"{block.code[0].address:#7x} {len(block.code):5} instructions {clocks(block.code):5} clocks   {most}")
        return
    print("clocks of a warp for a tile, and instructions of the visit for a logit; the products take 8 D clocks")
    print(f"{'':16}{'before':>8}{'visit':>8}{'in all':>8}{'instructions':>14}")
    for kernel in KERNELS:
        before, visit, instructions = cost(kernel)
        print(f"{kernel:16}{before:8}{visit:8}{before + visit:8}{instructions:14.1f}")


if __name__ == "__main__":
    main()
