r"""Reformer: attention within buckets of locality-sensitive hashing (Kitaev, Kaiser and Levskaya, ICLR 2020).

A token's query is hashed to the largest of [q R, -q R], R being a random matrix with half as many columns as there are
buckets. Tokens are sorted by bucket and position and cut into chunks; each attends to its own chunk and the one before,
in which the first chunk is preceded by the last of the hash before it. Over several hashes, with C_ij the number of
times that j is seen by i:

    out_i = sum_j C_ij exp(s_ij) v_j / sum_j C_ij exp(s_ij),    s_ij = q_i . k_j / (|k_j| sqrt(K)),   s_ii = -5e4

so that a token attends to itself only where it sees nothing else. Queries and keys are the same vectors in the
published mechanism and in :class:`ReformerAttention`; the operation takes other keys too, and hashes queries.

Chunks of all tokens sorted are not causal: where one ends depends on all tokens, later ones too, and a causal mask of
scores does not change that. The causal form here keeps buckets apart. Each is cut into chunks from its own first token,
and a token attends to the tokens before it in its chunk, and to the chunk before it in the same bucket: what it sees is
a function of the tokens up to itself. ``sees_future=True`` is the published form.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flowformer.core.checks import Layout, check_choice, check_dense, check_flag, check_integer, check_sizes, describe
from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Given, check_inputs, run
from flowformer.core.tracing import is_traced, is_transformed
from flowformer.mechanisms.buckets import cut_apart, pick
from flowformer.mechanisms.past import PastState, check_no_packed_state, fresh, recall

ITSELF = -5e4  # score of a token with itself, of reformer-pytorch; transformers has -1e5, which gives the same weights
RMS_EPS = 1e-6  # of keys in trax and transformers
LAYOUT = Layout(self_only="queries and keys are hashed as one")


class Form(NamedTuple):
    """What published implementations do differently.

    Attributes:
        keys: What keys are divided by: their length, their root mean square, or 1.
        power: Scores are multiplied by K to this power.
        sees_itself: Whether a token attends to itself as to any other.
        by_head: Whether each head has its own rotations.
    """

    keys: str
    power: float
    sees_itself: bool
    by_head: bool


FORMS = {
    "paper": Form("length", -0.5, False, False),  # and reformer-pytorch
    "hf": Form("rms", -0.5, False, True),  # trax and transformers: scores are sqrt(K) times as large
    "lra": Form("none", 0.5, True, False),  # Long Range Arena
}


def reformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotations: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: PastState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    form: str = "paper",
    chunk_length: int = 64,
    chunks_after: int = 0,
    sees_future: bool = False,
) -> Tensor | tuple[Tensor, PastState]:
    """LSH attention of the Reformer (Kitaev et al., 2020), in time and memory linear in length.

    The gradient takes buckets as given. With ``form="lra"`` it is what Long Range Arena released: chunks are of L /
    buckets tokens, zeros that pad the length to the next multiple of ``chunk_length`` take part, scores are multiplied
    by sqrt(K), and the output (batch, heads, length, V) is read as (batch, length, heads, V).

    Args:
        q: Queries (batch, L, heads, K), by which tokens are hashed.
        k: Keys (batch, L, heads, K); in the published mechanism ``q`` itself.
        v: Values (batch, L, heads, V).
        rotations: Random matrices (hashes, K, buckets / 2), or (heads, hashes, K, buckets / 2), normally distributed.
        causal: Output t sees positions up to t only: chunks are cut within buckets.
        mask: (batch, L) boolean, True = real token. Not with ``form="lra"``.
        context_mask: None: there is no cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1. Not with ``form="lra"``.
        initial_state: State to continue from (causal only, without ``sees_future``); batch N for a packed batch.
        return_state: Return the state after the last token as well (likewise).
        backend: ``"auto"`` or ``"torch"``.
        form: ``"paper"`` (and reformer-pytorch), ``"hf"`` (trax and transformers: keys are divided by their root mean
            square) or ``"lra"``.
        chunk_length: Tokens of a chunk.
        chunks_after: Chunks after its own that a token sees, 0 or 1; not in the causal form.
        sees_future: In place of the causal form the published one, in which later tokens move the limits of chunks.

    Returns:
        Output (batch, L, heads, V), zeros at padding; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "reformer_attention"
    check_no_packed_state(op, cu_seqlens, return_state)
    check_options(op, form, chunk_length, chunks_after, sees_future, causal)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    check_inputs(op, given, LAYOUT)
    check_rotations(op, rotations, q)
    if form == "lra" and (mask is not None or cu_seqlens is not None):
        raise ValueError(f"{op}: form 'lra' attends to padding, as released: it must have neither mask nor cu_seqlens")
    if sees_future and (initial_state is not None or return_state):
        raise ValueError(f"{op}: sees_future must be False with a state, since later tokens change earlier outputs")
    options = Options(FORMS[form], chunk_length, chunks_after, sees_future, causal)
    attend = _as_released if form == "lra" else _dense

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Any, query: Tensor | None, state: Any) -> Any:
        decodes = state is not None and state.key.shape[1] > 0 and q.shape[1] == 1
        with no_autocast(q.device):
            of_tokens = functools.partial(_last if decodes else attend, rotations=rotations, options=options)
            return recall(of_tokens, (q, k, v), key, state, return_state)

    return run(op, given, dense, layout=LAYOUT, init_state=fresh(q, v))


