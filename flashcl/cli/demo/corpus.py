"""The data of `flashcl demo`: (docstring, code) pairs of the Python functions installed on this machine.

The standard library and the installed packages are parsed with `ast`, never imported. The text of a pair is the first
paragraph of a docstring; its code is the function, signature and body, with every docstring cut out.
Nothing is downloaded.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import sys
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

MAX_PAIRS = 36_000  # bounds the demo's time where site-packages is huge
MAX_FILE_BYTES = 1_000_000  # larger files are generated tables
MAX_CODE_CHARS = 3_000
MAX_TEXT_CHARS = 400
MIN_TEXT_WORDS = 4
FORMAT = 1  # of the cache; raise it when the rules of this file change

SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "__pycache__", "_vendor", "site-packages", "dist-packages"}
FILES_PER_TASK = 32
FILES_PER_PROCESS = 256  # fewer do not pay for starting one
Track = Callable[[Iterable, int, str], Iterable]  # (items, total, description) -> the same items, with a progress bar


class Pair(NamedTuple):
    """A documented function. `name` is module.qualname; `file` and `line` say where its def stands."""

    name: str
    file: str
    line: int
    text: str
    code: str


class Source(NamedTuple):
    """A file to parse and the dotted name of its module."""

    file: str
    module: str


@dataclass
class Corpus:
    """The pairs in a fixed order, the number of files read, and (file, reason) of every file that could not be read."""

    pairs: list[Pair] = field(default_factory=list)
    files: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def describe(self) -> str:
        line = f"{len(self.pairs):,} (docstring, code) pairs from {self.files:,} files"
        if self.skipped:
            reasons = Counter(reason for _, reason in self.skipped)
            counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            line += f"; {len(self.skipped)} files skipped ({counts}), e.g. {self.skipped[0][0]}"
        return line


def load(cache: Path, roots: list[Path] | None = None, track: Track | None = None) -> Corpus:
    """The corpus of `roots` (default: everything importable here), from the file `cache` unless that is stale."""
    roots = python_roots() if roots is None else roots
    key = cache_key(roots)
    corpus = _read_cache(cache, key)
    if corpus is None:
        corpus = parse(find_sources(roots), track)
        _write_cache(cache, key, corpus)
    return corpus


def parse(sources: list[Source], track: Track | None = None, limit: int = MAX_PAIRS) -> Corpus:
    """Parse `sources` in order, until `limit` pairs are there. A text or a code that was seen before is dropped."""
    corpus = Corpus()
    seen: set[tuple[str, str]] = set()
    with _mapper(len(sources)) as mapper:
        parsed = mapper(parse_source, sources)
        for source, pairs, error in track(parsed, len(sources), "parsing") if track else parsed:
            corpus.files += 1
            if error:
                corpus.skipped.append((source.file, error))
            for pair in pairs:
                # equal codes or equal texts would make each other's right answer count as wrong
                marks = {("text", pair.text.lower()), ("code", " ".join(pair.code.split()))}
                if seen.isdisjoint(marks):
                    seen |= marks
                    corpus.pairs.append(pair)
            if len(corpus.pairs) >= limit:
                del corpus.pairs[limit:]
                break
    return corpus


@contextlib.contextmanager
def _mapper(count: int) -> Iterator[Callable[..., Iterable]]:
    """`map`, spread over processes where there are enough files to pay for starting them."""
    workers = min(os.cpu_count() or 1, 8, count // FILES_PER_PROCESS)
    if workers < 2:
        yield map
        return
    # spawn, because forking a process in which torch or a progress bar has threads can hang. Syntax trees have no
    # cycles, and looking for some in them would take a third of the time.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=spawn, initializer=gc.disable)
    try:
        yield lambda function, items: pool.map(function, items, chunksize=FILES_PER_TASK)
    finally:
        pool.shutdown(cancel_futures=True)


def parse_source(source: Source) -> tuple[Source, list[Pair], str | None]:
    """A file, its pairs, and the reason where it could not be read."""
    try:
        if os.path.getsize(source.file) > MAX_FILE_BYTES:
            return source, [], f"larger than {MAX_FILE_BYTES // 1_000_000} MB"
        text = importlib.util.decode_source(Path(source.file).read_bytes())
        if '"""' not in text and "'''" not in text:  # hardly a docstring: spare the parser
            return source, [], None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in other people's code
            tree = ast.parse(text)
        lines = text.split("\n")
        found = (_pair(source, name, node, lines) for name, node in _functions(tree.body))
        return source, [pair for pair in found if pair], None
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return source, [], type(error).__name__


