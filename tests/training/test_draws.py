"""Random numbers of one training, apart from PyTorch's."""

import threading
import warnings

import pytest
import torch
from torch import nn

from flowformer.training.draws import Draws
from flowformer.training.quiet import quiet


def draw() -> list[torch.Tensor]:
    drop, part = nn.Dropout(0.3), torch.empty(2, 3)
    return [
        nn.Linear(3, 4).weight.detach(), nn.init.trunc_normal_(torch.empty(5)), nn.init.xavier_uniform_(part),
        drop(torch.ones(40)), torch.empty(6).bernoulli_(0.4), torch.randn(3), torch.rand(2, 2), torch.randperm(9),
        torch.nn.functional.dropout(torch.ones(9), 0.5), torch.normal(torch.zeros(3), torch.ones(3)),
    ]  # fmt: skip


def test_numbers_are_those_of_pytorch_and_its_state_is_left():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        wanted = draw()
        state = torch.get_rng_state()
        draws = Draws(3)
        with draws:
            found = draw()
            draws.seed(3)
            again = draw()
        assert torch.equal(torch.get_rng_state(), state)
    for one, other, third in zip(wanted, found, again, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_gradients_are_those_of_dropout():
    x = torch.randn(50, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        nn.functional.dropout(x, 0.4).square().sum().backward()
    wanted, x.grad = x.grad, None
    with Draws(1):
        nn.functional.dropout(x, 0.4).square().sum().backward()
        assert nn.functional.dropout(x, 0.4, training=False) is not None
        assert (nn.functional.dropout(torch.ones(5), 1.0) == 0).all()
    torch.testing.assert_close(x.grad, wanted, rtol=0, atol=0)


def test_other_threads_draw_as_they_did():
    inside, done, found = threading.Event(), threading.Event(), []

    def other():
        inside.wait(10)
        found.append(torch.get_rng_state())
        torch.rand(1)
        found.append(torch.get_rng_state())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with Draws(0):
        inside.set()
        done.wait(10)
        before = torch.get_rng_state()
        torch.rand(5)
        assert torch.equal(torch.get_rng_state(), before)
    thread.join()
    assert not torch.equal(found[0], found[1])


def test_quiet_leaves_the_filters_of_others():
    with warnings.catch_warnings():
        before = list(warnings.filters)
        first, second = quiet(), quiet()
        first.__enter__()
        second.__enter__()
        warnings.filterwarnings("error", "of the program")
        first.__exit__(None, None, None)
        warnings.warn("this does not have many workers at all", UserWarning, stacklevel=1)
        second.__exit__(None, None, None)
        with pytest.raises(UserWarning, match="of the program"):
            warnings.warn("of the program", UserWarning, stacklevel=1)
        assert warnings.filters[1:] == before
