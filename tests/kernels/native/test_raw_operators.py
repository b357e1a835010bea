"""The raw operators refuse what kernels would read or write wrongly, whatever is called past our own checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from kernel_inputs import needs_kernels, random
from torch import Tensor

from flowformer import ops

OPERATORS = torch.ops.flowformer
CORE = ops.PRESETS["core"].values()
BATCH, LENGTH, SOURCES, HEADS, KEYS, VALUES, CHANNELS = 2, 37, 35, 3, 4, 5, 6

pytestmark = needs_kernels


def qkv(sources: int = LENGTH, batch: int = BATCH) -> dict[str, Tensor]:
    return {
        "q": random(batch, LENGTH, HEADS, KEYS),
        "k": random(batch, sources, HEADS, KEYS),
        "v": random(batch, sources, HEADS, VALUES),
    }


def mask(length: int) -> Tensor:
    return torch.ones(BATCH, length, dtype=torch.bool)


def state(of: str = "", batch: int = BATCH) -> dict[str, Tensor]:
    parts = ops.init_flow_state(batch, HEADS, KEYS, VALUES)._asdict()
    return {of + name: part for name, part in parts.items()}


def channels(sources: int = LENGTH) -> dict[str, Tensor]:
    return {
        name: random(BATCH, length, CHANNELS) for name, length in zip("qkv", (LENGTH, sources, sources), strict=True)
    }


def means(of: str = "") -> dict[str, Tensor]:
    return {of + name: torch.zeros(BATCH, CHANNELS, dtype=torch.float64) for name in ("log_weight", "mean")}


BOUNDS = torch.tensor([0, 3, 3, LENGTH], dtype=torch.int32)
NONE = {"log_decay": None}
DECAY = {"log_decay": -random(HEADS).abs()}
BY_TOKEN = {"log_decay": -random(BATCH, LENGTH, HEADS).abs()}
GRAD = {"grad_out": random(BATCH, LENGTH, HEADS, VALUES)}
PACKED_GRAD = {"grad_out": random(1, LENGTH, HEADS, VALUES)}
MASKS = {"key_mask": mask(SOURCES), "query_mask": mask(LENGTH)}
NO_MASKS = {"key_mask": None, "query_mask": None}
ONE_MASK = {"key_mask": mask(LENGTH), "query_mask": mask(LENGTH)}
NUMBERS = {"weight": random(BATCH, LENGTH, HEADS).abs(), "scale": random(BATCH, LENGTH, HEADS)}
NO_NUMBERS = {"weight": None, "scale": None}
PACKED_NUMBERS = {name: x[:1] for name, x in NUMBERS.items()}
CROSS_NUMBERS = {"weight": NUMBERS["weight"][:, :SOURCES], "scale": NUMBERS["scale"]}
MARKS = torch.zeros(BATCH, 3, 3, CHANNELS)


def sums(of: str = "", batch: int = BATCH) -> dict[str, Tensor]:
    shapes = {"keys": (batch, HEADS, KEYS), "memory": (batch, HEADS, KEYS, VALUES)}
    return {of + name: random(*shape).abs().double() for name, shape in shapes.items()}


WANTED = dict.fromkeys(  # gradients of log-decays
    (
        "flow_causal_backward", "flow_bidirectional_backward", "attend_causal_native_backward",
        "attend_native_backward",
    ),
    (True,),
)  # fmt: skip
ELU = (2, 1e-3)  # the feature map, and eps

# What each operator takes, in its order: the tensors by name. Options follow.
VALID: dict[str, tuple[str, dict[str, Tensor | None]]] = {
    "causal": ("flow_causal", {**qkv(), "mask": mask(LENGTH), "cu_seqlens": None, **DECAY, **state()}),
    "causal packed": ("flow_causal", {**qkv(batch=1), "mask": None, "cu_seqlens": BOUNDS, **NONE, **state(batch=3)}),
    "causal token": ("flow_causal", {**qkv(), "mask": None, "cu_seqlens": None, **BY_TOKEN, **state()}),
    "causal backward": (
        "flow_causal_backward",
        {**qkv(), "mask": mask(LENGTH), "cu_seqlens": None, **DECAY, **state(), **GRAD, **state("grad_")},
    ),
    "causal token backward": (
        "flow_causal_backward",
        {**qkv(), "mask": None, "cu_seqlens": None, **BY_TOKEN, **state(), **GRAD, **state("grad_")},
    ),
    "causal packed backward": (
        "flow_causal_backward",
        {
            **{**qkv(batch=1), "mask": None, "cu_seqlens": BOUNDS, **NONE},
            **{**state(batch=3), **PACKED_GRAD, **state("grad_", 3)},
        },
    ),
    "bidirectional": ("flow_bidirectional", {**qkv(SOURCES), **MASKS, "cu_seqlens": None, **NONE}),
    "bidirectional packed": ("flow_bidirectional", {**qkv(batch=1), **NO_MASKS, "cu_seqlens": BOUNDS, **DECAY}),
    "bidirectional token": ("flow_bidirectional", {**qkv(), **ONE_MASK, "cu_seqlens": None, **BY_TOKEN}),
    "bidirectional backward": (
        "flow_bidirectional_backward",
        {**qkv(SOURCES), **MASKS, "cu_seqlens": None, **NONE, **GRAD},
    ),
    "bidirectional packed backward": (
        "flow_bidirectional_backward",
        {**qkv(batch=1), **NO_MASKS, "cu_seqlens": BOUNDS, **DECAY, **PACKED_GRAD},
    ),
    "bidirectional token backward": (
        "flow_bidirectional_backward",
        {**qkv(), **ONE_MASK, "cu_seqlens": None, **BY_TOKEN, **GRAD},
    ),
    "step": ("flow_step", {**{name: x[:, 0] for name, x in qkv().items()}, **DECAY, **state()}),
    "step token": (
        "flow_step",
        {**{name: x[:, 0] for name, x in qkv().items()}, "log_decay": BY_TOKEN["log_decay"][:, 0], **state()},
    ),
    "attend causal": (
        "attend_causal_native",
        {**qkv(), "mask": mask(LENGTH), "cu_seqlens": None, **DECAY, **NUMBERS, **sums()},
    ),
    "attend causal packed": (
        "attend_causal_native",
        {**qkv(batch=1), "mask": None, "cu_seqlens": BOUNDS, **NONE, **PACKED_NUMBERS, **sums(batch=3)},
    ),
    "attend causal token": (
        "attend_causal_native",
        {**qkv(), "mask": None, "cu_seqlens": None, **BY_TOKEN, **NO_NUMBERS, **sums()},
    ),
    "attend causal backward": (
        "attend_causal_native_backward",
        {
            **{**qkv(), "mask": mask(LENGTH), "cu_seqlens": None, **BY_TOKEN, **NUMBERS, **sums()},
            **{**GRAD, **sums("grad_")},
        },
    ),
    "attend causal packed backward": (
        "attend_causal_native_backward",
        {
            **{**qkv(batch=1), "mask": None, "cu_seqlens": BOUNDS, **DECAY, **PACKED_NUMBERS, **sums(batch=3)},
            **{**PACKED_GRAD, **sums("grad_", 3)},
        },
    ),
    "attend": ("attend_native", {**qkv(SOURCES), **MASKS, "cu_seqlens": None, **NONE, **CROSS_NUMBERS}),
    "attend packed": ("attend_native", {**qkv(batch=1), **NO_MASKS, "cu_seqlens": BOUNDS, **DECAY, **PACKED_NUMBERS}),
    "attend token": ("attend_native", {**qkv(), **ONE_MASK, "cu_seqlens": None, **BY_TOKEN, **NO_NUMBERS}),
    "attend backward": (
        "attend_native_backward",
        {**qkv(SOURCES), **MASKS, "cu_seqlens": None, **NONE, **CROSS_NUMBERS, **GRAD},
    ),
    "attend packed backward": (
        "attend_native_backward",
        {**qkv(batch=1), **NO_MASKS, "cu_seqlens": BOUNDS, **NONE, **PACKED_NUMBERS, **PACKED_GRAD},
    ),
    "attend token backward": (
        "attend_native_backward",
        {**qkv(), **ONE_MASK, "cu_seqlens": None, **BY_TOKEN, **NUMBERS, **GRAD},
    ),
    "attend step": (
        "attend_step_native",
        {
            **{name: x[:, 0] for name, x in qkv().items()},
            **{**DECAY, **{name: x[:, 0] for name, x in NUMBERS.items()}, **sums()},
        },
    ),
    "attend step token": (
        "attend_step_native",
        {
            **{name: x[:, 0] for name, x in qkv().items()},
            **{"log_decay": BY_TOKEN["log_decay"][:, 0], **NO_NUMBERS, **sums()},
        },
    ),
    "aft causal": ("aft_simple_causal", {**channels(), "mask": mask(LENGTH), **means()}),
    "aft causal backward": (
        "aft_simple_causal_backward",
        {**channels(), "mask": mask(LENGTH), "marks": MARKS, "grad_out": random(BATCH, LENGTH, CHANNELS), **means("g")},
    ),
    "aft bidirectional": ("aft_simple_bidirectional", {**channels(SOURCES), **MASKS}),
    "aft bidirectional backward": (
        "aft_simple_bidirectional_backward",
        {**channels(SOURCES), **MASKS, "marks": MARKS[:, :1], "grad_out": random(BATCH, LENGTH, CHANNELS)},
    ),
}


def call(case: str, **changed: Tensor | None) -> Any:
    name, arguments = VALID[case]
    assert changed.keys() <= arguments.keys()
    options = {"flow": CORE, "attend": ELU}.get(name.partition("_")[0], ())
    return getattr(OPERATORS, name)(*{**arguments, **changed}.values(), *WANTED.get(name, ()), *options)


def empty_axes(x: Tensor) -> Iterator[Tensor]:
    """One axis without elements, except the batch."""
    for axis in range(1, x.ndim):
        yield x.narrow(axis, 0, 0)


def shapes(x: Tensor) -> Iterator[Tensor]:
    """The tensor with one element more, less or none along each axis, and with one axis more or less."""
    yield from empty_axes(x)
    for axis in range(x.ndim):
        yield torch.cat([x, x.narrow(axis, 0, 1)], axis)
        if x.shape[axis] > 1:
            yield x.narrow(axis, 0, x.shape[axis] - 1)
    yield x.unsqueeze(0)
    yield x.unsqueeze(-1)
    yield x.select(-1, 0)


def dtypes(x: Tensor) -> Iterator[Tensor]:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool):
        if dtype != x.dtype and not (x is BOUNDS and dtype == torch.int64):
            yield x.to(dtype)
    yield x.to(torch.complex64)


def places(x: Tensor) -> Iterator[Tensor]:
    yield x.to("meta")


CHANGES: dict[str, Callable[[Tensor], Iterator[Tensor]]] = {"shape": shapes, "dtype": dtypes, "device": places}


@pytest.mark.parametrize("case", VALID)
def test_the_arguments_that_are_changed_below_are_right(case: str) -> None:
    results = call(case)
    assert all(x.isfinite().all() for x in ([results] if isinstance(results, Tensor) else results[:1]))


def is_free(v: Tensor, other: Tensor) -> bool:
    """Whether other values differ in the number of channels only, which no other argument of this operator tells."""
    alike = other.shape[:-1] == v.shape[:-1] and other.dtype == v.dtype and other.device == v.device
    return alike and other.shape[-1] > 0


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", VALID)
def test_wrong_tensors_are_refused_one_by_one(case: str, change: str) -> None:
    name, arguments = VALID[case]
    for argument, tensor in arguments.items():
        for wrong in CHANGES[change](tensor) if tensor is not None else ():
            if argument == "v" and name in ("flow_bidirectional", "attend_native") and is_free(tensor, wrong):
                continue
            with pytest.raises((TypeError, ValueError), match=f"flowformer::{name}: .*got|cu_seqlens must rise"):
                call(case, **{argument: wrong})


@pytest.mark.parametrize("case", VALID)
def test_sparse_tensors_are_refused(case: str) -> None:
    for argument, tensor in VALID[case][1].items():
        if tensor is not None:
            with pytest.raises((TypeError, ValueError, NotImplementedError)):
                call(case, **{argument: tensor.to_sparse()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int32])
@pytest.mark.parametrize("case", VALID)
def test_inputs_of_a_dtype_without_kernels_are_refused(case: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="q, k and v must all be float32 or all bfloat16"):
        call(case, **{name: VALID[case][1][name].to(dtype) for name in "qkv"})


@pytest.mark.parametrize("case", [case for case in VALID if "causal" in case])
def test_parts_of_a_state_are_refused(case: str) -> None:
    names = [name for name in ("tokens", "keys", "sums", "log_normaliser", "memory") if name in VALID[case][1]]
    for name in names or (["log_weight", "mean"] if "backward" not in case else []):
        with pytest.raises(ValueError, match=f"a state is given whole or not at all, got no {name}"):
            call(case, **{name: None})


@pytest.mark.parametrize("case", [case for case in VALID if "packed" in case])
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 20, 10, LENGTH], [0, 3, 3, LENGTH + 1], [0, 3, 3, LENGTH - 1], [1, 3, 3, LENGTH], [-1, 3, 3, LENGTH],
        [0, 3, 1000, LENGTH], [0, -1000, 3, LENGTH], [0, 3, 2**31 - 1, LENGTH], [0, -(2**31), 3, LENGTH],
        [LENGTH, 3, 3, 0],
    ],
)  # fmt: skip
def test_boundaries_that_are_none_are_refused(case: str, bounds: list[int]) -> None:
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match=f"cu_seqlens must rise from 0 to the total length {LENGTH}"):
            call(case, cu_seqlens=torch.tensor(bounds, dtype=dtype))


@pytest.mark.parametrize("case", ["bidirectional token", "bidirectional token backward", "attend token"])
def test_decay_between_different_tokens_is_refused(case: str) -> None:
    arguments = VALID[case][1]
    shorter = {name: arguments[name][:, :SOURCES] for name in ("k", "v", "key_mask")}
    with pytest.raises(ValueError, match="with log_decay, q and k must be of the same tokens with one mask, got q"):
        call(case, **shorter)
    with pytest.raises(ValueError, match="with log_decay, q and k must be of the same tokens with one mask, got q"):
        call(case, key_mask=None)
    with pytest.raises(ValueError, match="with log_decay, key_mask and query_mask must be equal"):
        call(case, key_mask=torch.zeros_like(arguments["key_mask"]))


@pytest.mark.parametrize("case", [case for case in VALID if "packed" in case])
def test_masks_beside_boundaries_are_refused(case: str) -> None:
    for name in {"mask", "key_mask", "query_mask"} & VALID[case][1].keys():
        with pytest.raises(ValueError, match="a packed batch has batch 1, as many queries as keys and no masks"):
            call(case, **{name: torch.ones(1, LENGTH, dtype=torch.bool)})


@pytest.mark.parametrize(
    "options",
    [
        ("tanh", 1.0, 1e-6, 0.0, "sequence", True, True), ("sigmoid", 1.0, 1e-6, 0.0, "all", True, True),
        ("sigmoid", -1.0, 1e-6, 0.0, "sequence", True, True), ("sigmoid", 1.0, float("nan"), 0.0, None, True, True),
        ("sigmoid", 1.0, 1e-6, float("inf"), None, True, True),
    ],
)  # fmt: skip
def test_unknown_options_are_refused(options: tuple[Any, ...]) -> None:
    for name, arguments in VALID.values():
        if name.startswith("flow"):
            with pytest.raises(ValueError, match=r"unknown feature map or competition|must be finite and at least 0"):
                getattr(OPERATORS, name)(*arguments.values(), *WANTED.get(name, ()), *options)


@pytest.mark.parametrize("options", [(-1, 1e-3), (4, 1e-3), (2, -1e-3), (2, float("nan")), (2, float("inf"))])
def test_unknown_options_of_features_are_refused(options: tuple[Any, ...]) -> None:
    for name, arguments in VALID.values():
        if name.startswith("attend"):
            with pytest.raises(ValueError, match=r"feature_map must be 0 to 3, got|eps must be finite and at least 0"):
                getattr(OPERATORS, name)(*arguments.values(), *WANTED.get(name, ()), *options)


@pytest.mark.parametrize("case", [case for case in VALID if "attend" in case and "token" not in case])
def test_sums_of_keys_are_refused_where_nothing_is_divided(case: str) -> None:
    name, arguments = VALID[case]
    if "keys" in arguments:
        with pytest.raises(ValueError, match=rf"flowformer::{name}: keys must have shape \(0,\), got"):
            getattr(OPERATORS, name)(*arguments.values(), *WANTED.get(name, ()), 2, None)


@pytest.mark.parametrize("case", VALID)
def test_layouts_do_not_matter(case: str) -> None:
    """Kernels that need adjacent elements get copies."""

    def apart(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        wide = torch.stack([x, torch.ones_like(x)], -1)
        return wide.transpose(0, -2).contiguous().transpose(0, -2)[..., 0]

    want, got = call(case), call(case, **{name: apart(x) for name, x in VALID[case][1].items()})
    for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", VALID)
def test_an_empty_batch_is_computed(case: str) -> None:
    if "packed" not in case:
        of_heads = {name for name, x in VALID[case][1].items() if x is None or x.ndim == 1}
        results = call(case, **{name: x[:0] for name, x in VALID[case][1].items() if name not in of_heads})
        found = [results] if isinstance(results, Tensor) else results
        assert all(x.shape[0] == 0 or (x.shape == (HEADS,) and not x.any()) for x in found)


@pytest.mark.parametrize("case", VALID)
def test_the_default_device_does_not_matter(case: str) -> None:
    want = call(case)
    with torch.device("meta"):
        got = call(case)
    for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want)), strict=True):
        assert torch.equal(one, other)
