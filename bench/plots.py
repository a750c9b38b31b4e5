"""Figures from the files of `flashcl bench` and bench/kernels.py: docs/img/*.png from bench/results/*.json, by `make plots`.

One set of figures for each machine. What was not measured is said in the figure, never drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flashcl.cli.bench.results import Results, Row
from flashcl.cli.bench.suites import LOSSES

HERE = Path(__file__).parent
COLORS = {
    "flashcl-cuda": "#0b3c6f",
    "flashcl-triton": "#1f7fd1",
    "flashcl-torch": "#63b3e6",
    "dense": "#e07b39",
    "torch.compile": "#b0413e",
    "flex-attention": "#d4a017",
    "open_clip": "#8c6d46",
    "memeff": "#2a9d6f",
    "siglip-kernel": "#6b4fa0",
    "inf-cl": "#888888",
    "cut-cross-entropy": "#c0539f",
    "quack": "#4b5d16",
}
MARKERS = dict(zip(COLORS, "osD^v<>PXph*"))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="default: bench/results/*.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs/img")
    args = parser.parse_args(argv)
    paths = args.results or sorted((HERE / "results").glob("*.json"))
    machines, taken_apart = load(paths), load_parts(paths)
    if not machines:
        print(
            "no results of flashcl bench to draw: run flashcl bench --out bench/results/NAME.json first",
            file=sys.stderr,
        )
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    for name, results in machines.items():
        for figure_name, figure in figures(results, taken_apart.get(name)):
            path = args.out / f"{name}-{figure_name}.png"
            FigureCanvasAgg(figure)
            figure.savefig(path, dpi=130)
            print(path)
    return 0


def load(paths: Iterable[Path]) -> dict[str, list[Results]]:
    """The files that are results of `flashcl bench`, by machine."""
    machines = defaultdict(list)
    for path in paths:
        data = json.loads(path.read_text())
        if "copy_gb_per_s" in data.get("environment", {}) and data["rows"]:
            results = Results.load(path)
            machines[slug(results.environment["device"])].append(results)
    return machines


def load_parts(paths: Iterable[Path]) -> dict[str, dict]:
    """Of each machine the newest file of bench/kernels.py."""
    files = [json.loads(path.read_text()) for path in paths]
    files = [data for data in files if any(isinstance(row, dict) and "sweep" in row for row in data.get("rows", []))]
    files.sort(key=lambda data: data["environment"]["date"])
    return {slug(data["environment"]["device"]): data for data in files}


def slug(device: str) -> str:
    """A file name from the first words that describe a device."""
    return re.sub(r"[^a-z0-9]+", "-", device.split(",")[0].lower()).strip("-")


def figures(files: list[Results], taken_apart: dict | None = None) -> Iterable[tuple[str, Figure]]:
    rows = newest(files)
    for dtype in dict.fromkeys(row.dtype for row in rows):
        some = [row for row in rows if row.dtype == dtype and row.mode == "full"]
        sources = [results for results in files if any(row.dtype == dtype for row in results.rows)]
        bandwidth = max(results.environment["copy_gb_per_s"] for results in sources)
        if some:
            if sized := several(some, "d", "n"):
                yield f"{dtype}-sizes", footed(scaling(some, sized), sources, some)
            if several(some, "n", "d"):
                yield f"{dtype}-widths", footed(widths(some), sources, some)
            yield f"{dtype}-roofline", footed(roofline(some, bandwidth), sources, some)
        if taken_apart and (kernels := [row for row in taken_apart["rows"] if row["dtype"] == dtype]):
            yield f"{dtype}-kernels", footed(kernel_roofline(kernels, bandwidth), [Results(taken_apart["environment"])], [])


def newest(files: list[Results]) -> list[Row]:
    """The last measurement of each thing; that a provider was not there later does not undo it."""
    all_rows = Results({})
    for results in sorted(files, key=lambda results: results.environment["date"]):
        known = {row.key for row in all_rows.rows}
        all_rows.add([row for row in results.rows if row.status != "skipped" or row.key not in known])
    return all_rows.rows


def footed(figure: Figure, files: list[Results], rows: list[Row]) -> Figure:
    """What the numbers stand on, and what is not there, under every figure."""
    lines = textwrap.wrap(absent(rows), 190 * figure.get_figwidth() / 12)
    for environment in (results.environment for results in files):
        versions = f"torch {environment['torch']}, triton {environment['triton']}, driver {environment['driver']}"
        lines.append(f"{environment['device']}; {versions}; commit {environment['commit']}, {environment['date']}")
    figure.supxlabel("\n".join(dict.fromkeys(lines)), fontsize=7, color="0.35")
    return figure


# ---- time and memory against N ---------------------------------------------------------------------------------------


def scaling(rows: list[Row], losses: list[str]) -> Figure:
    """A line of two panels for each loss, at the D that has the most sizes."""
    figure = Figure(figsize=(12, 3.9 * len(losses)), layout="constrained")
    for loss, (time, memory) in zip(losses, figure.subplots(len(losses), 2, squeeze=False)):
        d = most_common(rows, loss, "d", "n")
        some = [row for row in rows if (row.loss, row.d) == (loss, d)]
        draw(time, some, "n", lambda row: (row.ms, row.ms_20, row.ms_80))
        weighed = [row for row in some if row.status != "ok" or row.extra_mib is not None]
        draw(memory, weighed, "n", lambda row: (row.extra_mib,) * 3)
        title = f"{loss}, D = {d}, {rows[0].dtype}, forward and backward"
        axes(time, title, "N (rows of S)", "ms (median, 20 to 80 %)", some, "n")
        axes(memory, title, "N (rows of S)", "peak extra memory, MiB", some, "n")
        legend(memory)
    return figure


def draw(ax, rows: list[Row], x: str, y) -> None:
    """A curve for each provider through what it measured; crosses above the panel where it ran out of memory."""
    full = [row for row in rows if row.status == "oom"]
    without = [name for name in COLORS if any(row.provider == name for row in full)]
    for name in COLORS:
        measured = [row for row in rows if row.provider == name and row.status == "ok"]
        measured.sort(key=lambda row: getattr(row, x))
        if measured:
            at, values = [getattr(row, x) for row in measured], [y(row) for row in measured]
            ax.plot(at, [v[0] for v in values], label=name, color=COLORS[name], marker=MARKERS[name], markersize=4.5)
            ax.fill_between(
                at, [v[1] for v in values], [v[2] for v in values], color=COLORS[name], alpha=0.15, linewidth=0
            )
    for k, name in enumerate(without):
        at = [getattr(row, x) for row in full if row.provider == name]
        style = dict(color=COLORS[name], transform=ax.get_xaxis_transform(), clip_on=False)
        ax.plot(at, [1.03 + 0.06 * k] * len(at), "x", gid=f"oom {name}", **style)
        ax.text(min(at), 1.03 + 0.06 * k, f"{name} out of memory   ", **style, fontsize=7, ha="right", va="center")
    ax.set_title("", pad=8 + 15 * len(without))


def absent(rows: list[Row]) -> str:
    """Who has no point in a figure, and why; a provider that has no such loss is not missed."""
    reasons = {}
    for row in rows:
        if row.status in ("wrong", "failed") or row.status == "skipped" and not row.note.startswith("has no"):
            why = row.note.split(" against ")[0]
            reasons[f"{row.provider}: {why if row.status == 'skipped' else f'{row.status} for {row.loss}, {why}'}"] = (
                None
            )
    return f"not drawn: {'; '.join(reasons)}" if reasons else ""


def plain_axes(ax, title: str, xlabel: str, ylabel: str) -> None:
    ax.title.set(text=title, fontsize=10)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def axes(ax, title: str, xlabel: str, ylabel: str, rows: list[Row], x: str | None = None) -> None:
    plain_axes(ax, title, xlabel, ylabel)
    if not any(row.status == "ok" for row in rows):
        ax.text(0.5, 0.5, "not measured", ha="center", transform=ax.transAxes, fontsize=12, color="0.4")
    if x:
        ticks = sorted({getattr(row, x) for row in rows})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=7)
        ax.minorticks_off()
        ax.margins(x=0.12, y=0.2)
        if ylabel.startswith(("ms", "peak")) and any(row.status == "ok" for row in rows):
            ax.set_yscale("log")


def legend(ax) -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def several(rows: list[Row], fixed: str, varied: str) -> list[str]:
    """The losses that were measured for more than one value of `varied`, `fixed` being the same."""
    losses = [loss for loss in LOSSES if any(row.loss == loss for row in rows)]
    return [loss for loss in losses if len(values_of(rows, loss, fixed, varied)[1]) > 1]


def most_common(rows: list[Row], loss: str, fixed: str, varied: str) -> int:
    """The value of `fixed` at which a loss was measured for the most values of `varied`."""
    return values_of(rows, loss, fixed, varied)[0]


def values_of(rows: list[Row], loss: str, fixed: str, varied: str) -> tuple[int, set[int]]:
    """That value, and the values of `varied`."""
    seen = defaultdict(set)
    for row in rows:
        if row.loss == loss:
            seen[getattr(row, fixed)].add(getattr(row, varied))
    return max(seen.items(), key=lambda item: (len(item[1]), item[0]))


# ---- % of the matrix rate against D ----------------------------------------------------------------------------------


def widths(rows: list[Row]) -> Figure:
    losses = [loss for loss in LOSSES if any(row.loss == loss for row in rows)]
    figure = Figure(figsize=(12, 3.9 * math.ceil(len(losses) / 2)), layout="constrained")
    panels = list(figure.subplots(math.ceil(len(losses) / 2), 2, squeeze=False).flat)
    for loss, ax in zip(losses, panels):
        n = most_common(rows, loss, "n", "d")
        some = [row for row in rows if (row.loss, row.n) == (loss, n)]
        draw(ax, some, "d", lambda row: tuple(100 * row.floor_ms / ms for ms in (row.ms, row.ms_20, row.ms_80)))
        axes(ax, f"{loss}, N = {n:,}, {rows[0].dtype}, forward and backward", "D", "% of the matrix rate", some, "d")
        ax.set_ylim(0, None)
        legend(ax)
    for ax in panels[len(losses) :]:
        ax.set_visible(False)
    return figure


# ---- roofline --------------------------------------------------------------------------------------------------------


def roofline(rows: list[Row], bandwidth: float) -> Figure:
    """Useful FLOPs against compulsory bytes: each embedding read once, each gradient written once."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    ax = figure.subplots()
    measured = [row for row in rows if row.status == "ok"]
    peak = max((row.matrix_tflops for row in measured), default=None)
    axes(
        ax,
        f"{rows[0].dtype}, forward and backward: under the two measured roofs",
        "useful FLOPs per compulsory byte (embeddings read once, gradients written once)",
        "useful TFLOP/s",
        rows,
    )
    if not measured:
        return figure
    intensity = [row.work.flops("full") / row.work.compulsory_bytes() for row in measured]
    roofs(ax, peak, bandwidth, intensity, [row.tflops for row in measured])
    for name in COLORS:
        points = [(at, row) for at, row in zip(intensity, measured) if row.provider == name]
        if points:
            style = dict(color=COLORS[name], marker=MARKERS[name], linestyle="none", markersize=5, alpha=0.85)
            ax.plot([at for at, _ in points], [row.tflops for _, row in points], label=name, **style)
    legend(ax)
    return figure


