"""Kill, crowd, fill and damage: does a run lose anything?

    python tools/chaos.py [--rounds 200] [--seed 0] [--kinds kill,crowd,...] [--json FILE]

Each round takes one run of a small model to its end through accidents, and compares what is in its folder with a run
that had none: metrics, weights and result must be the same bit for bit. In between every file must be whole, every
message one line, every exit status one that is promised in docs/reliability.md. A round is a function of the seed.

The rounds are forked from one process that has imported everything, so that a signal can arrive in any part of a
command, and a round takes about a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process has no threads but its own

import lightning  # noqa: F401 - imported before the processes are forked
import numpy as np
import rich.progress  # noqa: F401
import safetensors.torch
import torch

from flowformer.cli import main as flowformer
from flowformer.common.interrupts import Interrupted, signals_raise
from flowformer.kernels.native import build
from flowformer.training import fit  # noqa: F401

SIGNALS = {signal.SIGKILL: None, signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 143}
SMALL = ["--dim", "16", "--num-heads", "2", "--num-layers", "1", "--ffn-dim", "16", "--batch-size", "4"]
DISK_BYTES = 20 * 2**20
LIMIT_S = 120  # after which a command counts as hanging


class Loss(Exception):  # noqa: N818 - what a round finds, not an error of the program
    """Something was lost, or not as promised."""


class Process:
    """A command in a forked process, with its words on standard error.

    Args:
        words: What follows ``flowformer``.
        folder: Where to keep its output.
        before: Called in the process before the command.
        command: What is called with the words, and returns the exit status.
    """

    def __init__(
        self, words: Sequence[str], folder: Path, before: Callable[[], Any] | None = None,
        command: Callable[[Sequence[str]], int] = flowformer,
    ) -> None:  # fmt: skip
        self.words, self.said, self.command = list(words), folder / f"said-{time.monotonic_ns()}", command
        ready, go = os.pipe()
        self.start = time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(go, before)
        os.close(go)
        os.read(ready, 1)  # the command is about to start
        os.close(ready)

    def _run(self, go: int, before: Callable[[], Any] | None) -> None:
        try:
            opened = os.open(self.said, os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if before is not None:
                before()
            os.write(go, b"x")
            os._exit(self.command(self.words))
        except BaseException as error:
            os.write(2, f"Traceback: outside of the command: {error!r}".encode())
            os._exit(1)

    def stop(self, number: signal.Signals, after_s: float) -> None:
        """Send a signal, some time after the start."""
        time.sleep(max(after_s - (time.perf_counter() - self.start), 0.005))
        os.kill(self.pid, number)  # an ended process waits to be asked for its status, so the number is still its own

    def wait(self) -> tuple[int, str]:
        """Wait for the end; its exit status, negative for a signal, and what it said on standard error."""
        end = time.perf_counter() + LIMIT_S
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Loss(f"hangs: flowformer {' '.join(self.words)}")
            time.sleep(0.002)
        said = self.said.read_text(encoding="utf-8", errors="replace")
        if "Traceback" in said or "fault of flowformer" in said:
            raise Loss(f"traceback: flowformer {' '.join(self.words)}\n{said[-2000:]}")
        return os.waitstatus_to_exitcode(status), said


class Chaos:
    """Everything that rounds share: data, references, and a folder to work in.

    Args:
        work: An empty folder.
        seed: Decides all accidents.
    """

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.random = work, random.Random(seed)
        self.temporary = work / "temporary"
        self.temporary.mkdir()
        os.environ |= {"TMPDIR": str(self.temporary), "FLOWFORMER_DATA": str(work / "data-cache")}
        tempfile.tempdir = None
        self.references: dict[str, tuple[Path, float]] = {}
        self.kills = 0
        _write_data(work)

    def words(self, kind: str, out: Path) -> list[str]:
        """The command of a kind of run."""
        if kind == "series":
            files = ["--train-file", str(self.work / "train.csv"), "--test-file", str(self.work / "test.csv")]
            return ["train", "timeseries/own", *files, *SMALL, "--epochs", "4", "--eval-every", "1", "--out", str(out)]
        text = ["--file", str(self.work / "text.txt"), "--tokenizer", "words", "--length", "16", "--steps", "24"]
        return ["train", "text/own", *text, *SMALL, "--eval-every", "6", "--out", str(out)]

    def reference(self, kind: str) -> tuple[Path, float]:
        """The folder of a run without accidents, and how long it took in seconds."""
        if kind not in self.references:
            with (self.work / "said-warm").open("w") as said, contextlib.redirect_stdout(said):
                flowformer(self.words(kind, self.work / f"warm-{kind}"))  # imports what the forked processes need
            out = self.work / f"reference-{kind}"
            process = Process(self.words(kind, out), self.work)
            status, said = process.wait()
            if status:
                raise Loss(f"the reference ended with status {status}: {said}")
            self.references[kind] = out, time.perf_counter() - process.start
        return self.references[kind]

    def finish(self, kind: str, out: Path) -> None:
        """Resume a run to its end, and compare it with the reference."""
        status, said = Process([*self.words(kind, out), "--resume"], self.work).wait()
        if status:
            raise Loss(f"the run did not resume, status {status}: {said}")
        compare(self.reference(kind)[0], out)
        left = [*out.rglob(".staged*"), *self.temporary.iterdir()]
        if left:
            raise Loss(f"left behind: {left}")


def _write_data(work: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        rows = ["series,time,label,x,y"]
        for number in range(12):
            values = generator.normal(size=(6, 2)) + 3 * (number % 2)
            rows += [f"s{number},{time},{'ab'[number % 2]},{x:.4f},{y:.4f}" for time, (x, y) in enumerate(values)]
        (work / f"{name}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    words = [f"word{generator.integers(400)}" for _ in range(20_000)]
    lines = [" ".join(words[start : start + 12]) for start in range(0, len(words), 12)]
    (work / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(reference: Path, out: Path) -> None:
    """Raise a loss if two complete runs differ in metrics, weights or result."""
    records = [
        [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]
        for lines in ((path / "metrics.jsonl").read_text().splitlines() for path in (reference, out))
    ]
    if records[0] != records[1]:
        raise Loss(f"metrics differ: {records}")
    protocols = [json.loads((path / "result.json").read_text())["protocols"] for path in (reference, out)]
    if protocols[0] != protocols[1]:
        raise Loss(f"results differ: {protocols}")
    for path in reference.glob("checkpoints/*.safetensors"):
        ours, theirs = (safetensors.torch.load_file(where / "checkpoints" / path.name) for where in (out, reference))
        if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in theirs):
            raise Loss(f"weights differ: {path.name}")


def check_whole(out: Path) -> None:
    """Raise a loss if a file of a run is not whole."""
    for path in out.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                [json.loads(line) for line in path.read_text().splitlines()]
            elif path.suffix == ".safetensors":
                safetensors.torch.load_file(path)
            else:
                torch.load(path, weights_only=True)
        except Exception as error:
            raise Loss(f"{path} is not whole: {error}") from error


def kill(chaos: Chaos, out: Path) -> None:
    """Training is killed at random moments, and resumed each time."""
    kind = chaos.random.choice(("series", "text"))
    _, seconds = chaos.reference(kind)
    for _ in range(chaos.random.randint(1, 4)):
        number = chaos.random.choice(list(SIGNALS))
        process = Process([*chaos.words(kind, out), "--resume"], chaos.work)
        process.stop(number, chaos.random.uniform(0, 1.1 * seconds))
        _check_stopped(number, *process.wait(), done=(out / "result.json").exists())
        chaos.kills += 1
        check_whole(out)
    chaos.finish(kind, out)


def _check_stopped(number: signal.Signals, status: int, said: str, *, done: bool) -> None:
    expected = -number if SIGNALS[number] is None else SIGNALS[number]
    if status not in (expected, 0) and not (done and status == -number):
        raise Loss(f"{number.name} ended with status {status}, expected {expected}; said {said!r}")
    if status == SIGNALS[number] and (said.count("\n") != 1 or "--resume" not in said):
        raise Loss(f"{number.name} was answered by {said!r}")


def cache(chaos: Chaos, out: Path) -> None:
    """The tokens of a text are being made and kept when the process is killed."""
    _, seconds = chaos.reference("text")
    shutil.rmtree(chaos.work / "data-cache")
    for _ in range(chaos.random.randint(1, 3)):
        number = chaos.random.choice(list(SIGNALS))
        process = Process(chaos.words("text", out), chaos.work)
        process.stop(number, chaos.random.uniform(0, 0.3 * seconds))
        _check_stopped(number, *process.wait(), done=(out / "result.json").exists())
        chaos.kills += 1
        if out.exists():
            check_whole(out)
            break
    chaos.finish("text", out)
    if left := [path.name for path in (chaos.work / "data-cache" / "tokens").iterdir() if path.suffix == ".part"]:
        raise Loss(f"left behind: {left}")


def evaluation(chaos: Chaos, out: Path) -> None:
    """A run that is being evaluated is killed: it stays as it was."""
    reference, seconds = chaos.reference("series")
    shutil.copytree(reference, out)
    before = _contents(out)
    number = chaos.random.choice(list(SIGNALS))
    process = Process(["evaluate", str(out)], chaos.work)
    process.stop(number, chaos.random.uniform(0, 0.5 * seconds))
    status, said = process.wait()
    chaos.kills += 1
    if status not in (-number, SIGNALS[number], 0):
        raise Loss(f"{number.name} ended evaluate with status {status}; said {said!r}")
    if _contents(out) != before:
        raise Loss("evaluate changed the run")


def crowd(chaos: Chaos, out: Path) -> None:
    """Several processes train into one folder at once: one does, the others are told."""
    kind = chaos.random.choice(("series", "text"))
    chaos.reference(kind)
    crowd = [Process(chaos.words(kind, out), chaos.work) for _ in range(chaos.random.randint(2, 3))]
    ended = [process.wait() for process in crowd]
    if sorted(status for status, _ in ended) != [0, *[2] * (len(crowd) - 1)]:
        raise Loss(f"of {len(crowd)} processes: {ended}")
    if not all("in use" in said or "already contains" in said for status, said in ended if status):
        raise Loss(f"the others were told {ended}")
    compare(chaos.reference(kind)[0], out)


def disk(chaos: Chaos, out: Path) -> None:
    """The disk of 20 MB is full at some moment of a run, and is given room again."""
    with _small_disk(chaos.work / "disk") as (place, limit):
        filler, run = place / "filler", place / "run"
        size = 0 if limit else chaos.random.randrange(DISK_BYTES - 200_000, DISK_BYTES)
        filler.write_bytes(b"\0" * size)
        status, said = Process(chaos.words("series", run), chaos.work, before=limit).wait()
        if status not in (0, 2) or (status == 2 and ("No space left" not in said and "too large" not in said)):
            raise Loss(f"a full disk ended with status {status}: {said!r}")
        if run.exists():
            check_whole(run)
        filler.unlink()
        chaos.finish("series", run)


class _small_disk:  # noqa: N801 - used as a function
    """A file system of 20 MB where this process may mount one; otherwise a limit on the size of files."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> tuple[Path, Callable[[], None] | None]:
        self.place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(self.place)]
        made = subprocess.run(command, capture_output=True, check=False)
        self.mounted = made.returncode == 0
        return self.place, None if self.mounted else _limit_files

    def __exit__(self, *error: object) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.place)], check=True)
        shutil.rmtree(self.place)


