"""A fuzzer of the command line: generated wrong values, files and folders for every command and recipe.

Every call must end within its time, with status 0 where what was asked for was done and 2 where it was not, then with
one line on standard error, without a report of a fault, and without files left behind. Calls are functions of the seed;
what was found is printed as a command line, in the folder that is kept for it. Needs the extras timeseries, text and
vision.

    python tools/fuzz_cli.py                   # 600 calls in this process, 24 in processes of their own
    python tools/fuzz_cli.py --calls 100 --processes 0 --seed 7
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SMALL = ["--dim", "16", "--num-heads", "2", "--num-layers", "1", "--ffn-dim", "16", "--accelerator", "cpu"]
TEXT = [*SMALL, "--length", "16", "--steps", "2", "--eval-every", "1", "--batch-size", "2"]
WRONG_NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "1e20",
    "-0.5",
    "10" * 15,
    "1e400",
    "",
    "x",
    "[]",
    "{}",
    "None",
    "true",
)
WRONG_WORDS = ("", "\x1b[31m", "[/x]", "é🙂", "\udcff", "a" * 300, "null", "-", "--", "flow_", "../..", "%s", "{}")
WRONG_FOLDERS = ("file", "file/below", "a" * 300, "/proc/run", "", "file/../file/x", "null\0")
DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "emptied": lambda data, draw: b"",
    "cut": lambda data, draw: data[: draw.randrange(len(data) + 1)],
    "garbage": lambda data, draw: draw.randbytes(200),
    "one byte": lambda data, draw: _change_byte(data, draw),
    "zeros": lambda data, draw: bytes(len(data)),
    "not UTF-8": lambda data, draw: b"\xff\xfe" + data,
    "nested": lambda data, draw: b"[" * 100_000,
    "other JSON": lambda data, draw: draw.choice([b"[1]", b"null", b"3", b'"x"', b"{}", b'{"a": NaN}', b"[[[]]]"]),
    "JSON value": lambda data, draw: _change_json(data, draw),
}
JSON_VALUES: tuple[Any, ...] = (
    None,
    [],
    {},
    "x",
    "",
    -1,
    0,
    1e300,
    2**70,
    True,
    [1, 2],
    {"a": 1},
    "../../x",
    float("nan"),
)


class Hang(BaseException):
    """A call that took longer than its time; not an Exception, which the command would catch."""


@dataclass
class Call:
    """One call of the command line.

    Attributes:
        kind: What is wrong with it.
        words: What follows ``flowformer``.
        refused: Whether it has to end with status 2.
        names: A word that the message has to contain.
    """

    kind: str
    words: list[str]
    refused: bool = False
    names: str = ""


@dataclass
class Outcome:
    """What a call came to.

    Attributes:
        status: Exit status; None if it hung.
        out: Standard output.
        error: Standard error.
    """

    status: int | None
    out: str
    error: str


@dataclass
class Tally:
    """Counts of calls by command and kind, and what was found."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    found: list[tuple[str, Call, Path]] = field(default_factory=list)


def _change_byte(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data or b"x")
    changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _change_json(data: bytes, draw: random.Random) -> bytes:
    try:
        content = json.loads(data)
    except ValueError:
        return data[::-1]
    at, key = content, None
    for _ in range(draw.randrange(1, 4)):
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        if not keys:
            break
        if key is not None and draw.random() < 0.5:
            break
        before, key = at, draw.choice(keys)
        at = at[key]
    if key is None:
        return data[::-1]
    if draw.random() < 0.2:
        del before[key]
    else:
        before[key] = draw.choice(JSON_VALUES)
    return json.dumps(content).encode()


# ------------------------------------------------------------------------------------------------------------ materials