def roofs(ax, peak: float, bandwidth: float, intensity: list[float], tflops: list[float]) -> None:
    """The two roofs, in a panel that has room for these points."""
    ridge = peak * 1e12 / (bandwidth * 1e9)
    left, right = min(ridge, *intensity) / 4, max(ridge, *intensity) * 2
    ax.plot([left, ridge, right], [peak * left / ridge, peak, peak], color="0.3", linewidth=1.2)
    ax.annotate(
        f"matrix products {peak:.3g} TFLOP/s", (right, peak), (0, 4), textcoords="offset points", ha="right", fontsize=8
    )
    ax.annotate(
        f"copy {bandwidth:,.4g} GB/s", (left, peak * left / ridge), (18, 2), textcoords="offset points", fontsize=8
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(min(peak * left / ridge, *tflops) / 1.5, 2 * peak)


PARTS = {"sweep": "o", "grad": "v", "products": "s"}  # of a step, and their markers


def kernel_roofline(rows: list[dict], bandwidth: float) -> Figure:
    """The kernels of each step of bench/kernels.py, and the library's products with G beside them."""
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    ax = figure.subplots()
    title = f"{rows[0]['dtype']}: the kernels of a step, by the profiler, under the measured roofs"
    plain_axes(ax, title, "FLOPs per compulsory byte (embeddings and G)", "TFLOP/s")
    points = [
        (row["backend"], part, flops_per_byte(row, part), row[part]["tflops"])
        for row in rows for part in PARTS if "tflops" in row[part]
    ]  # fmt: skip
    peak = max(row["matrix_tflops"] for row in rows)
    roofs(ax, peak, bandwidth, [at for *_, at, _ in points], [rate for *_, rate in points])
    for backend in dict.fromkeys(name for name, *_ in points):
        for part, marker in PARTS.items():
            mine = [point[2:] for point in points if point[:2] == (backend, part)]
            style = dict(color=COLORS[f"flashcl-{backend}"], marker=marker, linestyle="none", markersize=5, alpha=0.85)
            ax.plot([at for at, _ in mine], [rate for _, rate in mine], label=f"{part}, {backend}", **style)
    widths = ", ".join(str(d) for d in sorted({row["d"] for row in rows}))
    words = f"grad and products from left to right, sweep upward: D = {widths}"
    ax.annotate(words, (0.02, 0.95), xycoords="axes fraction", fontsize=8)
    legend(ax)
    return figure


def flops_per_byte(row: dict, part: str) -> float:
    """FLOPs of a part of a step for each byte that it must move: embeddings, and G where it is written or read."""
    size = getattr(torch, row["dtype"]).itemsize
    embeddings, g = 2 * row["n"] * row["d"] * size, row["n"] ** 2 * size
    moved = {"sweep": embeddings, "grad": embeddings + g, "products": 2 * embeddings + 2 * g}[part]
    return row[part]["tflops"] * 1e12 * row[part]["ms"] / 1e3 / moved


if __name__ == "__main__":
    sys.exit(main())
