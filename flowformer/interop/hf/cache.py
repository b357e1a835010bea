"""The state of an attention layer as a cache layer of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache, CacheLayerMixin

from flowformer.models.decoder import LanguageState


class FlowformerCacheLayer(CacheLayerMixin):
    """Cache layer that holds the state of one attention module, of constant size if the mechanism's state is.

    ``DynamicCache(config=config)`` makes a cache of such layers for a :class:`FlowformerConfig`. Keys and values are
    not kept. Tokens can be taken back only after ``cache.activate_past_recording()``, which generation calls for the
    cache of an assistant: from then on the state after each call is kept, until a :meth:`crop` below it.

    Attributes:
        state: The attention's state; None before the first token.
        length: Real tokens so far, (batch,), int64; None before the first.
        seen: Tokens so far, padding included.
        record_past: Whether earlier states are kept.
        past: The earlier ones: ``state``, ``length`` and ``seen``.
    """

    # transformers finds the class by this name, and FlowformerConfig.layer_types gives it.
    _layer_type = "flowformer"
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.record_past = False
        self.reset()

    @property
    def is_croppable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] - a property in transformers too
        """Whether :meth:`crop` can take back tokens."""
        return self.record_past

    def activate_past_recording(self) -> None:
        """Keep the state after each call from now on, for :meth:`crop`."""
        self.record_past = True

    @property
    def batch_size(self) -> int:
        """Batch size; -1 before the first token."""
        return -1 if self.length is None else self.length.shape[0]

    def store(self, state: Any, length: Tensor, tokens: int) -> None:
        """Store the state after ``tokens`` more tokens, padding included; ``length`` (batch,) counts all real ones."""
        if self.record_past:
            self.past.append((self.state, self.length, self.seen))
        self.state, self.length, self.seen = state, length, self.seen + tokens

    def get_seq_length(self) -> int:
        """Return the number of tokens so far, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: the length is not limited."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of a mask for ``query_length`` more tokens, and its offset."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Reset to the state before the first token."""
        self.state: Any = None
        self.length: Tensor | None = None
        self.seen = 0
        self.past: list[tuple[Any, Tensor | None, int]] = []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row i by row ``beam_idx[i]``."""
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self._map(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``: row numbers, or one boolean per row."""
        self._map(lambda part: part[indices.to(part.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, to a state that was recorded.

        Args:
            tokens_to_remove: How many, as a negative number, as transformers gives it; 0 changes nothing.

        Raises:
            ValueError: for a state that was not recorded.
        """
        if not tokens_to_remove:
            return
        wanted = self.seen - abs(tokens_to_remove)
        kept = [entry for entry in self.past if entry[2] <= wanted]
        if not kept or kept[-1][2] != wanted:
            raise ValueError(
                f"cannot remove {abs(tokens_to_remove)} tokens from a state: copy the cache before it is updated, or"
                " call its activate_past_recording()"
            )
        self.state, self.length, self.seen = kept[-1]
        self.past = []  # an assistant does not go back further: each round accepts a token

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        """Not supported: the cache holds no keys and values. Models call :meth:`store`."""
        raise TypeError("a cache of a Flowformer holds states, not keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported, like :meth:`lazy_initialization`."""
        self.lazy_initialization(key_states, value_states)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.past = []
        if self.length is not None:
            self.length = change(self.length)
            # States are named tuples of tensors, each with the batch first, or of such tuples.
            self.state = tree_map(change, self.state)


def read_cache(cache: Cache | None, num_layers: int, batch: int) -> LanguageState | None:
    """Return the state in a cache; None if there is no cache or it is empty.

    Raises:
        TypeError: for another kind of cache, or one for another number of layers.
        ValueError: for one of another batch.
    """
    if cache is None:
        return None
    layers = _layers(cache)
    if len(layers) != num_layers:
        raise TypeError(
            f"cache must be one that the model returned, or DynamicCache(config=model.config), of {num_layers} layers;"
            f" got {cache!r}"
        )
    length = layers[0].length
    if length is None:
        return None
    if length.shape[0] != batch:
        raise ValueError(f"the batch size of the cache is {length.shape[0]}, that of the input {batch}")
    return LanguageState(length, tuple(layer.state for layer in layers))


def write_cache(cache: Cache, state: LanguageState, tokens: int) -> None:
    """Store the state after ``tokens`` more tokens (padding included) in a cache that :func:`read_cache` accepted."""
    for layer, part in zip(_layers(cache), state.layers, strict=True):
        layer.store(part, state.length, tokens)


def _layers(cache: Cache) -> list[FlowformerCacheLayer]:
    """The layers of a cache that are of a Flowformer."""
    layers = cache.layers if isinstance(cache, Cache) else []
    return [layer for layer in layers if isinstance(layer, FlowformerCacheLayer)]
