"""What `flashcl demo` leaves behind: the trained encoder with an index of every function, and the search in it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch

from flashcl.cli.arguments import UsageError
from flashcl.cli.demo import encoder as model
from flashcl.cli.demo.corpus import Pair
from flashcl.cli.demo.encoder import Bags, Encoder

ANSWERS = 10
CHUNK = 4096
# what a file must agree on with this code
LAYOUT = [1, model.BUCKETS, model.WIDTH, model.HIDDEN, model.DIM]


@torch.no_grad()
def save(encoder: Encoder, code: Bags, pairs: list[Pair], path: Path) -> None:
    """The encoder with the embedding, name, place and text of every function, held-out ones included."""
    encoder = encoder.cpu().eval()
    rows = torch.arange(len(pairs)).split(CHUNK)
    index = torch.cat([encoder.encode_code(code.take(r).weighted(encoder.code_idf)) for r in rows])
    functions = [(pair.name, f"{pair.file}:{pair.line}", pair.text) for pair in pairs]
    torch.save({"layout": LAYOUT, "encoder": encoder.state_dict(), "index": index, "functions": functions}, path)


def _load(path: Path) -> dict:
    """What `save` has written; an error that says what else is there."""
    try:
        saved = torch.load(path, weights_only=True)
    except FileNotFoundError:
        saved, state = None, "is not there"
    except OSError:
        raise  # a folder, no permission: `main` says which
    except Exception:  # the unpickler raises whatever foreign bytes lead it to
        saved, state = None, "cannot be read"
    else:
        state = "was not written by this version of flashcl demo"
    if not isinstance(saved, dict) or saved.get("layout") != LAYOUT or not {"encoder", "index", "functions"} <= saved.keys():
        raise UsageError(f"{path} {state}: run `flashcl demo` first, which trains the encoder (with the same --out)")
    return saved


@torch.no_grad()
def search(query: str, path: Path) -> None:
    """Print the functions whose code is nearest to the query."""
    saved = _load(path)
    encoder = Encoder().eval()
    encoder.load_state_dict(saved["encoder"])
    bags = Bags.of([query])
    if not len(bags.ids):
        raise UsageError(f"no words in the query {query!r}")
    scores = saved["index"] @ encoder.encode_text(bags.weighted(encoder.text_idf))[0]
    for score, row in zip(*scores.topk(min(ANSWERS, len(scores)))):
        name, place, text = saved["functions"][row]
        print(f"{score:.2f}  {name}  {place}\n      {textwrap.shorten(text, 110)}")
