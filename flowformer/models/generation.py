"""Sampling from language models token by token: :meth:`LanguageModel.generate` and its streaming form.

A prompt is read in pieces, each continuing from the state of the one before, and only its last position is scored.
After that only the state is kept: with flow, linear, mobile and the forms of AFT except AFT-full, the ten-thousandth
token takes the time and memory of the first.
"""

from __future__ import annotations

import reprlib
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from flowformer.core.checks import describe
from flowformer.core.precision import dtype_and_device, state_dtype
from flowformer.core.tracing import may_look
from flowformer.models.decoder import LanguageState
from flowformer.models.positions import LearnedPositions
from flowformer.models.step_graph import StepGraph, check_graph
from flowformer.models.vocabulary.cross_entropy import TOKEN_DTYPES, check_tokens

if TYPE_CHECKING:
    from flowformer.models.language import LanguageModel

CHUNK_SIZE = 4096  # tokens of each prompt read at a time
DONE = -1  # in place of a token, in a row that has ended before
LOOK = 32  # tokens after which a GPU is waited for, to see whether all rows have ended and all scores were finite
DRAWS = 256  # random numbers of each row that are drawn, and moved to the device, at a time
SEEDS = 2**32  # PyTorch's generator on the CPU takes the lower 32 bits of a seed


