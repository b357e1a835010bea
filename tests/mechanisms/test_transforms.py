"""Transforms of torch.func, over every mechanism: gradients, and maps over a batch."""

import pytest
import torch

from flowformer import create_attention
from flowformer.mechanisms import find_attention, list_attentions

FORMS = [
    (name, causal)
    for name in list_attentions()
    for causal in (False, True)
    if not causal or find_attention(name).can("causal")
]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of PyTorch's rules for maps
@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_transforms_of_modules(name, causal):
    torch.manual_seed(0)
    module, x = create_attention(name, 8, 2, causal=causal, max_length=20).eval(), torch.randn(3, 19, 8)

    def loss(x):
        return module(x).square().sum()

    leaf = x.clone().requires_grad_()
    out = module(leaf)
    (want,) = torch.autograd.grad(out.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(x), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.vmap(lambda one: module(one[None])[0])(x), out.detach(), atol=1e-5, rtol=1e-4)
    each = torch.vmap(torch.func.grad(lambda one: loss(one[None])))(x)
    torch.testing.assert_close(each, want, atol=1e-5, rtol=1e-4)
