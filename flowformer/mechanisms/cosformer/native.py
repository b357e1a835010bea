"""cosFormer attention with sums over keys by the C++ kernels; features and bounds in PyTorch."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.run import Checked, scanned
from flowformer.kernels.native.attend import products
from flowformer.mechanisms.cosformer.operation import CosformerState, attend_by


@implements("cosformer_attention", "native")
def attend(given: Checked, *options: Any) -> tuple[Tensor, CosformerState | None]:
    """Either form of cosFormer attention: the output, and the state after it."""
    return attend_by(functools.partial(products, "cosformer_attention"), scanned, given, *options)
