"""Padding is invisible to models: values and gradients, of parameters too, whatever the padding holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowformer import FlowMultiheadAttention, create_model, list_attentions
from flowformer.mechanisms import AFTConv, find_attention
from flowformer.models.decoder import Decoder
from flowformer.models.encoder import Encoder, EncoderBlock
from flowformer.models.swap.multihead import DropInMultiheadAttention

DIM, REAL, LENGTH = 8, 12, 17
FILLERS = (torch.nan, torch.inf, -torch.inf)
MASK = torch.arange(LENGTH).expand(2, -1) < REAL

each_filler = pytest.mark.parametrize("filler", FILLERS)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pad(x: Tensor, filler: float, dim: int = 1) -> Tensor:
    """Five more positions."""
    shape = list(x.shape)
    shape[dim] = LENGTH - REAL
    return torch.cat([x, x.new_full(shape, filler)], dim)


def larger(module: nn.Module) -> Any:
    """The module in float64, with parameters that are all different."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def gradients(module: nn.Module, *outputs: Tensor) -> list[Tensor]:
    module.zero_grad()
    sum(out.sin().sum() for out in outputs).backward()  # pyright: ignore[reportAttributeAccessIssue]
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(module: nn.Module, got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(module, got), gradients(module, want), rtol=1e-7, atol=1e-8)


@each_filler
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("attention", list_attentions())
def test_blocks(attention: str, norm_first: bool, filler: float) -> None:
    x = tokens(2, REAL, DIM)
    block = larger(EncoderBlock(DIM, 2, 12, attention=attention, max_length=LENGTH, norm_first=norm_first))
    same(block, block(pad(x, filler), mask=MASK)[:, :REAL], block(x))


@each_filler
def test_encoders_and_decoders(filler: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(2, REAL, DIM)
    encoder = larger(Encoder([EncoderBlock(DIM, 2, 12), EncoderBlock(DIM, 2, 12)], DIM))
    same(encoder, encoder(pad(x, filler), MASK)[:, :REAL], encoder(x))
    with monkeypatch.context() as tracing:  # a traced graph does not pack
        tracing.setattr("flowformer.models.encoder.may_look", lambda _: False)
        padded = encoder(pad(x, filler), MASK)
    assert not padded[:, REAL:].any()
    same(encoder, padded[:, :REAL], encoder(x))
    decoder = larger(Decoder([EncoderBlock(DIM, 2, 12, causal=True, norm_first=True)], DIM, norm_first=True))
    out, _ = decoder.extend(pad(x, filler), MASK, (None,))
    assert not out[:, REAL:].any()
    same(decoder, out[:, :REAL], decoder(x))


@each_filler
def test_classifiers_of_series(filler: float) -> None:
    model = larger(create_model("flowformer_timeseries", in_chans=3, num_classes=4, max_length=LENGTH, dim=DIM,
                                num_heads=2, ffn_dim=12, dropout=0.0))  # fmt: skip
    x = tokens(2, REAL, 3)
    same(model, model(pad(x, filler), MASK), model(x))


@pytest.mark.parametrize("filler", [-5, 10**9])
@pytest.mark.parametrize("with_state", [False, True])
def test_language_models(filler: int, with_state: bool) -> None:
    model = larger(create_model("flowformer_gpt_nano", vocab_size=11, max_length=LENGTH, dim=DIM, num_heads=2,
                                dropout=0.0))  # fmt: skip
    x = torch.randint(11, (2, REAL), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, torch.full((2, LENGTH - REAL), filler)], 1)
    out = model(padded, MASK, return_state=with_state)
    same(model, (out[0] if with_state else out)[:, :REAL], model(x))
    same(model, model.loss(padded, mask=MASK), model.loss(x))


def _flow(**options: Any) -> nn.MultiheadAttention:
    return FlowMultiheadAttention(DIM, 2, **options)


def _drop_in(mechanism: str) -> Callable[..., nn.MultiheadAttention]:
    lengths = {"max_length": LENGTH} if find_attention(mechanism).module.learns_positions else {}
    return lambda **options: DropInMultiheadAttention(DIM, 2, mechanism=mechanism, **lengths, **options)


KINDS = {name: _drop_in(name) for name in list_attentions() if name not in ("flow", "aft_conv", "reformer", "soft")} | {
    "flow": _flow
}


@each_filler
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_modules_in_place_of_pytorchs(kind: str, batch_first: bool, filler: float) -> None:
    module = larger(KINDS[kind](batch_first=batch_first))
    dim = 1 if batch_first else 0
    shape = (2, REAL, DIM) if batch_first else (REAL, 2, DIM)
    x, padded = tokens(*shape), pad(tokens(*shape), filler, dim)
    out, _ = module(padded, padded, padded, key_padding_mask=~MASK, need_weights=False)
    same(module, out.narrow(dim, 0, REAL), module(x, x, x, need_weights=False)[0])
    alone, one = (t.select(1 - dim, 0) for t in (padded, x))
    out, _ = module(alone, alone, alone, key_padding_mask=~MASK[0], need_weights=False)
    same(module, out[:REAL], module(one, one, one, need_weights=False)[0])


@each_filler
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["flow", "linear", "softmax", "aft_simple", "aft_full"])
def test_modules_in_place_of_pytorchs_in_cross_attention(kind: str, batch_first: bool, filler: float) -> None:
    module = larger(KINDS[kind](batch_first=batch_first, kdim=6, vdim=5))
    dim = 1 if batch_first else 0
    query, key, value = (
        tokens(*((2, length, width) if batch_first else (length, 2, width)), seed=width)
        for length, width in ((7, DIM), (REAL, 6), (REAL, 5))
    )
    out, _ = module(query, pad(key, filler, dim), pad(value, filler, dim), key_padding_mask=~MASK, need_weights=False)
    same(module, out, module(query, key, value, need_weights=False)[0])
    padding = torch.arange(9).expand(2, -1) >= 7
    longer = torch.cat([query, query.new_full([2 if n == dim else s for n, s in enumerate(query.shape)], filler)], dim)
    out, _ = module(longer, key, value, query_padding_mask=padding, need_weights=False)
    same(module, out.narrow(dim, 0, 7), module(query, key, value, need_weights=False)[0])


@each_filler
def test_attention_over_images(filler: float) -> None:
    module = larger(AFTConv(DIM, 2, kernel_size=(3, 3)))
    mask = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    x = tokens(2, 4, 5, DIM)
    padded, zeros = (x.masked_fill(~mask.unsqueeze(-1), value) for value in (filler, 0.0))
    same(module, module(padded, mask=mask), module(zeros, mask=mask))
