"""`flashcl demo`: tables, sizes, features and files, without training. test_demo.py has the rest."""

import argparse
import math
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from flashcl.cli import demo, main, memory
from flashcl.cli.demo import corpus, encoder, report, search, training
from flashcl.cli.demo.encoder import Bags, Encoder
from flashcl.cli.demo.training import Data, Run

CPU = torch.device("cpu")


def run(loss, batch, losses, seconds=0.25, r1=0.125, r10=0.5):
    return Run(loss, batch, losses, seconds, r1, r10, None)


def test_the_summary_has_its_numbers_in_their_columns():
    runs = [run("dense", 32, [3.0] * 10 + [2.5]), run("flashcl", 32, [3.0] * 10 + [2.0])]
    runs.append(run("flashcl", 128, [4.0, 3.5], 1.5, 0.25, 0.75))
    measured = [memory.Measured("dense", 32, 3 * 2**20), memory.Measured("flashcl", 32, 0)]
    measured.append(memory.Measured("dense", 128, None, 5 * 2**30))
    text = report.summary(runs, (0.01, 0.05), measured, 40, CPU)
    lines = {tuple(line.split()[:2]): line.split() for line in text.splitlines()}
    assert lines["dense", "32"] == "dense 32 11 352 12.5% 50.0% 2.500 250 ms 3.0 MiB".split()
    assert lines["flashcl", "32"] == "flashcl 32 11 352 12.5% 50.0% 2.000 250 ms under 1 MiB".split()
    assert lines["flashcl", "128"] == "flashcl 128 2 256 25.0% 75.0% 3.500 1,500 ms not measured".split()
    assert re.search(r"^dense +128 +not run: its loss would need 5.0 GiB$", text, re.M)
    assert "the right one of 40 held-out functions" in text and "(by chance 2.50% / 25.00%)" in text
    assert "0.0e+00 in the first ten steps,\n    5.0e-01 in all 11" in text
    assert "batch 128 was ended by its time limit" in text


def test_batches_are_no_larger_than_the_data():
    """Of larger ones there is none: the training would wait for ever."""
    args = argparse.Namespace(batch=1024, large_batch=None)
    assert demo.batch_sizes(args, 200, CPU) == (200, 200)
    assert demo.batch_sizes(args, 5000, CPU) == (1024, 4096)
    args.large_batch = 128
    assert demo.batch_sizes(args, 5000, CPU) == (1024, 128)


def test_the_sizes_whose_memory_is_measured(monkeypatch):
    monkeypatch.setattr(demo, "choose_threads", lambda device: None)
    seen = []
    monkeypatch.setattr(memory, "measure_all", lambda device, sizes, dim: seen.append(sizes) or [])
    monkeypatch.setattr(memory, "measurable", lambda device: True)
    demo.measure_memory(CPU, 1024, 16384)
    assert seen == [[1024, 4096, 16384, 32768]]


def test_a_measuring_process_that_ends_early_is_an_error(monkeypatch):
    monkeypatch.setattr(memory, "child_environment", lambda: {"PATH": ""})  # it does not find flashcl, or torch
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with code 1"):
        list(memory.measure_all(CPU, [64], 8))


def test_a_guess_gives_way_to_what_was_measured(monkeypatch):
    monkeypatch.setattr(memory, "_peak", lambda loss, batch, dim, device: 2 * 4 * batch**2)
    monkeypatch.setattr(memory, "available", lambda device: 2 * 2 * 4 * 512**2)
    found = {(m.loss, m.batch): m for m in memory._measure_here(CPU, [512, 256], 8)}
    assert found["dense", 256].peak and found["dense", 512].peak == 2 * 4 * 512**2  # by the first guess it would not fit