def write_series(path: Path, seed: int) -> None:
    """Twelve series of two channels and six steps, of two classes."""
    draw = random.Random(seed)
    rows = ["series,time,label,x,y"]
    for number in range(12):
        rows += [
            f"s{number},{step},{'ab'[number % 2]},{draw.gauss(number % 2, 1):.4f},{draw.random():.4f}"
            for step in range(6)
        ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def write_pictures(folder: Path) -> None:
    """Eight pictures of 8 x 8 pixels in two folders."""
    from PIL import Image

    for number in range(8):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (30 * number, 0, 255 - 30 * number)).save(path)


def prepare(folder: Path) -> None:
    """Write data, and train a run of series and one of text.

    Raises:
        SystemExit: if a run cannot be trained.
    """
    for seed, name in enumerate(("train", "test")):
        write_series(folder / f"{name}.csv", seed)
    (folder / "new.ts").write_text("@classLabel true a b\n@data\n1,2,3:1,2,3:a\n2,1:0,0:b\n", encoding="utf-8")
    (folder / "text.txt").write_text("\n".join(f"line {i} of a text, {i * i}" for i in range(300)), encoding="utf-8")
    (folder / "config.yaml").write_text("seed: 3\nlearning_rate: 1e-4\nattention_options: {preset: core}\n")
    (folder / "file").write_text("mine")
    write_pictures(folder / "pictures")
    series = ["--train-file", "train.csv", "--test-file", "test.csv", *SMALL, "--epochs", "1", "--out", "series"]
    text = ["--file", "text.txt", *TEXT, "--out", "text"]
    for words in (["train", "timeseries/own", *series], ["train", "text/own", *text]):
        outcome = run_here(words, folder, 120)
        if outcome.status != 0:
            raise SystemExit(f"{shlex.join(words)}: {outcome.error}")


# ---------------------------------------------------------------------------------------------------------------- calls


def numbers(draw: random.Random, folder: Path) -> Call:
    """A numeric field of any recipe with a value that it does not take."""
    from flowformer.common.fields import options_of
    from flowformer.recipes import create_recipe, list_recipes

    name = draw.choice(list_recipes())
    fields = [one for one in options_of(type(create_recipe(name))).values() if one.type in (int, float)]
    one, value = draw.choice(fields), draw.choice(WRONG_NUMBERS)
    flag = "--" + one.name.replace("_", "-")
    return Call(
        "number", ["train", name, f"{flag}={value}"], refused=True, names="" if value in ("", "None") else one.name
    )


def mechanism_options(draw: random.Random, folder: Path) -> Call:
    """An option of a mechanism with a wrong value, or one of another mechanism."""
    from flowformer.mechanisms import list_attentions
    from flowformer.mechanisms.registry import option_names

    mechanism = draw.choice(list_attentions())
    option = draw.choice([name for one in list_attentions() for name in option_names(one)])
    words = ["train", "text/own", "--file", str(folder / "text.txt"), *TEXT, "--attention", mechanism]
    value = draw.choice(("nan", "-1", "x", "[]", "1e400", "-inf", "{a: 1}"))
    return Call("mechanism", [*words, f"--attention-options.{option}", value], refused=True)


def words_of_fields(draw: random.Random, folder: Path) -> Call:
    """A field that is no number with a word that means nothing."""
    from flowformer.common.fields import options_of
    from flowformer.recipes import create_recipe, list_recipes

    name, fields = "", []
    while not fields:  # recipes without attention may have none
        name = draw.choice(list_recipes())
        fields = [
            one
            for one in options_of(type(create_recipe(name))).values()
            if one.choices or one.name in ("attention", "model")
        ]
    one, value = draw.choice(fields), draw.choice([word for word in WRONG_WORDS if word != "null"])
    return Call("word", ["train", name, f"--{one.name.replace('_', '-')}={value}"], refused=True)


def folders(draw: random.Random, folder: Path) -> Call:
    """A folder or file to write that cannot be written."""
    out = draw.choice(WRONG_FOLDERS)
    begins = (
        ["train", "text/own", "--file", "text.txt", *TEXT, "--out"], ["predict", "series", "test.csv", "--out"],
        ["export", "text", "--to", "hf", "--out"], ["bench", "causal", "--lengths", "16", "--out"],
        ["visualize", "series", "test.csv", "--out"], ["data", "wikitext", "--dir"],
    )  # fmt: skip
    words = draw.choice(begins)
    if words[0] == "predict" and out == "file":  # a file is replaced
        out = "."
    return Call("folder", [*words, out], refused=True)