def _limit_files() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def damage(chaos: Chaos, out: Path) -> None:
    """A file of a run is damaged: it is named, or was not needed; nothing is believed."""
    reference, _ = chaos.reference("series")
    shutil.copytree(reference, out)
    path = chaos.random.choice([path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lock"])
    content = bytearray(path.read_bytes())
    how = chaos.random.choice(("emptied", "cut", "changed", "overwritten"))
    place = chaos.random.randrange(len(content))
    if how == "changed":
        content[place] ^= 1 << chaos.random.randrange(8)
    damaged = {"emptied": b"", "cut": content[:place], "changed": content, "overwritten": b"\xff\x00" * 500}[how]
    path.write_bytes(damaged)
    ended = {}
    for words in (["evaluate", str(out)], [*chaos.words("series", out), "--resume"]):
        status, said = Process(words, chaos.work).wait()
        ended[words[0]] = status
        if status not in (0, 2) or (status == 2 and str(out) not in said):
            raise Loss(f"{path.name} {how}: {words[0]} ended with status {status}: {said!r}")
    weights = path.name == "last.safetensors"
    if weights and ended["evaluate"] == 0:
        raise Loss(f"{path.name} {how}, and evaluate believed it")


KERNELS = """
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void flowformer_set_parallel(void *) {}
EXPORT int flowformer_cpu_supports(const char *) { return 1; }
"""


def compilation(chaos: Chaos, out: Path) -> None:
    """Kernels, of a few lines, are being compiled when the process is killed, alone or beside others; then damaged."""
    source, folder = out / "source", out / "kernels"
    source.mkdir(parents=True)
    (source / "library.cpp").write_text(KERNELS)
    (source / "kernels.cpp").write_text("")
    os.environ["FLOWFORMER_CACHE"] = str(folder)
    for _ in range(chaos.random.randint(1, 4)):
        number = chaos.random.choice(list(SIGNALS))
        processes = [Process([str(source)], chaos.work, command=_compile) for _ in range(chaos.random.randint(1, 2))]
        processes[0].stop(number, chaos.random.uniform(0, 1.0))
        ended = [process.wait()[0] for process in processes]
        chaos.kills += 1
        if ended[0] not in (-number, SIGNALS[number], 0) or any(ended[1:]):
            raise Loss(f"{number.name} while compiling: {ended}")
    for damage in (None, b"", b"\xff" * 1000, 100):
        libraries = list(folder.glob("kernels-*"))
        if damage is not None:
            content = libraries[0].read_bytes()
            libraries[0].write_bytes(content[:damage] if isinstance(damage, int) else damage)
        status, said = Process([str(source)], chaos.work, command=_compile).wait()
        if status:
            raise Loss(f"no kernels after the damage {damage!r}: {said}")
    left = [path.name for path in folder.iterdir() if not path.name.endswith(".so") and path.name != ".lock"]
    running = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False).stdout
    if left or running or len(list(folder.glob("kernels-*.so"))) != 1:
        raise Loss(f"left behind: {left or list(folder.iterdir())}, processes {running}")


def _compile(words: Sequence[str]) -> int:
    try:
        with signals_raise():
            build.open_library(Path(words[0]), Path(words[0]))
    except Interrupted as error:
        return error.status
    return 0


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


KINDS = {
    "kill": kill, "cache": cache, "compilation": compilation, "evaluation": evaluation, "crowd": crowd, "disk": disk,
    "damage": damage,
}  # fmt: skip
WEIGHTS = {"kill": 6, "cache": 3, "compilation": 2, "evaluation": 2, "crowd": 2, "disk": 2, "damage": 3}  # of 20


def run_rounds(rounds: int, seed: int, kinds: Sequence[str], work: Path) -> dict[str, Any]:
    """Run so many rounds, and return how many of each kind there were, and what was lost."""
    chaos = Chaos(work, seed)
    counts, losses = dict.fromkeys(kinds, 0), []
    begin = time.perf_counter()
    for number in range(rounds):
        kind = chaos.random.choices(kinds, [WEIGHTS[one] for one in kinds])[0]
        out = work / f"round-{number}"
        try:
            KINDS[kind](chaos, out)
        except Loss as loss:
            losses.append(f"round {number}, {kind}: {loss}")
            print(losses[-1], file=sys.stderr, flush=True)
        counts[kind] += 1
        shutil.rmtree(out, ignore_errors=True)
    seconds = round(time.perf_counter() - begin)
    return {"seed": seed, "rounds": counts, "kills": chaos.kills, "losses": losses, "seconds": seconds}


def main(words: Sequence[str] | None = None) -> int:
    """Run the rounds; the exit status is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="some of %(default)s")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    values = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as work:
        result = run_rounds(values.rounds, values.seed, values.kinds.split(","), Path(work))
    print(json.dumps(result, indent=2))
    if values.json is not None:
        values.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return int(bool(result["losses"]))


if __name__ == "__main__":
    sys.exit(main())
