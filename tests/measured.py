"""For the tests of `flashcl bench` and of the programs in bench/: results that are made up, and fixtures."""

import importlib.util
from pathlib import Path

import pytest

from flashcl.cli.bench import machine, measure
from flashcl.cli.bench.results import Row

ROOT = Path(__file__).resolve().parents[1]

ROWS = [
    Row("info_nce", 64, 16, "float32", "full", "dense", "ok", "", 1.5, 1.25, 2.0, 7, 0.5, 1.0, 0.75, 3.0, 1e-7, "float64"),
    Row("info_nce", 64, 16, "float32", "full", "memeff", "skipped", 'not installed, "so far"'),
    Row("info_nce", 128, 16, "float32", "full", "dense", "oom"),
]
ENVIRONMENT = dict(
    device="CPU: one, two", driver="none", torch="2", triton="3", commit="abc", date="today", copy_gb_per_s=10.0
)


def script(name):
    """bench/<name>.py, which is not installed."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / f"bench/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    """A commit in the middle of a test would end what --resume may go on with."""
    monkeypatch.setattr(machine, "_commit", lambda: "abc1234")


@pytest.fixture
def no_children(monkeypatch):
    """Memory is not measured: the process that does it knows nothing of a provider that a test has made."""
    monkeypatch.setattr(measure, "_peak_in_fresh_process", lambda work, name: 2**20)
