"""Mobile-Attention by the Triton kernels for linear attention: :mod:`flowformer.mechanisms.mobile.by_heads`."""

from __future__ import annotations

import functools

from flowformer.core.backends import implements
from flowformer.kernels.triton.attend import attend
from flowformer.mechanisms.mobile.by_heads import attend_among_heads

implements("mobile_attention", "triton")(functools.partial(attend_among_heads, attend))
