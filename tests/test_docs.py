"""What the README and docs/ show: their snippets run, their tables are the numbers in bench/results/, their links lead somewhere.

The calls of other libraries' losses are in test_drop_in.py.
"""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import flashcl
from flashcl.backends.tiled import WORKSPACE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted((ROOT / "docs").glob("*.md"))
README, BENCHMARKS, DISTRIBUTED = ROOT / "README.md", ROOT / "docs/benchmarks.md", ROOT / "docs/distributed.md"


# ---- snippets ------------------------------------------------------------------------------------------------------------


def snippets(page: Path) -> list[str]:
    found = re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(), re.M | re.S)
    return [re.sub(rf"^{indent}", "", code, flags=re.M) for indent, code in found]


def stand_ins() -> dict:
    """What a reader has: a model, data and a process group; small ones."""
    rows = [torch.nn.functional.normalize(torch.randn(8, 4), dim=1).requires_grad_() for _ in range(4)]
    names = "image_features", "text_features", "x", "y"
    model = types.SimpleNamespace(logit_scale=torch.tensor(2.0, requires_grad=True))
    model.parameters = lambda: [model.logit_scale]
    return dict(zip(names, rows)) | dict(
        model=model, logit_scale=torch.tensor(10.0), s=torch.tensor(10.0), encoder=torch.nn.Linear(4, 3),
        images=torch.randn(600, 4), device="cpu", torch=torch, flashcl=flashcl, dist=dist,
    )  # fmt: skip


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A world of this process."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


RUNNABLE = [(page, code) for page in (README, DISTRIBUTED) for code in snippets(page) if "torch.cuda.make" not in code]


def test_there_are_snippets():
    assert len(RUNNABLE) == 7 and len(snippets(README)) == 7  # one of which needs a GPU: test_gpu.py runs what it says


@pytest.mark.parametrize("page, code", RUNNABLE, ids=[f"{page.stem} {k}" for k, (page, _) in enumerate(RUNNABLE)])
def test_a_snippet_runs(page, code, alone):
    names = stand_ins()
    exec(code, names)
    if "loss" in names:
        assert names["loss"].dim() == 0 and names["loss"].isfinite() and names["loss"].requires_grad


def test_the_pages_of_the_docstrings(tmp_path):
    """What `make docs` runs, to another folder."""
    pytest.importorskip("pdoc")
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "/pdoc " in line)
    words = [word.replace("docs/api", str(tmp_path)) for word in line.split("/pdoc ")[1].split()]
    subprocess.run([sys.executable, "-m", "pdoc", *words], cwd=ROOT, check=True, env=os.environ | dict(PYTHONSAFEPATH="1"))
    page = (tmp_path / "flashcl.html").read_text()
    assert "Radford et al. 2021" in page and all(f'id="{name}"' in page for name in flashcl.__all__)
    assert (tmp_path / "flashcl/reference.html").exists() and (tmp_path / "flashcl/contract.html").exists()


# ---- tables --------------------------------------------------------------------------------------------------------------