def test_the_best_run_is_saved_and_the_caller_s_seed_is_used(monkeypatch, tmp_path):
    """Of flashcl, by recall@10."""
    runs = [run("dense", 32, [1.0], r10=0.9), run("flashcl", 32, [1.0], r10=0.3), run("flashcl", 64, [1.0], r10=0.6)]
    for k, r in enumerate(runs):
        r.encoder = k
    saved, seeds = [], []
    data = SimpleNamespace(train=range(100), test=range(10), code=None)
    monkeypatch.setattr(demo, "load_pairs", lambda args: [None] * 200)
    monkeypatch.setattr(training, "prepare", lambda pairs, seed: (seeds.append(seed), data)[1])
    monkeypatch.setattr(demo, "measure_memory", lambda *_: [])
    monkeypatch.setattr(training, "initial_encoder", lambda data, seed: seeds.append(seed))
    monkeypatch.setattr(training, "recall", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(demo, "train_all", lambda *_: runs)
    monkeypatch.setattr(search, "save", lambda encoder, *_: saved.append(encoder))
    monkeypatch.setattr(demo, "draw", lambda *_: None)
    assert main(["demo", "--out", str(tmp_path), "--device", "cpu", "--seed", "7"]) == 0
    assert saved == [2] and seeds == [7, 7]


def test_features_count_by_how_telling_they_are_in_the_training_texts():
    texts = ["parse a date", "parse a file", "parse a graph", "parse zebras"]
    bags = Bags.of(texts)
    data = Data(bags, bags, torch.tensor([0, 1, 2]), torch.tensor([3]))
    model = training.initial_encoder(data, seed=0)

    def feature_of(word, other):
        return next(iter(set(encoder.features(word)) - set(encoder.features(other))))

    parse, date, zebras = (feature_of(*words) for words in (("parse", "date"), ("date", "parse"), ("zebras", "parse")))
    for idf in (model.text_idf, model.code_idf):
        assert idf[parse] == pytest.approx(math.log(4 / 4)) and idf[date] == pytest.approx(math.log(4 / 2))
        assert idf[zebras] == pytest.approx(math.log(4 / 1))  # which is held out


def test_a_word_that_comes_again_counts_less():
    once, four_times = Bags.of(["date"]), Bags.of(["date date date date"])
    assert torch.equal(once.ids, four_times.ids) and torch.equal(four_times.weights, 2 * once.weights)


def test_recall_and_search_drop_no_features(monkeypatch):
    text = ["parse a date", "sort a queue", "merge an image", "count the tokens"] * 5
    bags = Bags.of(text)
    data = Data(bags, bags, torch.arange(20), torch.arange(4))
    model = training.initial_encoder(data, seed=0)
    seen = []
    real = Encoder._pool
    monkeypatch.setattr(Encoder, "_pool", lambda self, b: (seen.append(self.training), real(self, b))[1])
    training.recall(model, data)
    assert seen == [False, False] and model.training


def test_search_of_few_functions_is_the_same_every_time(tmp_path, capsys):
    pairs = [corpus.Pair(f"m.f{k}", "/m.py", k, f"Parse thing number {k} now.", f"def f{k}(): return {k}") for k in range(3)]
    model = Encoder()
    search.save(model, Bags.of(p.code for p in pairs), pairs, tmp_path / "encoder.pt")
    shown = []
    for _ in range(2):
        assert main(["demo", "--out", str(tmp_path), "--search", "parse a thing"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and shown[0].count("\n") == 6


def test_texts_end_where_parameters_begin_and_can_be_printed():
    for mark in (":param x: no", ">>> f(1)", "Args:", "Parameters", "@return no"):
        assert corpus.first_paragraph(f"Return the number.\n{mark}\nno") == "Return the number."
    assert corpus.first_paragraph("A lone \ud800 surrogate").encode() == b"A lone ? surrogate"


def test_files_of_tests_and_very_large_ones_are_left_out(tmp_path, monkeypatch):
    function = 'def f():\n    """Return the one thing."""\n    return 1\n'
    for name in ("kept.py", "test_it.py", "it_test.py", "conftest.py"):
        (tmp_path / name).write_text(function)
    assert [s.module for s in corpus.find_sources([tmp_path])] == ["kept"]
    monkeypatch.setattr(corpus, "MAX_FILE_BYTES", 10)
    found = corpus.parse(corpus.find_sources([tmp_path]))
    assert not found.pairs and "larger than" in found.describe()


def test_a_cache_is_of_its_folders(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(f'def {name}():\n    """Return the one thing {name}."""\n    return 1\n')
    for name in ("a", "b"):
        found = corpus.load(tmp_path / "c.json", [tmp_path / name])
        assert [p.name for p in found.pairs] == [f"{name}.{name}"]


def test_code_of_a_folder_is_read_every_time(tmp_path):
    code = tmp_path / "code"
    code.mkdir()
    for word in ("first", "second"):
        (code / "m.py").write_text(f'def f():\n    """Return the {word} thing."""\n    return 1\n')
        args = argparse.Namespace(code=code, out=tmp_path)
        assert [p.text for p in demo.load_pairs(args)] == [f"Return the {word} thing."]


def test_the_curves_of_the_plot(monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    report._plot_losses(axes, [run("dense", 32, [3.0, 2.0])])
    assert list(axes.lines[0].get_xdata()) == [32, 64] and list(axes.lines[0].get_ydata()) == [3.0, 2.0]


def test_seconds_per_step_are_the_median():
    trainee = training.Trainee("flashcl", Encoder())
    trainee.losses, trainee.seconds = [1.0] * 3, [9.0, 1.0, 2.0]
    with mock.patch.object(training, "recall", lambda *_: (0.0, 0.0)):
        assert trainee.result(8, None).seconds_per_step == 2.0
