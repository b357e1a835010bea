"""Sampling options shared by text and image formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowformer.common.fields import option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options, see :func:`flowformer.models.generation.stream_tokens`."""

    temperature: float = option(1.0, "sampling temperature; 0 always selects the most likely token", at_least=0)
    top_k: int | None = option(None, "sample from the K most likely tokens only", at_least=1)
    top_p: float | None = option(
        None, "sample from the most likely tokens with this total probability", above=0, at_most=1
    )
    seed: int | None = option(None, "random seed (default: a different one in each run)", at_least=0, largest=2**32 - 1)

    def as_arguments(self) -> dict[str, Any]:
        """Return the options as arguments of :func:`flowformer.models.generation.stream_tokens`."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
