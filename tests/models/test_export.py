"""Models as exported programs: one for all lengths and batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowformer import create_model

pytestmark = pytest.mark.slow
BATCH = torch.export.Dim("batch", min=1, max=64)
LENGTH = torch.export.Dim("length", min=2, max=64)
SERIES = {"in_chans": 3, "num_classes": 4, "max_length": 64, "dim": 8, "num_heads": 2, "ffn_dim": 8}
LANGUAGE = {"vocab_size": 11, "max_length": 64, "dim": 8, "num_heads": 2, "num_layers": 1}


def check(model: nn.Module, make: Callable[[int, int], Tensor], masked: bool) -> None:
    def arguments(batch: int, length: int) -> tuple[Tensor, ...]:
        mask = torch.arange(length).expand(batch, -1) < torch.randint(1, length + 1, (batch, 1))
        return (make(batch, length), mask) if masked else (make(batch, length),)

    example = arguments(2, 20)
    shapes = tuple({0: BATCH, 1: LENGTH} for _ in example)
    program = torch.export.export(model.eval(), example, dynamic_shapes=shapes).module()
    for batch, length in ((3, 7), (1, 2), (2, 64), (5, 33)):
        given: Any = arguments(batch, length)
        got, want = program(*given), model(*given)
        if masked and got.ndim == 3:  # at padding, logits are undefined
            got, want = got[given[1]], want[given[1]]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_classifiers_of_series(masked: bool) -> None:
    check(create_model("flowformer_timeseries", **SERIES), lambda *sizes: torch.randn(*sizes, 3), masked)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_language_models(positions: str, masked: bool) -> None:
    model = create_model("flowformer_gpt_nano", positions=positions, **LANGUAGE)
    check(model, lambda *sizes: torch.randint(11, sizes), masked)