def stream_tokens(
    model: LanguageModel,
    prompts: Sequence[Tensor | Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Collection[int] | None = None,
    chunk_size: int = CHUNK_SIZE,
    cuda_graph: bool = False,
) -> Iterator[Tensor]:
    """Continue prompts, and yield each token as soon as it is sampled.

    Arguments are checked in the call; the prompts are read when the first token is asked for, and a token is computed
    when it is asked for. The model computes in evaluation mode and without gradients; between tokens it is as the
    caller left it.

    A row gives what its prompt gives alone, up to rounding. Each row has a random generator of its own, seeded with
    ``seed`` plus the number of the row: row 2 samples what its prompt alone samples with ``seed + 2``. Runs that must
    differ therefore need seeds at least as far apart as there are rows. Random numbers are drawn on the CPU, whatever
    the model's device, some hundred at a time, and the global generator is not used.

    Args:
        model: The model.
        prompts: One sequence of tokens for each row, (length,) tensors of integers or sequences of int, each of one
            token or more; lengths may differ. Or a (batch, length) tensor.
        max_new_tokens: The most tokens to choose in each row.
        temperature: Divides the scores. 0 always takes the likeliest token.
        top_k: Choose among the ``top_k`` likeliest tokens only: see :func:`next_probabilities`.
        top_p: Choose among the fewest likeliest tokens that have probability ``top_p`` together.
        seed: Seed of the random numbers, from 0. A fresh one if absent.
        eos_token_id: Token, or tokens, after which a row ends.
        chunk_size: Tokens of each prompt that are read at a time; memory depends on it, the result does not.
        cuda_graph: Whether to capture the step of the model as one CUDA graph, see
            :class:`flowformer.models.step_graph.StepGraph`. Requires a state of fixed size. No GPU has run it yet.

    Returns:
        An iterator of (batch,) int64 tensors on the model's device: the next token of each row, that which ends it
        too; -1 in rows that have ended. It stops after ``max_new_tokens``, or when all rows have ended: on a GPU, which
        is waited for once in 32 tokens only, up to 31 rows of -1 later, and so may an error be.

    Raises:
        TypeError, ValueError: in the call, for invalid arguments, and for more tokens than the model
            has positions; while iterating, for scores that are not finite.

    Example:
        >>> import torch
        >>> import flowformer
        >>> from flowformer.models.generation import stream_tokens
        >>> model = flowformer.create_model("flowformer_gpt_nano", vocab_size=65, max_length=64)
        >>> tokens = list(stream_tokens(model, [[1, 2, 3], [4]], max_new_tokens=5, temperature=0.8, seed=0))
        >>> torch.stack(tokens, 1).shape
        torch.Size([2, 5])
    """
    rows = check_prompts(prompts, model)
    _check_whole("max_new_tokens", max_new_tokens, 1)
    _check_whole("chunk_size", chunk_size, 1)
    _check_sampling(temperature, top_k, top_p)
    eos = _check_eos(eos_token_id, model)
    _check_positions(model, max(map(len, rows)), max_new_tokens)
    if cuda_graph:
        check_graph(model)
    sampler = _Sampler(temperature, top_k, top_p, _make_generators(seed, len(rows)), max_new_tokens)
    return _iterate(model, rows, max_new_tokens, sampler, eos, chunk_size, cuda_graph)


def complete(model: LanguageModel, prompts: Sequence[Tensor | Sequence[int]] | Tensor, **options: Any) -> list[Tensor]:
    """Continue prompts, and return prompts with new tokens: see :meth:`LanguageModel.generate`.

    Args:
        model: The model.
        prompts: As in :func:`stream_tokens`.
        **options: As in :func:`stream_tokens`.
    """
    rows = check_prompts(prompts, model)
    new = torch.stack(list(stream_tokens(model, rows, **options)), 1)
    return [torch.cat((prompt, tokens[tokens != DONE])) for prompt, tokens in zip(rows, new, strict=True)]


def next_probabilities(
    scores: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities of the next token after temperature, top-k and top-p, in this order.

    Args:
        scores: Logits, (..., vocabulary), finite.
        temperature: What scores are divided by; positive.
        top_k: Tokens less likely than the ``top_k``-th have probability 0; those as likely as it stay. A number beyond
            the vocabulary leaves all.
        top_p: Of what is left, the fewest tokens, likeliest first, whose probabilities come to ``top_p`` or more stay.

    Returns:
        (..., vocabulary), float64 where the device has it; each row sums to 1.

    Raises:
        TypeError, ValueError: for invalid options.
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        raise ValueError(
            "temperature must be positive for probabilities, got 0, which always selects the most likely token"
        )
    scores = scores.to(state_dtype(scores.device))
    # Differences first: they are 0 for the likeliest token, and no temperature, however low, makes that infinite.
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        last = scores.topk(top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < last, -torch.inf)
    probabilities = scores.softmax(-1)
    if top_p is None or top_p == 1:
        return probabilities
    ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    enough = ordered.cumsum(-1) - ordered >= top_p
    kept = torch.zeros_like(probabilities).scatter(-1, places, ordered.masked_fill(enough, 0))
    return kept / kept.sum(-1, keepdim=True)


class _Sampler:
    """Chooses a token of each row, with the row's own random numbers; looks at none, which a GPU would be waited for.

    Attributes:
        finite: Whether all scores so far were finite, a boolean tensor.
    """

    def __init__(
        self, temperature: float, top_k: int | None, top_p: float | None, generators: list[torch.Generator], most: int
    ) -> None:
        self._options = (temperature, top_k, top_p)
        self._generators, self._left = generators, most
        self._draws, self._place = torch.empty(0), 0
        self.finite = torch.tensor(True)

    def __call__(self, scores: Tensor) -> Tensor:
        """Tokens (batch,) by scores (batch, vocabulary)."""
        self.finite = self.finite.to(scores.device) & scores.isfinite().all()
        if self._options[0] == 0:
            return scores.argmax(-1)
        sums = next_probabilities(scores, *self._options).cumsum(-1)
        # The first token whose sum exceeds a share below 1 of the whole: never one of probability 0. What NaN leads to
        # is a token all the same, until it is looked at.
        shares = self._draw(sums).unsqueeze(-1) * sums[:, -1:]
        return torch.searchsorted(sums, shares, right=True).squeeze(-1).clamp(max=scores.shape[-1] - 1)

    def _draw(self, like: Tensor) -> Tensor:
        """The next random number of each row, (batch,); moved to the device some hundred at a time."""
        if self._place == len(self._draws):
            count = min(DRAWS, self._left)
            rows = [torch.rand(count, generator=each, dtype=like.dtype) for each in self._generators]
            self._draws, self._place, self._left = torch.stack(rows, 1).to(like.device), 0, self._left - count
        self._place += 1
        return self._draws[self._place - 1]


def _iterate(
    model: LanguageModel,
    rows: list[Tensor],
    max_new_tokens: int,
    sampler: _Sampler,
    eos: Tensor,
    chunk_size: int,
    cuda_graph: bool,
) -> Iterator[Tensor]:
    modules = list(model.modules())
    with _evaluating(modules):
        scores, state = _read(model, rows, chunk_size)
        tokens = sampler(scores)
        step = StepGraph(model, tokens, state) if cuda_graph else _Stepper(model, state)
    done = torch.zeros_like(tokens, dtype=torch.bool)
    for number in range(1, max_new_tokens + 1):
        last = number == max_new_tokens
        look = last or may_look(tokens) or number % LOOK == 0
        if look and not sampler.finite:
            raise ValueError("the model's logits of the next token are not finite")
        # Made out here, a tensor may enter computations with gradients.
        yield tokens.masked_fill(done, DONE)
        if eos.numel():
            done = done | torch.isin(tokens, eos)
        if last or (look and bool(done.all())):
            return
        with _evaluating(modules):
            # Rows that have ended are computed too, so that states keep their shape.
            tokens = sampler(step(tokens))


class _Stepper:
    """The step of a model, and its state."""

    def __init__(self, model: LanguageModel, state: LanguageState) -> None:
        self._model, self._state = model, state

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab_size) after ``tokens`` (batch,)."""
        scores, self._state = self._model.step(tokens, self._state)
        return scores


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards each module is in the mode that it had."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _read(model: LanguageModel, rows: list[Tensor], chunk_size: int) -> tuple[Tensor, LanguageState]:
    """Scores (batch, vocabulary) of the token after each prompt, and the state there."""
    # Padding is on the left, so that all prompts end in the last piece, at its last position.
    tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(tokens.shape[1], 0, -1) <= lengths.unsqueeze(1)
    hidden, state = torch.empty(0), None
    for piece, mask in zip(tokens.split(chunk_size, 1), real.split(chunk_size, 1), strict=True):
        mask = None if mask.all() else mask.to(piece.device)
        hidden, state = model.hidden(piece, mask, initial_state=state, return_state=True)
    assert state is not None  # no prompt is empty
    return model.logits(hidden[:, -1]), state


def _make_generators(seed: int | None, rows: int) -> list[torch.Generator]:
    if seed is None:
        seed = secrets.randbelow(SEEDS - rows)
    _check_whole("seed", seed, 0)
    if seed + rows > SEEDS:
        raise ValueError(f"seed must be at most {SEEDS - rows} for {rows} rows, got {seed}")
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]


def check_prompts(prompts: Sequence[Tensor | Sequence[int]] | Tensor, model: LanguageModel) -> list[Tensor]:
    """Check prompts, and return them as (length,) int64 tensors on the model's device.

    Raises:
        TypeError, ValueError: for what is no prompt, an empty one, or a token beyond the vocabulary.
    """
    if not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        raise TypeError(f"prompts must be sequences of tokens, one for each row, got {reprlib.repr(prompts)}")
    if _device(model).type == "meta":
        raise ValueError("the model is on the meta device, where it has no weights: load them first")
    rows = [_check_prompt(number, prompt, model) for number, prompt in enumerate(prompts)]
    if not rows:
        raise ValueError("prompts must contain at least one sequence of tokens, got none")
    return rows


def _check_prompt(number: int, prompt: Any, model: LanguageModel) -> Tensor:
    name = f"prompts[{number}]"
    try:
        tokens = torch.as_tensor(prompt, device=_device(model))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a sequence of tokens, got {reprlib.repr(prompt)}: {error}") from error
    if tokens.ndim != 1:
        hint = "; a single prompt goes in a list" if tokens.ndim == 0 else ""
        raise ValueError(f"{name} must be (length,), got {describe(tokens)}{hint}")
    if not len(tokens):
        raise ValueError(f"{name} is empty: a prompt must have at least one token")
    if tokens.dtype not in TOKEN_DTYPES:
        raise TypeError(f"{name} must be integers, got {describe(tokens)}")
    check_tokens(name, tokens, model.vocab_size)
    return tokens.to(torch.int64)


def _device(model: nn.Module) -> torch.device:
    return dtype_and_device(model)["device"]


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_sampling(temperature: Any, top_k: Any, top_p: Any) -> None:
    for name, value in (("temperature", temperature), ("top_p", 1 if top_p is None else top_p)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None:
        _check_whole("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")


def _check_eos(eos_token_id: int | Collection[int] | None, model: LanguageModel) -> Tensor:
    if eos_token_id is None:
        eos_token_id = ()
    tokens = (eos_token_id,) if isinstance(eos_token_id, int) else eos_token_id
    if isinstance(tokens, Tensor) or not isinstance(tokens, Collection):
        raise TypeError(f"eos_token_id must be an integer or a collection of them, got {describe(tokens)}")
    for token in tokens:
        _check_whole("eos_token_id", token, 0)
    eos = torch.tensor(sorted(tokens), dtype=torch.int64)
    check_tokens("eos_token_id", eos, model.vocab_size)
    return eos.to(device=_device(model))


def _check_positions(model: LanguageModel, longest: int, max_new_tokens: int) -> None:
    """Refuse more tokens than there are learned positions for; the last one chosen is not read."""
    attentions = [block.attention for block in model.decoder.layers]
    bounded = [one for one in attentions if one.learns_positions or one.bounds_causal]
    limits = [cast("int", attention.max_length) for attention in bounded if attention.max_length is not None]
    if isinstance(model.position, LearnedPositions):
        limits.append(model.position.num_embeddings)
    needed = longest + max_new_tokens - 1
    if limits and needed > min(limits):
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens = {max_new_tokens} need {needed} positions (the last"
            f" token is not read), and this model has {min(limits)}"
        )
