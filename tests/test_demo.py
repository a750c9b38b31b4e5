"""`flashcl demo` on a few hundred generated functions: the data, the encoder, a whole small run, the search."""

import argparse
import ast
import importlib.util
import io
import itertools
import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flashcl.cli import demo, main, memory, text
from flashcl.cli.demo import corpus, encoder, report, search, training
from flashcl.cli.demo.encoder import Bags, Encoder, features, words

VERBS = "parse read write merge sort split count delete update encode decode compress".split()
NOUNS = "date string matrix graph archive socket header image table queue token folder".split()
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_and_quiet(monkeypatch):
    """A narrow model, and one thread: it is small enough, and others may be using the other cores."""
    monkeypatch.setattr(encoder, "WIDTH", 32)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of child processes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def code_folder(tmp_path_factory):
    """A package of 288 documented functions, two for every verb and noun."""
    folder = tmp_path_factory.mktemp("code") / "package"
    folder.mkdir()
    for noun in NOUNS:
        source = "".join(
            f'def {verb}_{noun}{suffix}({noun}_input):\n    """{verb.title()} a {noun}{words} in one pass."""\n'
            f"    result = {noun}_input.{verb}({len(verb)})\n    return result{suffix}\n\n"
            for verb, (suffix, words) in itertools.product(VERBS, (("", ""), ("_reversed", ", last item first,")))
        )
        (folder / f"{noun}.py").write_text(source)
    return folder.parent


@pytest.fixture(scope="module")
def data(code_folder):
    return training.prepare(corpus.parse(corpus.find_sources([code_folder])).pairs, seed=0)


def arguments(*options):
    """What argparse makes of `flashcl demo <options>`."""
    parser = argparse.ArgumentParser()
    demo.add_parser(parser.add_subparsers())
    return parser.parse_args(["demo", *map(str, options)])


# ---- corpus


