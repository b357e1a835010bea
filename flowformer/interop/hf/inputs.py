"""What models of transformers are given: sizes, masks, packed batches, and keywords that transformers adds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from flowformer.core.checks import describe
from flowformer.models.decoder import LanguageState, check_token_ids, find_targets
from flowformer.models.positions import count_positions

# What Trainer and generate pass to every model, and the models of transformers ignore.
_PASSED_ON = {*TransformersKwargs.__optional_keys__, "tokenizer", "assistant_tokenizer", "assistant_model"}
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")


class Packing(NamedTuple):
    """Sequences that follow each other without padding.

    Attributes:
        starts: (batch, length) boolean, True = the first token of a sequence.
        positions: (1, total) positions of the real tokens within their sequences, int64.
        cu_seqlens: (sequences + 1,) boundaries, int32.
        tokens: (total,) numbers of the real tokens in the flattened batch; None where all are.
    """

    starts: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    tokens: Tensor | None


def check_keywords(keywords: Mapping[str, Any]) -> None:
    """Accept the keywords that transformers passes to its own models, and refuse others.

    Raises:
        TypeError: for another keyword.
        ValueError: for a value that asks for what a Flowformer does not have.
    """
    kinds = keywords.get("token_type_ids")
    unknown = [name for name in keywords if name not in _PASSED_ON and (name != "token_type_ids" or kinds is None)]
    if unknown := [name for name in unknown if keywords[name] is not None]:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown[0]!r}")
    if keywords.get("is_causal") is False:
        raise ValueError("is_causal=False is not supported: a Flowformer is a causal model")
    if kinds is not None and (torch.compiler.is_compiling() or kinds.any()):
        raise ValueError("token_type_ids must be zeros, or absent: a Flowformer has no token types")


def read_packing(
    position_ids: Tensor | None,
    keywords: Mapping[str, Any],
    sizes: tuple[int, int],
    real: Tensor | None,
    before: LanguageState | None = None,
) -> Packing | None:
    """Find the sequences of a packed batch: one that has ``cu_seq_lens_q``, ``seq_idx``, or positions that restart.

    Args:
        position_ids: (batch, length) or (1, length). They count the real tokens of each sequence from 0.
        keywords: ``cu_seq_lens_q`` and ``cu_seq_lens_k``, boundaries (sequences + 1,) in a batch of size 1; ``seq_idx``
            (batch, length), the number of each token's sequence.
        sizes: (batch, length).
        real: (batch, length) boolean, True = a real token; None where all are.
        before: The state after the tokens before these.

    Returns:
        The sequences; None where each row is one.

    Raises:
        ValueError, TypeError: for boundaries and positions that do not fit the input, or each other.
    """
    position_ids = _read_positions("position_ids", position_ids, sizes)
    numbers = _read_positions("seq_idx", keywords.get("seq_idx"), sizes)
    bounds = _read_boundaries(keywords, sizes, real)
    compiling = torch.compiler.is_compiling()
    if bounds is not None:
        packing = _pack_boundaries(bounds, sizes[1])
    elif position_ids is None and numbers is None:
        return None
    elif compiling:
        raise ValueError("position_ids and seq_idx cannot be read while a graph is traced: pass cu_seq_lens_q as well")
    else:
        packing = _pack_starts(cast("Tensor", find_starts(position_ids, keywords, sizes)), real)
    alone = bounds is None and bool((packing.starts.sum(1) <= 1).all())
    if position_ids is not None and not compiling:
        _check_positions(position_ids, packing, real, before if alone else None)
    if alone:
        return None
    if before is not None:
        raise ValueError("packed sequences are not supported after a cache: they begin with their first token")
    return packing


def find_starts(position_ids: Tensor | None, keywords: Mapping[str, Any], sizes: tuple[int, int]) -> Tensor | None:
    """Where sequences of a packed batch begin, (batch, length) boolean, and maybe at padding; None if nothing says so.

    Arguments as in :func:`read_packing`, which checks them.
    """
    bounds = next((keywords[name] for name in _BOUNDARIES if keywords.get(name) is not None), None)
    if bounds is not None:
        return _pack_boundaries(bounds, sizes[1]).starts
    numbers = _read_positions("seq_idx", keywords.get("seq_idx"), sizes)
    if numbers is not None:
        return torch.nn.functional.pad(numbers.diff(dim=1) != 0, (1, 0), value=True)
    positions = _read_positions("position_ids", position_ids, sizes)
    return None if positions is None else positions == 0


def _read_positions(name: str, numbers: Tensor | None, sizes: tuple[int, int]) -> Tensor | None:
    if numbers is None:
        return None
    if not isinstance(numbers, Tensor) or numbers.is_floating_point() or numbers.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {describe(numbers)}")
    if numbers.shape not in (sizes, (1, sizes[1])):
        raise ValueError(f"{name} must be {sizes} or {(1, sizes[1])}, got {describe(numbers)}")
    return numbers.expand(sizes)


def _read_boundaries(keywords: Mapping[str, Any], sizes: tuple[int, int], real: Tensor | None) -> Tensor | None:
    """The boundaries that transformers names after FlashAttention's arguments, if any."""
    given = {name: keywords[name] for name in _BOUNDARIES if keywords.get(name) is not None}
    if not given:
        return None
    for name, bounds in given.items():
        if not isinstance(bounds, Tensor) or bounds.dtype not in (torch.int32, torch.int64) or bounds.ndim != 1:
            raise TypeError(f"{name} must be the (sequences + 1,) boundaries as integers, got {describe(bounds)}")
    name, bounds = next(iter(given.items()))
    if sizes[0] != 1 or real is not None:
        raise ValueError(f"{name} describes a batch of size 1 without padding, got a batch of size {sizes[0]}"
                         + (" with padding" if real is not None else ""))  # fmt: skip
    if torch.compiler.is_compiling():
        return bounds
    if any(not torch.equal(other, bounds) for other in given.values()):
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must be equal in self-attention")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != sizes[1] or (bounds.diff() < 0).any():
        raise ValueError(f"{name} must rise from 0 to the length {sizes[1]}, got {bounds.tolist()}")
    return bounds