def damaged_data(draw: random.Random, folder: Path) -> Call:
    """A damaged file of data or options."""
    name = draw.choice(("train.csv", "test.csv", "new.ts", "text.txt", "config.yaml", "pictures/a/0.png"))
    how = draw.choice(list(DAMAGES))
    path = folder / name
    path.write_bytes(DAMAGES[how](path.read_bytes(), draw))
    train = ["train", "timeseries/own", "--train-file", "train.csv", "--test-file", "test.csv", *SMALL, "--epochs", "1"]
    by_name = {
        "train.csv": [*train, "--out", "out"],
        "test.csv": ["predict", "series", "test.csv"],
        "new.ts": ["predict", "series", "new.ts", "--out", "out.csv"],
        "config.yaml": [*train, "--config", "config.yaml", "--out", "out"],
        "text.txt": draw.choice(
            [
                ["train", "text/own", "--file", "text.txt", *TEXT, "--out", "out"],
                ["visualize", "text", "text.txt", "--out", "out.png"],
            ]
        ),
        "pictures/a/0.png": ["predict", "series", "pictures/a/0.png"],
    }
    return Call(f"data {how}", by_name[name])


def damaged_run(draw: random.Random, folder: Path) -> Call:
    """A file of a run that was damaged, edited or lost."""
    kind = draw.choice(("series", "text"))
    files = sorted(path for path in (folder / kind).rglob("*") if path.is_file())
    path, how = draw.choice(files), draw.choice(["lost", *DAMAGES])
    path.unlink() if how == "lost" else path.write_bytes(DAMAGES[how](path.read_bytes(), draw))
    commands = {
        "series": [
            ["evaluate", "series"],
            ["predict", "series", "test.csv"],
            ["visualize", "series", "test.csv", "--out", "out.png"],
            [
                "train",
                "timeseries/own",
                "--train-file",
                "train.csv",
                "--test-file",
                "test.csv",
                *SMALL,
                "--epochs",
                "1",
                "--out",
                "series",
                "--resume",
            ],
        ],
        "text": [
            ["evaluate", "text"],
            ["generate", "text", "--tokens", "3"],
            ["export", "text", "--to", "hf", "--out", "out"],
            ["train", "text/own", "--file", "text.txt", *TEXT, "--out", "text", "--resume"],
        ],
    }
    return Call(f"run {how}", draw.choice(commands[kind]))


def options_of_commands(draw: random.Random, folder: Path) -> Call:
    """Options of the other commands with values that mean nothing."""
    value = draw.choice((*WRONG_NUMBERS, *WRONG_WORDS))
    begins = (
        ["generate", "text", "--tokens"],
        ["generate", "text", "--temperature"],
        ["generate", "text", "--top-k"],
        ["generate", "text", "--top-p"],
        ["generate", "text", "--seed"],
        ["generate", "text", "--tokens", "2", "--prompt"],
        ["generate", "text", "--checkpoint"],
        ["visualize", "series", "test.csv", "--out", "out.png", "--at"],
        ["visualize", "series", "test.csv", "--out", "out.png", "--layer"],
        ["evaluate", "series", "--checkpoint"],
        ["visualize", "series", "test.csv", "--out", "out.png", "--head"],
        ["visualize", "series", "test.csv", "--out"],
        ["visualize", "series", "test.csv", "--out", "out.png", "--index"],
        ["evaluate", "series", "--data"],
        ["predict", "series"],
        ["predict"],
        ["evaluate"],
        ["generate"],
        ["export", "text", "--to"],
        ["info"],
        ["list"],
        ["list", "recipes"],
        ["data"],
        ["bench"],
        ["bench", "causal", "--lengths"],
        ["bench", "causal", "--lengths", "16", "--threads"],
        ["bench", "causal", "--lengths", "16", "--seconds"],
        ["bench", "causal", "--lengths", "16", "--contenders"],
        ["bench", "causal", "--lengths", "16", "--batch"],
        ["bench", "causal", "--lengths", "16", "--memory-gb"],
        ["doctor"],
        [],
        ["train"],
        ["train", "text/own", "--file"],
        ["train", "timeseries/own", "--config"],
    )
    return Call("option", [*draw.choice(begins), value])