def _functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """(qualname, node) of the functions and methods that a module defines, not of those inside other functions."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield prefix + node.name, node
            case ast.ClassDef():
                yield from _functions(node.body, f"{prefix}{node.name}.")
            case ast.If():
                yield from _functions(node.body + node.orelse, prefix)
            case ast.Try():
                caught = [statement for handler in node.handlers for statement in handler.body]
                yield from _functions(node.body + caught + node.orelse + node.finalbody, prefix)


def _pair(source: Source, name: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Pair | None:
    text = first_paragraph(ast.get_docstring(node, clean=False) or "")
    if len(text.split()) < MIN_TEXT_WORDS or len(node.body) < 2:  # a body that is only the docstring is no code
        return None
    code = code_without_docstrings(node, lines)[:MAX_CODE_CHARS]
    return Pair(f"{source.module}.{name}", source.file, node.lineno, text, code)


def first_paragraph(docstring: str) -> str:
    """The first paragraph as one line, up to where parameters or doctests begin."""
    kept: list[str] = []
    for line in inspect.cleandoc(docstring).split("\n"):
        line = line.strip()
        if line.startswith((":", "@", ">>>", "Args:", "Parameters")) or (not line and kept):
            break
        kept.append(line)
    line = " ".join(" ".join(kept).split())[:MAX_TEXT_CHARS]
    return line.encode(errors="replace").decode()  # lone surrogates, which escapes can write, cannot be printed


def code_without_docstrings(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The source of a function from its def on, without its docstring and those of the functions and classes inside."""
    kept = lines[node.lineno - 1 : node.end_lineno]
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(inner, False):
            string = inner.body[0].value
            first, last = string.lineno - node.lineno, string.end_lineno - node.lineno
            head = kept[first].encode()[: string.col_offset]  # ast counts columns in UTF-8 bytes
            tail = kept[last].encode()[string.end_col_offset :]
            kept[first : last + 1] = [(head + tail).decode()] + [""] * (last - first)  # lines keep their numbers
    return "\n".join(line for line in kept if line.strip())


def python_roots() -> list[Path]:
    """The standard library, then every folder of installed packages on sys.path."""
    installed = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([Path(sysconfig.get_paths()["stdlib"]), *installed]))


def find_sources(roots: list[Path]) -> list[Source]:
    """The Python files under `roots`: those of the first root by name, then the others in a fixed random order.

    Where the number of pairs is capped, the random order makes the corpus a sample of all packages, not the first few.
    """
    found = []
    for rank, root in enumerate(roots):
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
            for name in names:
                is_test = name.startswith(("test_", "conftest")) or name.endswith("_test.py")
                if name.endswith(".py") and not is_test:
                    relative = Path(folder, name).relative_to(root)
                    order = zlib.crc32(str(relative).encode(errors="replace")) if rank else 0
                    found.append((bool(rank), order, str(relative), Source(str(root / relative), _module(relative))))
    return [source for *_, source in sorted(found)]


def _module(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def cache_key(roots: list[Path]) -> list:
    """What the corpus depends on: this interpreter, the folders, and the installed packages with their versions."""
    packages = sorted({f"{dist.name} {dist.version}" for dist in importlib.metadata.distributions()})
    return [FORMAT, MAX_PAIRS, sys.version, [str(root) for root in roots], packages]


def _read_cache(cache: Path, key: list) -> Corpus | None:
    try:
        stored = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # absent, or cut off while it was written: parse anew
        return None
    if not isinstance(stored, dict) or stored.get("key") != key:
        return None
    skipped = [(file, reason) for file, reason in stored["skipped"]]
    return Corpus([Pair(*pair) for pair in stored["pairs"]], stored["files"], skipped)


def _write_cache(cache: Path, key: list, corpus: Corpus) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_name(f"{cache.name}.{os.getpid()}")  # renamed when whole, so that nobody reads half a file
    stored = {"key": key, "files": corpus.files, "skipped": corpus.skipped, "pairs": corpus.pairs}
    partial.write_text(json.dumps(stored), encoding="utf-8")
    partial.replace(cache)