def _pack_boundaries(bounds: Tensor, length: int) -> Packing:
    places = torch.arange(length, device=bounds.device)
    first = bounds[torch.searchsorted(bounds, places.to(bounds.dtype), right=True) - 1]
    positions = (places - first).unsqueeze(0)
    return Packing(positions == 0, positions, bounds.to(torch.int32), None)


def _pack_starts(starts: Tensor, real: Tensor | None) -> Packing:
    """Sequences that begin where ``starts`` (batch, length) is True, and at the first real token of each row."""
    mask = torch.ones_like(starts) if real is None else real
    starts = (starts | (mask.cumsum(1) == 1)) & mask
    tokens = mask.flatten().nonzero().squeeze(-1)
    begins = starts.flatten()[tokens]
    bounds = begins.nonzero().squeeze(-1)
    places = torch.arange(len(tokens), device=starts.device)
    positions = places - bounds[begins.cumsum(0) - 1]
    cu_seqlens = torch.cat((bounds, bounds.new_tensor([len(tokens)]))).to(torch.int32)
    return Packing(starts, positions.unsqueeze(0), cu_seqlens, None if real is None else tokens)


def _check_positions(position_ids: Tensor, packing: Packing, real: Tensor | None, before: LanguageState | None) -> None:
    """Refuse positions other than those that the model counts itself."""
    if before is None:
        given = position_ids.flatten() if real is None else position_ids[real]
        wanted = packing.positions[0]
    else:
        counted = count_positions(position_ids, real, before.length).expand(position_ids.shape)
        given, wanted = (x if real is None else x[real] for x in (position_ids, counted))
    wrong = (given != wanted).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"position_ids has {int(given[wrong[0]])} where {int(wanted[wrong[0]])} real tokens come before: it must"
            " count the real tokens of each sequence from 0, and go on after a cache, since a Flowformer attends in the"
            " order of its input"
        )


