"""Base class of attention modules: projections, heads, padding and states."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn

from flowformer.core.checks import (
    apply,
    check,
    check_flag,
    check_fresh_state,
    check_mask,
    check_optional_sizes,
    check_probability,
    check_sizes,
    check_tokens_of,
)
from flowformer.core.masks import fill
from flowformer.core.precision import dtype_and_device
from flowformer.mechanisms.dropout import Dropout
from flowformer.mechanisms.registry import Mechanism
from flowformer.mechanisms.short_conv import (
    ModuleState,
    Recent,
    ShortConv,
    check_recent,
    check_width,
    convolve,
    convolve_step,
)

NORM_EPS = 1e-6  # of the output norm; outputs of a mean of many values are small


@torch.no_grad()
def set_values(parameter: Tensor, values: Tensor) -> None:
    """Set a fresh parameter or buffer to given values, by functions of ``torch.nn.init``.

    transformers replaces those while it loads weights, so that parameters that are loaded keep their values.
    """
    floating = parameter.is_floating_point()
    unset = math.nan if floating else torch.iinfo(parameter.dtype).min
    nn.init.constant_(parameter, unset)
    parameter.copy_(torch.where(parameter.isnan() if floating else parameter == unset, values.to(parameter), parameter))


class Attention(nn.Module, ABC):
    """Base class of multi-head attention modules around an operation of :mod:`flowformer.ops`.

    Queries, keys and values are linear projections of the input, split as the operation takes them; its outputs are
    joined and projected once more, and dropout follows::

        q, k, v = q_proj(x), k_proj(x), v_proj(x)
        q, k, v = z + silu(conv(z)) for z in q, k, v      with conv
        out = operation(q, k, v)
        out = RMSNorm(out)                                with output_norm, head by head
        out = out * silu(gate_proj(x))                    with output_gate
        out = dropout(out_proj(out))

    A mechanism is a subclass entered in the registry, see :func:`flowformer.mechanisms.registry.register`. One with
    options or learned tensors overrides :meth:`arguments` or :meth:`learned`; one whose operation has no axis of heads
    :meth:`split` and :meth:`join`, one with narrower keys :attr:`key_width`.

    Attributes:
        mechanism: The row of the registry.
        learns_positions: Whether the module has parameters for each position, and so an argument ``max_length``, which
            :func:`flowformer.create_attention` passes on.
        bounds_causal: Whether a causal module needs to know the longest sequence although it has no such parameters; it
            then has the argument ``max_length``, which is passed on where ``causal``.
        further_options: Names of options that the constructor takes as ``**overrides``.
        axes: The axes of an input before its channels.

    Args:
        dim: Channels of input and output.
        num_heads: Heads; divides ``dim`` unless ``head_dim`` is given.
        causal: Output t depends on positions up to t only.
        bias: Whether the four projections have biases.
        dropout: Probability of dropping an output channel, after the output projection.
        head_dim: Channels of a head; ``dim // num_heads`` if absent.
        conv: Width of a short depthwise convolution over projected queries, keys and values, 2 to 16; 0 for none. See
            :mod:`flowformer.mechanisms.short_conv`.
        output_norm: Normalise the operation's output by the root mean square of each head's channels, with one weight
            for each channel of a head (all channels together in AFT, whose operations have no axis of heads). A norm
            by heads before the gate is that of RetNet (Sun et al., 2023) and Gated DeltaNet (Yang et al., 2025).
        output_gate: Multiply the joined output by silu(gate_proj(x)), x being the input of the queries, as RetNet does.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: for sizes that do not fit, or ``causal`` where the mechanism has no causal form.
    """

    mechanism: ClassVar[Mechanism]
    learns_positions: ClassVar[bool] = False
    bounds_causal: ClassVar[bool] = False
    further_options: ClassVar[tuple[str, ...]] = ()
    axes: str = "batch, length"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        head_dim: int | None = None,
        conv: int = 0,
        output_norm: bool = False,
        output_gate: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_heads=num_heads)
        check_optional_sizes(head_dim=head_dim)
        flags = {"causal": causal, "bias": bias, "output_norm": output_norm, "output_gate": output_gate}
        for label, value in flags.items():
            check_flag(label, value)
        check_width(conv)
        check_probability("dropout", dropout)
        if head_dim is None and dim % num_heads:
            raise ValueError(
                f"num_heads must divide dim unless head_dim is given, got dim {dim} and num_heads {num_heads}"
            )
        if causal and not self.mechanism.can("causal"):
            name, reason = type(self).__name__, self.mechanism.cannot["causal"]
            raise ValueError(f"{name} has no causal form, since {reason}: build it with causal=False")
        self.dim, self.num_heads, self.causal = dim, num_heads, causal
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        inner, factory = self.num_heads * self.head_dim, {"device": device, "dtype": dtype}
        if "q" in self.projections:
            self.q_proj = nn.Linear(dim, inner, bias=bias, **factory)
        if "k" in self.projections:
            self.k_proj = nn.Linear(dim, self.key_width, bias=bias, **factory)
        self.v_proj = nn.Linear(dim, inner, bias=bias, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=bias, **factory)
        self.dropout = Dropout(dropout)
        self.conv, self.output_norm, self.output_gate = conv, output_norm, output_gate
        if output_norm:
            self.out_norm = nn.RMSNorm(self.norm_width, eps=NORM_EPS, **factory)
        if output_gate:
            self.gate_proj = nn.Linear(dim, inner, bias=bias, **factory)
        if conv:
            if "q" in self.projections:
                self.q_conv = ShortConv(inner, conv, causal=causal, **factory)
            if "k" in self.projections:
                self.k_conv = ShortConv(self.key_width, conv, causal=causal, **factory)
            self.v_conv = ShortConv(inner, conv, causal=causal, **factory)

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        for name in ("q_proj", "k_proj", "v_proj", "out_proj", "out_norm", "gate_proj", "q_conv", "k_conv", "v_conv"):
            if hasattr(self, name):
                getattr(self, name).reset_parameters()

    # ------------------------------------------------------------------------ what a mechanism may override

    @property
    def projections(self) -> tuple[str, ...]:
        """Which of ``"q"`` and ``"k"`` have a projection, and a convolution with ``conv``, of their own; v always has.

        Without one of their own, keys are the queries. The constructor asks for it: what it depends on is set before. A
        class without queries overrides ``_project`` and ``_convs``.
        """
        return ("q", "k")

    @property
    def key_width(self) -> int:
        """Channels of the projected keys."""
        return self.num_heads * self.head_dim

    @property
    def norm_width(self) -> int:
        """Channels over which the output norm averages: the last axis of the operation's output."""
        return self.head_dim

    def split(self, x: Tensor) -> Tensor:
        """Split queries, keys or values (..., width) into heads: (..., heads, channels)."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def join(self, out: Tensor) -> Tensor:
        """Join the heads of the operation's output: (..., heads, channels) to (..., width)."""
        return out.flatten(-2)

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Return the learned tensors, which the operation takes after v, and the step after the state.

        Some depend on the inputs x, (batch, L, dim) or of a step (batch, dim); without them, all that a state needs.
        """
        return ()

    def arguments(self) -> dict[str, Any]:
        """Return the options of the operation, and of its step, state, reference and rows."""
        return {}

    # ----------------------------------------------------------------------------------------------- use

    @overload
    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None,
        context_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, initial_state: Any = None,
        return_state: Literal[False] = False,
    ) -> Tensor: ...  # fmt: skip
    @overload
    def forward(
        self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None,
        context_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, initial_state: Any = None,
        return_state: Literal[True],
    ) -> tuple[Tensor, Any]: ...  # fmt: skip
    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        initial_state: Any = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Any]:
        """Attend from ``x`` to ``context``, or to itself.

        Args:
            x: (batch, L, dim).
            context: (batch, S, dim) for cross-attention. Absent, or ``x`` itself without a ``context_mask``, for
                self-attention. Not for causal modules, nor for mechanisms without cross-attention.
            mask: (batch, L) boolean, True = real token of x.
            context_mask: (batch, S) boolean, True = real token of the context; absent where all are real.
            cu_seqlens: (N + 1,) int32 boundaries of N sequences packed into a batch of size 1; without ``context``.
            initial_state: State to continue from (causal modules).
            return_state: Return the state after the last token as well (causal modules).

        Returns:
            (batch, L, dim), zeros at padded positions; with ``return_state`` also the state.

        Raises:
            TypeError, ValueError: for invalid arguments.
        """
        x, source, masks = self.resolve(x, context, mask, context_mask)
        recent, state = None, initial_state
        if self.conv and self.causal and state is not None:
            sequences = cu_seqlens.numel() - 1 if isinstance(cu_seqlens, Tensor) else x.shape[0]
            recent, state = self._open("initial_state", state, sequences, x.device)
        q, k, v, recent = self.project(x, source, masks, cu_seqlens, recent)
        given: dict[str, Any] = {"causal": self.causal, **masks, **self.arguments()}
        if cu_seqlens is not None:
            given["cu_seqlens"] = cu_seqlens
        if initial_state is not None or return_state:
            given.update(initial_state=self._cast(state, q.dtype), return_state=return_state)
        out = self.mechanism.operation(q, k, v, *self.learned(x), **given)
        out, state = out if return_state else (out, None)
        out = fill(self._finish(out, x), mask)
        return (out, state if recent is None else ModuleState(*recent, state)) if return_state else out

    def resolve(
        self, x: Tensor, context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        """Return the inputs of queries, and of keys and values, zeros at padding; and the masks for the operation.

        Padding is filled before the projections: the gradient of a weight is a product with the inputs, and zero times
        NaN is NaN.

        Raises:
            TypeError, ValueError: for inputs that do not fit.
        """
        if context is x and context_mask is None:
            context = None
        self._check(x, context, mask, context_mask)
        source = context if context is None else fill(context, context_mask)
        if context is not None and context_mask is None and mask is not None:
            # The operation takes equal lengths without a context_mask for self-attention.
            context_mask = torch.ones(context.shape[:-1], dtype=torch.bool, device=context.device)
        x = fill(x, mask)
        return x, x if source is None else source, {"mask": mask, "context_mask": context_mask}

    def project(
        self,
        x: Tensor,
        source: Tensor,
        masks: Mapping[str, Tensor | None],
        cu_seqlens: Tensor | None = None,
        recent: Recent | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Recent | None]:
        """Return queries, keys and values as the operation takes them, for what :meth:`resolve` returns.

        Args:
            x: Input of the queries.
            source: Input of keys and values.
            masks: The masks of both.
            cu_seqlens: As in :meth:`forward`.
            recent: The projected queries, keys and values before the first, where there is a convolution.

        Returns:
            Queries, keys and values; and in causal modules with a convolution, the last ones before it.
        """
        q, k, v = self._project(x, source)
        if not self.conv:
            return self.split(q), self.split(k), self.split(v), None
        if cu_seqlens is not None:  # what the operation refuses must not reach the convolutions
            name, layout, parts = type(self).__name__, self.mechanism.layout, map(self.split, (q, k, v))
            check(name, *parts, layout=layout, causal=self.causal, cu_seqlens=cu_seqlens, **masks)
        (q, k, v), recent = convolve(self._convs, (q, k, v), masks, cu_seqlens, recent)
        return self.split(q), self.split(k), self.split(v), recent

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, not yet split."""
        what = f"{type(self).__name__}: inputs"
        q = apply(what, self.q_proj, x)
        k = apply(what, self.k_proj, source) if "k" in self.projections else q
        return q, k, apply(what, self.v_proj, source)

    @property
    def _convs(self) -> tuple[ShortConv, ShortConv, ShortConv]:
        return self.q_conv, self.k_conv if "k" in self.projections else self.q_conv, self.v_conv

    def _open(self, what: str, state: Any, sequences: int, device: torch.device) -> tuple[Recent, Any]:
        """What a state holds for the convolutions, and for the operation, which checks its part."""
        check_recent(f"{type(self).__name__}: {what}", state, self._convs, sequences, device)
        return state[:3], state.inner

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        """The module's output for the operation's output and the input of the queries."""
        if self.output_norm:
            # Under autocast the weight has another dtype than the output, which PyTorch's fused norm does not take.
            out = self.out_norm(out.to(self.out_norm.weight.dtype)).to(out.dtype)
        out = self.join(out)
        if self.output_gate:
            out = out * nn.functional.silu(self.gate_proj(x))
        return self.dropout(self.out_proj(out))

    def init_state(self, batch_size: int) -> Any:
        """Return the state before the first token, for a batch of ``batch_size`` sequences."""
        self._check_state("init_state")
        assert self.mechanism.init_state is not None  # there is a state
        check_fresh_state(f"{type(self).__name__}.init_state", batch_size)
        sizes, like = (batch_size, self.num_heads, self.head_dim, self.head_dim), dtype_and_device(self)
        state = self.mechanism.init_state(*sizes, *self.learned(), **like, **self.arguments())
        if not self.conv:
            return state
        q, k, v = (conv.init_recent(batch_size, **like) for conv in self._convs)
        return ModuleState(q, k, v, state)

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Process one token: x (batch, dim) and the state before it, to output (batch, dim) and the state after it."""
        self._check_state("step")
        assert self.mechanism.step is not None  # there is a state
        check_tokens_of(f"{type(self).__name__}.step: x", x, "batch", self.dim)
        q, k, v = self._project(x, x)
        recent = None
        if self.conv:
            recent, state = self._open("state", state, x.shape[0], x.device)
            (q, k, v), recent = convolve_step(self._convs, (q, k, v), recent)
        q, k, v = self.split(q), self.split(k), self.split(v)
        out, state = self.mechanism.step(q, k, v, self._cast(state, q.dtype), *self.learned(x), **self.arguments())
        return self._finish(out, x), state if recent is None else ModuleState(*recent, state)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        return f"dim={self.dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, causal={self.causal}"

    def _cast(self, state: Any, dtype: torch.dtype) -> Any:
        """Cast a state that is kept in the dtype of inputs, which autocast may have changed."""
        if self.mechanism.can("fixed state") or not isinstance(state, tuple) or not hasattr(state, "_fields"):
            return state  # the operation raises the error
        cast = (part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part for part in state)
        return type(state)(*cast)

    def _check(self, x: Tensor, context: Tensor | None, mask: Tensor | None, context_mask: Tensor | None) -> None:
        name, reason = type(self).__name__, self.mechanism.layout.self_only
        if context is not None and reason:
            raise ValueError(f"{name}: context is not supported, since {reason}")
        check_tokens_of(f"{name}: x", x, self.axes, self.dim)
        if mask is not None:
            check_mask(f"{name}: mask", mask, x.shape[:-1], x.device)
        if context is None:
            if context_mask is not None:
                raise ValueError(f"{name}: context_mask requires context; in self-attention, pass mask")
            return
        check_tokens_of(f"{name}: context", context, self.axes, self.dim)
        if self.causal:
            raise ValueError(f"{name}: a causal module does not support context; build it with causal=False")
        if context_mask is not None:
            check_mask(f"{name}: context_mask", context_mask, context.shape[:-1], context.device)

    def _check_state(self, what: str) -> None:
        name = type(self).__name__
        if not self.causal:
            raise ValueError(f"{name}.{what}: only a causal module has a state; build it with causal=True")
        if not self.mechanism.can("state"):
            raise ValueError(f"{name}.{what}: no state is available, since {self.mechanism.cannot['state']}")
