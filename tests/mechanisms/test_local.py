"""What is specific to local attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from windowed import equals_truth, inputs

from flowformer import LocalAttention, ops


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"window": 3, "look_backward": 2, "exact_window": True},
        {"window": 70, "exact_window": True},
        {"window": 20, "look_backward": 0},
        {"window": 5, "look_backward": 3},
        {"window": 8, "released": "local-attention"},
    ],
)
def test_other_windows_equal_the_reference(options: dict[str, Any], causal: bool) -> None:
    equals_truth("local", inputs(150), causal=causal, **options)
    equals_truth("local", inputs(7), causal=causal, **options)


@pytest.mark.parametrize("options", [{"window": 40}, {"window": 41, "exact_window": True}])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_that_reaches_all_is_softmax(options: dict[str, Any], causal: bool) -> None:
    tensors = inputs(40)
    want = ops.softmax_attention(*tensors, causal=causal)
    torch.testing.assert_close(ops.local_attention(*tensors, causal=causal, **options), want, rtol=1e-12, atol=1e-12)


def test_approaches_softmax_as_the_window_grows() -> None:
    tensors = inputs(256)
    want = ops.softmax_attention(*tensors)
    errors = [float((ops.local_attention(*tensors, window=2**n) - want).norm()) for n in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12 < errors[0]


def test_exact_windows_go_on_from_states_and_by_steps() -> None:
    tensors, options = inputs(50), {"window": 3, "look_backward": 2, "exact_window": True}
    want = ops.local_attention(*tensors, causal=True, **options)
    first = [tensor[:, :23] for tensor in tensors]
    outs, state = ops.local_attention(*first, causal=True, return_state=True, **options)
    second = [tensor[:, 23:40] for tensor in tensors]
    more, state = ops.local_attention(*second, causal=True, initial_state=state, return_state=True, **options)
    steps = []
    for at in range(40, 50):
        out, state = ops.local_attention_step(*(tensor[:, at] for tensor in tensors), state, **options)
        steps.append(out)
    torch.testing.assert_close(torch.cat([outs, more, torch.stack(steps, 1)], 1), want, rtol=1e-12, atol=1e-12)
    assert state.key.shape == (2, 6, 3, 4)


def test_second_gradients_are_refused() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in inputs(10))
    with pytest.raises(RuntimeError, match="second-order gradients"):
        torch.autograd.grad(ops.local_attention(q, k, v, window=2).sum(), q, create_graph=True)


def test_zeros_as_keys_are_refused_where_there_is_padding() -> None:
    tensors = inputs(6, batch=1)
    for padding in ({"mask": torch.ones(1, 6, dtype=torch.bool)}, {"cu_seqlens": torch.tensor([0, 2, 6])}):
        with pytest.raises(ValueError, match="takes neither mask nor cu_seqlens"):
            ops.local_attention(*tensors, released="local-attention", **padding)


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"window": 0}, ValueError, "window must be positive, got 0"),
        ({"window": 2.0}, TypeError, "window must be a whole number, got 2.0"),
        ({"look_backward": -1}, ValueError, "look_backward must be at least 0 and at most 2147483647, got -1"),
        ({"look_backward": None}, TypeError, "look_backward must be a whole number, got None"),
        ({"look_forward": -1}, ValueError, "look_forward must be at least 0 and at most 2147483647, got -1"),
        ({"look_forward": 1, "causal": True}, ValueError, "look_forward must be 0 or None in the causal form, got 1"),
        ({"exact_window": 1}, TypeError, "exact_window must be True or False, got 1"),
        ({"released": "mine"}, ValueError, "released must be None or one of local-attention, lra, got 'mine'"),
        ({"released": "lra", "causal": True}, ValueError, "released='lra' has no causal form, got causal=True"),
    ],
)
def test_bad_options_are_refused_in_words(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        ops.local_attention(*inputs(6), **options)
    with pytest.raises(kind, match=says):
        LocalAttention(12, 3, **options)