def read_sizes(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    """(batch, length) of the input, be it tokens or embeddings."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("pass either input_ids or inputs_embeds")
    if input_ids is not None:
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids must be a tensor of integers, got {describe(input_ids)}")
        check_token_ids("input_ids", input_ids)
        return input_ids.shape[0], input_ids.shape[1]
    embeds = cast("Tensor", inputs_embeds)
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        raise TypeError(f"inputs_embeds must be a tensor of floating-point numbers, got {describe(embeds)}")
    if embeds.ndim != 3 or not embeds.shape[1]:
        raise ValueError(f"inputs_embeds must be (batch, length, dim) with one token or more, got {describe(embeds)}")
    return embeds.shape[0], embeds.shape[1]


def read_mask(
    attention_mask: Tensor | None, batch: int, length: int, seen: int, before: LanguageState | None
) -> Tensor | None:
    """Which of the new tokens are real, (batch, length) boolean; None where all are."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {describe(attention_mask)}")
    if attention_mask.shape not in ((batch, length), (batch, seen + length)):
        so_far = f" or {(batch, seen + length)}" if seen else ""
        raise ValueError(f"attention_mask must be {(batch, length)}{so_far}, got {describe(attention_mask)}")
    mask = attention_mask.bool()
    if torch.compiler.is_compiling():
        return mask[:, -length:]
    if before is None and not torch.equal(mask.to(attention_mask.dtype), attention_mask):
        raise ValueError("attention_mask must contain only 1 (a real token) and 0 (padding); packed sequences are told"
                         " by position_ids or cu_seq_lens_q")  # fmt: skip
    # On the CPU only, for elsewhere it would wait for the device at every token.
    if before is not None and mask.shape[1] > length and mask.device.type == "cpu":
        claimed = mask[:, :-length].sum(-1)
        if not torch.equal(claimed, before.length):
            raise ValueError(
                f"attention_mask marks {claimed.tolist()} of the earlier tokens as real, but the cache"
                f" holds {before.length.tolist()} real tokens"
            )
    mask = mask[:, -length:]
    return None if mask.all() else mask


def countable_labels(
    labels: Tensor, attention_mask: Tensor | None, sizes: tuple[int, int], logits_to_keep: int | Tensor,
    starts: Tensor | None, classes: int,
) -> Tensor:  # fmt: skip
    """Labels, with -100 at padding and where nothing but padding or another sequence comes before."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be a tensor of integers, got {describe(labels)}")
    if labels.shape != sizes:
        raise ValueError(f"labels must be {sizes} like the input, got {describe(labels)}")
    if isinstance(logits_to_keep, Tensor) or logits_to_keep:
        raise ValueError("logits_to_keep is not supported with labels, which need the logits of all positions")
    if starts is not None:
        labels = labels.masked_fill(starts.to(labels.device), -100)
    if attention_mask is not None:
        real = attention_mask[:, -labels.shape[1] :].bool().to(labels.device)
        labels = labels.masked_fill(~find_targets(real), -100)
    # Values are looked at on a CPU only, as those of tokens are.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= classes))]
        if wrong.numel():
            raise ValueError(f"labels must be from 0 to {classes - 1}, or -100, got {int(wrong[0])}")
    return labels


def share_of_labels(given: Tensor, counted: Tensor) -> Tensor:
    """Return which share of the labels that Trainer counts are counted by the model.

    Trainer's ``num_items_in_batch`` is the number of labels other than -100, without the first of each row. It includes
    the first real token of a row that is padded on the left, which the model does not predict from padding.
    """
    ours, theirs = ((labels[:, 1:] != -100).sum() for labels in (counted, given))
    return torch.where(theirs > 0, ours / theirs.clamp(min=1), 1.0)


def last_token(
    input_ids: Tensor | None, attention_mask: Tensor | None, length: int, pad_token_id: int | None
) -> Tensor | None:
    """Where the last real token of each row is, (batch,); None where it is at the end."""
    if attention_mask is not None:
        real = attention_mask[:, -length:].bool()
    elif input_ids is not None and pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        return None
    return (torch.arange(length, device=real.device) * real).argmax(-1)


def refuse_packing(starts: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raise for several sequences in a row, where ``starts`` says where they begin.

    Raises:
        ValueError: if there are.
    """
    if starts is None or torch.compiler.is_compiling():
        return
    if attention_mask is not None:
        starts = starts & attention_mask[:, -starts.shape[1] :].bool()
    if (starts.sum(1) > 1).any():
        raise ValueError("packed sequences are not supported by a classifier, which has one result a row: pad them")
