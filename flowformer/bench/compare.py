"""Did a change make it slower? The same run on this tree and on another commit, by turns.

The other commit is checked out as a temporary git worktree, and measured by its own ``flowformer.bench``: what has the
same name there and here is compared. Each turn is a process of its own.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flowformer.bench.process import ROOT, ask
from flowformer.bench.runner import Plan
from flowformer.common.errors import RunError
from flowformer.common.names import nearest
from flowformer.core.backends import list_backends

Record = dict[str, Any]
PAIRS = 2  # times that each side runs


def compare(
    revision: str,
    plan: Plan,
    keep: Callable[[Record], None],
    tell: Callable[[str], None] = lambda text: None,
    *,
    root: Path = ROOT,
    pairs: int = PAIRS,
) -> None:
    """Run a plan here and at another commit, in the order here, there, there, here, and keep all records and ratios.

    Without names of contenders, this library's own take part. Memory is measured once on each side.

    Args:
        revision: Whatever git takes for a commit.
        plan: What to measure.
        keep: Called with each record: those of the runs, with ``"side"`` and ``"pair"``, then the ``"ratio"`` records.
        tell: Called with a line of progress.
        root: Folder of this checkout.
        pairs: Times that each side runs.

    Raises:
        RunError: outside a git checkout, for an unknown commit, if a side cannot be run, and if the other one ran on
            another device or in another dtype.
        ValueError: for an unknown name in the plan.
    """
    commit = find_commit(root, revision)
    plan = replace(plan, ours_only=True, threads=plan.threads or torch.get_num_threads())
    plan.rows()  # unknown names are refused before anything is checked out
    records: list[Record] = []
    conditions: dict[str, str] = {}
    with worktree(root, commit) as there:
        for pair in range(pairs):
            sides = (("here", root), ("there", there))
            for side, folder in sides if pair % 2 == 0 else reversed(sides):
                name = "this tree" if side == "here" else revision
                tell(f"{name}, run {pair + 1} of {pairs}")
                found = _run(replace(plan, memory=plan.memory and pair == 0), folder, name)
                conditions[side] = conditions_of(found)
                _refuse_unlike(conditions, revision)
                for record in found:
                    records.append({**record, "side": side, "pair": pair})
                    keep(records[-1])
    for record in ratios(records):
        keep(record)


def _run(plan: Plan, folder: Path, name: str) -> list[Record]:
    try:
        return ask("run", plan.threads, folder, plan=plan.as_record(), imports=plan.imports)
    except RunError as error:
        raise RunError(f"{name} cannot be measured: {error}") from error


def conditions_of(records: list[Record]) -> str:
    """The device and the dtype of a run in words. A bench that knows neither has run on the CPU, in its own dtypes."""
    start = next(record for record in records if record["record"] == "run")
    device = start["environment"].get("device")
    return f"{device['name'] if device else 'the CPU'}, {start.get('plan', {}).get('dtype') or 'dtypes by default'}"


def _refuse_unlike(conditions: dict[str, str], revision: str) -> None:
    if len(set(conditions.values())) > 1:
        raise RunError(
            f"this tree was measured on {conditions['here']}, and {revision} on {conditions['there']}: times of "
            "different devices or dtypes are not compared"
        )


def find_commit(root: Path, revision: str) -> str:
    """The commit's full name.

    Raises:
        RunError: outside a git checkout, or for an unknown commit; the message suggests the nearest branch or tag.
    """
    if not (root / ".git").exists():
        raise RunError(f"--compare requires flowformer to come from a git checkout, and {root} is none")
    try:
        return _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").strip()
    except subprocess.CalledProcessError as error:
        known = _git(root, "for-each-ref", "--format=%(refname:short)").split()
        raise RunError(f"git knows no commit {revision!r}{nearest(revision, known)}") from error


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """A temporary checkout of a commit, removed whatever happens.

    Raises:
        RunError: for a commit that has no benchmark.
    """
    with tempfile.TemporaryDirectory(prefix="flowformer-bench-") as temporary:
        folder = Path(temporary) / "tree"
        try:
            _git(root, "worktree", "add", "--detach", str(folder), commit)
            if not (folder / "flowformer" / "bench" / "worker.py").is_file():
                raise RunError(f"commit {commit[:12]} has no flowformer.bench, which could measure it")
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _git(root, "worktree", "prune")


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout


# -------------------------------------------------------------------------------------------------------------- ratios


def ratios(records: list[Record]) -> list[Record]:
    """For each operation, length and contender, the time here over the time there: of the least, and pair by pair.

    Further rows are ``flow (best)``, the fastest backend of Flow-Attention on each side, likewise of other mechanisms,
    and the limits (milliseconds per 1e9 of their work), which say how alike the machine was.
    """
    times = _least_times(records)
    pairs = sorted({pair for by_side in times.values() for _, pair in by_side})
    found = []
    for (operation, length, contender), by_side in times.items():
        here, there = ([by_side[side, pair] for pair in pairs if (side, pair) in by_side] for side in ("here", "there"))
        both = [pair for pair in pairs if {("here", pair), ("there", pair)} <= set(by_side)]
        found.append(
            {
                "record": "ratio", "operation": operation, "length": length, "contender": contender,
                "here_ms": min(here, default=None), "there_ms": min(there, default=None),
                "ratio": min(here) / min(there) if here and there else None,
                "pair_ratios": [by_side["here", pair] / by_side["there", pair] for pair in both],
                "memory_ratio": _memory_ratio(records, operation, length, contender),
            }
        )  # fmt: skip
    return found


def _least_times(records: list[Record]) -> dict[tuple[str, int, str], dict[tuple[str, int], float]]:
    """Milliseconds by what was measured, then by side and pair."""
    times: dict[tuple[str, int, str], dict[tuple[str, int], float]] = {}
    backends = {row.name for row in list_backends()}
    for record in records:
        turn = (record["side"], record["pair"])
        place = (record.get("operation", ""), record.get("length", 0))
        if record["record"] == "limit":
            # Sizes are chosen in each run: what compares is the time of as much work.
            times.setdefault((*place, f"limit {record['name']}, per 1e9"), {})[turn] = 1e3 / record["value"]
        elif record["record"] == "point" and record["status"] == "timed":
            times.setdefault((*place, record["contender"]), {})[turn] = record["min_ms"]
            mechanism, _, backend = record["contender"].rpartition("-")
            if record["ours"] and backend in backends:
                best = times.setdefault((*place, f"{mechanism} (best)"), {})
                best[turn] = min(best.get(turn, record["min_ms"]), record["min_ms"])
    return dict(sorted(times.items(), key=lambda item: item[0][:2]))


def _memory_ratio(records: list[Record], operation: str, length: int, contender: str) -> float | None:
    bytes_of = {
        record["side"]: record["memory"].get("peak_bytes")
        for record in records
        if record["record"] == "point" and "memory" in record
        and (record["operation"], record["length"], record["contender"]) == (operation, length, contender)
    }  # fmt: skip
    here, there = bytes_of.get("here"), bytes_of.get("there")
    return here / there if here and there else None
