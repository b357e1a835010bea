"""The step of a language model as one CUDA graph, with its tokens and its state in place.

A step is some hundred small kernels, and launching them takes longer than they run. A graph is launched once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from flowformer.core.precision import dtype_and_device

if TYPE_CHECKING:
    from flowformer.models.decoder import LanguageState
    from flowformer.models.language import LanguageModel

_WARM_UPS = 2  # steps before the capture: libraries allocate and choose kernels in their first calls


class StepGraph:
    """The step of a model, captured once and replayed for every token.

    Args:
        model: The model, on a CUDA device.
        tokens: (batch,) of that device; their values do not matter.
        state: The state before the next token. It is copied, and the copy is advanced in place by every call.
    """

    def __init__(self, model: LanguageModel, tokens: Tensor, state: LanguageState) -> None:
        self._model, self._tokens, self._state = model, tokens.clone(), tree_map_only(Tensor, Tensor.clone, state)
        self._scores = torch.empty(0)
        self._replay = capture(self._advance, lambda: model.step(self._tokens, self._state), tokens.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, vocab_size) after ``tokens`` (batch,). The next call overwrites them."""
        self._tokens.copy_(tokens)
        self._replay()
        return self._scores

    def _advance(self) -> None:
        self._scores, after = self._model.step(self._tokens, self._state)
        pairs = list(zip(_tensors(self._state), _tensors(after), strict=True))
        kept = {old.untyped_storage().data_ptr() for old, _ in pairs}
        # What is a view of the state before must be read before that is overwritten.
        pairs = [(old, new.clone() if new.untyped_storage().data_ptr() in kept else new) for old, new in pairs]
        for old, new in pairs:
            old.copy_(new)


def capture(work: Callable[[], None], warm_up: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Capture work as a CUDA graph, and return what replays it.

    Args:
        work: What to capture; it is not computed in the capture.
        warm_up: The same without what it changes.
        device: Where it runs, which need not be the current one.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay


def check_graph(model: LanguageModel) -> None:
    """Check that the step of a model can be a graph.

    Raises:
        ValueError: for a model that is not on a CUDA device, and for a state that grows.
    """
    device = dtype_and_device(model)["device"]
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True requires a model on a CUDA device, got one on {device}")
    for block in model.decoder.layers:
        row = block.attention.mechanism
        if not row.can("fixed state"):
            raise ValueError(
                f"cuda_graph=True requires a state of fixed size, and {row.name} has none: {row.cannot['fixed state']}"
            )


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
