"""The classifier of token sequences and of pairs: published sizes, pooling, and padding that does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flowformer
from flowformer.models.initialization import reset_parameters
from flowformer.models.positions import SinusoidalPositions
from flowformer.models.sequence import SequenceClassifier

SMALL = {"vocab_size": 11, "num_classes": 4, "max_length": 24, "dim": 16, "num_heads": 2, "ffn_dim": 32}
LENGTHS = (24, 9, 1)
POOLS = pytest.mark.parametrize("pool", ["class", "mean"])


def build(seed: int = 0, **options: Any) -> SequenceClassifier:
    torch.manual_seed(seed)
    return flowformer.create_model("flowformer_sequence", **{**SMALL, **options}).eval()  # pyright: ignore


def batch(*shape: int, lengths: tuple[int, ...] = LENGTHS, length: int = 24) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 11, (*shape, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) < torch.tensor(lengths).view(*shape, 1)
    return tokens.masked_fill(~mask, 0), mask


def test_published_sizes():
    model = flowformer.create_model("flowformer_sequence", vocab_size=17, num_classes=10, max_length=2000)
    # Counted from the published shapes: embedding, class token, four projections without biases, feed-forward network,
    # three norms, classifier.
    block = 4 * 512 * 512 + (512 * 1024 + 1024) + (1024 * 512 + 512)
    assert sum(p.numel() for p in model.parameters()) == (
        17 * 512 + 512 + block + 3 * 2 * 512 + (512 * 1024 + 1024) + (1024 * 10 + 10)
    )


def test_narrow_heads_and_pairs():
    model = build(head_dim=3, pairs="interaction")
    block: Any = model.encoder.blocks[0]
    assert block.attention.q_proj.weight.shape == (6, 16)
    layers = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    assert [tuple(layer.weight.shape) for layer in layers] == [(32, 64), (16, 32), (4, 16)]


@POOLS
@pytest.mark.parametrize("attention", flowformer.list_attentions())
def test_padding_is_invisible(attention, pool):
    model = build(attention=attention, pool=pool)
    tokens, mask = batch(3)
    alone = torch.cat([model(tokens[i : i + 1, : int(n)]) for i, n in enumerate(mask.sum(-1))])
    noisy = tokens.masked_fill(~mask, 10**6)  # any number, beyond the vocabulary too
    torch.testing.assert_close(model(noisy, mask), alone, rtol=1e-4, atol=1e-5)
    left = [
        torch.stack([row.roll(int((~real).sum())) for row, real in zip(x, mask, strict=True)]) for x in (tokens, mask)
    ]
    torch.testing.assert_close(model(*left), alone, rtol=1e-4, atol=1e-5)


@POOLS
def test_published_behaviour_lets_padding_take_part(pool):
    model = build(pool=pool, mask_padding=False)
    tokens, mask = batch(3)
    assert (model(tokens, mask)[1] - model(tokens[1:2, :9])[0]).abs().max() > 1e-3
    torch.testing.assert_close(model(tokens, mask), model(tokens))


def test_a_sequence_without_tokens_gives_finite_logits():
    for pool in ("class", "mean"):
        model = build(pool=pool)
        out = model(torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.bool))
        assert out.isfinite().all()


@pytest.mark.parametrize("pairs", ["joined", "interaction"])
def test_a_pair_is_two_sequences_by_the_same_weights(pairs):
    model = build(pairs=pairs)
    tokens, mask = batch(3, 2, lengths=(24, 9, 1, 24, 7, 7))
    a, b = (model.encode(tokens[:, i], mask[:, i]) for i in range(2))
    parts = (a, b) if pairs == "joined" else (a, b, a * b, a - b)
    torch.testing.assert_close(model(tokens, mask), model.head(torch.cat(parts, -1)), rtol=1e-5, atol=1e-6)


def test_positions_are_the_published_ones():
    dim, places = 6, np.arange(7)
    angles = places[:, None] * 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    wanted = np.empty((7, dim))
    wanted[:, 0::2], wanted[:, 1::2] = np.sin(angles), np.cos(angles)
    found = SinusoidalPositions(dim, first=0, interleaved=True)(torch.arange(7))
    torch.testing.assert_close(found, torch.from_numpy(wanted).float())
    odd = SinusoidalPositions(5, first=0, interleaved=True)(torch.arange(3))
    assert odd.shape == (3, 5)


def test_the_order_of_tokens_counts_only_with_positions():
    tokens, _ = batch(1, lengths=(24,))
    for positions, changes in (("sinusoidal", True), ("learned", True), (None, False)):
        model = build(positions=positions)
        difference = (model(tokens) - model(tokens.flip(-1))).abs().max()
        assert (difference > 1e-4) == changes, positions


def test_initial_weights_are_drawn_alike_by_a_reset():
    torch.manual_seed(0)
    model = build(positions="learned", num_layers=2)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    reset_parameters(model)
    for name, value in model.state_dict().items():
        other = weights[name]
        assert value.shape == other.shape
        if value.numel() > 60:  # of the same size, drawn anew
            assert 0.75 < value.std() / other.std() < 1.33, name
    assert weights["encoder.blocks.0.linear1.weight"].abs().max() <= (6 / (16 + 32)) ** 0.5
    assert weights["positions.weight"].std() < 0.03
    assert model.no_weight_decay() == {"positions.weight", "class_token"}


def test_gradients_reach_every_parameter():
    model = build(pairs="joined", positions="learned").train()
    tokens, mask = batch(3, 2, lengths=(24, 9, 1, 24, 7, 7))
    model(tokens, mask).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"positions": "rotary"}, ValueError, "positions must be one of 'sinusoidal', 'learned', None, got 'rotary'"),
        ({"pool": "max"}, ValueError, "pool must be one of 'class', 'mean', got 'max'"),
        ({"pool": None}, ValueError, "pool must be one of 'class', 'mean', got None"),
        ({"pairs": True}, ValueError, "pairs must be one of 'joined', 'interaction', None, got True"),
        ({"head_dim": 0}, ValueError, "head_dim must be"),
        ({"mask_padding": 1}, TypeError, "mask_padding must be"),
    ],
)
def test_wrong_options(options, kind, says):
    with pytest.raises(kind, match=says):
        build(**options)


def test_wrong_input():
    model, tokens = build(), torch.ones(2, 5, dtype=torch.int64)
    pair = build(pairs="joined")
    for call, kind, says in (
        (lambda: model(tokens.float()), TypeError, "tokens must be a tensor of integers, got"),
        (lambda: model(tokens[0]), ValueError, r"tokens must have the shape \(batch, length\)"),
        (lambda: model(tokens[:, :0]), ValueError, "with at least one position"),
        (lambda: model(torch.ones(1, 25, dtype=torch.int64)), ValueError, "at most max_length = 24"),
        (lambda: model(tokens + 10), ValueError, "tokens must be from 0 to 10, got 11"),
        (lambda: model(tokens, torch.ones(2, 4, dtype=torch.bool)), ValueError, "mask"),
        (lambda: pair(tokens), ValueError, r"tokens must have the shape \(batch, 2, length\)"),
        (lambda: pair(tokens.view(1, 2, 5).expand(1, 2, 5)[:, :1]), ValueError, r"\(batch, 2, length\)"),
    ):
        with pytest.raises(kind, match=says):
            call()


def test_empty_batch_and_small_integers():
    model = build()
    assert model(torch.zeros(0, 5, dtype=torch.int64), torch.zeros(0, 5, dtype=torch.bool)).shape == (0, 4)
    tokens, mask = batch(3)
    torch.testing.assert_close(model(tokens.to(torch.uint8), mask), model(tokens, mask))