def table(page: Path, header: str) -> list[list[str]]:
    """The cells below the header that begins like this."""
    lines = page.read_text().splitlines()
    start = next(k for k, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def shows(cell: str, value: float) -> bool:
    """Whether a cell like "27.2 (102 %)", "0.44 s" or "1.0 GiB" is that number, rounded."""
    text = cell.split()[0].replace(",", "")
    decimals = len(text.partition(".")[2])
    value = value / 1024 if "GiB" in cell else value
    return abs(float(text) - value) <= 0.501 * 10**-decimals


def results(name: str) -> list[dict]:
    return json.loads((ROOT / "bench/results" / name).read_text())["rows"]


@pytest.mark.parametrize(
    "page, header, file, sizes",
    [
        (README, "| loss | rows | flashcl ms", "bench-cpu.json", 2),
        (BENCHMARKS, "| loss | rows | flashcl ms", "bench-cpu.json", 5),
        (BENCHMARKS, "| loss, on Zen 4 | rows | flashcl ms", "bench-cpu-zen4.json", 2),
        (BENCHMARKS, "| loss, bfloat16 | rows | flashcl ms", "bench-cpu-bf16.json", 4),
    ],
    ids=["README", "benchmarks", "benchmarks, Zen 4", "benchmarks, bfloat16"],
)
def test_the_table_of_a_cpu(page, header, file, sizes):
    found = {(r["loss"], r["n"], r["provider"]): r for r in results(file)}
    rows = table(page, header)
    assert len(rows) == 4 * sizes
    for loss, n, *cells in rows:
        ours, dense, compiled = (found[loss, int(n.replace(",", "")), k] for k in ("flashcl-torch", "dense", "torch.compile"))
        values = [r["ms"] for r in (ours, dense, compiled)] + [ours["ms"] / dense["ms"], ours["ms"] / compiled["ms"]]
        values += [r["extra_mib"] for r in (ours, dense, compiled)]
        assert all(map(shows, cells, values)) and len(cells) == len(values), (loss, n, cells, values)


def test_the_table_of_a_gpu():
    found = {(r["loss"], r["n"], r["d"], r["provider"]): r for r in results("bench-h200.json")}
    rows = table(README, "| loss | rows | D")
    assert len(rows) == 10
    for loss, n, d, cuda, triton, peer, dense, *memory in rows:
        at = loss, int(n.replace(",", "")), int(d.replace(",", ""))
        peers = [found[(*at, name)] for name in ("memeff", "siglip-kernel") if (*at, name) in found]
        best = min((r for r in peers if r["status"] == "ok"), key=lambda r: r["ms"], default=None)
        assert (best is None) == (peer == "") == (memory[1] == ""), (at, peer)
        assert best is None or best["provider"] in peer, (at, peer)
        ours, tritons, eager = (found[(*at, name)] for name in ("flashcl-cuda", "flashcl-triton", "dense"))
        shown = zip((ours, tritons, best, eager), (cuda, triton, peer, dense), (memory[0], None, *memory[1:]))
        for r, time, mib in shown:
            if r is not None:
                assert shows(time, r["ms"]) and (mib is None or shows(mib, r["extra_mib"])), (at, r["provider"], time, mib)
                of_cublas = float(re.search(r"\((\d+) %\)", time)[1])
                assert abs(of_cublas - 100 * r["tflops"] / r["matrix_tflops"]) <= 0.51, (at, r["provider"], time)


def test_the_table_of_targets():
    rows = [r for name in ("bench-h200-peers.json", "bench-h200.json") for r in results(name)]
    found = {(r["loss"], r["n"], r["d"], r["provider"]): r for r in rows if r["status"] == "ok"}
    ours, losses = "flashcl-cuda", {"InfoNCE": "info_nce", "SigLIP": "siglip", "NT-Xent": "nt_xent"}
    (million,) = results("million-h200.json")
    small = [r["ms"] for name in SMALL.values() for r in results(name)]
    eager, graph, compiled = ([r[k] for r in small] for k in ("flashcl", "flashcl, graph", "dense, torch.compile"))
    targets = table(BENCHMARKS, "| target | asked")
    assert len(targets) == 16
    for target, asked, reached, verdict in targets:
        width = re.search(r"D = ([\d,]+)", target)
        at = next((v for k, v in losses.items() if k in target), None), 65_536, width and int(width[1].replace(",", ""))
        if asked.endswith(" %"):
            r = found[(*at, "flashcl-triton" if "Triton" in target else ours)]
            assert shows(reached, 100 * r["tflops"] / r["matrix_tflops"])
            assert "(" not in reached or shows(reached.partition("(")[2], 100 * r["tflops"] / 790)
            met = r["tflops"] / r["matrix_tflops"] >= float(asked.split()[0]) / 100
        elif asked.endswith("as fast"):
            peer = found[(*at, target.split(",")[0])]
            faster, wanted = peer["ms"] / found[(*at, ours)]["ms"], float(asked.split()[0])
            assert shows(reached, faster)
            met = faster >= wanted
            needed = 100 * wanted * peer["tflops"] / peer["matrix_tflops"]
            assert met or shows(re.search(r"would be (\d+) %", verdict)[1], needed)
        elif "NT-Xent" in target:
            r = found[(*at, ours)]
            assert shows(reached, r["ms"]) and all(f"{r[k]:.2f}" in verdict for k in ("ms_20", "ms_80"))
            met = r["ms"] <= float(asked.split()[0])
        elif "million" in target:
            what = "times_floor" if "floor" in asked else "peak_gb"
            assert shows(reached, million[what]) and (what == "peak_gb" or f"{million['times_lasting_floor']:.2f} ×" in verdict)
            met = million[what] <= float(asked.split()[0])
        else:  # small batches
            ends = min(graph), max(graph), min(compiled), max(compiled)
            assert reached == "{:.1f} to {:.1f} ms for {:.1f} to {:.1f}".format(*ends)
            assert f"({min(eager):.0f} to {max(eager):.0f} ms)" in verdict
            met = all(a <= b for a, b in zip(graph, compiled))
        assert verdict.startswith("met" if met else "**missed**"), target

    for cpu, name in (("Zen 5", "bench-cpu.json"), ("Zen 4", "bench-cpu-zen4.json")):
        times = {(r["n"], r["provider"]): r["ms"] for r in results(name) if r["loss"] == "info_nce"}
        ratios = [times[n, "flashcl-torch"] / times[n, "dense"] for n in (2048, 16_384)]
        assert f"n {cpu} {ratios[0]:.2f} and {ratios[1]:.2f}" in BENCHMARKS.read_text()


SMALL = {"c245df4": "small-h200.json", "c8d32a9": "small-h200-c8d32a9.json"}  # by commit


def test_the_table_of_small_batches():
    rows = table(README, "| rows | flashcl | flashcl in a graph")
    assert len(rows) == 5
    for n, *cells, commit in rows:
        (found,) = (r["ms"] for r in results(SMALL[commit]) if r["n"] == int(n.replace(",", "")))
        values = [found[k] for k in ("flashcl", "flashcl, graph", "dense", "dense, torch.compile")]
        assert all(map(shows, cells, values)), (n, cells, values)


def test_the_table_of_ranks():
    found = {(r["loss"], r["world"], r["strategy"]): r for r in results("distributed-cpu.json")}
    rows = table(README, "| loss | one rank")
    assert len(rows) == 4
    for loss, *steps, ring, gather, waiting in rows:
        assert all(shows(cell, found[loss, world, "ring"]["step_s"]) for cell, world in zip(steps, (1, 2, 4))), (loss, steps)
        for cell, strategy in ((ring, "ring"), (gather, "gather")):
            assert shows(cell, found[loss, 4, strategy]["sent_mib"]), (loss, strategy, cell)
        assert shows(waiting, 100 * found[loss, 4, "ring"]["exposed"]), (loss, waiting)


def test_the_comparison_is_part_of_the_whole_one():
    short, whole = (table(page, "| | flashcl | memeff") for page in (README, ROOT / "docs/comparison.md"))
    assert len(short) == 12 and len(whole) > len(short) and all(row in whole for row in short)


def test_the_workspace_is_as_large_as_the_readme_says():
    assert f"Up to {WORKSPACE // 2**20} MiB of flashcl's memory are a workspace" in README.read_text()


# ---- links ---------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.exists(), target
            assert not anchor or anchor in anchors(to), target
