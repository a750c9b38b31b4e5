"""Scripts that compile the Triton kernels for GPUs that are not here, in processes of their own: this one may interpret."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def run_each(script: Path, runs: list[tuple], tmp_path_factory) -> dict[tuple, list | str]:
    """{run: the lines that the script printed for its arguments, as JSON, or its errors}, side by side."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))  # of this script: another may keep less of a kernel

    def run(arguments):
        command = [sys.executable, str(script), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.stderr[-3000:] if done.returncode else [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(runs, pool.map(run, runs)))
