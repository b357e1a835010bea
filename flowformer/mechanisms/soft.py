r"""SOFT: attention by a Gaussian kernel, by way of landmarks.

Source: Lu et al., "SOFT: Softmax-free Transformer with Linear Complexity", NeurIPS 2021. Keys are the queries. With
x = q / K^(1/4) and landmarks l = GELU(LayerNorm(W x)) made of patches of x,

    out = P_q X P_k^T V,    P_ij = exp(-|x_i - l_j|^2 / 2),    X ~ (A + ridge I)^(-1),    A_ij = exp(-|l_i - l_j|^2 / 2)
    X <- 2 X - X A X,       twenty times, from X = 1.8 A / (largest row sum of A)^2

without any normalisation. A depthwise convolution of the values may be added:
:mod:`flowformer.mechanisms.value_conv`. For images W is a convolution over patches of r x r pixels, as published; for
series, for which the paper has none, a matrix that the means of m segments of the real tokens are multiplied by.

This is the authors' code since 2022, but for gradients: there that of the inverse is taken to be -X^T g X^T, whether or
not the iterations have converged, which ``gradient="released"`` gives. ``start="batch"`` with ``ridge=0`` is the code
of 2021: from X = 2 A / (largest row sum of the whole batch)^2, halved while it is too large. The inverse, which may
be a hundred times as sensitive as its argument, is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, layer_norm

from flowformer.core.checks import (
    Layout,
    check_bidirectional,
    check_choice,
    check_dense,
    check_flag,
    check_number,
    check_optional_sizes,
    check_sizes,
    describe,
)
from flowformer.core.masks import close_up_if, fill, spread
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Given, run
from flowformer.core.segments import segment_means
from flowformer.core.sums import sum_over_tokens, times_sum
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.inverses import newton, newton_by_limit, scale_of_batch
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.value_conv import check_filters, check_value_conv, convolve_values, filter_rows
from flowformer.mechanisms.weights import Rows, rows_of, truth_of

__all__ = ["SoftAttention", "soft_attention"]

NO_CAUSAL_FORM = "its landmarks are of the whole sequence"
SELF_ONLY = "its landmarks are of queries and keys alike"
LAYOUT = Layout(self_only=SELF_ONLY)
IMAGES = Layout("batch, height, width, heads, channels", self_only=SELF_ONLY)
STARTS, GRADIENTS = ("matrix", "batch"), ("exact", "released")
NORM_EPS = 1e-5  # of torch.nn.LayerNorm, as published

Landmarks = tuple[Tensor, Tensor, Tensor]


def soft_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Landmarks,
    filters: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: None = None,
    return_state: bool = False,
    backend: str = "auto",
    num_landmarks: int = 49,
    iterations: int = 20,
    ridge: float = 0.01,
    value_conv: int = 0,
    start: str = "matrix",
    gradient: str = "exact",
) -> Tensor:
    """SOFT (Lu et al., 2021), in time and memory linear in length.

    Args:
        q: Queries (batch, L, heads, K), or of images (batch, height, width, heads, K).
        k: Keys, likewise; the queries themselves, as published.
        v: Values (batch, L, heads, V) or (batch, height, width, heads, V).
        landmarks: W, (K, K) for series or (K, K, r, r) for images, and the weight (K,) and bias (K,) of the norm, all
            of them shared by all heads. Pixels that do not fill a patch have no part in the landmarks.
        filters: Of the convolution of values, (heads, value_conv), for images (heads, value_conv, value_conv); absent
            without one.
        causal: There is no causal form.
        mask: (batch, L) boolean, True = real token, of series.
        context_mask: Not taken: this is self-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1, of series.
        initial_state: There is no state.
        return_state: Likewise.
        backend: ``"auto"`` or ``"torch"``.
        num_landmarks: m, of series; images have one for each patch.
        iterations: Steps towards the inverse.
        ridge: Added to the diagonal of A.
        value_conv: Width of the convolution of values, odd; 0 for none.
        start: ``"matrix"``: the inverse of each sequence and head starts by its own row sums; ``"batch"``: as released
            in 2021, by the largest of the whole batch, so that a result depends on other sequences.
        gradient: Of the inverse: ``"exact"``, through all iterations; ``"released"``: -X^T g X^T, as released in 2022.

    Returns:
        Output (batch, L, heads, V) or (batch, height, width, heads, V), zeros at padded queries.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "soft_attention"
    check_bidirectional(op, causal, NO_CAUSAL_FORM)
    _check_options(f"{op}: ", num_landmarks, iterations, ridge, start, gradient)
    is_image = isinstance(q, Tensor) and q.ndim == 5
    if is_image and (mask is not None or cu_seqlens is not None):
        raise ValueError(f"{op}: images have no padding: pass neither mask nor cu_seqlens")
    inverse = _inverse_by(iterations, ridge, start, gradient)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: None) -> Any:
        with no_autocast(q.device):
            compute = sum_dtype(q.dtype)
            given = check_landmarks(op, landmarks, q, compute)
            Q, K, V = (fill(x, query).to(compute) for x in (q, k, v))
            taps = check_filters(op, filters, value_conv, v.shape[-2], V, axes=2 if is_image else 1)
            Q, K = Q * Q.shape[-1] ** -0.25, K * K.shape[-1] ** -0.25
            if is_image:
                out = _of_images(Q, K, V, given, taps, inverse)
            else:
                out = _of_series(Q, K, V, query, given, taps, inverse, num_landmarks)
            return out.to(v.dtype).contiguous(), None

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    if is_image and isinstance(k, Tensor) and q.shape != k.shape:
        raise ValueError(f"{op}: q and k of images must have one shape, got {describe(q)} and {describe(k)}")
    return run(op, given, dense, layout=IMAGES if is_image else LAYOUT, apart=start == "batch")


