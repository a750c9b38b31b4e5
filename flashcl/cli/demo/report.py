"""What `flashcl demo` shows: progress bars, the table of runs, the plot. rich and matplotlib are used where installed."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flashcl.cli.memory import METHOD, Measured, find
from flashcl.cli.text import size, table

if TYPE_CHECKING:
    from flashcl.cli.demo.training import Run  # which shows its progress with this module

COLORS = {"dense": "#e07b39", "flashcl": "#1f5fa8", "large": "#2a9d6f"}
Update = Callable[..., None]  # (fraction done, note)


@contextlib.contextmanager
def progress(description: str) -> Iterator[Update]:
    """A progress bar on a terminal; everywhere one line at the end with the time taken."""
    start = time.perf_counter()
    if not sys.stdout.isatty():
        bar = contextlib.nullcontext(lambda fraction, note="": None)
    else:
        bar = _rich_bar(description) if importlib.util.find_spec("rich") else _plain_bar(description)
    try:
        with bar as update:
            yield update
    finally:  # also where the work ends before its bar is full
        print(f"{description}: {time.perf_counter() - start:.1f} s", flush=True)


@contextlib.contextmanager
def _plain_bar(description: str) -> Iterator[Update]:
    yield lambda fraction, note="": print(f"\r{description} {fraction:4.0%} {note:<30}", end="", flush=True)
    print("\r" + " " * (len(description) + 36), end="\r")


@contextlib.contextmanager
def _rich_bar(description: str) -> Iterator[Update]:
    from rich import progress as bars

    text, note = bars.TextColumn("{task.description}"), bars.TextColumn("{task.fields[note]}")
    columns = (text, bars.BarColumn(), bars.TaskProgressColumn(), bars.TimeElapsedColumn(), note)
    with bars.Progress(*columns, transient=True) as bar:  # gone when done: one line with the time stays
        task = bar.add_task(description, total=1.0, note="")
        yield lambda fraction, note="": bar.update(task, completed=fraction, note=note)


def track(items: Iterable, total: int, description: str) -> Iterator:
    """The same items, with a progress bar."""
    with progress(description) as update:
        for done, item in enumerate(items, 1):
            yield item
            update(done / total)


def summary(
    runs: list[Run], untrained: tuple[float, float], measured: list[Measured], held_out: int, device: torch.device
) -> str:
    """The table of runs and how to read it."""
    header = ["loss", "batch", "steps", "pairs seen", "recall@1", "recall@10", "final loss", "time/step", "loss memory"]
    rows = [["untrained", "", "", "", f"{untrained[0]:.1%}", f"{untrained[1]:.1%}", "", "", ""]]
    for run in runs:
        m = find(measured, run.loss, run.batch)
        seen = [f"{run.batch:,}", f"{len(run.losses):,}", f"{run.batch * len(run.losses):,}"]
        scores = [f"{run.recall1:.1%}", f"{run.recall10:.1%}", f"{run.losses[-1]:.3f}"]
        cost = [f"{run.seconds_per_step * 1000:,.0f} ms", _peak(m) if m else "not measured"]
        rows.append([run.loss, *seen, *scores, *cost])
    trained = {run.batch for run in runs if run.loss == "dense"}
    rows += [_not_trained(m) for m in measured if m.loss == "dense" and m.batch in {r.batch for r in runs} - trained]
    notes = [
        f"recall: the right one of {held_out:,} held-out functions comes first / is among the first ten "
        f"(by chance {1 / held_out:.2%} / {min(1, 10 / held_out):.2%})",
        "final loss: of the last step; it grows with log(batch), so compare it within a batch only",
    ]
    if measured:
        method = METHOD[device.type]
        notes.append(f"loss memory: measured peak of forward and backward of the loss, without the towers ({method})")
    if difference := loss_difference(runs):
        notes.append(difference)
    if len(runs[-1].losses) < len(runs[0].losses):
        notes.append(
            f"batch {runs[-1].batch:,} was ended by its time limit (--seconds gives it more):\n"
            "    its recall says nothing about large batches, only that such steps are feasible"
        )
    return "\n".join([table(header, rows), "", *notes])


def _not_trained(m: Measured) -> list[str]:
    if m.peak is None:
        return [m.loss, f"{m.batch:,}", f"not run: its loss would need {size(m.needed)}"]
    return [m.loss, f"{m.batch:,}", f"not trained: its loss alone takes {_peak(m)} (measured)"]


def _peak(m: Measured) -> str:
    return "under 1 MiB" if m.peak < 2**20 else size(m.peak)  # the pages of a process tell no more


def loss_difference(runs: list[Run]) -> str | None:
    """How far apart dense and flashcl at the same batch are."""
    curves = [run.losses for run in runs if run.batch == runs[0].batch]
    if len(curves) != 2:
        return None
    gaps = [abs(a - b) for a, b in zip(*curves)]
    return (
        f"dense and flashcl at batch {runs[0].batch:,}: max |difference| of their losses {max(gaps[:10]):.1e} in the "
        f"first ten steps,\n    {max(gaps):.1e} in all {len(gaps)} (rounding, which training amplifies)"
    )


def plot(runs: list[Run], memory: list[Measured], path: Path, footer: str) -> None:
    """Left the loss of every run, right the memory of the loss against the batch size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.4), layout="constrained")  # without pyplot: no window, no global state
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _plot_losses(left, runs)
    _plot_memory(right, memory)
    for axes in (left, right):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(footer, fontsize=8, color="0.35")
    figure.savefig(path, dpi=150)


