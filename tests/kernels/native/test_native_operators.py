"""The native kernels as operators of PyTorch, and when they are chosen: compile, export, transforms, autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_inputs import Graphs, Recorder, all_close, both_forms, close, exact, inputs, native, needs_kernels, random
from torch import Tensor, nn
from torch.autograd import forward_ad

from flowformer import FlowAttention, cli, ops
from flowformer.kernels.native import build
from flowformer.kernels.native.kernels import kernels

OPERATORS = torch.ops.flowformer
CORE = ops.PRESETS["core"].values()
LRA = ops.PRESETS["lra"].values()

pytestmark = [
    needs_kernels,
    # PyTorch's own, where it loads the derivatives of forward mode
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    # and where opcheck runs an operator compiled
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def no_choice_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLOWFORMER_BACKEND", raising=False)


def ran(function: Callable[..., Any], *arguments: Any, **options: Any) -> list[str]:
    """The native operators that a call runs."""
    with Recorder() as recorder:
        function(*arguments, **options)
    return recorder.ran


# ---------------------------------------------------------------------------------------------------------- operators


def masked(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    random_ = torch.Generator().manual_seed(0)
    q, k, _ = tensors
    return torch.rand(k.shape[:2], generator=random_) < 0.7, torch.rand(q.shape[:2], generator=random_) < 0.7


def packed(tensors: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    whole = [t.flatten(0, 1).unsqueeze(0) for t in tensors]
    return whole, torch.tensor([0, 3, 3, whole[0].shape[1]], dtype=torch.int32)


def causal_arguments(kind: str) -> list[Any]:
    tensors, mask, bounds, sequences = inputs(9, keys=3, values=5), None, None, 2
    if kind == "packed":
        (tensors, bounds), sequences = packed(tensors), 3
    if kind == "masked":
        mask, _ = masked(tensors)
    _, state = native(*inputs(4, batch=sequences, keys=3, values=5), causal=True, return_state=True)
    return [*tensors, mask, bounds, log_decay_of(kind), *state]


def log_decay_of(kind: str) -> Tensor | None:
    return {"decay": -random(2).abs(), "decay-token": -random(2, 9, 2).abs()}.get(kind)


def bidirectional_arguments(kind: str) -> list[Any]:
    sources = 7 if kind in ("plain", "masked") else 9
    tensors, masks, bounds = inputs(9, sources, keys=3, values=5), (None, None), None
    if kind == "packed":
        tensors, bounds = packed(tensors)
    if kind == "masked":
        masks = masked(tensors)
    return [*tensors, *masks, bounds, log_decay_of(kind)]


def with_leaves(arguments: list[Any]) -> list[Any]:
    return [
        x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
    ]


options = pytest.mark.parametrize("options", [CORE, LRA], ids=["core", "lra"])
# Shapes and gradients by kind of arguments do not depend on options: with the others, of one kind.
kinds_and_options = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, given, id=f"{name}-{kind}", marks=[pytest.mark.slow] * (name == "lra" and kind != "plain"))
        for name, given in (("core", CORE), ("lra", LRA))
        for kind in ("plain", "masked", "packed", "decay", "decay-token")
    ],
)


@kinds_and_options
def test_operators_of_the_causal_form_are_as_pytorch_wants_them(kind: str, options: tuple[Any, ...]) -> None:
    arguments = causal_arguments(kind)
    torch.library.opcheck(OPERATORS.flow_causal.default, (*with_leaves(arguments), *options))
    upstream = [random(*arguments[2].shape), *(random(*part.shape).double() for part in arguments[6:])]
    torch.library.opcheck(OPERATORS.flow_causal_backward.default, (*arguments, *upstream, True, *options))
    alone = [upstream[0], None, None, None, None]
    torch.library.opcheck(OPERATORS.flow_causal_backward.default, (*arguments, *alone, False, *options))


@kinds_and_options
def test_operators_of_the_bidirectional_form_are_as_pytorch_wants_them(kind: str, options: tuple[Any, ...]) -> None:
    arguments = bidirectional_arguments(kind)
    torch.library.opcheck(OPERATORS.flow_bidirectional.default, (*with_leaves(arguments), *options))
    q, _, v = arguments[:3]
    upstream = random(*q.shape[:3], v.shape[-1])
    torch.library.opcheck(OPERATORS.flow_bidirectional_backward.default, (*arguments, upstream, True, *options))


@options
def test_the_step_is_as_pytorch_wants_it(options: tuple[Any, ...]) -> None:
    q, k, v, _, _, _, *state = causal_arguments("plain")
    for log_decay in (None, -random(2).abs(), -random(2, 2).abs()):
        torch.library.opcheck(OPERATORS.flow_step.default, (q[:, 0], k[:, 0], v[:, 0], log_decay, *state, *options))


@both_forms
def test_gradients_of_gradients_are_refused(causal: bool) -> None:
    leaves = [t.requires_grad_() for t in inputs(9)]
    out = native(*leaves, causal=causal)
    # With a term beside it whose second derivative exists, dropping the first's would go unnoticed.
    with pytest.raises(RuntimeError, match="native kernels do not support second-order gradients: omit create_graph"):
        torch.autograd.grad(out.sum() + leaves[0].pow(3).sum(), leaves, create_graph=True)


def test_gradients_of_gradients_come_from_pytorch_where_it_is_asked_for() -> None:
    leaves = [t.double().requires_grad_() for t in inputs(3, batch=1, heads=1, keys=2, values=2)]
    assert torch.autograd.gradgradcheck(functools.partial(ops.flow_attention, backend="torch"), leaves)


# --------------------------------------------------------------------------------------------------- compile and export


class Model(nn.Module):
    """Two layers, as a language model has them."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(FlowAttention(16, 2, causal=causal) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.layer_norm(x, x.shape[-1:]))
        return x