MAKERS = (numbers, numbers, mechanism_options, words_of_fields, folders, damaged_data, damaged_run, options_of_commands)


# ---------------------------------------------------------------------------------------------------------------- rules


def run_here(words: list[str], folder: Path, limit_s: int) -> Outcome:
    """Run a command line in this process, in a folder and within a time."""
    from flowformer.cli import main

    out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in "ab")
    before, old = Path.cwd(), signal.signal(signal.SIGALRM, _hang)
    os.chdir(folder)
    signal.alarm(limit_s)
    status: int | None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            status = main(words)
    except SystemExit as stop:  # of --help
        status = stop.code if isinstance(stop.code, int) else 1
    except Hang:
        status = None
    except Exception as unexpected:
        status = 1
        error.write(f"Traceback: {type(unexpected).__name__}: {unexpected}\n")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        os.chdir(before)
    return Outcome(status, *(_read(stream) for stream in (out, error)))


def _hang(*_: Any) -> None:
    raise Hang


def _read(stream: io.TextIOWrapper) -> str:
    stream.flush()
    raw = stream.buffer
    assert isinstance(raw, io.BytesIO)
    return raw.getvalue().decode("utf-8", "replace")


def judge(call: Call, outcome: Outcome, folder: Path, before: set[str]) -> str:
    """Return what is wrong with an outcome; "" if nothing is."""
    if outcome.status is None:
        return "hangs"
    if "Traceback" in outcome.error or outcome.status not in (0, 2):
        return f"status {outcome.status}: {outcome.error.strip()[-300:]}"
    if outcome.status == 0:
        if call.refused:
            return "is accepted"
        if not outcome.out.strip() and not (_files(folder) - before):
            return "status 0, and nothing was done"
        return ""
    lines = outcome.error.strip().splitlines()
    if len(lines) != 1 or not lines[0].startswith("flowformer: "):
        return f"{len(lines)} lines on standard error: {outcome.error.strip()[:300]}"
    if call.names and call.names.replace("_", "-") not in outcome.error.replace("_", "-"):
        return f"the message does not name {call.names}: {lines[0]}"
    left = sorted(_files(folder) - before)
    return f"leaves {', '.join(left)} behind" if left else ""


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def fuzz(calls: int, seed: int, material: Path, *, limit_s: int = 30) -> Tally:
    """Make and judge calls in this process.

    Args:
        calls: How many.
        seed: Decides what they are.
        material: A folder that :func:`prepare` has filled; each call gets a copy.
        limit_s: Time of a call in seconds.
    """
    tally = Tally()
    for number in range(calls):
        draw = random.Random(f"{seed} {number}")
        folder = Path(tempfile.mkdtemp(prefix=f"call-{number}-", dir=material.parent))
        shutil.copytree(material, folder, dirs_exist_ok=True)
        call = MAKERS[number % len(MAKERS)](draw, folder)
        before = _files(folder)
        wrong = judge(call, run_here(call.words, folder, limit_s), folder, before)
        tally.calls[call.words[0] if call.words else "", call.kind] += 1
        if wrong:
            tally.found.append((wrong, call, folder))
        else:
            shutil.rmtree(folder)
    return tally


# ------------------------------------------------------------------------------------------- processes of their own


