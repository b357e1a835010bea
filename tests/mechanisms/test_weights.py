"""Rows and flows, for every mechanism of the registry, its variants and both forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from law_cases import Variant, shapes_of, variants_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flowformer import ops
from flowformer.mechanisms import Mechanism, find_attention, list_attentions
from flowformer.mechanisms.flow.equations import phi
from flowformer.ops import FlowMaps

HEADS, KEY, VALUE = 2, 4, 3
ROWS = {name: find_attention(name).rows for name in list_attentions()}
SIGNED = {"linformer", "nystromformer", "rfa", "soft"}  # whose weights may be negative
flow_rows, mobile_rows = ROWS["flow"], ROWS["mobile"]
flow_maps, mobile_maps = find_attention("flow").flows, find_attention("mobile").flows


class Case:
    """One form of one variant of one mechanism."""

    def __init__(self, row: Mechanism, variant: Variant, causal: bool) -> None:
        self.row, self.variant, self.causal = row, variant, causal
        self.is_aft = row.name.startswith("aft")

    @property
    def crosses(self) -> bool:
        return self.row.can("cross") and not self.causal and not self.variant.decays

    def inputs(self, length: int, sources: int | None = None, *, batch: int = 2, seed: int = 0) -> list[Tensor]:
        random = torch.Generator().manual_seed(seed + length)
        sizes = zip((length, sources or length, sources or length), shapes_of(self.row, HEADS, KEY, VALUE), strict=True)
        return [torch.randn(batch, n, *shape, generator=random, dtype=torch.float64) for n, shape in sizes]

    def parameters(self, length: int) -> tuple[Any, ...]:
        random = torch.Generator().manual_seed(length)
        made = tree_map(
            lambda shape: None if shape is None else torch.randn(shape, generator=random, dtype=torch.float64),
            self.variant.learned(length, HEADS, *((KEY,) if self.variant.by_channels else ())),
            is_leaf=lambda shape: shape is None or isinstance(shape, torch.Size),
        )
        if self.variant.decays and not self.variant.by_token:
            return -made[0].abs(), *made[1:]
        return made

    def drawn(self) -> list[Tensor]:
        random = torch.Generator().manual_seed(1)
        return [
            found if isinstance(found, Tensor) else torch.randn(found, generator=random, dtype=torch.float64)
            for found in self.variant.drawn(HEADS, KEY)
        ]

    def options(self, length: int) -> dict[str, Any]:
        return {**self.variant.options, **self.variant.for_length(length)}

    def learned(self, q: Tensor, length: int = 64) -> tuple[Any, ...]:
        """What the operation takes after q, k and v: the same log-decays for the same places of the same sequence."""
        others = (*self.drawn(), *self.parameters(length))
        if not self.variant.by_token:
            return others
        random = torch.Generator().manual_seed(length)
        log_decay = -torch.rand(2, length, HEADS, generator=random, dtype=torch.float64)
        return log_decay[: len(q), : q.shape[1]], *others

    def rows(self, q: Tensor, k: Tensor, rows: Any, length: int = 64, **arguments: Any) -> Tensor:
        given = {"causal": self.causal, **self.options(length), **arguments}
        return ROWS[self.row.name](q, k, rows, *self.learned(q, length), **given)

    def op(self, q: Tensor, k: Tensor, v: Tensor, length: int = 64, **arguments: Any) -> Tensor:
        given = {"causal": self.causal, **self.options(length), **arguments}
        return self.row.operation(q, k, v, *self.learned(q, length), **given)


CASES = {
    f"{name}-{label}-{form}": Case(find_attention(name), variant, form == "causal")
    for name in list_attentions()
    for label, variant in variants_of(find_attention(name)).items()
    for form in ("bidirectional", "causal")
    if variant.only in ("", form)
    if find_attention(name).rows and (form == "bidirectional" or find_attention(name).can("causal"))
    if variant.only in ("", form)
}


def those(wanted: Callable[[Case], bool]) -> pytest.MarkDecorator:
    chosen = {name: case for name, case in CASES.items() if wanted(case)}
    return pytest.mark.parametrize("case", chosen.values(), ids=chosen.keys())


each = those(lambda case: True)


def add_up(case: Case, weights: Tensor, q: Tensor, v: Tensor, rows: list[int]) -> Tensor:
    """What queries get of values under weights: outputs (batch, rows, ...) of the operation."""
    if not case.is_aft:
        out = torch.einsum("bhrs,bshv->brhv", weights, v)
        return torch.nn.functional.normalize(out, dim=-1) if case.row.name == "yoso" else out
    groups = v.unflatten(-1, (weights.shape[1], -1))
    return q[:, rows].sigmoid() * torch.einsum("bhrs,bshv->brhv", weights, groups).flatten(2)


def each_weight(case: Case, q: Tensor, k: Tensor, v: Tensor, row: int, **arguments: Any) -> Tensor:
    """The weights of one query, (batch, heads or channels, S): the derivatives of its output by each value."""
    v = v.clone().requires_grad_()
    out = case.op(q, k, v, **arguments)[:, row]
    if not case.is_aft:
        return torch.autograd.grad(out[..., 0].sum(), v)[0][..., 0].transpose(1, 2)
    weights = torch.autograd.grad(out.sum(), v)[0] / q[:, row].sigmoid().unsqueeze(1)
    return weights.transpose(1, 2)


@each
def test_rows_times_values_are_the_output(case: Case) -> None:
    for length, sources in [(20, 20), (7, 30), (30, 7)] if case.crosses else [(1, 1), (20, 20), (40, 40)]:
        q, k, v = case.inputs(length, sources)
        rows = [length - 1, 0, length // 2]
        weights = case.rows(q, k, rows)
        assert weights.dtype == torch.float64
        assert weights.shape[2:] == (3, sources)
        assert weights.min() >= 0 or case.row.name in SIGNED
        torch.testing.assert_close(add_up(case, weights, q, v, rows), case.op(q, k, v)[:, rows], rtol=1e-10, atol=1e-10)


@those(lambda case: case.row.name != "yoso")  # whose outputs have length 1
def test_each_weight_is_the_derivative_by_its_value(case: Case) -> None:
    q, k, v = case.inputs(12)
    mask = torch.tensor([[True] * 12, [False] * 2 + [True] * 3 + [False] + [True] * 4 + [False] * 2])
    rows = torch.tensor([3, 11, 2])
    weights = case.rows(q, k, rows, mask=mask)
    if case.row.name == "aft_conv":
        weights = weights.repeat_interleave(VALUE, 1)
    for index, row in enumerate(rows.tolist()):
        wanted = each_weight(case, q, k, v, row, mask=mask)
        torch.testing.assert_close(weights[:, :, index], wanted, rtol=1e-10, atol=1e-10)
    assert weights[1, :, 1].count_nonzero() == 0  # from a padded query
    assert weights[1, :, :, [0, 1, 5, 10, 11]].count_nonzero() == 0  # to padded keys


@each
def test_padding_may_hold_anything(case: Case) -> None:
    q, k, _ = case.inputs(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 8:] = mask[1, :2] = False
    weights = case.rows(q, k, [5, 9], mask=mask)
    for padding in (torch.nan, torch.inf, 1e4):
        other = [x.masked_fill(~mask.view(2, 12, *(1,) * (x.ndim - 2)), padding) for x in (q, k)]
        torch.testing.assert_close(case.rows(*other, [5, 9], mask=mask), weights, rtol=1e-12, atol=1e-12)
    alone = case.rows(q[:1, :8], k[:1, :8], [5])
    torch.testing.assert_close(weights[:1, :, :1, :8], alone, rtol=1e-12, atol=1e-12)
    nothing = torch.zeros(2, 12, dtype=torch.bool)
    assert case.rows(q, k, [5, 9], mask=nothing).count_nonzero() == 0


@each
def test_causal_rows_see_no_later_token(case: Case) -> None:
    q, k, _ = case.inputs(20)
    weights = case.rows(q, k, [0, 6])
    assert bool(weights[:, :, 1, 7:].count_nonzero() == 0) == case.causal
    if case.causal:
        q[:, 7:], k[:, 7:] = 3.0, -2.0
        assert torch.equal(case.rows(q, k, [0, 6]), weights)


@those(lambda case: case.crosses)
def test_cross_attention_has_two_masks(case: Case) -> None:
    q, k, v = case.inputs(9, 9)
    key, query = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    key[0, :3], query[1, 2:5] = False, False
    masks = {"context_mask": key, "mask": query}
    rows = [0, 3, 8]
    got = add_up(case, case.rows(q, k, rows, **masks), q, v, rows)
    torch.testing.assert_close(got, case.op(q, k, v, **masks)[:, rows], rtol=1e-10, atol=1e-10)


class _Largest(TorchDispatchMode):
    """The size of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