def results(function: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    out = function(x)
    out.square().sum().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


@pytest.fixture
def compiled_afresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@both_forms
@pytest.mark.usefixtures("compiled_afresh")
def test_compiles_whole_and_keeps_the_operators(causal: bool) -> None:
    model, graphs = Model(causal), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend)
    x = random(2, 40, 16)
    all_close(results(compiled, model, x), results(model, model, x), 1e-6)
    name = "flowformer.flow_causal" if causal else "flowformer.flow_bidirectional"
    assert graphs.operators() == [[f"{name}.default"] * 2, [f"{name}_backward.default"] * 2]


@pytest.mark.usefixtures("compiled_afresh")
def test_compiles_by_name_of_backend() -> None:
    model, x = Model(), random(2, 40, 16)
    all_close(
        results(torch.compile(model, fullgraph=True, backend="aot_eager"), model, x), results(model, model, x), 1e-6
    )


@both_forms
@pytest.mark.usefixtures("compiled_afresh")
def test_compiles_once_for_every_length(causal: bool) -> None:
    model, graphs = Model(causal), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs.backend, dynamic=True)
    for length in (40, 33, 1000):
        x = random(2, length, 16)
        all_close(results(compiled, model, x), results(model, model, x), 1e-6)
    assert len(graphs.kept) == 2  # one forward, one backward


@pytest.mark.usefixtures("compiled_afresh")
def test_a_step_compiles() -> None:
    layer, graphs = FlowAttention(16, 2, causal=True), Graphs()
    compiled = torch.compile(layer.step, fullgraph=True, backend=graphs.backend)
    state = other = layer.init_state(3)
    with torch.no_grad():
        for seed in range(4):
            x = random(3, 16, seed=seed)
            want, state = layer.step(x, state)
            got, other = compiled(x, other)
            close(got, want, 1e-6)
    assert graphs.operators() == [["flowformer.flow_step.default"]]


@pytest.mark.slow
@both_forms
@pytest.mark.usefixtures("compiled_afresh")
def test_compiles_with_inductor(causal: bool) -> None:
    model, x = Model(causal), random(2, 40, 16)
    all_close(results(torch.compile(model, fullgraph=True), model, x), results(model, model, x), 1e-5)


@both_forms
def test_what_is_exported_runs_without_this_package(causal: bool) -> None:
    model, x = Model(causal).eval(), random(2, 40, 16)
    program = torch.export.export(model, (x,))
    assert not [node for node in program.graph.nodes if "flowformer" in str(node.target)]
    assert ran(model, x) == [f"flow_{'causal' if causal else 'bidirectional'}"] * 2
    with torch.no_grad():
        close(program.module()(x), model(x))


# ---------------------------------------------------------------------------------------------------------- transforms


