"""Options of how tokens are drawn from a model, which formats of text and of images share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowformer.common.fields import option


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn: see :func:`flowformer.models.generation.stream_tokens`."""

    temperature: float = option(1.0, "what scores are divided by; 0 always takes the likeliest token")
    top_k: int | None = option(None, "choose among so many likeliest tokens only")
    top_p: float | None = option(None, "choose among the likeliest tokens of this probability together")
    seed: int | None = option(None, "seed of the random numbers; another each time if absent")

    def as_arguments(self) -> dict[str, Any]:
        """The options as arguments of :func:`flowformer.models.generation.stream_tokens`."""
        return {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "seed")}
