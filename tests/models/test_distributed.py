"""The loss of a language model under DDP and FSDP2, on two processes of the CPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

import flowformer
from flowformer.models.language import LanguageModel


def build(*, tied: bool = False) -> LanguageModel:
    torch.manual_seed(0)
    return flowformer.create_model(
        "flowformer_gpt_nano", vocab_size=12, max_length=20, dim=8, num_heads=2, num_layers=1, dropout=0.0, tied=tied
    )


def tokens(rank: int) -> Tensor:
    return torch.randint(12, (2, 9), generator=torch.Generator().manual_seed(rank))


def mean_gradients(tied: bool) -> dict[str, Tensor]:
    """What two processes come to: the mean over their losses."""
    model = build(tied=tied)
    sum(model.loss(tokens(rank)) / 2 for rank in range(2)).backward()  # pyright: ignore[reportAttributeAccessIssue]
    return {name: parameter.grad for name, parameter in model.named_parameters()}  # pyright: ignore[reportReturnType]


def whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def check(rank: int, port: int) -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    for tied in (False, True):
        want = mean_gradients(tied)
        model = build(tied=tied)
        seen = tokens(rank)
        parallel = DistributedDataParallel(model)  # reduces gradients for as long as it lives
        parallel(seen[:, :-1], targets=seen[:, 1:]).backward()
        same({name: p.grad for name, p in model.named_parameters()}, want)
        model = build(tied=tied)
        for block in model.decoder.blocks:
            fully_shard(block)
        if model.head is not None:
            fully_shard(model.head)
        fully_shard(model)
        model.loss(seen).backward()
        same({name: whole(p.grad) for name, p in model.named_parameters()}, want)
    distributed.destroy_process_group()


def same(got: dict[str, Any], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_gradients_on_two_processes_are_those_of_the_mean_loss() -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(check, (port,), nprocs=2, start_method="spawn")  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("targets", [True, False])
def test_the_loss_runs_the_hooks_of_the_model_and_of_its_head(targets: bool) -> None:
    model, seen, ran = build(), tokens(0), []
    want = model.loss(seen[:, :-1], seen[:, 1:])
    model.register_forward_hook(lambda *_: ran.append("model"))
    model.head.register_forward_hook(lambda *_: ran.append("head"))  # pyright: ignore[reportOptionalMemberAccess]
    got = model.loss(seen[:, :-1], seen[:, 1:]) if targets else model.loss(seen)
    assert ran == ["head", "model"]
    torch.testing.assert_close(got, want)


def test_a_head_that_is_called_gives_the_gradients_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, results = tokens(0), []
    for hooked, chunk in ((False, 2**24), (True, 2**24), (True, 30)):
        monkeypatch.setattr("flowformer.models.vocabulary.cross_entropy.CHUNK_SCORES", chunk)
        model = build()
        if hooked:
            model.head.register_forward_hook(lambda *_: None)  # pyright: ignore[reportOptionalMemberAccess]
        loss = model.loss(seen)
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


def test_targets_come_without_a_state() -> None:
    seen = tokens(0)
    with pytest.raises(ValueError, match="targets and return_state are not supported together"):
        build()(seen, targets=seen, return_state=True)


def test_the_loss_of_forward_is_that_of_loss() -> None:
    model, seen = build(), tokens(0)
    mask = torch.arange(8).expand(2, -1) < torch.tensor([[8], [5]])
    given = {"targets": seen[:, 1:], "reduction": "none"}
    torch.testing.assert_close(model(seen[:, :-1], mask, **given), model.loss(seen[:, :-1], mask=mask, **given))
