"""Files of numbers recorded from published implementations, and the functions that compute the same with ours.

A reader is a function of a :class:`Golden` that returns, by name, what ours gives beside what was recorded: the output
and every recorded gradient. Each mechanism has its own readers in ``of_NAME.py``::

    @reads("cosformer", "cosformer_causal")
    def cosformer(golden: Golden) -> Pairs:
        attend = partial(ops.cosformer_attention, causal=golden.options["causal"])
        return compared(golden, attend, "q", "k", "v")
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

Pairs = dict[str, tuple[Tensor, Tensor]]  # by name: what ours gives, what was recorded


class Golden(NamedTuple):
    """One file.

    Attributes:
        name: The file's name without its suffix.
        tensors: What it holds, by name.
        options: Of the implementation that was run, as the header says.
        baseline: Which implementation.
        kind: ``"op"``, ``"module"``, ...
    """

    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    baseline: str
    kind: str

    @property
    def recorded(self) -> set[str]:
        """Names of the results: the output and gradients."""
        return {name for name in self.tensors if name == "out" or (name.startswith("grad") and name != "grad_out")}


class Reader(NamedTuple):
    """A function that computes what a file holds, and how far apart the two may be, of the largest element."""

    compute: Callable[[Golden], Pairs]
    tolerance: float


READERS: dict[str, Reader] = {}


def reads(*stems: str, tolerance: float = 1e-12) -> Callable[[Callable[[Golden], Pairs]], Callable[[Golden], Pairs]]:
    """Register a function as the reader of files that begin with one of the given stems."""

    def register(compute: Callable[[Golden], Pairs]) -> Callable[[Golden], Pairs]:
        for stem in stems:
            if stem in READERS:
                raise ValueError(f"there is a reader of {stem} already")
            READERS[stem] = Reader(compute, tolerance)
        return compute

    return register


def find_reader(name: str) -> Reader | None:
    """Return the reader of the longest stem that the name begins with; a suffix after it begins with - or _."""
    fitting = [stem for stem in READERS if name == stem or name.startswith((f"{stem}_", f"{stem}-"))]
    return READERS[max(fitting, key=len)] if fitting else None


def load_readers() -> None:
    """Import every ``of_NAME.py`` beside this file."""
    for found in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if found.name.startswith("of_"):
            importlib.import_module(f"{__package__}.{found.name}")


def load(path: Path) -> Golden:
    """Read one file."""
    with safe_open(str(path), "pt") as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    options = json.loads(header.get("options", "{}"))
    return Golden(path.stem, tensors, options, header.get("baseline", ""), header.get("kind", ""))


def compared(golden: Golden, function: Callable[..., Tensor], *names: str) -> Pairs:
    """Run a function on tensors of a file, and pair its output and gradients with the recorded ones.

    Args:
        golden: The file.
        function: What is run.
        names: Of the tensors it takes, in order. The gradient of ``q`` is recorded as ``grad_q``, that of ``param.E``
            as ``grad.E``.
    """
    of_inputs = {name: name.replace("param.", "grad.") if "." in name else f"grad_{name}" for name in names}
    given = {name: golden.tensors[name].clone() for name in names}
    wanted = [name for name in names if of_inputs[name] in golden.tensors]
    for name in wanted:
        given[name].requires_grad_()
    out = function(*given.values())
    grads = torch.autograd.grad(out, [given[name] for name in wanted], golden.tensors["grad_out"])
    got = {"out": out.detach(), **{of_inputs[name]: grad for name, grad in zip(wanted, grads, strict=True)}}
    return {name: (value, golden.tensors[name]) for name, value in got.items()}


def errors(golden: Golden, pairs: Pairs) -> dict[str, float]:
    """Return the largest difference of each pair, of the largest recorded element; inf for what is not comparable."""
    missing = dict.fromkeys(golden.recorded - set(pairs), float("inf"))
    largest = max((float(want.double().abs().max()) for _, want in pairs.values()), default=0.0)
    return {**missing, **{name: _error(got, want, largest) for name, (got, want) in pairs.items()}}


def _error(got: Tensor, want: Tensor, largest: float) -> float:
    if got.shape != want.shape:
        return float("inf")
    difference, size = (got.double() - want.double()).abs().max(), want.double().abs().max()
    if size < 1e-15 * want.numel() * largest:  # zero but for rounding, as the gradient of a key's bias
        size = largest
    error = float(difference / size if size > 0 else difference)
    return error if error == error else float("inf")  # NaN is not close to anything


def check(path: Path) -> tuple[bool, str]:
    """Compute what a file holds; return whether it is the same, and a line that says so."""
    golden = load(path)
    reader = find_reader(golden.name)
    if reader is None:
        return False, f"{golden.name}: unknown, no reader has its name"
    try:
        pairs = reader.compute(golden)
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        return False, f"{golden.name}: FAILS, {type(error).__name__}: {error}"
    found = errors(golden, pairs)
    worst = max(found, key=lambda name: found[name])
    same = found[worst] <= reader.tolerance
    verdict = "the same" if same else f"DIFFERS by more than {reader.tolerance:.0e}"
    return same, f"{golden.name}: {verdict}, {len(found)} results, at most {found[worst]:.1e} off ({worst})"
