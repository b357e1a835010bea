"""Cross-entropy by chunks is cross-entropy, in less memory."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowformer.models.language import LanguageModel
from flowformer.models.vocabulary.cross_entropy import CHUNK_SCORES, cross_entropy

TOKENS, DIM, VOCABULARY = (3, 7), 5, 11
REDUCTIONS = ("mean", "sum", "none")


def inputs(dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(*TOKENS, DIM, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, DIM, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, TOKENS)
    targets[0, :3] = -100
    return hidden, weight, targets


def plain(hidden, weight, targets, reduction):
    loss = nn.functional.cross_entropy((hidden @ weight.T).flatten(0, -2), targets.flatten(), reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


def gradients(loss, *leaves):
    torch.manual_seed(1)
    return torch.autograd.grad(loss, leaves, torch.randn_like(loss))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY, 4 * VOCABULARY + 1, 10**6])
def test_equals_the_plain_loss(reduction, chunk):
    hidden, weight, targets = inputs()
    ours = cross_entropy(hidden, weight, targets, reduction=reduction, chunk_scores=chunk)
    wanted = plain(hidden, weight, targets, reduction)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(ours, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets = inputs()
    torch.autograd.gradcheck(
        lambda h, w: cross_entropy(h, w, targets, reduction="none", chunk_scores=30), (hidden, weight)
    )


def test_large_scores_and_ignored_tokens_that_are_not_finite():
    hidden, weight, targets = inputs(torch.float32)
    hidden = (hidden * 1e4).detach()
    hidden[0, :3] = torch.nan
    hidden.requires_grad_()
    loss = cross_entropy(hidden, weight, targets)
    assert loss.isfinite()
    grad_hidden, _ = torch.autograd.grad(loss, (hidden, weight))
    assert (grad_hidden[0, :3] == 0).all()
    assert grad_hidden.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype):
    hidden, weight, targets = inputs(dtype)
    ours = cross_entropy(hidden, weight, targets, chunk_scores=30)
    assert ours.dtype == torch.float32
    wanted = plain(hidden.double(), weight.double(), targets, "mean")
    torch.testing.assert_close(ours.double(), wanted, rtol=2e-2, atol=2e-2)
    for one, other in zip(gradients(ours, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


def test_autocast():
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours, wanted = cross_entropy(hidden, weight, targets), plain(hidden, weight, targets, "mean")
    torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients(ours, hidden, weight), gradients(wanted, hidden, weight), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_no_token_that_counts_is_no_loss():
    hidden, weight, targets = inputs()
    loss = cross_entropy(hidden, weight, torch.full_like(targets, 5), ignore_index=5)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


class Recorder(TorchDispatchMode):
    """Elements of the largest tensor that comes to be."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def measured(loss_of, hidden, weight) -> tuple[int, int]:
    """Elements of the largest tensor, and of all that is kept for the backward pass."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with Recorder() as recorder, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(hidden, weight).backward()
    return recorder.largest, sum(kept.values())


def test_memory_is_that_of_a_chunk():
    tokens, dim, vocabulary, chunk = 512, 4, 1000, 8
    hidden = torch.randn(tokens, dim, requires_grad=True)
    weight = torch.randn(vocabulary, dim, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    largest, kept = measured(lambda h, w: cross_entropy(h, w, targets, chunk_scores=chunk * vocabulary), hidden, weight)
    assert largest == chunk * vocabulary
    assert kept <= hidden.numel() + weight.numel() + 4 * tokens
    # The recorder sees what the plain loss makes of it.
    largest, kept = measured(lambda h, w: plain(h, w, targets, "mean"), hidden, weight)
    assert largest >= tokens * vocabulary
    assert kept >= tokens * vocabulary


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_model_holds_a_chunk_of_scores(tied):
    model = LanguageModel(40_000, dim=4, num_layers=1, num_heads=1, positions=None, tied=tied)
    tokens = torch.randint(40_000, (2, 401))
    with Recorder() as recorder:
        model.loss(tokens).backward()
    assert recorder.largest <= CHUNK_SCORES < 800 * 40_000


def test_refuses_what_does_not_fit():
    hidden, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"targets must be \(3, 7\) like hidden, got \(21,\) int64"):
        cross_entropy(hidden, weight, targets.flatten())
    with pytest.raises(TypeError, match="targets must be integers"):
        cross_entropy(hidden, weight, targets.double())
    with pytest.raises(ValueError, match="targets must be from 0 to 10, or -100, got 11"):
        cross_entropy(hidden, weight, targets.masked_fill(targets == 4, 11))
    with pytest.raises(ValueError, match=r"weight \(vocabulary, dim\), got .* and \(11, 4\)"):
        cross_entropy(hidden, weight[:, :4], targets)
    with pytest.raises(TypeError, match="have the same dtype"):
        cross_entropy(hidden, weight.float(), targets)
    with pytest.raises(ValueError, match="reduction must be"):
        cross_entropy(hidden, weight, targets, reduction="max")
    with pytest.raises(ValueError, match="chunk_scores must be positive"):
        cross_entropy(hidden, weight, targets, chunk_scores=0)
