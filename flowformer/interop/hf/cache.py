"""The state of a model as a layer of a cache of transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from flowformer.models.decoder import LanguageState


class FlowformerCacheLayer(CacheLayerMixin):
    """The state of one attention, of constant size where the mechanism's is.

    ``DynamicCache(config=config)`` makes a cache of such layers for a :class:`FlowformerConfig`. Keys and values are
    not kept, and tokens cannot be taken back, which generation with an assistant would need.

    Attributes:
        state: The attention's state; None before the first token.
        length: Real tokens so far, (batch,), int64; None before the first.
        seen: Tokens so far, padding included.
    """

    # transformers finds the class by this name, and FlowformerConfig.layer_types gives it.
    _layer_type = "flowformer"
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reset()

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token."""
        return -1 if self.length is None else self.length.shape[0]

    def store(self, state: Any, length: Tensor, tokens: int) -> None:
        """Keep the state after ``tokens`` more, padding included, ``length`` (batch,) real ones in all."""
        self.state, self.length, self.seen = state, length, self.seen + tokens

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: there is no end."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of a mask for ``query_length`` more tokens, and its first token."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self.state: Any = None
        self.length: Tensor | None = None
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._map(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row, ``repeats`` times in a row."""
        self._map(lambda part: part.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``: numbers, or booleans for all rows."""
        self._map(lambda part: part[indices.to(part.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to remove tokens.

        Raises:
            ValueError: when asked to.
        """
        if tokens_to_remove:
            raise ValueError(
                f"a state cannot go back, by {tokens_to_remove} tokens: copy the cache before it is updated"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> NoReturn:
        """Refused: there are no keys and values to keep. A model calls :meth:`store`."""
        raise TypeError("a cache of a Flowformer holds states, not keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, as :meth:`lazy_initialization` is."""
        self.lazy_initialization(key_states, value_states)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.length is not None:
            self.length = change(self.length)
            # The states of all mechanisms are named tuples of tensors, each with the batch first.
            self.state = type(self.state)(*map(change, self.state))


def read_cache(cache: Cache | None, num_layers: int, batch: int) -> LanguageState | None:
    """The state that a cache holds; None for no cache, or an empty one.

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
        raise ValueError(f"the cache is of {length.shape[0]} rows, and the input of {batch}")
    return LanguageState(length, tuple(layer.state for layer in layers))


def write_cache(cache: Cache, state: LanguageState, tokens: int) -> None:
    """Keep the state after ``tokens`` more (padding included) in a cache that :func:`read_cache` took."""
    for layer, part in zip(_layers(cache), state.layers, strict=True):
        layer.store(part, state.length, tokens)


def _layers(cache: Cache) -> list[FlowformerCacheLayer]:
    """The layers of a cache that are of a Flowformer."""
    layers = cache.layers if isinstance(cache, Cache) else []
    return [layer for layer in layers if isinstance(layer, FlowformerCacheLayer)]
