"""The processes that a benchmark starts: one for each measured peak of memory, one for each side of a comparison.

``python -m flowformer.bench.worker TASK`` reads one JSON object from standard input, and the last line of its standard
output is the answer, in JSON.
"""

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
        root: Folder that holds the ``flowformer`` to import.
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


def _memory(values: dict[str, Any]) -> Any:
    from flowformer.bench.memory import measure

    return measure(values["operation"], values["contender"], values["shape"])


def _run(values: dict[str, Any]) -> Any:
    from dataclasses import replace

    from flowformer.bench.registry import CONTENDERS
    from flowformer.bench.runner import Plan, run

    plan = Plan.from_record(values["plan"])
    known = {name for _, name in CONTENDERS}
    names = tuple(name for name in plan.contenders if name in known)  # the other side of a comparison may have more
    if plan.contenders and not names:
        raise RunError(f"there is none of the contenders {', '.join(plan.contenders)}")
    records: list[dict[str, Any]] = []
    run(replace(plan, contenders=names), records.append)
    return records


def main() -> None:
    """Do the task named on the command line."""
    import torch

    from flowformer.bench.registry import load

    values = json.load(sys.stdin)
    torch.set_num_threads(values["threads"])
    load(values.get("imports", ()))
    print(json.dumps({"memory": _memory, "run": _run}[sys.argv[1]](values)))


if __name__ == "__main__":
    main()
