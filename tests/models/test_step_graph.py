"""Generation as on a GPU: the step with its state in place, and few looks at what was computed.

What a CUDA graph does without a GPU cannot be run here; what it replays can.
"""

import re

import pytest
import torch

from flowformer.mechanisms import find_attention, list_attentions
from flowformer.models import generation, step_graph
from flowformer.models.generation import stream_tokens
from flowformer.models.language import LanguageModel
from flowformer.models.step_graph import StepGraph

FIXED = [name for name in list_attentions() if find_attention(name).can("causal", "state", "fixed state")]
GROWING = [name for name in list_attentions() if find_attention(name).can("causal", "state") and name not in FIXED]
OPTIONS = {"aft_local": {"window": 4, "position_dim": 3}, "aft_full": {"position_dim": 3}}
PROMPTS = ([3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8])


def build(attention="flow", **options):
    torch.manual_seed(0)
    options = {"attention_options": OPTIONS.get(attention), "max_length": 80, **options}
    return LanguageModel(31, dim=16, num_layers=2, num_heads=2, attention=attention, **options).eval()


@pytest.fixture
def replayed(monkeypatch):
    """Work in place of its graph, and what was warmed up: 1 for each step."""
    warm_ups = []

    def capture(work, warm_up, device):
        warm_up()
        warm_ups.append(1)
        return work

    monkeypatch.setattr(step_graph, "capture", capture)
    monkeypatch.setattr(generation, "check_graph", lambda _: None)
    return warm_ups


@pytest.mark.parametrize(
    ("attention", "options"),
    [*((name, {}) for name in FIXED), ("flow", {"attention_options": {"preset": "distance"}, "positions": None})],
)
def test_a_step_in_place_gives_the_same(replayed, attention, options):
    model, given = build(attention, **options), {"max_new_tokens": 60, "temperature": 0.8, "seed": 3}
    want = list(stream_tokens(model, PROMPTS, **given))
    assert len({int(token) for tokens in want for token in tokens}) > 5
    got = list(stream_tokens(model, PROMPTS, cuda_graph=True, **given))
    assert torch.equal(torch.stack(got), torch.stack(want))
    assert replayed == [1]


def test_the_state_before_is_read_before_it_is_overwritten(replayed):
    class Swapping:
        """Its state after a token is the one before, the other way round."""

        def step(self, tokens, state):
            one, other = state
            return one[:, None] + tokens[:, None], (other, one)

    tokens = torch.zeros(2, dtype=torch.int64)
    step = StepGraph(Swapping(), tokens, (torch.tensor([1, 2]), torch.tensor([3, 4])))
    assert [step(tokens).flatten().tolist() for _ in range(3)] == [[1, 2], [3, 4], [1, 2]]


def test_what_the_caller_holds_is_not_changed(replayed):
    model, tokens = build(), torch.tensor([1, 2])
    state = model.init_state(2)
    before = [part.clone() for layer in state.layers for part in layer]
    StepGraph(model, tokens, state)(tokens)
    assert all(
        torch.equal(*pair) for pair in zip(before, [part for layer in state.layers for part in layer], strict=True)
    )
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("steps", [10, 32, 45, 64])
def test_looking_at_times_only_gives_the_same_tokens(monkeypatch, steps):
    model = build(positions="sinusoidal", max_length=None)
    given = {"max_new_tokens": steps, "temperature": 2.0, "seed": 1, "eos_token_id": range(8)}
    want = model.generate(PROMPTS, **given)
    assert all(len(row) < len(prompt) + steps for row, prompt in zip(want, PROMPTS, strict=True))
    monkeypatch.setattr(generation, "may_look", lambda _: False)
    got = model.generate(PROMPTS, **given)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert len(list(stream_tokens(model, PROMPTS, **given))) == min(steps, 32)


@pytest.mark.parametrize("looking", [True, False])
def test_scores_that_are_not_finite_are_found(monkeypatch, looking):
    model = build()
    with torch.no_grad():
        model.embed.weight[5:] = torch.nan  # but for the prompt's
    monkeypatch.setattr(generation, "may_look", lambda _: looking)
    with pytest.raises(ValueError, match="logits of the next token are not finite"):
        model.generate([[1, 2]], max_new_tokens=70, temperature=3.0, seed=0)


def test_more_random_numbers_than_are_drawn_at_a_time(monkeypatch):
    model, given = build(positions="sinusoidal", max_length=None), {"max_new_tokens": 40, "seed": 1}
    want = model.generate(PROMPTS, **given)
    monkeypatch.setattr(generation, "DRAWS", 7)
    assert all(torch.equal(*pair) for pair in zip(model.generate(PROMPTS, **given), want, strict=True))


@pytest.mark.parametrize("attention", FIXED)
def test_a_step_of_a_model_waits_for_nothing(attention):
    """A tensor on the meta device has no values: looking at one is an error."""
    model = build(attention, device="meta")
    state, tokens = model.init_state(2), torch.zeros(2, dtype=torch.int64, device="meta")
    scores, state = model.step(tokens, state)
    assert model.step(tokens, state)[0].shape == scores.shape == (2, 31)


def test_refuses_a_model_that_is_not_on_a_gpu():
    with pytest.raises(ValueError, match="cuda_graph=True requires a model on a CUDA device, got one on cpu"):
        build().generate([[1]], max_new_tokens=1, cuda_graph=True)


@pytest.mark.parametrize("attention", GROWING)
def test_refuses_a_state_that_grows(monkeypatch, attention):
    monkeypatch.setattr(step_graph, "dtype_and_device", lambda _: {"device": torch.device("cuda")})
    reason = re.escape(find_attention(attention).cannot["fixed state"])
    with pytest.raises(ValueError, match=f"state of fixed size, and {attention} has none: {reason}$"):
        build(attention).generate([[1]], max_new_tokens=1, cuda_graph=True)