def _check_options(of: str, num_landmarks: Any, iterations: Any, ridge: Any, start: Any, gradient: Any) -> None:
    check_sizes(**{f"{of}num_landmarks": num_landmarks, f"{of}iterations": iterations})
    check_number(f"{of}ridge", ridge, 0)
    check_choice(f"{of}start", start, STARTS)
    check_choice(f"{of}gradient", gradient, GRADIENTS)


def check_landmarks(op: str, landmarks: Any, q: Tensor, dtype: torch.dtype) -> Landmarks:
    """Return the tensors of which landmarks are made, in a dtype.

    Raises:
        TypeError, ValueError: for others than queries (..., heads, K) require.
    """
    width, is_image = q.shape[-1], q.ndim == 5
    weight = f"({width}, {width}, r, r) for images" if is_image else f"({width}, {width}) for series"
    wanted = f"{op}: landmarks must be three tensors, {weight}, ({width},) and ({width},)"
    parts = tuple(landmarks) if isinstance(landmarks, (tuple, list)) else (landmarks,)
    shown = f"got {', '.join(describe(part) for part in parts)}"
    for part in parts:
        check_dense(f"{op}: landmarks", part)
    if len(parts) != 3 or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        raise TypeError(f"{wanted}, of floating-point dtype, {shown}")
    first, scale, offset = parts
    side = first.shape[-1:] * 2 if is_image else ()
    if first.shape != (width, width, *side) or not first.numel() or not scale.shape == offset.shape == (width,):
        raise ValueError(f"{wanted}, {shown}")
    if any(part.device != q.device for part in parts):
        raise ValueError(f"{op}: landmarks must be on {q.device} like q, {shown}")
    return first.to(dtype), scale.to(dtype), offset.to(dtype)


# ------------------------------------------------------------------------------------------------ series and images


def _activate(x: Tensor, landmarks: Landmarks) -> Tensor:
    """Landmarks of what W gave, in float64."""
    x, scale, offset = (part.to(state_dtype(x.device)) for part in (x, *landmarks[1:]))
    return gelu(layer_norm(x, x.shape[-1:], scale, offset, NORM_EPS))


