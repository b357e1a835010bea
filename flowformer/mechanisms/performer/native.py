"""Performer attention with sums over keys by the C++ kernels; features, and the part of eps, in PyTorch.

The running maximum is a decay: of integers, which have no gradient.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.run import Checked, scanned
from flowformer.kernels.native.attend import products, ratio
from flowformer.mechanisms.performer.operation import PerformerState, attend_by


@implements("performer_attention", "native")
def attend(given: Checked, *options: Any) -> tuple[Tensor, PerformerState | None]:
    """Either form of Performer attention: the output, and the state after it."""
    op = "performer_attention"
    return attend_by(functools.partial(products, op), scanned, given, *options, ratio=functools.partial(ratio, op))