class Options(NamedTuple):
    """Checked options."""

    form: Form
    chunk_length: int
    chunks_after: int
    sees_future: bool
    causal: bool


def check_options(
    op: str, form: Any, chunk_length: Any, chunks_after: Any, sees_future: Any, causal: bool = False
) -> None:
    """Raise for an unknown form, a chunk of no token, or options that a form does not have."""
    check_choice(f"{op}: form", form, tuple(FORMS))
    check_sizes(**{f"{op}: chunk_length": chunk_length})
    check_integer(f"{op}: chunks_after", chunks_after)
    check_flag(f"{op}: sees_future", sees_future)
    if chunks_after not in (0, 1) or (chunks_after and form == "lra"):
        raise ValueError(f"{op}: chunks_after must be 0 or 1, and 0 with form 'lra', got {chunks_after}")
    if causal and form == "lra":
        raise ValueError(f"{op}: form 'lra' has no causal form: causal must be False, got True")
    if causal and chunks_after and not sees_future:
        raise ValueError(f"{op}: chunks_after must be 0 in the causal form, got {chunks_after}")


def check_rotations(op: str, rotations: Any, q: Tensor) -> None:
    """Raise unless rotations are of the queries' channels and heads, on their device."""
    check_dense(f"{op}: rotations", rotations)
    heads, channels = q.shape[2:]
    wanted = f"(hashes, {channels}, buckets / 2) or ({heads}, hashes, {channels}, buckets / 2) on {q.device}"
    fits = isinstance(rotations, Tensor) and rotations.ndim in (3, 4) and rotations.is_floating_point()
    fits = fits and 0 not in rotations.shape and rotations.shape[-2] == channels and rotations.device == q.device
    if not fits or rotations.shape[:-3] not in ((), (heads,)):
        raise (ValueError if isinstance(rotations, Tensor) else TypeError)(
            f"{op}: rotations must be {wanted}, got {describe(rotations)}"
        )


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rotations: Tensor, options: Options) -> Tensor:
    """Outputs of a padded batch."""
    dtype, compute = q.dtype, sum_dtype(q.dtype)
    options = options._replace(chunk_length=min(options.chunk_length, q.shape[1]))  # a longer one holds no more
    q, k, v = (fill(x, mask).transpose(1, 2) for x in (q, k, v))
    buckets = hash_tokens(q, rotations)
    count = 2 * rotations.shape[-1]
    if mask is not None:  # padding comes last
        buckets = [bucket.masked_fill(~mask.unsqueeze(1), count) for bucket in buckets]
    if options.causal and not options.sees_future:
        plans = [_plan_apart(bucket, options.chunk_length, count) for bucket in buckets]
    else:
        plans = _plan_sorted(buckets, options, count)
    q, k, v = q.to(compute), _keys(k.to(compute), options.form), v.to(compute)
    outs, totals = zip(*(_recomputed(q, k, v, plan, options) for plan in plans), strict=True)
    shares = torch.stack(totals).softmax(0).unsqueeze(-1)
    out = sum(share * one for share, one in zip(shares, outs, strict=True))
    return fill(torch.as_tensor(out).transpose(1, 2).to(dtype), mask)


