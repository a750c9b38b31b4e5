"""The command line: flashcl info | check | demo."""

from __future__ import annotations

import argparse

import flashcl
from flashcl.cli import check, info


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="flashcl", description=flashcl.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"flashcl {flashcl.__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    for command in (info, check):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130  # as a shell reports a command that was interrupted
