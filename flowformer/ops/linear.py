"""Linear attention, and the chunked scan that every causal linear mechanism shares.

The Linear Transformer (Katharopoulos et al., 2020, "Transformers are RNNs") replaces exp(q . k) by phi(q) . phi(k)
with phi(x) = elu(x) + 1, so that a sum over keys becomes a K x V matrix:

    out_i = phi(q_i) . sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps)

Causal attention restricts j to j <= i. Computed token by token it is a recurrence over the K x V matrix; computed for
all tokens at once with cumulative sums it needs L such matrices. The scan here takes a middle way: within a chunk the
tokens meet in a chunk x chunk product, and only one matrix per chunk carries the past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.ops import backend as _backend
from flowformer.ops.masking import (
    HEADS,
    Layout,
    Masks,
    check,
    check_dtype,
    check_state,
    check_state_use,
    check_step,
    fill,
    no_autocast,
    run_packed,
    state_dtype,
    sum_dtype,
    without_autocast,
)

CHUNK = 64  # tokens that meet directly; 64 is fastest in PyTorch on a CPU
BLOCK = 512  # tokens whose intermediate values exist at a time; backward recomputes block by block
RUN = 128  # tokens summed by one matrix product

Step = Callable[[Sequence[Any], Any], tuple[Tensor, Any]]


# ---------------------------------------------------------------------------------------------------- the shared scan


def scan(step: Step, tokens: Sequence[Tensor | None], state: Any, *, block: int = BLOCK) -> tuple[Tensor, Any]:
    """Run a causal recurrence over blocks of tokens, in memory linear in length, forward and backward.

    Autograd sees one node: it keeps the inputs and the state before each block, and recomputes a block when it comes to
    differentiate it. Gradients of gradients are refused. While a graph is traced (compile, export), under torch.func
    and under forward-mode differentiation, the blocks are plain operations.

    Args:
        step: ``step(tokens of a block, state) -> (output of the block, state after it)``, pure.
        tokens: Tensors (batch, L, ...), or ``None``.
        state: A NamedTuple of tensors; integer ones take no gradient.
        block: Tokens in a block.

    Returns:
        Output (batch, L, ...) and the state after the last token.
    """
    if torch.compiler.is_compiling() or _backend.is_transformed():
        pieces = []
        for start in range(0, _length(tokens), block):
            piece, state = step(_cut(tokens, start, block), state)
            pieces.append(piece)
        return torch.cat(pieces, 1), state
    tensors = [t for t in (*tokens, *state) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        layout = _Layout(step, block, [t is not None for t in tokens], type(state))
        out, *parts = _Scan.apply(layout, *tensors)
        return out, type(state)(*parts)
    return _run(step, tokens, state, block)


def _run(
    step: Step, tokens: Sequence[Tensor | None], state: Any, block: int, starts: list[Any] | None = None
) -> tuple[Tensor, Any]:
    """The output, and the state after the last token; the states before each block are added to ``starts``."""
    length, out = _length(tokens), None
    for start in range(0, length, block):
        if starts is not None:
            starts.append(state)
        piece, state = step(_cut(tokens, start, block), state)
        if out is None:
            out = piece.new_empty(piece.shape[0], length, *piece.shape[2:])
        out[:, start : start + block] = piece
    assert out is not None  # there is at least one token
    return out, state


class _Layout(NamedTuple):
    """What a flat list of tensors means to :class:`_Scan`."""

    step: Step
    block: int
    given: list[bool]  # which tokens are tensors, which None
    state_type: Any

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor | None], Any]:
        rest = iter(tensors)
        tokens = [next(rest) if given else None for given in self.given]
        return tokens, self.state_type(*rest)


def _length(tokens: Sequence[Tensor | None]) -> int:
    return next(t.shape[1] for t in tokens if t is not None)


def _cut(tokens: Sequence[Tensor | None], start: int, block: int) -> list[Tensor | None]:
    return [t if t is None else t[:, start : start + block] for t in tokens]


class _Scan(torch.autograd.Function):
    """The scan as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, layout: _Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        tokens, first = layout.split(tensors)
        starts: list[Any] = []
        out, last = _run(layout.step, tokens, first, layout.block, starts)
        ctx.layout, ctx.blocks = layout, len(starts)
        ctx.save_for_backward(*tensors, *(part for state in starts[1:] for part in state))
        ctx.mark_non_differentiable(*(part for part in last if not part.is_floating_point()))
        return out, *last

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # once_differentiable would drop them in silence where grads_out is a constant.
            raise RuntimeError("a causal operation has no gradients of gradients: leave out create_graph=True")
        grad_out, *grad_state = grads_out
        layout, count = ctx.layout, sum(ctx.layout.given)
        saved = ctx.saved_tensors
        tokens, first = saved[:count], saved[count : count + len(grad_state)]
        later = saved[count + len(grad_state) :]
        wanted = ctx.needs_input_grad[1 : 1 + count]
        grads = [torch.empty_like(t) if want else None for t, want in zip(tokens, wanted, strict=True)]
        carried = [g for g, part in zip(grad_state, first, strict=True) if part.is_floating_point()]
        for index in reversed(range(ctx.blocks)):
            start = index * layout.block
            state = first if index == 0 else later[(index - 1) * len(first) : index * len(first)]
            window = slice(start, start + layout.block)
            pieces = [t[:, window].detach().requires_grad_(w) for t, w in zip(tokens, wanted, strict=True)]
            state = [part.detach().requires_grad_(part.is_floating_point()) for part in state]
            with torch.enable_grad():
                out, after = layout.step(*layout.split([*pieces, *state]))
            outputs = [out, *(part for part in after if part.requires_grad)]
            flowing = [g for g, part in zip(carried, _floating(after), strict=True) if part.requires_grad]
            leaves = [t for t in (*pieces, *state) if t.requires_grad]
            results = list(torch.autograd.grad(outputs, leaves, [grad_out[:, window], *flowing], allow_unused=True))
            results = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, results, strict=True)]
            carried = results[sum(wanted) :]
            for grad in grads:
                if grad is not None:
                    grad[:, window] = results.pop(0)
        of_state = iter(carried)
        return None, *grads, *(next(of_state) if part.is_floating_point() else None for part in first)