def _last(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rotations: Tensor, options: Options) -> Tensor:
    """Output (batch, 1, heads, V) of the last token in the causal form, from weights of all before it."""
    dtype, compute = q.dtype, sum_dtype(q.dtype)
    q, k, v = (fill(x, mask).transpose(1, 2) for x in (q, k, v))
    real = torch.ones(k.shape[0], 1, k.shape[2], dtype=torch.bool, device=k.device) if mask is None else mask[:, None]
    seen = torch.zeros(k.shape[:3], dtype=compute, device=k.device)
    for bucket in hash_tokens(q, rotations):
        same = (bucket == bucket[..., -1:]) & real
        chunk = (same.cumsum(-1) - 1).clamp(min=0) // options.chunk_length
        seen += same & (chunk >= chunk[..., -1:] - 1)
    scores = (q[:, :, -1:].to(compute) @ _keys(k.to(compute), options.form).transpose(-1, -2)).squeeze(-2)
    if not options.form.sees_itself:
        itself = torch.arange(k.shape[2], device=k.device) == k.shape[2] - 1
        scores = scores.masked_fill(itself, ITSELF)
    scores = (scores + seen.clamp(min=1).log()).masked_fill(seen == 0, torch.finfo(compute).min)
    out = scores.softmax(-1).unsqueeze(-2) @ v.to(compute)
    return fill(out.transpose(1, 2).to(dtype), None if mask is None else mask[:, -1:])


