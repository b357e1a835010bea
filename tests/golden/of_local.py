"""Local attention: the package local-attention, and what Long Range Arena calls so."""

from __future__ import annotations

from functools import partial

from flowformer import ops

from .files import Golden, Pairs, compared, reads
from .kernels import PROJECTIONS, between_kernels


@reads(
    "local_block", "local_block_causal", "local_neighbours", "local_lookback_causal", "local_exact_window_causal"
)  # fmt: skip
def local(golden: Golden) -> Pairs:
    options = golden.options
    attend = partial(
        ops.local_attention,
        causal=options["causal"],
        window=options["window_size"],
        look_backward=options["look_backward"],
        look_forward=options["look_forward"],
        exact_window=options.get("exact_windowsize", False),
        released="local-attention" if options["autopad"] else None,
    )
    return compared(golden, attend, "q", "k", "v")


@reads("local_lra")
def local_lra(golden: Golden) -> Pairs:
    options = {"window": golden.options["block_size"], "released": "lra"}
    attend = partial(ops.local_attention, mask=golden.tensors["padding_mask"].bool(), **options)
    return compared(golden, between_kernels(attend), *PROJECTIONS)
