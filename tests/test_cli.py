"""The commands as a user runs them, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flashcl
from flashcl import contract
from flashcl.cli import check as check_command, info, main
from flashcl.dtypes import DTYPES
from flashcl.engine import dispatch

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


def test_info_has_a_line_for_each_part(monkeypatch):
    names = [name for name, _ in info.report()]
    assert names == ["flashcl", "python", "torch", "triton", "extension", "device", *dispatch.BACKENDS, "auto"]
    monkeypatch.setattr(info.dispatch, "choose", lambda name, x: "cuda" if x.dtype.itemsize == 2 else "triton")
    assert info.report()[-1] == ("auto", "float64: triton, float32: triton, bfloat16: cuda, float16: cuda")


def test_check_passes_on_this_machine():
    done = run("check", "--backend", "torch")
    assert done.returncode == 0 and "all passed" in done.stdout, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.endswith(" ok")]
    assert len(lines) == 7 * 4  # losses x dtypes


def right(*args, nt_xent=flashcl.nt_xent, **options):
    return nt_xent(*args, **options)


def wrong_value(*args, **options):
    """Its gradients fit it."""
    return right(*args, **options) * 1.0001


def wrong_gradients(*args, **options):
    value = right(*args, **options)
    return value.detach() + 1.02 * (value - value.detach())


def wrong_in_many_rows(z1, *args, **options):
    return (wrong_value if len(z1) == 600 else right)(z1, *args, **options)


def wrong_in_one_regime(*args, temperature, **options):
    return (wrong_gradients if temperature < 0.02 else right)(*args, temperature=temperature, **options)


def check(monkeypatch, capsys, nt_xent):
    """Of two losses, one of them planted: exit code, {(loss, dtype): (our error, that of dense, verdict, reasons)}."""
    monkeypatch.setattr(contract, "LOSSES", ("siglip", "nt_xent"))
    monkeypatch.setattr(flashcl, "nt_xent", nt_xent)
    if nt_xent is not wrong_in_many_rows:  # most of the time goes into its case
        monkeypatch.delitem(check_command.CASES, "600 rows")
    code = main(["check", "--backend", "torch"])
    found = re.findall(
        r"^(\w+) +(\w+) +torch +(\S+) +(\S+) +(ok|FAILED)\n((?:    .*\n)*)", capsys.readouterr().out, re.M
    )
    assert len(found) == 2 * 4
    return code, {row[:2]: row[2:] for row in found}


@pytest.mark.parametrize(
    "nt_xent, reasons",
    [
        (wrong_value, ["init: value", "large: value"]),
        (wrong_gradients, ["init: grad z1", "t=0.01: grad z2", "gradcheck"]),
        (wrong_in_many_rows, ["600 rows: value"]),
        (wrong_in_one_regime, ["t=0.01: grad z1", "t=0.01: grad temperature"]),
    ],
)
def test_check_fails_where_a_loss_is_wrong(monkeypatch, capsys, nt_xent, reasons):
    """Exit code 1, and the table says where."""
    code, table = check(monkeypatch, capsys, nt_xent)
    assert code == 1
    assert {loss for (loss, _), row in table.items() if row[2] == "FAILED"} == {"nt_xent"}
    shown = table["nt_xent", "float64"][3]
    assert all(f"    {reason}" in shown for reason in reasons), shown
    assert ("gradcheck" in shown) == ("gradcheck" in reasons)
    if nt_xent not in (wrong_value, wrong_in_many_rows):  # which is less than the rounding of 16 bits
        assert {row[2] for (loss, _), row in table.items() if loss == "nt_xent"} == {"FAILED"}


def test_check_goes_over_all_backends_and_one_failure_is_enough(monkeypatch, capsys):
    """Without --backend. A backend that serves only some dtypes is usable; the last of several may be right."""
    serves = {"cuda": set(), "triton": {torch.float32, torch.bfloat16}, "torch": set(DTYPES)}
    monkeypatch.setattr(dispatch, "unusable", lambda name, _, dtype: None if dtype in serves[name] else f"no {dtype}")
    monkeypatch.setattr(contract, "LOSSES", ("nt_xent",))
    monkeypatch.setattr(check_command, "CASES", {"init": dict(regime="init", n=7, d=4)})
    real = flashcl.nt_xent

    def nt_xent(*args, backend, **options):
        return real(*args, backend="torch", **options) * (1.01 if backend == "triton" else 1.0)

    monkeypatch.setattr(flashcl, "nt_xent", nt_xent)
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    found = re.findall(r"^nt_xent +(\w+) +(\w+) +\S+ +\S+ +(ok|FAILED)$", out, re.M)
    right, wrong = [(str(d)[6:], "torch", "ok") for d in DTYPES], [(d, "triton", "FAILED") for d in ("float32", "bfloat16")]
    assert sorted(found) == sorted(right + wrong)
    assert "cuda is not usable: no torch.bfloat16" in out and out.endswith("2 FAILED\n")
    assert main(["check", "--backend", "triton"]) == 1


def test_the_error_that_check_prints_is_the_worst(monkeypatch, capsys):
    """Of all regimes, values and gradients: one regime is wrong, and there every value is right. The truth has more digits
    than float64: dense PyTorch in float64 has an error, too."""
    _, table = check(monkeypatch, capsys, wrong_in_one_regime)
    ours, dense = table["nt_xent", "float64"][:2]
    assert ours == "2.0e-02" and 1e-16 < float(dense) < 1e-10
    assert float(table["siglip", "float64"][0]) < 1e-12 < 1e-4 < float(table["siglip", "bfloat16"][1])


def test_a_backend_that_cannot_run_is_not_checked(monkeypatch, capsys):
    monkeypatch.setattr(check_command, "default_device", lambda: torch.device("cpu"))
    assert main(["check", "--backend", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"flashcl: --backend cuda: .+\n", err) and not out


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_gpu_that_is_not_there(monkeypatch, tmp_path, capsys, command):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([command, "--device", "cuda", "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err == "flashcl: --device cuda: torch finds no CUDA GPU here\n" and not out and not list(tmp_path.iterdir())


def test_the_commands_run_where_unix_does_not(tmp_path):
    """As on Windows: neither `resource` nor a load average, and nothing that tells the memory of a process."""
    script = """
