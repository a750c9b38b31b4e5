"""The commands as a user runs them, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import flashcl

FLASHCL = Path(sys.executable).with_name("flashcl")


def run(*args, **environment):
    return subprocess.run([FLASHCL, *args], capture_output=True, text=True, env=os.environ | environment)


def test_info_says_what_is_here_and_why_not():
    done = run("info", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert f"flashcl    {flashcl.__version__}" in done.stdout and torch.__version__ in done.stdout
    assert re.search(r"^torch +usable: float64, float32, bfloat16, float16$", done.stdout, re.M)
    if not torch.cuda.is_available():
        assert re.search(r"^triton +not usable: .+cpu", done.stdout, re.M)
        assert re.search(r"^auto +torch$", done.stdout, re.M)


def test_check_passes_on_this_machine():
    done = run("check", "--backend", "torch")
    assert done.returncode == 0 and "all passed" in done.stdout, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.endswith(" ok")]
    assert len(lines) == 7 * 4  # losses x dtypes


def test_check_fails_where_a_loss_is_wrong():
    """One loss, one part in ten thousand off: exit code 1, and the table says where."""
    script = """
import sys, flashcl
from flashcl.cli import main
right = flashcl.nt_xent
flashcl.nt_xent = lambda *args, **kwargs: right(*args, **kwargs) * 1.0001
sys.exit(main(["check", "--backend", "torch"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = re.findall(r"^(\S.*?)  +torch .*FAILED$", done.stdout, re.M)
    assert set(failed) == {"nt_xent"}, done.stdout


def test_a_backend_that_cannot_run_fails_the_check_and_says_why():
    done = run("check", "--backend", "cuda")
    if "not usable" in done.stdout:
        assert done.returncode == 1 and re.search(r"not usable: \w+", done.stdout)
    else:
        assert done.returncode == 0, done.stdout


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(f"{FLASHCL} info | true", shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