def _of_series(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    landmarks: Landmarks,
    taps: Tensor | None,
    inverse: Callable[..., Tensor],
    m: int,
) -> Tensor:
    """Outputs (batch, L, heads, V), for scaled queries and keys."""
    length = q.shape[1]
    (q, k, v), real, places = close_up_if((q, k, v), mask)
    means, used = segment_means(q, min(m, q.shape[1]), real)
    marks = _activate(means @ landmarks[0].T, landmarks).transpose(1, 2)
    Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
    out = _attend(Q, K, V, marks, used, inverse)
    out = fill((out if taps is None else out + convolve_values(V, taps)).transpose(1, 2), real)
    return out if places is None else spread(out, places, length)


def _of_images(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Landmarks, taps: Tensor | None, inverse: Callable[..., Tensor]
) -> Tensor:
    """Outputs (batch, height, width, heads, V), for scaled queries and keys."""
    ratio, (height, width) = landmarks[0].shape[-1], q.shape[1:3]
    if ratio > min(height, width):
        raise ValueError(f"soft_attention: patches of {ratio} x {ratio} pixels in an image of {height} x {width}")
    pixels = q.permute(0, 3, 4, 1, 2)
    patches = conv2d(pixels.flatten(0, 1), landmarks[0], stride=ratio).flatten(2).mT
    marks = _activate(patches, landmarks).unflatten(0, pixels.shape[:2])
    Q, K, V = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = _attend(Q, K, V, marks, None, inverse).transpose(1, 2).unflatten(1, (height, width))
    if taps is None:
        return out
    image = v.permute(0, 4, 3, 1, 2)  # (batch, channels, heads, height, width)
    near = conv2d(image.flatten(0, 1), taps.unsqueeze(1), padding=taps.shape[-1] // 2, groups=len(taps))
    return out + near.unflatten(0, image.shape[:2]).permute(0, 3, 4, 2, 1)


# --------------------------------------------------------------------------------------------------------- attention


def _attend(
    q: Tensor, k: Tensor, v: Tensor, marks: Tensor, used: Tensor | None, inverse: Callable[..., Tensor]
) -> Tensor:
    """Outputs (batch, heads, L, V) for landmarks (batch, heads, m, K), of which ``used`` (batch, m) there are."""
    A, marks = _kernel(marks, marks), marks.to(q.dtype)
    of_tokens = sum_over_tokens(_kernel(k, marks), v)
    if used is not None:
        # The others have rows of the identity, which the iterations do not mix with the rest, and no values.
        both = used[:, None, :, None] & used[:, None, None, :]
        A = torch.where(both, A, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device))
        of_tokens = of_tokens * used[:, None, :, None]
    mixed = inverse(A) @ of_tokens.to(A.dtype)
    return times_sum(_kernel(q, marks), mixed.to(q.dtype))


def _kernel(x: Tensor, marks: Tensor) -> Tensor:
    """exp(-|x_i - l_j|^2 / 2), (..., tokens, m)."""
    product = times_sum(x, marks.mT)
    return (product - x.square().sum(-1, keepdim=True) / 2 - marks.square().sum(-1).unsqueeze(-2) / 2).exp()


def _inverse_by(iterations: int, ridge: float, start: str, gradient: str) -> Callable[[Tensor], Tensor]:
    """Return a function of A (batch, heads, m, m) that approximates the inverse of A + ridge I."""

    def inverse(A: Tensor) -> Tensor:
        A = A + ridge * torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        scale = scale_of_batch(A) if start == "batch" else 1.8 / A.sum(-1).amax(-1)[..., None, None].square()
        return (newton_by_limit if gradient == "released" else newton)(A, scale, iterations)

    return inverse


# --------------------------------------------------------------------------------------------------------- the truth


