"""Mobile-Attention by the C++ kernels for linear attention: :mod:`flowformer.mechanisms.mobile.by_heads`."""

from __future__ import annotations

from torch import Tensor

from flowformer.core.backends import implements
from flowformer.core.run import Checked
from flowformer.kernels.native.attend import attend
from flowformer.mechanisms.mobile.by_heads import attend_among_heads
from flowformer.mechanisms.mobile.operation import MobileState
from flowformer.mechanisms.mobile.options import MobileOptions


@implements("mobile_attention", "native")
def attend_natively(given: Checked, options: MobileOptions) -> tuple[Tensor, MobileState | None]:
    """Either form of Mobile-Attention: the output, and the state after it."""
    # Gradients come by way of the gates and of the sum over tokens: they are added before they are rounded.
    q, k, v = (x.float() for x in given[:3])
    out, state = attend_among_heads(attend, given._replace(q=q, k=k, v=v), options)
    return out.to(given.v.dtype), state
