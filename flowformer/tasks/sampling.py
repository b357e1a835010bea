"""Sampling options shared by text and image formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowformer.common.fields import option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options, see :func:`flowformer.models.generation.stream_tokens`."""

    temperature: float = option(1.0, "sampling temperature; 0 always selects the most likely token")
    top_k: int | None = option(None, "sample from the K most likely tokens only")
    top_p: float | None = option(None, "sample from the most likely tokens with this total probability")
    seed: int | None = option(None, "random seed (default: a different one in each run)")

    def as_arguments(self) -> dict[str, Any]:
        """Return the options as arguments of :func:`flowformer.models.generation.stream_tokens`."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
