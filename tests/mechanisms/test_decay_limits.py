"""Log-decays at their limits: not a number, a factor of 0, and far beyond, in every mechanism that decays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowformer import ops

OPERATIONS = [ops.flow_attention, ops.linear_attention, ops.softmax_attention]
BACKENDS = ["auto", "torch"]
FORMS = pytest.mark.parametrize("causal", [False, True])


def inputs(length: int = 20) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, 2, 8, generator=random) for _ in range(3)]


@FORMS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_not_a_number_is_seen(operation, backend, causal):
    out = operation(*inputs(), torch.full((2,), torch.nan), causal=causal, backend=backend)
    assert out.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_is_seen_in_a_step(backend):
    state, tokens = ops.init_flow_state(1, 2, 8, 8), (x[:, 0] for x in inputs())
    out, _ = ops.flow_attention_step(*tokens, state, torch.full((2,), torch.nan), backend=backend)
    assert out.isnan().all()


@pytest.mark.parametrize("value", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_after_a_factor_of_zero_nothing_is_left_of_what_was_before(operation, backend, dtype, value):
    q, k, v = (x.to(dtype) for x in inputs())
    log_decay = torch.full((1, 20, 2), -0.1)
    log_decay[:, 10] = value
    before, after = slice(0, 10), slice(10, 20)
    # Half precision may round each weight, which moves an output by up to that share of the largest value.
    tolerance = {"rtol": 2e-3, "atol": 2**-11 * float(v.abs().max())} if dtype == torch.float16 else {}
    for causal, kept, other in [(True, after, before), (False, before, after)]:
        found = operation(q, k, v, log_decay, causal=causal, backend=backend)
        alone = operation(*(x[:, kept] for x in (q, k, v)), log_decay[:, before], causal=causal, backend=backend)
        torch.testing.assert_close(found[:, kept], alone, **tolerance)
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, other] *= -3
        again = operation(*changed, log_decay, causal=causal, backend=backend)
        assert torch.equal(again[:, kept], found[:, kept])


@FORMS
@pytest.mark.parametrize("value", [-1e15, -1e30])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_many_resets_lose_no_digits(operation, value, causal):
    """Differences of sums of such log-decays would lose all others."""
    tensors = [x.double() for x in inputs(300)]
    log_decay = torch.full((1, 300, 2), -0.1, dtype=torch.float64)
    log_decay[:, ::3] = value
    out = operation(*tensors, log_decay, causal=causal, backend="torch")
    piece = operation(*(x[:, 150:153] for x in tensors), log_decay[:, 150:153], causal=causal, backend="torch")
    torch.testing.assert_close(out[:, 150:153], piece)
