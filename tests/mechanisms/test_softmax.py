"""What is specific to softmax attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flowformer import ops


def inputs(length: int, sources: int | None = None) -> list[Tensor]:
    random = torch.Generator().manual_seed(length)
    sizes = (length, *(length if sources is None else sources,) * 2)
    return [torch.randn(2, n, 3, 4, generator=random, dtype=torch.float64) for n in sizes]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch(causal: bool) -> None:
    tensors = inputs(40)
    got = ops.softmax_attention(*tensors, causal=causal)
    torch.testing.assert_close(got, torch_attention(*tensors, is_causal=causal), rtol=1e-12, atol=1e-12)


def test_cross_attention_with_mask_equals_torch() -> None:
    tensors = inputs(40, 30)
    mask = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    want = torch_attention(*tensors, attn_mask=mask[:, None, None, :])
    got = ops.softmax_attention(*tensors, context_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_equals_torch_multihead_attention() -> None:
    # Another implementation still, with its own idea of a mask: True = ignore.
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 20, 12, dtype=torch.float64)
    mask = torch.arange(20).expand(2, -1) < torch.tensor([[20], [7]])
    q, k, v = ((x @ w.T).unflatten(-1, (3, 4)) for w in theirs.in_proj_weight.chunk(3))
    out = ops.softmax_attention(q, k, v, mask=mask).flatten(2) @ theirs.out_proj.weight.T
    want, _ = theirs(x, x, x, key_padding_mask=~mask, need_weights=False)
    torch.testing.assert_close(out[mask], want[mask], rtol=1e-10, atol=1e-12)


def test_the_state_is_the_past() -> None:
    q, k, v = inputs(9)
    mask = torch.arange(9).expand(2, -1) < torch.tensor([[9], [4]])
    _, state = ops.softmax_attention(q, k, v, causal=True, mask=mask, return_state=True)
    assert torch.equal(state.mask, mask)
    assert torch.equal(state.key, k.masked_fill(~mask[..., None, None], 0))
    assert torch.equal(state.value, v.masked_fill(~mask[..., None, None], 0))
    _, state = ops.softmax_attention_step(q[:, 0], k[:, 0], v[:, 0], state)
    assert state.key.shape == state.value.shape == (2, 10, 3, 4)
    assert state.mask[:, -1].all()


def test_states_of_a_packed_batch_are_refused() -> None:
    q, k, v = (x[:1] for x in inputs(9))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="states of a packed batch differ in length: run its sequences one by one"):
        ops.softmax_attention(q, k, v, causal=True, cu_seqlens=bounds, return_state=True)


def test_a_packed_batch_may_continue_from_states() -> None:
    start, (q, k, v) = inputs(5), (x[:1] for x in inputs(9))
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    _, state = ops.softmax_attention(*start, causal=True, return_state=True)
    got = ops.softmax_attention(q, k, v, causal=True, cu_seqlens=bounds, initial_state=state)
    for row, (a, b) in enumerate(((0, 4), (4, 9))):
        whole = [torch.cat([x[row : row + 1], y[:, a:b]], 1) for x, y in zip(start, (q, k, v), strict=True)]
        want = ops.softmax_attention(*whole, causal=True)[:, 5:]
        torch.testing.assert_close(got[:, a:b], want, rtol=1e-12, atol=1e-12)
