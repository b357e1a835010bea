"""Start :mod:`flowformer.bench.worker` as a process of its own: for a peak of memory, or a side of a comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from flowformer.common.errors import RunError

ROOT = Path(__file__).resolve().parents[2]


def ask(task: str, threads: int, root: Path = ROOT, **values: Any) -> Any:
    """Do a task in a fresh process.

    Args:
        task: ``"memory"`` or ``"run"``.
        threads: Of torch and OpenMP there.
        root: Folder that holds the ``flowformer`` to import, which may be that of another commit.
        **values: What the task takes, as JSON can say it.

    Raises:
        RunError: with the last line that the process wrote, if it fails.
    """
    # The library at root comes first; after it the places that modules of further contenders may be in.
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", ""), str(Path.cwd())])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "flowformer.bench.worker", task], cwd=root, env=environment, text=True,
        input=json.dumps({"threads": threads, **values}), capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = f"was killed by signal {-done.returncode}" if done.returncode < 0 else (lines or ["failed"])[-1]
        raise RunError(f"the process that was to do {task!r} with {root}: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])