# A free table of positions is quadratic by definition.
@those(lambda case: not case.variant.quadratic)
def test_nothing_quadratic_is_ever_made(case: Case) -> None:
    length, rows = 4096, [0, 2000, 4095]  # flows with a decay take their time
    q, k, _ = case.inputs(length, batch=1)
    q, k = q.float(), k.float()
    learned, options = case.learned(q, length), case.options(length)
    with _Largest() as largest:
        weights = ROWS[case.row.name](q, k, rows, *learned, causal=case.causal, **options)
        if case.row.flows is not None:
            case.row.flows(q, k, *learned, causal=case.causal, **options)
    assert weights.shape[2:] == (3, length)
    assert largest.numbers <= 3 * length * HEADS * max(KEY, VALUE)


# ---------------------------------------------------------------------------------------------------------------- flows


@pytest.mark.parametrize("label", variants_of(find_attention("flow")))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "sources"), [(30, 30), (9, 25), (25, 9)])
def test_flow_maps_make_the_output(label: str, causal: bool, length: int, sources: int) -> None:
    case = CASES[f"flow-{label}-{'causal' if causal else 'bidirectional'}"]
    if length != sources and not case.crosses:
        return
    q, k, v = case.inputs(length, sources, batch=1)
    learned = case.learned(q)
    got = flow_maps(q, k, *learned, causal=causal, **case.variant.options)
    Q, K = (phi(x, ops.flow_options(**case.variant.options).feature_map) for x in (q, k))
    scores = torch.einsum("bihk,bjhk->bhij", Q, K)
    if case.variant.decays:
        so_far = learned[0].expand(1, length, -1).cumsum(1).transpose(1, 2)
        scores = scores * (-(so_far.unsqueeze(-1) - so_far.unsqueeze(-2)).abs()).exp()
    scores = scores.tril() if causal else scores
    weights = (got.allocation / got.incoming).unsqueeze(-1) * scores * got.competition.unsqueeze(-2)
    out = torch.einsum("bhij,bjhv->bihv", weights, v)
    torch.testing.assert_close(out, case.op(q, k, v), rtol=1e-10, atol=1e-10)