def processes(material: Path, count: int, seed: int) -> Tally:
    """Streams of other encodings, closed and full ones, and signals: each in a process of its own."""
    tally, draw = Tally(), random.Random(seed)
    commands = (
        ["list"],
        ["info", "flow"],
        ["generate", "text", "--tokens", "9", "--prompt", "é🙂"],
        ["evaluate", "series"],
        ["predict", "series", "test.csv"],
        ["train", "nonsense"],
        ["--help"],
    )
    for number in range(count):
        kind, words = list(_WAYS)[number % len(_WAYS)], draw.choice(commands)
        shell, environment, expected = _WAYS[kind]
        line = shell.format(shlex.join([sys.executable, "-m", "flowformer", *words]))
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=material,
            capture_output=True,
            env={**os.environ, **environment},
            timeout=300,
            check=False,
        )
        said = done.stderr.decode("utf-8", "replace")
        tally.calls[words[0], kind] += 1
        call = Call(kind, words)
        wrong = words[-1] == "nonsense" and kind not in ("interrupted", "terminated")
        fine = done.returncode in ((2,) if wrong else expected)
        if not fine or "Traceback" in said or len(said.strip().splitlines()) > 1:
            tally.found.append((f"status {done.returncode}: {said[-300:]} ({line})", call, material))
    return tally


# How a command is run, in bash; its environment; and the statuses that are right.
_WAYS: dict[str, tuple[str, dict[str, str], tuple[int, ...]]] = {
    "ascii": ("{}", {"PYTHONIOENCODING": "ascii"}, (0,)),
    "cp1252": ("{}", {"PYTHONIOENCODING": "cp1252"}, (0,)),
    "C locale": ("{}", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, (0, 2)),
    "closed stdout": ("{} >&-", {}, (2,)),
    "full stdout": ("{} > /dev/full", {}, (2,)),
    "closed stderr": ("{} 2>&-", {}, (0,)),
    "full stderr": ("{} 2> /dev/full", {}, (0,)),
    "interrupted": ("timeout --preserve-status -s INT 2 {}", {}, (0, 2, 130)),
    "terminated": ("timeout --preserve-status -s TERM 2 {}", {}, (0, 2, 143)),
}


def report(tally: Tally) -> int:
    """Print the table of calls and what was found; return the exit status."""
    commands = sorted({command for command, _ in tally.calls})
    kinds: dict[str, Counter[str]] = {command: Counter() for command in commands}
    for (command, kind), count in tally.calls.items():
        kinds[command][kind] += count
    for command in commands:
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds[command].most_common())
        print(f"{command or '(none)':10} {sum(kinds[command].values()):5}  {listed}")
    for wrong, call, folder in tally.found:
        print(
            f"\nFOUND: {wrong}\n  cd {shlex.quote(str(folder))}; flowformer {shlex.join(call.words)}".encode(
                "ascii", "backslashreplace"
            ).decode()
        )
    print(f"\n{sum(tally.calls.values())} calls, {len(tally.found)} findings")
    return 1 if tally.found else 0


@contextlib.contextmanager
def workshop() -> Iterator[Path]:
    """A folder with the material of the calls, and caches of its own; kept where something was found."""
    root = Path(tempfile.mkdtemp(prefix="flowformer-fuzz-"))
    os.environ.update(
        XDG_CACHE_HOME=str(root / "cache"), FLOWFORMER_DATA=str(root / "data"), FLOWFORMER_BACKEND="torch"
    )
    (root / "material").mkdir()
    prepare(root / "material")
    yield root / "material"


def main() -> int:
    """Run the fuzzer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--calls", type=int, default=600, help="calls in this process")
    parser.add_argument("--processes", type=int, default=24, help="calls in processes of their own")
    parser.add_argument("--seed", type=int, default=0)
    values = parser.parse_args()
    began = time.monotonic()
    with workshop() as material:
        tally = fuzz(values.calls, values.seed, material)
        more = processes(material, values.processes, values.seed)
        tally.calls += more.calls
        tally.found += more.found
        status = report(tally)
        print(f"{time.monotonic() - began:.0f} s, seed {values.seed}")
        if not tally.found:
            shutil.rmtree(material.parent)
    return status


if __name__ == "__main__":
    sys.exit(main())
