"""Random feature attention with sums over keys by Triton kernels; features, gates and bounds in PyTorch."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.run import Checked, at_once
from flowformer.kernels.triton.attend import products
from flowformer.mechanisms.rfa.operation import RFAState, attend_by


@implements("rfa_attention", "triton")
def attend(given: Checked, *options: Any) -> tuple[Tensor, RFAState | None]:
    """Either form of random feature attention: the output, and the state after it."""
    return attend_by(functools.partial(products, "rfa_attention"), at_once, given, *options)