def _floating(state: Sequence[Tensor]) -> list[Tensor]:
    return [part for part in state if part.is_floating_point()]


def split_chunks(x: Tensor, chunk: int) -> Tensor:
    """(batch, length, heads, channels) to (batch, heads, chunks, chunk, channels); length is a multiple of chunk."""
    batch, length, heads, channels = x.shape
    return x.view(batch, length // chunk, chunk, heads, channels).permute(0, 3, 1, 2, 4).contiguous()


def join_chunks(x: Tensor, length: int) -> Tensor:
    """(batch, heads, chunks, chunk, channels) to (batch, length, heads, channels); what is longer is dropped."""
    batch, heads, chunks, chunk, channels = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(batch, chunks * chunk, heads, channels)[:, :length]


def pad_to_chunks(tokens: Sequence[Tensor], mask: Tensor | None, chunk: int) -> tuple[list[Tensor], Tensor | None]:
    """Lengthen (batch, length, ...) tensors with masked zeros to a multiple of ``chunk``."""
    batch, length = tokens[0].shape[:2]
    missing = -length % chunk
    if not missing:
        return list(tokens), mask
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=tokens[0].device)
    longer = [torch.cat([t, t.new_zeros(batch, missing, *t.shape[2:])], 1) for t in tokens]
    return longer, torch.nn.functional.pad(mask, (0, missing))


