"""How well a language model of bytes predicts texts longer than those it was trained on, by the place in the text.

Run: python examples/long_text.py RUN FILE        RUN: folder of `flowformer train text/own --tokenizer bytes`
     python examples/long_text.py                 a small model, trained for some seconds on this library's pages
"""

import json
import math
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from rich.console import Console

from flowformer.recipes import create_recipe, read_recipe
from flowformer.training.fit import load, train

LENGTH, ROWS = 2_000, 5
PLACES = (16, 64, 128, 256, 512, 1_000, 1_500, LENGTH)


def bits_by_place(run: Path, file: Path) -> None:
    """Print bits per byte of pieces of the last 100,000 bytes of a file, by the place in the piece."""
    model, _ = load(read_recipe(json.loads((run / "recipe.json").read_text(encoding="utf-8"))), run)
    tokens = torch.frombuffer(bytearray(file.read_bytes()[-100_000:]), dtype=torch.uint8).long()
    pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    with torch.inference_mode():
        nats = torch.cat([model.loss(some, reduction="none") for some in pieces.split(ROWS)]).mean(0)
    for first, last in pairwise(PLACES):
        print(f"bytes {first:>5,} to {last:>5,}: {nats[first - 1 : last - 1].mean() / math.log(2):.3f} bits per byte")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        bits_by_place(*map(Path, sys.argv[1:]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            text, out = Path(folder) / "text.txt", Path(folder) / "run"
            text.write_bytes(
                b"".join(page.read_bytes() for page in sorted(Path(__file__).parents[1].glob("docs/*.md")))
            )
            sizes = {"length": 128, "dim": 32, "num_layers": 1, "steps": 40, "eval_every": 40}
            train(create_recipe("text/own", file=text, **sizes), out, console=Console())
            bits_by_place(out, text)