def soft_weights(
    q: Tensor,
    k: Tensor,
    landmarks: Landmarks,
    filters: Tensor | None = None,
    *,
    causal: bool = False,
    num_landmarks: int = 49,
    iterations: int = 20,
    ridge: float = 0.01,
    value_conv: int = 0,
    start: str = "matrix",
    gradient: str = "exact",
    size: tuple[int, int] | None = None,
) -> Rows:
    """Return rows of P_q X P_k^T, and of the convolution, of one series or of the pixels of one image of a ``size``."""
    op, (length, heads, width) = "soft_attention", q.shape
    check_bidirectional(op, causal, NO_CAUSAL_FORM)
    if (start, gradient) != ("matrix", "exact"):
        raise ValueError(
            f"{op}: weights are of start='matrix' and gradient='exact', since the released code depends on other "
            f"sequences, got {start!r} and {gradient!r}"
        )
    shape = q if size is None else q.unflatten(0, size).unsqueeze(0)
    weight, scale, offset = check_landmarks(op, landmarks, shape, q.dtype)
    q, k = q / width**0.25, k / width**0.25
    if size is None:
        m = min(num_landmarks, length)
        parts = [q[number * length // m : (number + 1) * length // m].mean(0) for number in range(m)]
        mixed = torch.einsum("mhk,ck->hmc", torch.stack(parts), weight)
    else:
        r = weight.shape[-1]
        rows, columns = size[0] // r, size[1] // r
        cut = q.unflatten(0, size)[: rows * r, : columns * r].unflatten(0, (rows, r)).unflatten(2, (columns, r))
        mixed = torch.einsum("ayxbhk,ckyb->haxc", cut, weight).flatten(1, 2)
    centred = mixed - mixed.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + NORM_EPS).sqrt() * scale + offset
    marks = normed * (1 + torch.erf(normed / 2**0.5)) / 2

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squares = ((x[..., c].unsqueeze(-1) - y[..., c].unsqueeze(-2)) ** 2 for c in range(width))
        return (-sum(squares, torch.zeros_like(x[..., :1])) / 2).exp()

    A = kernel(marks, marks) + ridge * torch.eye(marks.shape[1], dtype=q.dtype, device=q.device)
    X = 1.8 * A / A.sum(-1).amax(-1)[:, None, None] ** 2
    for _ in range(iterations):
        X = 2 * X - X @ A @ X
    taps = check_filters(op, filters, value_conv, heads, q, axes=1 if size is None else 2)

    def rows_at(places: Tensor) -> Tensor:
        found = kernel(q[places].transpose(0, 1), marks) @ X @ kernel(k.transpose(0, 1), marks).mT
        if taps is None:
            return found
        return found + (filter_rows(taps, places, length) if size is None else _image_rows(taps, places, size))

    return rows_at


def _image_rows(filters: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows of a two-dimensional convolution, (heads, rows, pixels)."""
    height, width = size
    y, x = (torch.arange(n, device=places.device) for n in size)
    taps, reach = filters.shape[-1], filters.shape[-1] // 2
    down = (y - (places // width).unsqueeze(1) + reach)[:, :, None].expand(-1, -1, width).flatten(1)
    right = (x - (places % width).unsqueeze(1) + reach)[:, None, :].expand(-1, height, -1).flatten(1)
    reached = (down >= 0) & (down < taps) & (right >= 0) & (right < taps)
    return filters[:, down.clamp(0, taps - 1), right.clamp(0, taps - 1)].masked_fill(~reached, 0)


_TRUTH, _ROWS = truth_of(soft_weights), rows_of("soft_attention", soft_weights, LAYOUT)


def soft_truth(q: Tensor, k: Tensor, v: Tensor, *learned: Any, **options: Any) -> Tensor:
    """The float64 reference, of series or images."""
    if q.ndim != 5:
        return _TRUTH(q, k, v, *learned, **options)
    size = (q.shape[1], q.shape[2])
    return _TRUTH(*(x.flatten(1, 2) for x in (q, k, v)), *learned, size=size, **options).unflatten(1, size)


def soft_rows(q: Tensor, k: Tensor, places: Any, *learned: Any, **options: Any) -> Tensor:
    """Rows of weights of a batch of series or images; pixels are counted row by row."""
    if q.ndim != 5:
        return _ROWS(q, k, places, *learned, **options)
    return _ROWS(q.flatten(1, 2), k.flatten(1, 2), places, *learned, size=(q.shape[1], q.shape[2]), **options)


@register(
    "soft",
    operation=soft_attention,
    truth=soft_truth,
    rows=soft_rows,
    source="Lu et al., SOFT: Softmax-free Transformer with Linear Complexity, NeurIPS 2021",
    cost="L landmarks (K + V)",
    layout=LAYOUT,
    cannot={
        "causal": NO_CAUSAL_FORM,
        "permutation": "its landmarks are of neighbouring tokens",
    },
)
class SoftAttention(Attention):
    """SOFT (Lu et al., 2021): attention by a Gaussian kernel and landmarks, for series or images, in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        num_landmarks: Landmarks of a series (m); 49 are those of the published models for images of 224 x 224 pixels.
        ratio: For images (batch, height, width, dim): the side of the patches that landmarks are made of. The published
            models have 8, 4 and 2 in their first three stages; the last has softmax attention.
        iterations: Steps towards the inverse.
        ridge: Added to the diagonal of A.
        value_conv: Width of a depthwise convolution of the values that is added, along both axes of images; odd, 0 for
            none. The published models have 9, 5 and 3.
        shared_qk: Keys are the queries, as published; then there is no projection of keys.
        start: As :func:`soft_attention` takes it.
        gradient: Likewise.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Attributes:
        landmark_weight: W, (head_dim, head_dim) or (head_dim, head_dim, ratio, ratio).
        landmark_scale: Weight of the norm, (head_dim,).
        landmark_offset: Bias of the norm, (head_dim,).
        value_filters: (num_heads, value_conv) or (num_heads, value_conv, value_conv), where there is a convolution.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> import torch
        >>> from flowformer import SoftAttention
        >>> SoftAttention(dim=64, num_heads=4)(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])
        >>> SoftAttention(dim=64, num_heads=2, ratio=4, value_conv=5)(torch.randn(2, 28, 28, 64)).shape
        torch.Size([2, 28, 28, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_landmarks: int = 49,
        ratio: int | None = None,
        iterations: int = 20,
        ridge: float = 0.01,
        value_conv: int = 0,
        shared_qk: bool = True,
        start: str = "matrix",
        gradient: str = "exact",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check_flag("shared_qk", shared_qk)
        self.shared_qk = shared_qk  # the base class asks for it
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        _check_options("", num_landmarks, iterations, ridge, start, gradient)
        check_optional_sizes(ratio=ratio)
        check_value_conv("value_conv", value_conv)
        if ratio is not None:
            self.axes = "batch, height, width"
            if self.conv:
                raise ValueError(
                    f"SoftAttention: conv={self.conv} is along a sequence, and ratio={ratio} is for images: build it "
                    "with conv=0"
                )
        self.ratio, self.value_conv = ratio, value_conv
        self.own = {
            "num_landmarks": num_landmarks, "iterations": iterations, "ridge": ridge, "value_conv": value_conv,
            "start": start, "gradient": gradient,
        }  # fmt: skip
        width, sides, factory = (
            self.head_dim,
            () if ratio is None else (ratio, ratio),
            {"device": device, "dtype": dtype},
        )
        self.landmark_weight = nn.Parameter(torch.empty(width, width, *sides, **factory))
        self.landmark_scale = nn.Parameter(torch.empty(width, **factory))
        self.landmark_offset = nn.Parameter(torch.empty(width, **factory))
        if value_conv:
            taps = (value_conv,) * (1 if ratio is None else 2)
            self.value_filters = nn.Parameter(torch.empty(num_heads, *taps, **factory))
        self._reset_landmarks()

    @property
    def projections(self) -> tuple[str, ...]:
        """Queries have one, which is that of shared keys."""
        return ("q",) if self.shared_qk else ("q", "k")

    def reset_parameters(self) -> None:
        """Draw fresh parameters, as a new module has them."""
        super().reset_parameters()
        self._reset_landmarks()

    def _reset_landmarks(self) -> None:
        filters = [self.value_filters] if self.value_conv else []
        for weight in (self.landmark_weight, *filters):
            bound = weight[0].numel() ** -0.5  # as torch.nn.Conv2d has it
            nn.init.uniform_(weight, -bound, bound)
        nn.init.ones_(self.landmark_scale)
        nn.init.zeros_(self.landmark_offset)

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """What landmarks are made of, and the filters of the convolution, where there is one."""
        landmarks = (self.landmark_weight, self.landmark_scale, self.landmark_offset)
        return (landmarks, self.value_filters) if self.value_conv else (landmarks,)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return dict(self.own)