def test_what_is_conserved_in_flow_attention() -> None:
    for length, sources in [(30, 30), (9, 25), (25, 9)]:
        q, k, _ = CASES["flow-core-bidirectional"].inputs(length, sources)
        got = flow_maps(q, k, eps=0.0)
        torch.testing.assert_close(got.conserved_incoming.mean(-1), torch.full((2, HEADS), sources / length).double())
        torch.testing.assert_close(got.conserved_outgoing.mean(-1), torch.full((2, HEADS), length / sources).double())
        torch.testing.assert_close(got.competition.mean(-1), torch.ones(2, HEADS).double())
        Q, K = q.sigmoid(), k.sigmoid()
        torch.testing.assert_close(got.incoming, torch.einsum("bihk,bjhk->bhi", Q, K))
        torch.testing.assert_close(got.outgoing, torch.einsum("bihk,bjhk->bhj", Q, K))


def test_conserved_outgoing_flow_is_before_the_clamp() -> None:
    q, k, _ = CASES["flow-core-bidirectional"].inputs(30)
    clamped, free = flow_maps(q, k), flow_maps(q, k, clamp=None)
    assert clamped.conserved_outgoing.max() > 1
    assert torch.equal(clamped.conserved_outgoing, free.conserved_outgoing)
    assert not torch.allclose(clamped.competition, free.competition)


@pytest.mark.parametrize("label", variants_of(find_attention("mobile")))
@pytest.mark.parametrize("causal", [False, True])
def test_mobile_maps(label: str, causal: bool) -> None:
    case = CASES[f"mobile-{label}-causal"]
    q, k, _ = case.inputs(15, batch=1)
    got = mobile_maps(q, k, causal=causal, **case.variant.options)
    options = ops.mobile_options(**case.variant.options)
    Q, K = (x[0].relu() + 1e-6 if options.feature_map == "relu" else x[0].sigmoid() for x in (q, k))
    incoming, allocation = got.incoming[0].T, got.allocation[0].T
    torch.testing.assert_close(incoming, ((Q + options.eps) * (K.sum(1, keepdim=True) + options.eps)).sum(-1))
    # The last row is made of the flows: with its own query it is A Q / I . K C.
    scale = 1 / 15 if options.normalize else 1
    wanted = (allocation / incoming)[-1, :, None] * torch.einsum("hk,jhk->hj", Q[-1], K) * got.competition[0] * scale
    row = mobile_rows(q, k, [14], causal=causal, **case.variant.options)
    torch.testing.assert_close(row[0, :, 0], wanted)
    exact = mobile_maps(q, k, eps=0.0)
    torch.testing.assert_close(exact.conserved_incoming.sum(1), torch.full((1, 15), float(HEADS)).double())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("flows", [flow_maps, mobile_maps])