import os, sys
sys.modules["resource"] = None
del os.getloadavg
from flashcl.cli import main, memory
memory.measurable = lambda device: device.type == "cuda"
sys.exit(main(sys.argv[1:]))
"""
    sizes = ["--n", "64", "--d", "8", "--seconds", "0.01", "--provider", "flashcl-torch,dense", "--mode", "full"]
    command = [sys.executable, "-c", script, "bench", *sizes, "--device", "cpu", "--out", tmp_path / "r.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if re.match("(flashcl-torch|dense) full", line)]
    assert len(lines) == 2 and all("not measured" in line for line in lines), done.stdout
    again = subprocess.run([*command, "--overwrite", "--compare", tmp_path / "r.json"], capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count("memory not measured") == 2, again.stdout + again.stderr


def test_the_commands_without_a_script():
    done = subprocess.run([sys.executable, "-m", "flashcl", "info"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("flashcl "), done.stderr


def test_a_closed_pipe_is_no_error():
    """Whoever reads has gone before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | dict(TRITON_INTERPRET="0")  # whose interpreter warns
    done = subprocess.run([FLASHCL, "info"], stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_of_any_command(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "report", interrupted)
    assert main(["info"]) == 130


def test_without_docstrings_and_with_stdout_closed():
    """`python -OO`, and `>&-` in a shell: there sys.stdout is None."""
    for flags, redirected in (("-OO", ""), ("-B", ">&-")):
        command = f"'{sys.executable}' {flags} -m flashcl info {redirected}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=FLASHCL.parent)
        assert done.returncode == 0, done.stderr
        assert ("flashcl" in done.stdout) == (not redirected)
