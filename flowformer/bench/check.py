"""Is a contender right? Nothing is timed that is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowformer.bench.device import Device
from flowformer.bench.registry import Contender, Inputs, Operation, Outputs, Shape
from flowformer.common.errors import RunError


class WrongResultError(RunError):
    """A contender that departs from the truth by more than its tolerance; it is not timed."""


@dataclass(frozen=True)
class Checked:
    """How right a contender is.

    Attributes:
        error: Largest error of a row relative to the row, over all outputs; ``None`` where it is not checked.
        tolerance: The largest allowed.
        length: Length at which it was checked.
        note: ``"checked"``, also with how many sequences if not with all; or why it is not checked.
    """

    error: float | None
    tolerance: float | None
    length: int
    note: str

    def as_record(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def error_of(got: Tensor, want: Tensor) -> float:
    """Largest distance of a row of ``got`` from its row of ``want``, relative to the length of that row.

    A row is the channels of one head of one token. Outputs of causal attention shrink with time, so an error relative
    to the largest of all would not see the late ones. Rows shorter than the median count as the median: some gradients
    are next to nothing, as the difference of terms that are not.

    Returns:
        The error; infinity for a wrong shape, or where anything is not finite.
    """
    if got.shape != want.shape:
        return float("inf")
    norms = want.norm(dim=-1)
    scale = norms.clamp(min=norms.median()).clamp(min=torch.finfo(want.dtype).tiny)
    error = ((got.to(want) - want).norm(dim=-1) / scale).max().item()
    return error if error == error else float("inf")  # NaN is not equal to itself


class Checker:
    """Checks contenders on a device, and remembers truths and verdicts: one length serves all the longer ones.

    The truth is computed on the CPU, whatever the device, from the same numbers.
    """

    def __init__(
        self, inputs: Callable[[Operation, Shape, torch.dtype, str], Inputs], device: Device | None = None
    ) -> None:
        self._inputs, self._device = inputs, device or Device()
        self._truths: dict[tuple[Any, ...], Outputs] = {}
        self._verdicts: dict[tuple[Any, ...], Checked] = {}

    def check(self, operation: Operation, row: Contender, shape: Shape) -> Checked:
        """Compare a contender with the truth at ``shape``, or at the operation's ``check_length`` if that is shorter.

        Raises:
            WrongResultError: naming the contender, the error and the tolerance.
        """
        batch = min(shape.batch, self._device.checked_batch or shape.batch)
        note = "checked" if batch == shape.batch else f"checked with {batch} of {shape.batch} sequences"
        shape = replace(shape, length=min(shape.length, operation.check_length), batch=batch)
        key = (operation.name, row.name, shape, note)
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(operation, row, shape, note)
        return self._verdicts[key]

    def _judge(self, operation: Operation, row: Contender, shape: Shape, note: str) -> Checked:
        inputs = self._inputs(operation, shape, row.dtype, row.layout)
        got = operation.bind(row.function, self._device.put(inputs)).run()
        if row.reference is None:
            if not all(bool(tensor.isfinite().all()) for tensor in got):
                raise WrongResultError(
                    f"{row.name} gives values that are not finite in {operation.name}; it is not timed"
                )
            return Checked(None, None, shape.length, f"unchecked: {row.unchecked}")
        error = _worst(got, self._truth(operation, row, shape, inputs))
        tolerance = row.tolerance or operation.tolerances[row.dtype]
        if not error <= tolerance:
            raise WrongResultError(
                f"{row.name} is wrong in {operation.name} at {operation.axis} {shape.length}: its error of {error:.1e} "
                f"exceeds the tolerance of {tolerance:.0e}; it is not timed"
            )
        return Checked(error, tolerance, shape.length, note)

    def _truth(self, operation: Operation, row: Contender, shape: Shape, inputs: Inputs) -> Outputs:
        key = (operation.name, row.reference, shape, row.dtype)
        if key not in self._truths:
            assert row.reference is not None  # judged already
            self._truths[key] = operation.truth(row.reference, inputs)
        return self._truths[key]


def _worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    if len(got) != len(want):
        return float("inf")
    return max(error_of(one, other) for one, other in zip(got, want, strict=True))