def parse(folder, **files):
    for name, source in files.items():
        (folder / f"{name}.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    return corpus.parse(corpus.find_sources([folder]))


def test_pairs_hold_name_place_text_and_code_without_docstrings(tmp_path):
    source = '''
class Stack:
    """A class has no pair of its own."""

    def push(self, item: int = 3):
        """Put an item on
        the höchste place.

        SECOND paragraph.
        """
        def inner():
            "INNER docstring"
            return item  # kept
        return inner

    def one_line(self): "LEAK of a whole docstring here"; return 1
'''
    push, one_line = parse(tmp_path, module=source).pairs
    assert push.name == "module.Stack.push" and push.file == str(tmp_path / "module.py") and push.line == 5
    assert push.text == "Put an item on the höchste place."
    assert "def push(self, item: int = 3):" in push.code and "return item  # kept" in push.code
    assert not any(word in push.code for word in ("höchste", "SECOND", "INNER", '"'))
    assert "LEAK" not in one_line.code and "return 1" in one_line.code


def test_no_docstring_leaks_from_the_standard_library():
    source = corpus.Source(ast.__file__, "ast")
    _, pairs, error = corpus.parse_source(source)
    assert error is None and len(pairs) > 20
    assert not any(pair.text in " ".join(pair.code.split()) for pair in pairs)


def test_equal_texts_and_equal_codes_are_dropped(tmp_path):
    function = 'def {}(a):\n    """{}"""\n    return {}\n'
    pairs = parse(
        tmp_path,
        first=function.format("f", "Return the one thing.", 1),
        second=function.format("g", "Return the ONE thing.", 2),
        third=function.format("f", "Another text, the same code.", 1),
    ).pairs
    assert [pair.name for pair in pairs] == ["first.f"]


def test_tiny_texts_and_empty_bodies_are_left_out(tmp_path):
    source = 'def f():\n    """Do it now."""\n    return 1\ndef g():\n    """Overridden in the derived classes."""\n'
    assert parse(tmp_path, module=source).pairs == []


def test_files_that_cannot_be_read_are_counted(tmp_path):
    good = 'def f():\n    """Return the größte number here."""\n    return 1\n'
    found = parse(
        tmp_path,
        broken='"""text"""\ndef f(:\n',
        null=b'"""text"""\n\x00',
        not_utf8=good.encode("latin-1"),
        with_cookie=b"# coding: latin-1\n" + good.encode("latin-1"),
    )
    assert [pair.text for pair in found.pairs] == ["Return the größte number here."]
    assert found.files == 4
    assert {file.rsplit("/")[-1] for file, _ in found.skipped} == {"broken.py", "null.py", "not_utf8.py"}
    assert "3 files skipped" in found.describe() and "1 UnicodeDecodeError" in found.describe()


def test_folders_of_tests_are_left_out(tmp_path):
    for folder in ("tests", "kept"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    assert [source.module for source in corpus.find_sources([tmp_path])] == ["kept"]


def test_the_number_of_pairs_is_bounded_and_their_order_fixed(code_folder):
    sources = corpus.find_sources([code_folder])
    assert sources == corpus.find_sources([code_folder])
    everything, some = corpus.parse(sources), corpus.parse(sources, limit=100)
    assert len(everything.pairs) == 2 * len(VERBS) * len(NOUNS)
    assert some.pairs == everything.pairs[:100] and some.files < everything.files


def test_parsing_in_several_processes_gives_the_same(code_folder, monkeypatch):
    sources = corpus.find_sources([code_folder])
    alone = corpus.parse(sources)
    monkeypatch.setattr(corpus, "FILES_PER_PROCESS", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert corpus.parse(sources) == alone


def test_cache_is_used_until_the_packages_change(code_folder, tmp_path, monkeypatch):
    cache, parsed = tmp_path / "corpus.json", []
    track = lambda items, total, description: (parsed.append(1), items)[1]  # noqa: E731
    fresh = corpus.load(cache, [code_folder], track)
    assert corpus.load(cache, [code_folder], track) == fresh and len(parsed) == 1
    cache.write_text(cache.read_text()[:1000])
    assert corpus.load(cache, [code_folder], track) == fresh and len(parsed) == 2
    package = SimpleNamespace(name="new", version="1.0")
    monkeypatch.setattr(corpus.importlib.metadata, "distributions", lambda: [package])
    assert corpus.load(cache, [code_folder], track) == fresh and len(parsed) == 3


# ---- encoder


def test_identifiers_are_split():
    assert words("HTTPServer2.parse_isoDate(x)") == ["http", "server", "2", "parse", "iso", "date", "x"]


def test_hashing_is_the_same_in_every_process():
    program = "from flashcl.cli.demo.encoder import features; print(features('parse'))"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    there = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == str(features("parse"))


def test_bags_select_rows():
    texts = ["parse a date", "", "date date"]
    bags = Bags.of(texts)
    rows = torch.tensor([2, 1, 2, 0])
    assert taken_equal(bags.take(rows), Bags.of([texts[row] for row in rows]))
    norms = [bags.weighted(torch.ones(2**15)).take(torch.tensor([row])).weights.norm().item() for row in (0, 1, 2)]
    assert norms == pytest.approx([1, 0, 1])


def taken_equal(a, b):
    return torch.equal(a.ids, b.ids) and torch.equal(a.weights, b.weights) and torch.equal(a.starts, b.starts)


def test_an_untrained_encoder_matches_common_words():
    torch.manual_seed(0)
    untrained = Encoder().eval()
    x = untrained.encode_text(Bags.of(["parse a date"]))
    y = untrained.encode_code(Bags.of(["parse_date(a)", "sort_queue(b)"]))
    assert x.norm().item() == pytest.approx(1) and (x @ y.T).argmax() == 0


# ---- training


def test_dense_and_flashcl_coincide_and_learn(data):
    dense, fused = training.train(["dense", "flashcl"], data, CPU, 64, steps=20)
    assert dense.losses[0] == pytest.approx(fused.losses[0], abs=1e-5)
    assert dense.losses == pytest.approx(fused.losses, abs=1e-2)
    assert fused.losses[-1] < 0.8 * fused.losses[0]
    assert fused.recall10 > 5 * 10 / len(data.test) and fused.recall1 <= fused.recall10


def test_recall_counts_the_first_and_the_first_ten(data, monkeypatch):
    """Of the k-th text, k codes are nearer than its own: it comes in place k + 1."""
    model, nearer = Encoder(), torch.ones(20, 20).tril(-1)
    nearer -= torch.arange(20.0)[:, None] / 2  # some texts are nearer to all codes than others
    monkeypatch.setattr(model, "encode_text", lambda bags: nearer)
    monkeypatch.setattr(model, "encode_code", lambda bags: torch.eye(20))
    assert training.recall(model, replace(data, test=data.test[:20])) == (1 / 20, 10 / 20)


def test_the_scale_ends_at_that_of_clip_and_can_come_back(data):
    trainee = training.Trainee("flashcl", training.initial_encoder(data, seed=0))
    text, code = data.text.weighted(trainee.encoder.text_idf), data.code.weighted(trainee.encoder.code_idf)
    trainee.encoder.log_scale.data.fill_(math.log(200))
    rows = data.train[:32]
    trainee.step(text.take(rows), code.take(rows), learning_rate=1e-3)
    assert trainee.encoder.logit_scale.item() == pytest.approx(100) and trainee.encoder.log_scale.grad != 0


def test_batches_are_the_same_for_a_seed_and_hold_no_pair_twice(data):
    first, again = (list(itertools.islice(training.batches(data.train, 100, seed=3), 7)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert all(len(batch.unique()) == 100 for batch in first)
    assert not set(data.train.tolist()) & set(data.test.tolist())


def test_the_time_limit_ends_a_run(data):
    (run,) = training.train(["flashcl"], data, CPU, 64, steps=10**9, seconds=0.5)
    assert 1 <= len(run.losses) < 10**4


@pytest.mark.skipif(not memory.measurable(CPU), reason="reads /proc")
def test_measured_memory_of_dense_grows_and_that_of_flashcl_does_not():
    measured = {(m.loss, m.batch): m.peak for m in memory.measure_all(CPU, [1024, 8192], dim=16)}
    assert 4 < measured["dense", 8192] / (4 * 8192**2) < 7
    assert measured["flashcl", 8192] < measured["dense", 8192] / 10


@pytest.mark.skipif(not memory.measurable(CPU), reason="reads /proc")
def test_dense_is_run_within_half_of_the_memory(monkeypatch):
    needed = memory.FIRST_GUESS * 4 * 512**2
    for free, run in ((2 * needed, True), (2 * needed - 2, False)):
        monkeypatch.setattr(memory, "available", lambda device: free)
        dense, fused = memory._measure_here(CPU, [512], 16)
        assert fused.peak is not None
        assert (dense.peak is not None) if run else dense == memory.Measured("dense", 512, None, needed)


def test_dense_is_trained_only_where_it_could_be_measured(monkeypatch):
    trained = []

    def train(losses, data, device, batch, **limits):
        trained.append((losses, batch))
        return []

    monkeypatch.setattr(training, "train", train)
    fits, too_large = memory.Measured("dense", 32, 2**20), memory.Measured("dense", 32, None, 2**40)
    for measured in ([fits], [], [memory.Measured("dense", 128, 2**20), too_large]):
        demo.train_all(arguments(), None, CPU, 32, 64, measured)
    both, alone = (["dense", "flashcl"], 32), (["flashcl"], 64)
    assert trained == [both, alone, both, alone, (["flashcl"], 32), alone]


@pytest.mark.parametrize(
    "limit, used, available",
    [
        ("3000000", "1000000", 2_000_000),
        ("max", "1000000", 4_096_000),
        ("9000000", "1000000", 4_096_000),  # of a machine that has less
        (None, None, 4_096_000),
    ],
)
def test_memory_is_what_the_container_leaves(monkeypatch, limit, used, available):
    files = {"/proc/meminfo": "MemTotal: 9000 kB\nMemFree: 8000 kB\nMemAvailable: 4000 kB\n"}
    if limit:
        files |= {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}

    def read(path):
        if path not in files:
            raise FileNotFoundError(path)
        return io.StringIO(files[path])

    monkeypatch.setattr(memory, "open", read, raising=False)
    assert memory.available(CPU) == available


# ---- the whole


def test_a_small_run_from_code_to_search(code_folder, tmp_path, capsys):
    out = tmp_path / "out"
    options = ("--batch", 32, "--large-batch", 128, "--steps", 15, "--device", "cpu")
    assert demo.run(arguments("--code", code_folder, "--out", out, *options)) == 0
    shown = capsys.readouterr().out
    for expected in ("288 (docstring, code) pairs", "recall@10", "max |difference|", "not trained:", str(out)):
        assert expected in shown
    assert shown.count("\n") < 40 and "\r" not in shown  # no bars where nobody watches
    if importlib.util.find_spec("matplotlib"):
        assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"

    command = shlex.split(next(line for line in shown.splitlines() if line.startswith("    flashcl demo")))[1:]
    assert main(command) == 0 and "package." in capsys.readouterr().out  # the encoder of this run, wherever it is
    assert demo.run(arguments("--out", out, "--search", "compress an image")) == 0
    answers = capsys.readouterr().out.splitlines()
    assert main(["demo", "--out", str(out), "--search", "?!"]) == 2 and "no words" in capsys.readouterr().err
    assert len(answers) == 20 and any("package.image.compress_image" in line for line in answers)
    assert f"  {code_folder}/package/" in answers[0]


def test_fewer_threads_are_taken_where_they_are_faster(monkeypatch, capsys):
    torch.set_num_threads(4)
    monkeypatch.setattr(demo, "THREADS", 4)
    monkeypatch.setattr(demo.flashcl, "info_nce", lambda *a, **k: time.sleep(0.001 * torch.get_num_threads()))
    demo.choose_threads(CPU)
    assert torch.get_num_threads() == 1 and "threads: 1 of 4" in capsys.readouterr().out


def test_search_without_an_encoder_says_what_to_do(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--search", "anything"]) == 2
    assert "run `flashcl demo` first" in capsys.readouterr().err


def test_search_in_a_file_of_another_version_says_what_to_do(tmp_path, capsys):
    for other in ({"layout": [0]}, {"layout": search.LAYOUT}, [1, 2]):
        torch.save(other, tmp_path / "encoder.pt")
        assert main(["demo", "--out", str(tmp_path), "--search", "anything"]) == 2
        assert "not written by this version" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no archive", b"hello world\n", b".", "half"], ids=str)
def test_search_in_what_is_no_encoder_says_what_to_do(content, tmp_path, capsys):
    if content == "half":
        torch.save({"layout": list(range(1000))}, tmp_path / "encoder.pt")
        content = (tmp_path / "encoder.pt").read_bytes()[:600]
    (tmp_path / "encoder.pt").write_bytes(content)
    assert main(["demo", "--out", str(tmp_path), "--search", "anything"]) == 2
    assert "cannot be read: run `flashcl demo` first" in capsys.readouterr().err


def test_too_little_code_is_refused(tmp_path, capsys):
    assert main(["demo", "--code", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "0 pairs are too few" in capsys.readouterr().err
    assert main(["demo", "--code", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert f"--code {tmp_path / 'nowhere'}: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch", "--large-batch", "--steps", "--seconds"])
def test_numbers_must_be_positive(option, capsys):
    with pytest.raises(SystemExit):
        arguments(option, 0)
    assert f"argument {option}: expected" in capsys.readouterr().err


# ---- report


def test_without_matplotlib_the_plot_is_skipped_aloud(tmp_path, monkeypatch, capsys):
    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)  # an ImportError
    demo.draw([], [], tmp_path / "demo.png", CPU)
    assert "plot skipped" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("peak", [0, None, 2**20])
def test_the_plot_bears_what_was_not_measured(tmp_path, peak):
    pytest.importorskip("matplotlib")
    measured = [memory.Measured("dense", 32, peak, 2**30 if peak is None else None)]
    run = training.Run("flashcl", 32, [1.0], 0.1, 0.5, 0.5, None)
    report.plot([run], measured, tmp_path / "demo.png", "here")
    assert (tmp_path / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal(monkeypatch, capsys, rich):
    if rich and not importlib.util.find_spec("rich"):
        pytest.skip("rich is not installed")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    if not rich:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(report.track(range(3), 3, "counting")) == [0, 1, 2]
    assert "counting: 0." in capsys.readouterr().out


def test_sizes_in_words():
    shown = [text.size(count) for count in (0, 2000, 300 * 2**20, 5 * 2**30)]
    assert shown == ["0 B", "2.0 KiB", "300 MiB", "5.0 GiB"]
