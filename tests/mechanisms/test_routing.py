"""Routing attention: the forms that the laws do not call, what it approximates, and how centroids are learned."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize

from flowformer import create_attention, ops
from flowformer.mechanisms import find_attention
from flowformer.mechanisms.routing.operation import EPS

ROW = find_attention("routing")


def inputs(length, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 2, 4, generator=random, dtype=torch.float64) for _ in range(3)]


def directions(clusters, seed=1):
    drawn = torch.randn(2, clusters, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normalize(drawn, dim=-1)


def with_gradients(function, *tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def all_close(got, want, tolerance=1e-10):
    for one, other in zip(got, want, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= tolerance * other.abs().max()


FORMS = {
    "shared": {"shared_qk": True},
    "shared causal": {"shared_qk": True, "causal": True},
    "published causal": {"causal": True, "sees_future": True},
    "published shared causal": {"causal": True, "sees_future": True, "shared_qk": True},
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("length", [5, 41])
def test_forms_equal_truth(name, length):
    op, truth = (
        partial(function, centroids=directions(3), window=6, **FORMS[name])
        for function in (
            ops.routing_attention,
            lambda q, k, v, centroids, **given: ROW.truth(q, k, v, centroids, **given),
        )
    )
    tensors = inputs(length)
    all_close(with_gradients(op, *tensors), with_gradients(truth, *tensors))
    mask = torch.rand(2, length, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[:, :4] = True
    poisoned = [t.masked_fill(~mask[..., None, None], torch.nan) for t in tensors]
    want = with_gradients(partial(truth, mask=mask), *tensors)
    all_close(with_gradients(partial(op, mask=mask), *poisoned), want)


def test_shared_form_is_the_same_resumed_and_token_by_token():
    q, _, v = inputs(40)
    given = {"window": 4, "shared_qk": True}
    centroids = directions(3)
    attend = partial(ops.routing_attention, centroids=centroids, causal=True, return_state=True, **given)
    whole, last = attend(q, q, v)
    first, state = attend(q[:, :23], q[:, :23], v[:, :23])
    rest, resumed = attend(q[:, 23:], q[:, 23:], v[:, 23:], initial_state=state)
    all_close([torch.cat([first, rest], 1), *resumed[1:]], [whole, *last[1:]])
    outs = []
    for one, value in zip(q[:, 23:].unbind(1), v[:, 23:].unbind(1), strict=True):
        out, state = ops.routing_attention_step(one, one, value, state, centroids, **given)
        outs.append(out)
    all_close([torch.stack(outs, 1), *state[1:]], [rest, *last[1:]])
    assert torch.equal(state.tokens, last.tokens)


def test_published_causal_form_sees_the_future_and_ours_does_not():
    before, other = inputs(64), inputs(64, seed=9)
    after = [torch.cat([a[:, :40], b[:, 40:]], 1) for a, b in zip(before, other, strict=True)]
    attend = partial(ops.routing_attention, centroids=directions(4), causal=True, window=12)
    assert torch.equal(attend(*after)[:, :40], attend(*before)[:, :40])
    moved = (attend(*after, sees_future=True) - attend(*before, sees_future=True))[:, :40].abs().amax((-1, -2)) > 1e-3
    assert moved.double().mean() > 0.3


def test_token_in_no_cluster_has_an_output_of_zeros():
    out = ops.routing_attention(*inputs(40), directions(2), window=6)
    nothing = (out == 0).all(-1)
    assert (nothing.sum(1) >= 40 - 2 * 6).all()
    assert (nothing.sum(1) <= 40 - 6).all()


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_is_softmax(causal):
    q, k, v = inputs(40)
    got = ops.routing_attention(q, k, v, directions(1), causal=causal, window=40)
    want = ops.softmax_attention(q, k, v, causal=causal)
    all_close([got], [want if causal else want / (1 + EPS)])


@pytest.mark.parametrize("causal", [False, True])
def test_error_to_softmax_falls_with_windows_and_with_fewer_clusters(causal):
    q, k, v = inputs(128)
    exact = ops.softmax_attention(q, k, v, causal=causal)

    def error(clusters, window):
        errors = []
        for seed in range(4):
            got = ops.routing_attention(q, k, v, directions(clusters, seed), causal=causal, window=window)
            errors.append((got - exact).norm() / exact.norm())
        return float(torch.stack(errors).mean())

    by_window = [error(1 if causal else 4, window) for window in (4, 16, 64)]
    assert all(more < 0.9 * fewer for fewer, more in pairwise(by_window)), by_window
    by_clusters = [error(clusters, 128) for clusters in (8, 2, 1)] if causal else [error(4, 96), error(4, 128)]
    assert all(fewer < 0.9 * more for more, fewer in pairwise(by_clusters)), by_clusters


# ------------------------------------------------------------------------------------------------------ the module


def build(**options):
    torch.manual_seed(0)
    return create_attention("routing", 8, 2, num_clusters=3, window=4, seed=3, **options).double()


def tokens(length=30):
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_module_shares_queries_and_keys():
    module, x = build(shared_qk=True), tokens()
    assert not any(name.startswith("k_proj") for name in module.state_dict())
    qk, v = (part(x).unflatten(-1, (2, 4)) for part in (module.q_proj, module.v_proj))
    out = ops.routing_attention(qk, qk, v, module.centroids, window=4, shared_qk=True)
    assert torch.equal(module(x), module.out_proj(out.flatten(2)))
    for context in (tokens(20), tokens()):
        with pytest.raises(ValueError, match="context is not supported with shared_qk"):
            module(x, context)
    assert torch.equal(module(x, x), module(x))
    q, k, v = inputs(12)
    with pytest.raises(ValueError, match="shared_qk must be False in cross-attention, got 12 queries and 9 keys"):
        ops.routing_attention(q, k[:, :9], v[:, :9], directions(3), shared_qk=True)


def test_passes_do_not_move_centroids():
    module = build().train()
    before = module.centroids.clone()
    assert torch.allclose(before.norm(dim=-1), torch.ones(2, 3, dtype=torch.float64))
    module(tokens()).sum().backward()
    assert torch.equal(module.centroids, before)


@pytest.mark.parametrize("shared", [False, True])
def test_updates_are_those_of_k_means(shared):
    module, x = build(shared_qk=shared), tokens()
    with torch.no_grad():
        module.centroids[1, 1] = module.centroids[1, ::2].mean(0)  # between the others: nearest to none
    before = module.centroids.clone()
    layers = (module.q_proj,) if shared else (module.q_proj, module.k_proj)
    directions = torch.cat([normalize(layer(x).unflatten(-1, (2, 4)), dim=-1) for layer in layers], 1)
    nearest = torch.einsum("blhk,hck->blhc", directions, before).argmax(-1)
    module.update_centroids(x, decay=0.9)
    for head in range(2):
        for cluster in range(3):
            members = directions[:, :, head][nearest[:, :, head] == cluster]
            assert bool(len(members)) == ((head, cluster) != (1, 1))
            old = before[head, cluster]
            want = 0.9 * old + 0.1 * normalize(members.sum(0), dim=0) if len(members) else old
            torch.testing.assert_close(module.centroids[head, cluster], want)


def test_k_means_lowers_the_loss():
    module, x = build(), tokens()
    losses = []
    for _ in range(5):
        losses.append(module.commitment_loss(x).item())
        module.update_centroids(x, decay=0.0)
    assert all(after <= before for before, after in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]


def test_commitment_draws_queries_and_keys():
    module, x = build(), tokens()
    loss = module.commitment_loss(x, weight=1.0)
    loss.backward()
    with torch.no_grad():
        for layer in (module.q_proj, module.k_proj):
            layer.weight -= 0.1 * layer.weight.grad
    assert module.commitment_loss(x, weight=1.0) < loss
    assert module.v_proj.weight.grad is None


def test_padding_counts_neither_for_centroids_nor_for_the_loss():
    one, other = build(), build()
    mask = torch.arange(50) < 30
    padded = torch.cat([tokens(), torch.full((2, 20, 8), torch.nan, dtype=torch.float64)], 1)
    mask = mask.expand(2, -1)
    torch.testing.assert_close(one.commitment_loss(padded, mask=mask), other.commitment_loss(tokens()))
    one.update_centroids(padded, mask=mask)
    other.update_centroids(tokens())
    torch.testing.assert_close(one.centroids, other.centroids)


def test_wrong_options_are_refused():
    q, k, v = inputs(12)
    for options, kind, says in (
        ({"window": 0}, ValueError, "window must be positive, got 0"),
        ({"window": 2.0}, TypeError, "window must be a whole number, got 2.0"),
        ({"shared_qk": 1}, TypeError, "shared_qk must be True or False, got 1"),
        ({"sees_future": True}, ValueError, "sees_future is of the causal form"),
        ({"sees_future": True, "causal": True, "return_state": True}, ValueError, "sees_future must be False with a"),
        ({"centroids": None}, TypeError, r"centroids must be a floating-point tensor \(2, clusters, 4\), got NoneType"),
        ({"centroids": directions(3).long()}, TypeError, "centroids must be a floating-point tensor"),
        ({"centroids": directions(3)[..., :3]}, ValueError, r"must be \(2, clusters, 4\), got \(2, 3, 3\)"),
        ({"centroids": directions(3)[:, :0]}, ValueError, r"must be \(2, clusters, 4\), got \(2, 0, 4\)"),
    ):
        with pytest.raises(kind, match=says):
            ops.routing_attention(q, k, v, **{"centroids": directions(3), **options})
    state = ops.init_routing_state(2, 2, 4, 4, 3, window=6)
    step = partial(ops.routing_attention_step, q[:, 0], k[:, 0], v[:, 0], state, directions(3), window=6)
    assert step()[0].shape == (2, 2, 4)
    with pytest.raises(ValueError, match="sees_future must be False with a state"):
        step(sees_future=True)
    with pytest.raises(ValueError, match=r"initial_state.key must be \(2, 2, 3, 5, 4\).* got \(2, 2, 3, 6, 4\)"):
        step(window=5)
    for options, says in (({"decay": 1.5}, "decay must be at most 1"), ({"decay": -0.1}, "decay must be at least 0")):
        with pytest.raises(ValueError, match=says):
            build().update_centroids(tokens(), **options)
    with pytest.raises(ValueError, match="num_clusters must be positive, got 0"):
        create_attention("routing", 8, 2, num_clusters=0)
