"""The processes that :mod:`flowformer.bench.process` starts: no module of this package imports this one.

``python -m flowformer.bench.worker TASK`` reads one JSON object from standard input, and the last line of its standard
output is the answer, in JSON. Another commit may be on the other side of ``--compare``: keep ``run`` as it is.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch

from flowformer.bench.memory import measure
from flowformer.bench.registry import OPERATIONS, contenders, load
from flowformer.bench.runner import Plan, run
from flowformer.common.errors import RunError


def measure_memory(values: dict[str, Any]) -> Any:
    """The peak of memory of one contender."""
    return measure(values["operation"], values["contender"], values["shape"])


def run_plan(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of a plan, which may name operations and contenders that only the other side has."""
    plan = Plan.from_record(values["plan"])
    operations = tuple(name for name in plan.operations if name in OPERATIONS)
    if plan.operations and not operations:
        raise RunError(f"there is none of the operations {', '.join(plan.operations)}")
    known = {name for operation, name in contenders() if operation in (operations or OPERATIONS)}
    names = tuple(name for name in plan.contenders if name in known)
    if plan.contenders and not names:
        raise RunError(f"there is none of the contenders {', '.join(plan.contenders)}")
    records: list[dict[str, Any]] = []
    run(replace(plan, operations=operations, contenders=names), records.append)
    return records


TASKS = {"memory": measure_memory, "run": run_plan}


def main() -> None:
    """Do the task named on the command line."""
    values = json.load(sys.stdin)
    torch.set_num_threads(values["threads"])
    load(values.get("imports", ()))
    print(json.dumps(TASKS[sys.argv[1]](values)))


if __name__ == "__main__":
    main()
