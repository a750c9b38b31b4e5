"""The command line: flashcl info | check | bench | demo | plan.

Exit codes: 0, all is well; 1, what was checked or compared is worse than it should be; 2, what was asked for cannot be
done, and stderr says why; 3, a time limit or a broken GPU left some of it; 130, interrupted. A provider that `bench` finds
wrong is a result, like any other.
"""

from __future__ import annotations

import argparse
import os
import sys

import flashcl
from flashcl.cli import bench, check, demo, info, plan
from flashcl.cli.arguments import UsageError


def main(argv: list[str] | None = None) -> int:
    about = "Contrastive losses for PyTorch that never store the N x M logits."
    parser = argparse.ArgumentParser(prog="flashcl", description=about)
    parser.add_argument("--version", action="version", version=f"flashcl {flashcl.__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    for command in (info, check, bench, demo, plan):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        code = args.run(args)
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130  # as a shell reports a command that was interrupted
    except BrokenPipeError:  # `flashcl ... | head`: nobody reads on, also not what Python would flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UsageError, OSError) as error:  # OSError: a file that is not there, or cannot be written
        print(f"flashcl: {error}", file=sys.stderr)
        return 2