def _as_released(q: Tensor, k: Tensor, v: Tensor, mask: None, rotations: Tensor, options: Options) -> Tensor:
    """Outputs as Long Range Arena has them."""
    length, buckets = q.shape[1], 2 * rotations.shape[-1]
    width = (length // options.chunk_length + 1) * options.chunk_length  # a whole chunk more where it divides
    if width % buckets:
        raise ValueError(
            f"reformer_attention: form 'lra' divides the padded length by the buckets: it must be a multiple of "
            f"{buckets}, got {width}"
        )
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, width - length)) for x in (q, k, v))
    out = _dense(q, k, v, None, rotations, options._replace(chunk_length=width // buckets))
    return out.transpose(1, 2).reshape(out.shape)[:, :length]


def hash_tokens(x: Tensor, rotations: Tensor) -> list[Tensor]:
    """Return the buckets (batch, heads, length) of vectors (batch, heads, length, K), one tensor for each hash.

    In float64, so that vectors of any dtype have the same buckets as their exact copies.
    """
    wide = state_dtype(x.device)
    x, rotations = x.detach().to(wide), rotations.detach().to(wide)
    if rotations.ndim == 3:
        rotations = rotations.unsqueeze(0)
    rotated = (x @ rotation for rotation in rotations.unbind(1))
    return [torch.cat([one, -one], -1).argmax(-1) for one in rotated]


def _keys(k: Tensor, form: Form) -> Tensor:
    """Keys, divided and scaled."""
    if form.keys == "length":
        size = k.norm(dim=-1, keepdim=True)
        k = k / size.masked_fill(size == 0, torch.inf)  # a key of zeros has no direction, nor a gradient
    elif form.keys == "rms":
        k = k * torch.rsqrt(k.square().mean(-1, keepdim=True) + RMS_EPS)
    return k * k.shape[-1] ** form.power


# ---------------------------------------------------------------------------------------------- which tokens meet


class Plan(NamedTuple):
    """Chunks of one hash: places of tokens, and the length of the sequence where there is none.

    Attributes:
        own: (batch, heads, chunks, chunk length).
        context: What each chunk sees, (batch, heads, chunks, more).
        slots: Where each token is among the slots of all chunks, (batch, heads, length).
    """

    own: Tensor
    context: Tensor
    slots: Tensor


def _plan_sorted(buckets: Sequence[Tensor], options: Options, count: int) -> list[Plan]:
    """Chunks of all tokens sorted by bucket; ``count`` is the bucket of padding."""
    length, chunk = buckets[0].shape[-1], options.chunk_length
    chunks = -(-length // chunk)
    orders = [bucket.sort(stable=True).indices for bucket in buckets]
    sorted_places, slots = [], []
    for bucket, order in zip(buckets, orders, strict=True):
        place = torch.arange(length, device=order.device).expand_as(order)
        slots.append(torch.zeros_like(order).scatter(-1, order, place))
        order = order.masked_fill(bucket.gather(-1, order) == count, length)
        order = torch.nn.functional.pad(order, (0, chunks * chunk - length), value=length)
        sorted_places.append(order.unflatten(-1, (chunks, chunk)))
    real = (buckets[0] < count).sum(-1, keepdim=True)
    last = ((real - 1) // chunk).clamp(min=0)  # the chunk of the last real token, (batch, heads, 1)
    plans = []
    for index, own in enumerate(sorted_places):
        before, after = sorted_places[index - 1], sorted_places[(index + 1) % len(buckets)]
        of_last = before.take_along_dim(last[..., None], 2)
        context = [torch.cat([of_last, own[:, :, :-1]], 2), own]
        if options.chunks_after:
            following = torch.cat([own[:, :, 1:], after[:, :, :1]], 2)
            is_last = (torch.arange(chunks, device=own.device) == last).unsqueeze(-1)
            context.append(torch.where(is_last, after[:, :, :1], following))
        plans.append(Plan(own, torch.cat(context, -1), slots[index]))
    return plans


def _plan_apart(bucket: Tensor, chunk: int, count: int) -> Plan:
    """Chunks within each of ``count`` buckets; a token's place in its chunk depends on the tokens before it only."""
    cut = cut_apart(bucket, chunk, count)
    own = cut.places
    before = torch.cat([own[:, :, :1], own[:, :, :-1]], 2).masked_fill(cut.starts.unsqueeze(-1), bucket.shape[-1])
    return Plan(own, torch.cat([before, own], -1), cut.slots)


# ------------------------------------------------------------------------------------------------- one hash


def _recomputed(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Options) -> tuple[Tensor, Tensor]:
    """As :func:`_attend`, whose products the backward pass computes anew."""
    if is_traced() or is_transformed() or not any(x.requires_grad for x in (q, k, v)):
        return _attend(q, k, v, plan, options)
    out = checkpoint(_attend, q, k, v, plan, options, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, tuple)  # as it returns
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, options: Options) -> tuple[Tensor, Tensor]:
    """Outputs (batch, heads, length, V) of one hash, and logarithms of the sums of weights (batch, heads, length)."""
    length, (own, context, slots) = q.shape[2], plan
    scores = pick(q, own) @ pick(k, context).transpose(-1, -2)
    mine, others = own.unsqueeze(-1), context.unsqueeze(-2)
    if not options.form.sees_itself:
        scores.masked_fill_(mine == others, ITSELF)  # in place, since no gradient needs the products
    hidden = others == length
    if options.causal:
        hidden = hidden | (others > mine)
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    largest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - largest).exp_()
    total = weights.sum(-1, keepdim=True)  # not in a logarithm with -5e4, of which float32 keeps no fraction
    out = (weights @ pick(v, context)) / total
    return pick(out.flatten(2, 3), slots), (largest + total.log()).flatten(2).gather(-1, slots)