def by_vmap(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.vmap(f)(*(torch.stack([t, 2 * t, -t]) for t in (q, k, v)))


def by_jvp(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.jvp(f, (q, k, v), (v, q, k))[1]


def by_grad(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.func.grad(lambda q: f(q, k, v).square().sum())(q)


def by_dual_numbers(f: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(q, k), k, v)).tangent


TRANSFORMS = {"vmap": by_vmap, "jvp": by_jvp, "grad": by_grad, "dual numbers": by_dual_numbers}


@both_forms
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_left_to_pytorch(transform: str, causal: bool) -> None:
    tensors, seen = inputs(6), []

    def attention(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        seen.append(ops.explain("flow_attention", q, k, v, causal=causal, backend=backend))
        return ops.flow_attention(q, k, v, causal=causal, backend=backend)

    def run(backend: str) -> Tensor:
        return TRANSFORMS[transform](functools.partial(attention, backend=backend), *tensors)

    want = run("torch")
    seen.clear()
    got = run("auto")
    assert got.any()
    assert torch.equal(got, want)
    assert seen[0].backend == "torch"
    assert "torch.func transforms and forward-mode differentiation" in seen[0].why
    with pytest.raises(ValueError, match=r"backend 'native' .* cannot run here: .* torch.func transforms"):
        run("native")


@both_forms
def test_transforms_are_right(causal: bool) -> None:
    tensors = [t.double() for t in inputs(70)]
    attend = functools.partial(ops.flow_attention, causal=causal)
    q, k, v = (torch.stack([t, 2 * t]) for t in tensors)
    by_one = torch.func.vmap(attend)(q, k, v)
    assert torch.allclose(by_one, torch.stack([attend(*row) for row in zip(q, k, v, strict=True)]))
    wanted = torch.autograd.grad(attend(tensors[0].requires_grad_(), *tensors[1:]).square().sum(), tensors[0])[0]
    q, k, v = (t.detach() for t in tensors)
    assert torch.allclose(by_grad(attend, q, k, v), wanted)
    out, back = torch.func.vjp(attend, q, k, v)
    forward = (by_jvp(attend, q, k, v) * out).sum()  # along (v, q, k)
    assert torch.allclose(forward, sum((g * t).sum() for g, t in zip(back(out), (v, q, k), strict=True)))


@both_forms
def test_under_autocast_bfloat16_is_worth_its_inputs(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(causal).eval(), random(2, 200, 16)
    outs = {}
    with torch.no_grad():
        want = copy_in_float64(model)(x.double())
        for backend in ("native", "torch"):
            monkeypatch.setenv("FLOWFORMER_BACKEND", backend)
            with torch.autocast("cpu", torch.bfloat16):
                assert len(ran(model, x)) == (2 if backend == "native" else 0)
                outs[backend] = model(x).double()
    errors = {backend: (out - want).abs().max() for backend, out in outs.items()}
    assert errors["native"] <= 2 * errors["torch"]
    assert errors["native"] <= 2**-7 * want.abs().max()


def copy_in_float64(model: Model) -> nn.Module:
    made = Model(model.layers[0].causal).double().eval()
    made.load_state_dict(model.state_dict())
    return made


# -------------------------------------------------------------------------------------------------- which one is chosen


def test_native_runs_where_it_can() -> None:
    tensors = inputs(9)
    token, state = [t[:, 0] for t in tensors], ops.init_flow_state(2, 2, 8, 8)
    assert ran(ops.flow_attention, *tensors) == ["flow_bidirectional"]
    assert ran(ops.flow_attention, *tensors, causal=True) == ["flow_causal"]
    assert ran(ops.flow_attention, *(t.bfloat16() for t in tensors)) == ["flow_bidirectional"]
    assert ran(ops.flow_attention_step, *token, state) == ["flow_step"]
    assert ran(ops.flow_attention_step, token[0].requires_grad_(), *token[1:], state) == ["flow_causal"]
    for plain in (
        lambda: ops.flow_attention(*tensors, backend="torch"),
        lambda: ops.flow_attention(*(t.double() for t in tensors)),
        lambda: ops.flow_attention(*(t.half() for t in tensors)),
        lambda: ops.flow_attention_step(*token, state, backend="torch"),
        lambda: ops.softmax_attention(*tensors),
    ):
        assert ran(plain) == []


def cannot(says: str) -> Any:
    return pytest.raises(ValueError, match=rf"(?s)backend 'native' \(requested by .*\) cannot run here: .*{says}")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (Tensor.double, "float32 and bfloat16, not float64"),
        (Tensor.half, "float32 and bfloat16, not float16"),
        (lambda t: t.to("meta"), "run on the CPU, not on meta"),
    ],
    ids=["float64", "float16", "meta"],
)
def test_native_says_why_it_cannot(change: Callable[[Tensor], Tensor], says: str) -> None:
    tensors = [change(t) for t in inputs(6)]
    with cannot(says):
        native(*tensors)
    with cannot(says):
        native(*tensors, causal=True)
    with cannot(says):
        state = ops.init_flow_state(2, 2, 8, 8, device=tensors[0].device)
        ops.flow_attention_step(*(t[:, 0] for t in tensors), state, backend="native")
    explained = ops.explain("flow_attention", *tensors)
    assert explained.backend == "torch"
    assert says in explained.why


def test_native_says_that_an_operation_has_none() -> None:
    with cannot("softmax_attention has no native kernels"):
        ops.softmax_attention(*inputs(6), backend="native")
    assert "softmax_attention has no native kernels" in ops.explain("softmax_attention", *inputs(6)).why


@pytest.mark.parametrize("off", ["0", "off", "FALSE", "no"])
def test_native_says_that_it_is_switched_off(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.SWITCH, off)
    with cannot(f"switched off by FLOWFORMER_NATIVE={off}"):
        native(*inputs(6))
    assert ran(ops.flow_attention, *inputs(6)) == []
    explained = ops.explain("flow_attention", *inputs(6))
    assert explained.backend == "torch"
    assert f"switched off by FLOWFORMER_NATIVE={off}" in explained.why
    monkeypatch.setenv(build.SWITCH, "1")
    assert ran(ops.flow_attention, *inputs(6)) == ["flow_bidirectional"]


def test_environment_is_obeyed_and_the_argument_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(6)
    monkeypatch.setenv("FLOWFORMER_BACKEND", "torch")
    assert ran(ops.flow_attention, *tensors) == []
    assert ops.explain("flow_attention", *tensors).why == "requested by FLOWFORMER_BACKEND"
    assert ran(native, *tensors) == ["flow_bidirectional"]
    monkeypatch.setenv("FLOWFORMER_BACKEND", "native")
    assert ran(ops.flow_attention, *tensors) == ["flow_bidirectional"]
    assert ran(ops.flow_attention, *tensors, backend="torch") == []
    with cannot("not float64"):
        ops.flow_attention(*(t.double() for t in tensors))
    monkeypatch.setenv("FLOWFORMER_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"unknown backend 'abacus' \(requested by FLOWFORMER_BACKEND\)"):
        ops.flow_attention(*tensors)


def test_a_level_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.LEVEL_VARIABLE, "avx1024")
    for backend in ("auto", "native"):
        with pytest.raises(ValueError, match=r"FLOWFORMER_NATIVE_LEVEL=avx1024: available on this machine: .*portable"):
            ops.flow_attention(*inputs(6), backend=backend)


def test_doctor_reports_a_level_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv(build.LEVEL_VARIABLE, "avx1024")
    monkeypatch.setenv("FLOWFORMER_BACKEND", "torch")
    assert cli.main(["doctor"]) == 2
    assert "FLOWFORMER_NATIVE_LEVEL=avx1024: available on this machine: " in capsys.readouterr().err


def test_every_level_of_this_machine_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.load()
    assert library is not None
    for causal in (False, True):
        want = exact(*inputs(100, keys=20), causal=causal)
        for level in library.levels:
            monkeypatch.setenv(build.LEVEL_VARIABLE, level)
            assert kernels().level == level
            close(native(*inputs(100, keys=20), causal=causal), want)


@pytest.mark.parametrize("level", ["best", "portable"])
def test_level_and_origin_are_told(level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    library = build.load()
    assert library is not None
    if level == "best":
        monkeypatch.delenv(build.LEVEL_VARIABLE, raising=False)
        level = library.levels[0]
    else:
        monkeypatch.setenv(build.LEVEL_VARIABLE, level)
    explained = ops.explain("flow_attention", *inputs(6))
    assert explained.backend == "native"
    assert cli.main(["doctor"]) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("backend")]
    for text in (explained.why, told):
        for part in (level, library.how, library.threads):
            assert part in text
    assert "native" in told


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_go_through_checkpointing(causal):
    """Which hands out what was saved only once."""
    q, k, v = (torch.randn(1, 20, 2, 4, requires_grad=True) for _ in range(3))

    def attend(*tensors):
        return ops.flow_attention(*tensors, causal=causal, backend="native")

    wanted = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    out = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)
    for one, other in zip(torch.autograd.grad(out.square().sum(), (q, k, v)), wanted, strict=True):
        torch.testing.assert_close(one, other)
