"""Options of Performer attention."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from torch import Tensor

from flowformer.common.names import nearest
from flowformer.core.checks import check_flag, check_number, check_table
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, sum_dtype


@dataclass(frozen=True)
class PerformerOptions:
    """Options of :func:`performer_attention`, its step and its reference.

    Attributes:
        kernel: ``"softmax"`` or ``"relu"``.
        projected: Whether features are of W x; without, for the relu kernel only, of x (Long Range Arena's default).
        eps: Added to each feature. 1e-4 with softmax and 1e-3 with relu if absent; Long Range Arena's softmax has 1e-6.
        scale: s, by which queries and keys are multiplied; K^-1/4 if absent. Long Range Arena's relu has 1; the code of
            Nystromformer divides twice, K^-1/2.
        maximum: Over which keys M is taken in the causal softmax form. ``"past"``: those up to the query. ``"all"``: as
            published; later keys change earlier outputs, and there is no state.
        detach: Treat M as a constant in gradients, as performer-pytorch does.
        sum_eps: Added to each feature's sum over keys in the denominator; 1e-6 in performer-pytorch's causal form.
        least: Twice this is added to denominators of no more than it; 1e-6 in Long Range Arena's softmax form.
    """

    kernel: Literal["softmax", "relu"] = "softmax"
    projected: bool = True
    eps: float | None = None
    scale: float | None = None
    maximum: Literal["past", "all"] = "past"
    detach: bool = False
    sum_eps: float = 0.0
    least: float = 0.0

    def __post_init__(self) -> None:
        """Raise for options that do not fit."""
        for name, choices in (("kernel", ("softmax", "relu")), ("maximum", ("past", "all"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("projected", "detach"):
            check_flag(name, getattr(self, name))
        for name in ("eps", "scale", "sum_eps", "least"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0)
        if not self.projected and self.kernel == "softmax":
            raise ValueError("projected=False requires kernel='relu', got kernel='softmax'")
        if self.eps is None:
            object.__setattr__(self, "eps", 1e-4 if self.kernel == "softmax" else 1e-3)

    @property
    def offset(self) -> float:
        """The value of ``eps``."""
        assert self.eps is not None  # set
        return self.eps

    @property
    def exponential(self) -> bool:
        """Whether features are exponentials."""
        return self.kernel == "softmax"

    @property
    def absolute(self) -> bool:
        """Whether the scale of features matters, for something is added to denominators."""
        return self.sum_eps > 0 or self.least > 0

    def project(self, x: Tensor, projection: Tensor | None) -> Tensor:
        """Return W x' (..., m), in the dtype of sums."""
        x = x.to(sum_dtype(x.dtype))
        scale = self.scale_of(x)
        return x * scale if projection is None else x @ (projection.to(x.dtype) * scale).T

    def scale_of(self, x: Tensor) -> float:
        """Return s for queries or keys (..., K)."""
        return x.shape[-1] ** -0.25 if self.scale is None else self.scale

    def exponents(self, x: Tensor, projection: Tensor | None, mask: Tensor | None = None) -> Exponents:
        """Return the exponents of features of x (..., K), with a mask of the first axes."""
        x = fill(x, mask).to(sum_dtype(x.dtype))
        projected = self.project(x, projection)
        if not self.exponential:
            return Exponents(projected.relu(), None, projected.new_zeros(projected.shape[:-1]), mask)
        half = x.square().sum(-1, keepdim=True) * (self.scale_of(x) ** 2 / 2)
        largest = projected.amax(-1)
        # Without eps, M cancels: any bound will do, and the lowest keeps most in range.
        largest = fill(largest if self.offset else largest - half.squeeze(-1), mask, LOG_ZERO)
        return Exponents(projected, half, largest.detach() if self.detach else largest, mask)


class Exponents(NamedTuple):
    """Exponents of features of tokens, W x' - |x'|^2 / 2, as a difference: a scale can be subtracted in the same pass.

    Attributes:
        projected: W x', (..., m); with the relu kernel features without eps.
        half: |x'|^2 / 2, (..., 1); ``None`` with the relu kernel.
        largest: M of each token, (...), next to -inf at padding; zeros with the relu kernel.
        mask: Which tokens are real.
    """

    projected: Tensor
    half: Tensor | None
    largest: Tensor
    mask: Tensor | None

    def features(self, scale: Tensor) -> Tensor:
        """Return features without eps, relative to exp(scale) for a scale (...); zeros at padding."""
        if self.half is None:
            return self.projected
        # A sum, for that of a difference has a negation in its gradient.
        return (self.projected + fill(-(self.half + scale.unsqueeze(-1)), self.mask, LOG_ZERO)).exp_()


OPTIONS = tuple(field.name for field in fields(PerformerOptions))


def performer_options(**overrides: Any) -> PerformerOptions:
    """Return the default options, with some of them overridden.

    Raises:
        TypeError, ValueError: for an option that does not exist, or a value that does not fit.
    """
    for name in overrides:
        if name not in OPTIONS:
            known = ", ".join(OPTIONS)
            raise TypeError(f"Performer attention has no option {name!r}; available: {known}{nearest(name, OPTIONS)}")
    return PerformerOptions(**overrides)


def check_projection(op: str, options: PerformerOptions, projection: Tensor | None, q: Tensor) -> None:
    """Raise unless the projection fits queries (..., K) and the options."""
    if options.projected:
        check_table(f"{op}: projection", projection, "features, channels", (None, q.shape[-1]), q.device)
    elif projection is not None:
        raise ValueError(f"{op}: projection must be None with projected=False, got a tensor")