def _plot_losses(axes, runs: list[Run]) -> None:
    small = min((run.batch for run in runs), default=0)
    for run in runs:
        color = COLORS["large" if run.batch > small else run.loss]
        wide = run.loss == "dense"  # drawn first, as a band under the flashcl curve that follows it
        seen = [run.batch * (step + 1) for step in range(len(run.losses))]
        axes.plot(
            seen,
            run.losses,
            color=color,
            linewidth=6 if wide else 1.4,
            alpha=0.45 if wide else 1,
            marker=None if run.batch == small else "o",
            markersize=3.5,
            label=f"{run.loss}, batch {run.batch:,}, {len(run.losses)} steps: recall@10 {run.recall10:.1%}",
        )
    axes.set(xscale="log", xlabel="pairs seen", ylabel="InfoNCE in nats (it grows with log batch)")
    axes.set(title="Training loss", ylim=(0, None))
    axes.legend(frameon=False)


def _plot_memory(axes, memory: list[Measured]) -> None:
    labels = {"dense": {"xytext": (-8, 4), "ha": "right"}, "flashcl": {"xytext": (0, -16), "ha": "center"}}
    for loss, label in labels.items():
        done = [m for m in memory if m.loss == loss and m.peak]
        color = COLORS[loss]
        axes.plot([m.batch for m in done], [m.peak for m in done], "o-", color=color, label=f"{loss}, measured")
        for m in done:
            axes.annotate(size(m.peak), (m.batch, m.peak), textcoords="offset points", color=color, **label)
    for m in memory:
        if m.peak is None:
            axes.plot(m.batch, m.needed, "o", markerfacecolor="none", color=COLORS["dense"])
            axes.annotate(
                f"not run: would\nneed {size(m.needed)}",
                (m.batch, m.needed),
                (-8, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=9,
            )
    batches = sorted({m.batch for m in memory if m.peak or m.needed})
    if not batches:
        axes.text(0.5, 0.5, "not measured here", ha="center", transform=axes.transAxes)
        return
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.yaxis.set_major_formatter(lambda value, _: size(value).replace(".0 ", " "))
    axes.set(xlabel="batch size", ylabel="peak memory of the loss", title="Memory of the loss, forward and backward")
    axes.margins(x=0.15, y=0.12)
    axes.legend(frameon=False, loc="upper left")
