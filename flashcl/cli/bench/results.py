"""Results: what one measurement is, the file that holds them, the table, and the comparison of two files."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from flashcl.cli.arguments import UsageError
from flashcl.cli.bench.suites import KEY, Workload
from flashcl.cli.text import size, table

STATUSES = ("ok", "oom", "wrong", "failed", "skipped")


@dataclass
class Row:
    """One provider at one workload in one mode. Only a status of "ok" has numbers; "wrong" has an error."""

    loss: str
    n: int  # rows of S
    d: int
    dtype: str
    mode: str
    provider: str
    status: str  # one of STATUSES
    note: str = ""
    ms: float | None = None  # median
    ms_20: float | None = None  # quantiles
    ms_80: float | None = None
    runs: int | None = None
    tflops: float | None = None  # useful FLOPs (suites.USEFUL) per second
    matrix_tflops: float | None = None  # of the library's products at the chunk shapes, in the same run
    floor_ms: float | None = None  # useful FLOPs at that rate
    extra_mib: float | None = None  # peak memory beyond the inputs, of forward and backward, where it can be measured
    error: float | None = None  # worst relative L2 error of value and gradients
    oracle: str | None = None  # what the error is against

    @property
    def work(self) -> Workload:
        return Workload(self.loss, self.n, self.d, self.dtype)

    @property
    def key(self) -> tuple:
        return *(getattr(self, name) for name in KEY), self.mode, self.provider


class BadFile(UsageError):
    """A file that is no result of `flashcl bench`."""


@dataclass
class Results:
    environment: dict[str, str | float]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Results:
        try:
            data = json.loads(path.read_text())
            found = cls(dict(data["environment"]), [Row(**row) for row in data["rows"]])
        except (ValueError, KeyError, TypeError) as error:
            raise BadFile(f"{path} is no result of flashcl bench: {error!r}") from None
        if missing := {"device", "commit", "date"} - found.environment.keys():
            raise BadFile(f"{path} is no result of flashcl bench: it has no {', '.join(sorted(missing))}")
        return found

    def save(self, path: Path) -> None:
        """JSON, and the same as CSV beside it. Whole files replace whole files: there is always a valid one."""
        rows = [asdict(row) for row in self.rows]
        _replace(path, json.dumps(dict(environment=self.environment, rows=rows), indent=1) + "\n")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [*(f.name for f in fields(Row)), *self.environment])
        writer.writeheader()
        writer.writerows(row | self.environment for row in rows)
        _replace(path.with_suffix(".csv"), text.getvalue())

    def add(self, rows: list[Row]) -> None:
        """New measurements take the place of old ones of the same thing."""
        again = {row.key for row in rows}
        self.rows = [row for row in self.rows if row.key not in again] + rows


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, newline="")
    os.replace(temporary, path)


# ---- the table -------------------------------------------------------------------------------------------------------

HEADER = ["ms", "20 %", "80 %", "useful TFLOP/s", "% of matrix rate", "x floor", "extra memory", "rel. error"]


def show(rows: list[Row]) -> str:
    """The rows of one workload: a line for each provider and mode, and how fast the machine multiplies matrices."""
    lines = [_line(row) for row in rows if row.status != "skipped"]
    if not lines:
        return "no provider is here"
    notes = [f"{row.provider}: {row.note}" for row in rows if row.status == "ok" and row.note]
    if rate := next((row.matrix_tflops for row in rows if row.matrix_tflops), None):
        notes.append(f"matrix rate {rate:.4g} TFLOP/s; error against {next(row.oracle for row in rows if row.oracle)}")
    return "\n".join([table([f"{rows[0].work}", *HEADER], lines), *dict.fromkeys(notes)])


def _line(row: Row) -> list[str]:
    name = f"{row.provider} {row.mode}"
    if row.status != "ok":
        return [name, {"oom": "out of memory"}.get(row.status, f"{row.status}: {row.note}")]
    return [
        name,
        *(f"{v:,.4g}" if v < 1000 else f"{v:,.0f}" for v in (row.ms, row.ms_20, row.ms_80)),
        f"{row.tflops:.4g}",
        f"{row.tflops / row.matrix_tflops:.0%}",
        f"{row.ms / row.floor_ms:.2f}",
        "not measured" if row.extra_mib is None else size(row.extra_mib * 2**20),
        f"{row.error:.0e}",
    ]


def skipped(rows: list[Row]) -> list[str]:
    """One line for each provider that took no part somewhere: why."""
    reasons: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.status == "skipped":
            reasons.setdefault(row.provider, {})[row.note] = None
    return [f"{provider}: {', '.join(notes)}" for provider, notes in reasons.items()]


# ---- comparison ------------------------------------------------------------------------------------------------------

TIME_TOLERANCE, MEMORY_TOLERANCE, MEMORY_NOISE_MIB = 1.1, 1.1, 16


def must_be_of_one_device(new: Results, old: Results) -> None:
    if new.environment["device"] != old.environment["device"]:
        theirs, ours = old.environment["device"], new.environment["device"]
        raise UsageError(f"no comparison: measured on {theirs}, this is {ours}")


@dataclass(frozen=True)
class Change:
    row: Row
    text: str
    regression: bool


def compare(new: Results, old: Results) -> list[Change]:
    """What became of each measurement of `old` that `new` repeats. Slower counts where the median grew by more than a
    tenth, also in relation to the floor, and the middle parts of the two distributions do not touch. Both are of one device."""
    before = {row.key: row for row in old.rows if row.status != "skipped"}
    pairs = [(before[row.key], row) for row in new.rows if row.key in before]
    if not pairs:
        raise UsageError("no comparison: no measurement is in both")
    return [_change(was, now) for was, now in pairs]


def _change(was: Row, now: Row) -> Change:
    name = f"{now.work} {now.provider} {now.mode}"
    if "ok" not in (was.status, now.status) or was.status != now.status:
        worse = was.status == "ok" and now.status != "ok"
        return Change(now, f"{name}: {was.status} -> {now.status} {now.note}".rstrip(), worse)
    # A machine that is slower altogether has slower matrix products, too: of the same rounds, whose rate makes the floor.
    beyond_floor = now.ms / now.floor_ms > TIME_TOLERANCE * was.ms / was.floor_ms
    slower = now.ms > TIME_TOLERANCE * was.ms and now.ms_20 > was.ms_80 and beyond_floor
    measured = None not in (was.extra_mib, now.extra_mib)
    larger = measured and now.extra_mib > MEMORY_TOLERANCE * was.extra_mib + MEMORY_NOISE_MIB
    words = " ".join(word for word, holds in (("SLOWER", slower), ("MORE MEMORY", larger)) if holds)
    of_time = f"{was.ms:.4g} -> {now.ms:.4g} ms (x {now.ms / was.ms:.2f})"
    of_memory = f"{was.extra_mib:.0f} -> {now.extra_mib:.0f} MiB" if measured else "memory not measured"
    return Change(now, f"{name}: {of_time}, {of_memory} {words}".rstrip(), slower or larger)