def test_flows_of_padding_are_zero_and_others_as_without(flows: Callable[..., FlowMaps], causal: bool) -> None:
    q, k, _ = CASES["flow-core-bidirectional"].inputs(10)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 6:] = mask[1, :3] = False
    for eps in (1e-6, 0.0):
        padded = [x.masked_fill(~mask[..., None, None], torch.nan) for x in (q, k)]
        got = flows(*padded, causal=causal, mask=mask, eps=eps)
        alone = flows(q[:1, :6], k[:1, :6], causal=causal, eps=eps)
        for name, one, wanted in zip(got._fields, got, alone, strict=True):
            torch.testing.assert_close(one[:1, :, :6], wanted, msg=name)
            assert one.masked_select(~mask.unsqueeze(1)).count_nonzero() == 0, name


# -------------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("hard", [False, True])
def test_aft_conv_over_images(hard: bool) -> None:
    random = torch.Generator().manual_seed(0)
    q, v = (torch.randn(2, 5, 6, 8, generator=random, dtype=torch.float64) for _ in "qv")
    k = torch.randn(2, 5, 6, 2, generator=random, dtype=torch.float64)
    filters = torch.randn(2, 3, 5, generator=random, dtype=torch.float64)
    mask = torch.rand(2, 5, 6, generator=random) < 0.7
    mask[:, 2, 3] = True
    rows = [0, 15, 29]
    for masked in (None, mask):
        weights = ROWS["aft_conv"](q, k, rows, filters, hard=hard, mask=masked)
        out = ops.aft_conv(q, k, v, filters, hard=hard, mask=masked).flatten(1, 2)[:, rows]
        values = v.flatten(1, 2).unflatten(-1, (2, 4))
        mean = torch.einsum("bhrs,bshv->brhv", weights, values).flatten(2)
        torch.testing.assert_close(q.flatten(1, 2)[:, rows].sigmoid() * mean, out, rtol=1e-10, atol=1e-10)
    # Around pixel (2, 3): three rows, of five columns each, of which the last is there.
    if hard:
        assert ROWS["aft_conv"](q, k, [15], filters, hard=True)[0, 0, 0].count_nonzero() == 15


def test_channels_of_aft_are_averaged_head_by_head() -> None:
    q, k, _ = CASES["aft_simple-default-causal"].inputs(10)
    each_channel, two = ROWS["aft_simple"](q, k, [4]), ROWS["aft_simple"](q, k, [4], heads=2)
    assert each_channel.shape == (2, HEADS * VALUE, 1, 10)
    torch.testing.assert_close(two, each_channel.unflatten(1, (2, -1)).mean(2))


def test_weights_of_large_keys_are_finite() -> None:
    q = torch.randn(1, 8, 2, 4)
    for scale in (1e4, -1e4):
        for rows in (flow_rows, mobile_rows, ROWS["linear"], ROWS["softmax"]):
            assert rows(scale * q, q * 1e4, [0, 7], causal=True).isfinite().all()
        k = scale * torch.randn(1, 8, 4)
        assert ROWS["aft_simple"](k, k, [0, 7]).sum(-1).sub(1).abs().max() < 1e-12


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "one or more"),
        ([1.5], "integers"),
        ([10], "from 0 to 9"),
        ([-1], "from 0 to 9"),
        ([[1]], "one or more"),
    ],
)
def test_rows_must_be_places(rows: Any, message: str) -> None:
    q = torch.randn(1, 10, 2, 4)
    with pytest.raises(ValueError, match=message):
        flow_rows(q, q, rows)


def test_bad_input_is_refused() -> None:
    q, x = torch.randn(1, 10, 2, 4), torch.randn(1, 10, 4)
    with pytest.raises(ValueError, match="must be"):
        ROWS["softmax"](x, x, [0])
    with pytest.raises(ValueError, match="the same length"):
        mobile_rows(q, q[:, :5], [0])
    with pytest.raises(TypeError, match="boolean"):
        ROWS["linear"](q, q, [0], mask=torch.ones(1, 10))
    with pytest.raises(ValueError, match="unknown preset"):
        flow_maps(q, q, preset="cor")
    with pytest.raises(ValueError, match="has 4 positions"):
        ROWS["aft_full"](x, x, [0], torch.zeros(4, 4))
    with pytest.raises(ValueError, match="divide the groups of values"):
        ROWS["aft_simple"](x, x, [0], heads=3)
    with pytest.raises(ValueError, match="window"):
        ROWS["aft_local"](x, x, [0], torch.zeros(10, 10), 0)
    with pytest.raises(ValueError, match="one filter for each of"):
        ROWS["aft_conv"](x, x[..., :2], [0], torch.zeros(3, 5))
    with pytest.raises(ValueError, match="heads, taps"):
        ROWS["aft_conv"](x, x[..., :2], [0], torch.zeros(2, 5, 5), causal=True)
    with pytest.raises(ValueError, match="height, width"):
        ROWS["aft_conv"](x, x[..., :2], [0], torch.zeros(2, 5, 5))
