"""setup.py, function by function, without a compiler. test_packaging.py builds with it."""

import runpy
from pathlib import Path

import pytest
import setuptools

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def functions(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("FLASHCL_CUDA", "0")
    monkeypatch.chdir(REPO)
    return runpy.run_path("setup.py")


def nvcc_in(folder):
    folder.mkdir(parents=True)
    (folder / "nvcc").touch(mode=0o755)
    return str(folder / "nvcc")


def test_nvcc_is_searched_in_order(functions, tmp_path, monkeypatch):
    on_path, home, cuda_path = (nvcc_in(tmp_path / name / "bin") for name in ("p", "h", "c"))
    monkeypatch.setenv("PATH", str(tmp_path / "p/bin"))
    assert functions["find_nvcc"]() == on_path
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "c"))
    assert functions["find_nvcc"]() == cuda_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "h"))
    assert functions["find_nvcc"]() == home


def test_files_of_a_generation_are_compiled_for_it_alone(functions, monkeypatch, tmp_path):
    asked = {}
    record = lambda *words: asked.setdefault(words[1].name, words) and ""  # noqa: E731
    monkeypatch.setitem(functions["compile_file"].__globals__, "nvcc", record)
    monkeypatch.setenv("FLASHCL_ARCHS", "80;90a")
    for name in ("rows.cu", "sweep_sm90.cu"):
        functions["compile_file"](Path(name), [], tmp_path)
    gencode = {name: [w[-7:].split("sm_")[1] for w in words if str(w).startswith("-gencode")] for name, words in asked.items()}
    assert gencode == {"rows.cu": ["80", "90a"], "sweep_sm90.cu": ["90a"]}
    monkeypatch.setenv("FLASHCL_ARCHS", "80")
    assert not any("_sm90" in name for name in functions["sources"]())
    monkeypatch.delenv("FLASHCL_ARCHS")
    assert any("_sm90" in name for name in functions["sources"]()) and functions["architectures"]() == ["90a"]


PTXAS = """ptxas info    : Compiling entry function '_Zone' for 'sm_90a'
ptxas info    : Function properties for _Zone
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
"""


def test_what_ptxas_reports_is_kept(functions):
    source = functions["resources_source"](PTXAS)
    assert '"_Zone sm_90a registers=40 stack=16 spill_stores=4 spill_loads=8\\n"' in source
    assert "Potential Performance Loss" in source


def test_a_report_in_other_words_is_no_error(functions):
    """Nor do two kernels make one line."""
    other = PTXAS.replace("bytes stack frame", "B of stack").replace("_Zone", "_Zother")
    source = functions["resources_source"](other + PTXAS)
    assert "_Zone sm_90a registers=40" in source and "_Zother" not in source