def carry(sums: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """Sums before each chunk, and after the last.

    Args:
        sums: One sum per chunk, (batch, heads, chunks, ...).
        past: The sum of all before, (batch, heads, ...), in the dtype of states.

    Returns:
        Sum before each chunk, shape and dtype of ``sums``; sum after the last chunk, shape and dtype of ``past``.
    """
    running = sums.cumsum(2)
    before = torch.cat([torch.zeros_like(running[:, :, :1]), running[:, :, :-1]], 2) + past.to(sums.dtype).unsqueeze(2)
    return before, past + running[:, :, -1].to(past.dtype)


def causal_product(scores: Tensor, Q: Tensor, K: Tensor, V: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """sum_{j <= i} (Q_i . K_j) V_j over chunks.

    Args:
        scores: Q K^T within each chunk, lower triangle, (batch, heads, chunks, chunk, chunk).
        Q: (batch, heads, chunks, chunk, K).
        K: (batch, heads, chunks, chunk, K).
        V: (batch, heads, chunks, chunk, V).
        memory: sum of K_j V_j^T over the past, (batch, heads, K, V).

    Returns:
        The products (batch, heads, chunks, chunk, V) and the memory after the last chunk.
    """
    before, memory = carry(K.transpose(-1, -2) @ V, memory)
    return scores @ V + Q @ before, memory


# ------------------------------------------------------------------------------------- what linear operations share


def attend(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    key_padding_mask: Tensor | None,
    query_padding_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Any,
    return_state: bool,
    backend: str,
    init_state: Callable[..., Any],
    block: Step,
    whole: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor],
    native: Callable[[Masks, Any], tuple[Tensor, Any]] | None = None,
    layout: Layout = HEADS,
) -> Any:
    """Check once, choose once, and run an operation of linear cost: by the scan if causal, else whole.

    Args:
        op: Name of the operation, for messages.
        q: Like all that follow up to ``backend``, as the operation takes it.
        k: Keys.
        v: Values.
        causal: Which form.
        key_padding_mask: Padding of keys.
        query_padding_mask: Padding of queries.
        cu_seqlens: Packing.
        initial_state: State before the first token.
        return_state: Whether to return the last.
        backend: Implementation.
        init_state: The state before the first token, for (batch, heads, K, V).
        block: The causal form on a block of tokens (q, k, v, mask): see :func:`scan`.
        whole: The bidirectional form on q, k, v, mask of keys, mask of queries.
        native: Either form by native kernels, for masks and the state before the first token (``None``: a fresh one).
        layout: Whether the bidirectional form is self-attention too.

    Returns:
        The output, or the output and the state.
    """
    masks = check(
        op, q, k, v, layout=layout, causal=causal, key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask, cu_seqlens=cu_seqlens,
    )  # fmt: skip
    chosen = _backend.choose(op, backend, q)
    check_state_use(op, causal, initial_state, return_state)
    state = None
    if causal:
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        sizes = (sequences, q.shape[2], q.shape[3], v.shape[3])
        if initial_state is not None:
            check_state(op, initial_state, init_state(*sizes, device=q.device))
            state = initial_state
        elif chosen == "torch":
            state = init_state(*sizes, device=q.device)

    def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        if causal:
            return scan(block, (q, k, v, mask), state)
        return whole(q, k, v, mask, mask if cu_seqlens is not None else masks.query), None

    if chosen == "native":
        assert native is not None  # else it would not have been chosen
        out, state = native(masks, state)
    elif cu_seqlens is None:
        out, state = dense(q, k, v, masks.key, state)
    else:
        out, state = run_packed(dense, (q, k, v), cu_seqlens, state)
    return (out, state) if return_state else out


# ---------------------------------------------------------------------------------------------------- sums over tokens


def sum_over_tokens(A: Tensor, B: Tensor) -> Tensor:
    """A^T B for A (..., tokens, a) and B (..., tokens, b), a sum over tokens in runs, which are then added up.

    In float32 a matrix product over 300,000 like tokens may be wrong by 3e-3; torch.sum, which adds pairwise, is not.
    """
    whole = A.shape[-2] - A.shape[-2] % RUN
    if whole == 0 or torch.compiler.is_compiling():
        return A.transpose(-1, -2) @ B
    (A, last_A), (B, last_B) = (x.split([whole, x.shape[-2] - whole], -2) for x in (A, B))
    A, B = (x.unflatten(-2, (-1, RUN)) for x in (A, B))
    return (A.transpose(-1, -2) @ B).sum(-3) + last_A.transpose(-1, -2) @ last_B


class _TimesSum(torch.autograd.Function):
    """A M as one node of the graph, for the sake of its backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, M: Tensor) -> Tensor:
        return A @ M

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor, Tensor]:
        (A, M), (grad,) = ctx.saved_tensors, grads_out
        return grad @ M.transpose(-1, -2), sum_over_tokens(A, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (A, M), (of_A, of_M) = ctx.saved_tensors, tangents
        return of_A @ M + A @ of_M


def times_sum(A: Tensor, M: Tensor) -> Tensor:
    """A M for A (..., tokens, a) and M (..., a, b), a sum over tokens, as is its gradient: taken in runs too."""
    return A @ M if torch.compiler.is_compiling() else _TimesSum.apply(A, M)


# --------------------------------------------------------------------------------------------------- linear attention


class LinearState(NamedTuple):
    """What causal linear attention remembers of the past.

    Attributes:
        key_sum: sum phi(k), (batch, heads, K).
        memory: sum phi(k) v^T, (batch, heads, K, V).
    """

    key_sum: Tensor
    memory: Tensor


def init_linear_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> LinearState:
    """The state before the first token, for inputs of ``dtype``; sums are kept in float64 whatever it is."""
    check_dtype("init_linear_state", dtype)
    device = torch.device("cpu") if device is None else torch.device(device)
    zeros = {"dtype": state_dtype(device), "device": device}
    return LinearState(
        torch.zeros(batch, heads, key_channels, **zeros),
        torch.zeros(batch, heads, key_channels, value_channels, **zeros),
    )


def elu_plus_one(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, written as exp(min(x, 0)) + max(x, 0) so that small values keep their digits."""
    return x.clamp(max=0).exp() + x.relu()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, LinearState]:
    """Attention of the Linear Transformer (Katharopoulos et al., 2020), feature map elu + 1.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        causal: Output t sees positions up to t only. Wants L == S.
        key_padding_mask: (batch, S) boolean, True = real token. With L == S it says the queries' padding too.
        query_padding_mask: (batch, L) boolean, for cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.
        eps: Added to the denominator.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    return attend(
        "linear_attention", q, k, v, causal=causal, key_padding_mask=key_padding_mask,
        query_padding_mask=query_padding_mask, cu_seqlens=cu_seqlens, initial_state=initial_state,
        return_state=return_state, backend=backend, init_state=init_linear_state,
        block=lambda tokens, state: _causal_block(tokens, state, eps, CHUNK),
        whole=lambda q, k, v, key_mask, query_mask: _bidirectional(q, k, v, key_mask, query_mask, eps),
    )  # fmt: skip


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, eps: float
) -> Tensor:
    compute = sum_dtype(q.dtype)
    with no_autocast(q.device):
        Q = fill(elu_plus_one(fill(q, query_mask).to(compute)), query_mask).transpose(1, 2)
        K = fill(elu_plus_one(fill(k, key_mask).to(compute)), key_mask).transpose(1, 2)
        V = fill(v, key_mask).to(compute).transpose(1, 2)
        total = times_sum(Q, K.sum(-2).unsqueeze(-1)) + eps
        out = times_sum(Q, sum_over_tokens(K, V)) / total
        return out.transpose(1, 2).to(q.dtype).contiguous()


def _causal_block(tokens: Sequence[Any], state: LinearState, eps: float, chunk: int) -> tuple[Tensor, Any]:
    q, k, v, mask = tokens
    compute, length = sum_dtype(q.dtype), q.shape[1]
    with no_autocast(q.device):
        (q, k, v), mask = pad_to_chunks((q, k, v), mask, chunk)
        Q = split_chunks(fill(elu_plus_one(fill(q, mask).to(compute)), mask), chunk)
        K = split_chunks(fill(elu_plus_one(fill(k, mask).to(compute)), mask), chunk)
        V = split_chunks(fill(v, mask).to(compute), chunk)
        scores = (Q @ K.transpose(-1, -2)).tril()
        key_before, key_sum = carry(K.sum(-2), state.key_sum)
        total = scores.sum(-1, keepdim=True) + Q @ key_before.unsqueeze(-1) + eps
        product, memory = causal_product(scores, Q, K, V, state.memory)
        return join_chunks(product / total, length).to(v.dtype), LinearState(key_sum, memory)


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState, *, eps: float = 1e-6
) -> tuple[Tensor, LinearState]:
    """One token of causal linear attention.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        eps: Added to the denominator.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for input that is not as said above.
    """
    op = "linear_attention_step"
    check_step(op, q, k, v, state, LinearState)
    batch, heads, channels = q.shape
    check_state(op, state, init_linear_state(batch, heads, channels, v.shape[-1], device=q.device))
    with no_autocast(q.device):
        compute = state.memory.dtype
        Q, K, V = elu_plus_one(q.to(compute)), elu_plus_one(k.to(compute)), v.to(compute)
        key_sum = state.key_sum + K
        memory = state.memory + K.unsqueeze(-1) * V.unsqueeze(-2)
        total = (Q * key_sum).sum(-1, keepdim=True) + eps
        out = (Q.unsqueeze(-2) @ memory).squeeze(-2) / total
        return out.to(v.dtype), LinearState(key_sum, memory)
