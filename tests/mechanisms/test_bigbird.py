"""What is specific to BigBird: random blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from windowed import equals_truth, inputs

from flowformer import BigBirdAttention, ops
from flowformer.mechanisms import find_attention


def numbers(rows: int, random: int, heads: int = 3) -> torch.Tensor:
    return torch.randint(2**20, (heads, rows, random), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("length", [1, 4, 12, 13, 20, 31, 90])
@pytest.mark.parametrize("random", [0, 1, 5])
def test_equals_the_reference_at_any_length(length: int, random: int) -> None:
    # Five random blocks are more than there are at some lengths, and 4 rows fewer than blocks.
    equals_truth("bigbird", inputs(length), numbers(4, random), block=4)


@pytest.mark.parametrize("released", ["huggingface", "huggingface-eval", "lra"])
def test_released_forms_equal_the_reference(released: str) -> None:
    equals_truth("bigbird", inputs(44), numbers(20, 2), block=4, released=released)


def test_blocks_are_drawn_without_repetition_and_for_each_head() -> None:
    row, q = find_attention("bigbird"), torch.zeros(1, 60, 3, 2, dtype=torch.float64)
    seen = ops.bigbird_attention(q, q, torch.eye(60, dtype=q.dtype).view(1, 60, 1, 60).expand(-1, -1, 3, -1),
                                 numbers(50, 3), block=3) > 0  # fmt: skip
    counts = seen[0, 6:-6:3].sum(-1)  # one token of each block
    assert (counts == 3 * (3 + 2 + 3)).all()
    assert not torch.equal(seen[:, :, 0], seen[:, :, 1])
    assert row.cannot["causal"] == "the last block is seen by all tokens"


def test_as_many_random_blocks_as_there_are_is_softmax() -> None:
    tensors = inputs(60)
    want = ops.softmax_attention(*tensors)
    given = [numbers(15, random) for random in (0, 2, 4, 8, 15)]
    errors = [float((ops.bigbird_attention(*tensors, random, block=4) - want).norm()) for random in given]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 < errors[0]


def test_modules_own_their_random_numbers() -> None:
    module = BigBirdAttention(12, 3, block=2, num_random=2, seed=1).bfloat16().double()
    x = torch.randn(2, 40, 12, dtype=torch.float64)
    want = module(x)
    assert torch.equal(module.bfloat16().double().random_blocks, module.random_blocks)
    assert torch.equal(want, module(x))
    other = BigBirdAttention(12, 3, block=2, num_random=2, seed=2)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.random_blocks, module.random_blocks)
    module.redraw(3)
    assert not torch.equal(other.random_blocks, module.random_blocks)
    assert not torch.equal(want, module(x))
    assert BigBirdAttention(12, 3, num_random=0)(x.float()).shape == x.shape


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"block": 0}, ValueError, "block must be positive, got 0"),
        (
            {"released": "hf"},
            ValueError,
            "released must be None or one of huggingface, huggingface-eval, lra, got 'hf'",
        ),
    ],
)
def test_bad_options_are_refused_in_words(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        ops.bigbird_attention(*inputs(6), numbers(4, 2), **options)
    with pytest.raises(kind, match=says):
        BigBirdAttention(12, 3, **options)


@pytest.mark.parametrize(
    ("random_blocks", "kind"),
    [
        (None, TypeError),
        (torch.zeros(3, 4, 2), TypeError),
        (numbers(4, 2, heads=2), ValueError),
        (numbers(0, 2), ValueError),
    ],
)
def test_bad_random_numbers_are_refused_in_words(random_blocks: Any, kind: type[Exception]) -> None:
    with pytest.raises(
        kind, match=r"random_blocks must be a tensor \(heads, rows, random blocks\) of integers, 3 heads"
    ):
        ops.bigbird_attention(*inputs(6), random_blocks)


def test_a_causal_form_is_refused() -> None:
    with pytest.raises(ValueError, match="no causal form, since the last block is seen by all tokens"):
        ops.bigbird_attention(*inputs(6), numbers(4, 2), causal=True)
    with pytest.raises(ValueError, match="num_random must be at least 0, got -1"):
        BigBirdAttention(12, 3, num_random=-1)
