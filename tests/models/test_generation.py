"""Generation: what a batch gives, each prompt gives alone, and the parallel form of the model agrees."""

import gc
import math
from itertools import islice

import pytest
import torch
from torch import nn

from flowformer.mechanisms import find_attention, list_attentions
from flowformer.models import generation
from flowformer.models.generation import next_probabilities, stream_tokens
from flowformer.models.language import LanguageModel

CAUSAL = [name for name in list_attentions() if find_attention(name).can("causal")]
# Sorts, of all tokens so far or of clusters, take long: two of their tests are slow.
STEPPING = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ("reformer", "routing", "sinkhorn"))) for name in CAUSAL
]
VOCABULARY, LENGTH = 31, 24
SMALL = {"dim": 16, "num_layers": 2, "num_heads": 2, "max_length": LENGTH}
OPTIONS = {
    "aft_local": {"window": 4, "position_dim": 3},
    "aft_full": {"position_dim": 3},
    "aft_conv": {"kernel_size": 3},
}
PROMPTS = ([3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8])


def build(attention="flow", **options):
    """A model in float64 whose matrices are of a size to matter, so that it does not say the same again and again."""
    torch.manual_seed(0)
    options = {**SMALL, "attention": attention, "attention_options": OPTIONS.get(attention), **options}
    model = LanguageModel(VOCABULARY, **options).double().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("gamma"):  # fresh filters of AFT-conv are zero
            nn.init.normal_(parameter, std=0.3)
    return model


def build_constant(probabilities):
    """A model that gives the next token these probabilities, whatever came before."""
    model = LanguageModel(len(probabilities), dim=4, num_layers=1, num_heads=1, positions=None, dropout=0.0)
    with torch.no_grad():
        model.decoder.norm.weight.zero_()
        model.decoder.norm.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
        model.head.weight[:, 0] = torch.tensor(probabilities).log()
    return model


def collect(model, prompts, **options):
    """All tokens as lists, row by row."""
    return torch.stack(list(stream_tokens(model, prompts, **options)), 1).tolist()


def draw(row, steps, seed):
    generator = torch.Generator().manual_seed(seed + row)
    return [torch.rand(1, generator=generator, dtype=torch.float64).item() for _ in range(steps)]


def pick(scores, share, **options):
    """The token whose part of [0, 1) holds a number, by a plain loop over probabilities."""
    if options.get("temperature") == 0:
        return max(range(len(scores)), key=scores.tolist().__getitem__)
    total = 0.0
    probabilities = next_probabilities(scores, **options).tolist()
    for token, probability in enumerate(probabilities):
        total += probability
        if share < total:
            return token
    raise AssertionError(f"{share} is beyond {total}")


def by_whole_sequences(model, prompts, steps, seed=0, **options):
    """What generate must give: each row by itself, its whole sequence read again for each token."""
    rows = []
    for row, prompt in enumerate(prompts):
        tokens = list(prompt)
        for share in draw(row, steps, seed):
            tokens.append(pick(model(torch.tensor([tokens]))[0, -1], share, **options))
        rows.append(tokens[len(prompt) :])
    return rows


@pytest.mark.parametrize(("temperature", "chunk"), [(0, 100), (0.7, 3)])
@pytest.mark.parametrize("attention", STEPPING)
def test_equals_whole_sequences(attention, temperature, chunk):
    model = build(attention)
    got = collect(model, PROMPTS, max_new_tokens=8, temperature=temperature, seed=5, chunk_size=chunk)
    assert got == by_whole_sequences(model, PROMPTS, 8, seed=5, temperature=temperature)
    assert len({token for row in got for token in row}) > 4


@pytest.mark.parametrize("attention", CAUSAL)
def test_a_prompt_gives_in_a_batch_what_it_gives_alone(attention):
    model, options = build(attention), {"max_new_tokens": 8, "top_k": 9, "top_p": 0.9}
    together = collect(model, PROMPTS, seed=5, **options)
    alone = [collect(model, [prompt], seed=5 + row, **options)[0] for row, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert collect(model, [[0] * 16, *PROMPTS[1:]], seed=5, **options)[1:] == together[1:]


@pytest.mark.parametrize("attention", STEPPING)
def test_pieces_of_a_prompt_do_not_matter(attention):
    model, prompts = build(attention), [*PROMPTS, list(range(15))]
    one, *others = (
        collect(model, prompts, max_new_tokens=6, seed=1, chunk_size=chunk) for chunk in (15, 1, 2, 7, 4096)
    )
    assert all(one == other for other in others)


def test_a_piece_at_a_time_and_one_position_is_scored(monkeypatch):
    model, seen = build(positions="sinusoidal", max_length=None), []
    hidden, logits = model.hidden, model.logits
    monkeypatch.setattr(model, "hidden", lambda x, *rest, **more: (seen.append(x.shape), hidden(x, *rest, **more))[1])
    monkeypatch.setattr(model, "logits", lambda x: (seen.append(x.shape), logits(x))[1])
    next(stream_tokens(model, [[1] * 100, [2] * 30], max_new_tokens=1, chunk_size=40))
    assert seen == [(2, 40), (2, 40), (2, 20), (2, 16)]


def test_tensors_and_lists_are_prompts():
    model = build()
    wanted = collect(model, PROMPTS, max_new_tokens=3, seed=0)
    assert collect(model, [torch.tensor(prompt) for prompt in PROMPTS], max_new_tokens=3, seed=0) == wanted
    assert (
        collect(model, [torch.tensor(PROMPTS[0], dtype=torch.uint8), *PROMPTS[1:]], max_new_tokens=3, seed=0) == wanted
    )
    square = torch.tensor([PROMPTS[2], PROMPTS[2]])
    assert collect(model, square, max_new_tokens=3, seed=0) == collect(
        model, [PROMPTS[2]] * 2, max_new_tokens=3, seed=0
    )


def test_three_thousand_tokens_from_a_state_that_does_not_grow(monkeypatch):
    model = build(dim=8, num_layers=1, positions="sinusoidal", max_length=None)
    states, step = [], model.step
    monkeypatch.setattr(model, "step", lambda tokens, state: (states.append(sizes(state)), step(tokens, state))[1])
    tokens, alive = [], []
    for number, token in enumerate(stream_tokens(model, [[7]], max_new_tokens=3000, temperature=0.9, seed=2)):
        tokens.append(int(token))
        if number in (100, 2900):
            alive.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert len(tokens) == 3000
    assert len(states) == 2999
    assert len(set(states)) == 1
    assert alive[0] == alive[1]
    scores = model(torch.tensor([[7, *tokens[:-1]]]))[0]
    assert tokens == [pick(*pair, temperature=0.9) for pair in zip(scores, draw(0, 3000, 2), strict=True)]


def sizes(state):
    return tuple(tuple(part.shape) for layer in state.layers for part in layer)


# ------------------------------------------------------------------------------------------------------------ sampling

GIVEN = (0.02, 0.4, 0.08, 0.3, 0.2)
ALLOWED = [
    ({}, {0, 1, 2, 3, 4}),
    ({"top_k": 1}, {1}),
    ({"top_k": 3}, {1, 3, 4}),
    ({"top_k": 5}, {0, 1, 2, 3, 4}),
    ({"top_k": 1000}, {0, 1, 2, 3, 4}),
    ({"top_p": 1e-9}, {1}),
    ({"top_p": 0.39}, {1}),
    ({"top_p": 0.41}, {1, 3}),
    ({"top_p": 0.71}, {1, 3, 4}),
    ({"top_p": 0.97}, {1, 2, 3, 4}),
    ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
    # Of the two that top-k leaves, the likelier has 0.57 and not 0.4: top-k comes first.
    ({"top_k": 2, "top_p": 0.5}, {1}),
    ({"top_k": 2, "top_p": 0.6}, {1, 3}),
    # And temperature before both: squares are 0.0004, 0.16, 0.0064, 0.09, 0.04, of 0.2968.
    ({"temperature": 0.5, "top_p": 0.53}, {1}),
    ({"temperature": 0.5, "top_p": 0.55}, {1, 3}),
    ({"temperature": 2.0, "top_p": 0.55}, {1, 3}),
    ({"temperature": 2.0, "top_p": 0.62}, {1, 3, 4}),
]


def renormalise(allowed, temperature=1.0, **_):
    weights = [given ** (1 / temperature) if token in allowed else 0 for token, given in enumerate(GIVEN)]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize(("options", "allowed"), ALLOWED)
def test_probabilities_are_those_of_the_allowed_tokens(options, allowed):
    scores = torch.tensor(GIVEN, dtype=torch.float64).log() + 700
    wanted = torch.tensor(renormalise(allowed, **options), dtype=torch.float64)
    got = next_probabilities(torch.stack((scores, scores.flip(0))), **options)
    torch.testing.assert_close(got, torch.stack((wanted, wanted.flip(0))), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("options", "allowed"), ALLOWED)
def test_tokens_are_as_frequent_as_they_are_likely(options, allowed):
    rows, steps = 50, 100
    got = collect(build_constant(GIVEN), [[0]] * rows, max_new_tokens=steps, seed=11, **options)
    counts = torch.tensor(got).flatten().bincount(minlength=5).tolist()
    assert {token for token, count in enumerate(counts) if count} == allowed
    for count, wanted in zip(counts, renormalise(allowed, **options), strict=True):
        deviation = math.sqrt(rows * steps * wanted * (1 - wanted))
        assert abs(count - rows * steps * wanted) <= 4 * deviation
    if len(allowed) > 1:
        assert len({tuple(row) for row in got}) == rows


def test_ties():
    scores = torch.tensor([1.0, 2.0, 2.0, 0.0, 2.0])
    assert next_probabilities(scores, top_k=1).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 0, 1 / 3])
    assert next_probabilities(scores, top_k=1, top_p=0.5).tolist() == pytest.approx([0, 0.5, 0.5, 0, 0])
    assert next_probabilities(torch.zeros(1024), top_p=0.5).tolist() == [1 / 512] * 512 + [0] * 512


@pytest.mark.parametrize(("share", "wanted"), [(0.0, 1), (1 - 2.0**-53, 10)])
def test_the_ends_of_what_may_be_drawn(monkeypatch, share, wanted):
    # Ten tenths sum to less than one, and what top-k leaves out stands before and behind them.
    model = build_constant([0.01, *[0.098] * 10, 0.01])
    monkeypatch.setattr(torch, "rand", lambda *sizes, generator, dtype: torch.full(sizes, share, dtype=dtype))
    assert collect(model, [[0]], max_new_tokens=1, top_k=10) == [[wanted]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-6])
def test_low_temperatures_are_greedy(temperature):
    model = build()
    assert collect(model, PROMPTS, max_new_tokens=5, temperature=temperature) == collect(
        model, PROMPTS, max_new_tokens=5, temperature=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_of_other_dtypes_sample_in_float64(dtype):
    assert next_probabilities(torch.randn(2, 9, dtype=dtype)).dtype == torch.float64
    got = collect(build().to(dtype), PROMPTS, max_new_tokens=5, seed=0)
    assert all(0 <= token < VOCABULARY for row in got for token in row)


def test_seed_alone_decides():
    model, options = build(), {"max_new_tokens": 8}
    before = torch.get_rng_state()
    one = collect(model, PROMPTS, seed=3, **options)
    torch.manual_seed(99)
    assert collect(model, PROMPTS, seed=3, **options) == one
    assert collect(model, PROMPTS, seed=4, **options) != one
    assert collect(model, PROMPTS, **options) != collect(model, PROMPTS, **options)
    torch.set_rng_state(before)
    collect(model, PROMPTS, **options)
    assert torch.equal(torch.get_rng_state(), before)
    same = collect(model, [[1, 2]] * 4, seed=3, **options)
    assert len({tuple(row) for row in same}) == 4
    assert collect(model, [[1, 2]], seed=2**32 - 1, **options) != collect(model, [[1, 2]], seed=0, **options)


# ---------------------------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("attention", ["flow", "softmax"])
def test_rows_stop_by_themselves(attention):
    model, options = build(attention), {"max_new_tokens": 12, "seed": 0, "temperature": 2.0}
    free = collect(model, PROMPTS, **options)
    stop = {free[0][2], free[1][7], free[2][4]}
    first = [next(place for place, token in enumerate(row) if token in stop) for row in free]
    assert len(set(first)) > 1
    assert max(first) < 11
    got = collect(model, PROMPTS, eos_token_id=stop, **options)
    steps = max(first) + 1
    for row, before, end in zip(got, free, first, strict=True):
        assert row == before[: end + 1] + [-1] * (steps - end - 1)


def test_nothing_is_computed_after_all_have_stopped(monkeypatch):
    model, calls = build(), []
    count(monkeypatch, model, calls)
    (first,) = collect(model, PROMPTS[:1], max_new_tokens=1, temperature=0)
    assert collect(model, PROMPTS[:1], max_new_tokens=9, temperature=0, eos_token_id=first) == [first]
    assert calls == ["hidden", "hidden"]


def count(monkeypatch, model, calls):
    """Note each call of the model by name."""

    def watch(name, method):
        def call(*given, **more):
            calls.append(name)
            return method(*given, **more)

        monkeypatch.setattr(model, name, call)

    watch("hidden", model.hidden)
    watch("step", model.step)


# ------------------------------------------------------------------------------------------------- manners of a guest


def test_tokens_come_as_they_are_asked_for(monkeypatch):
    model, calls = build(positions="sinusoidal", max_length=None), []
    count(monkeypatch, model, calls)
    tokens = stream_tokens(model, PROMPTS, max_new_tokens=10**12)
    assert calls == []
    next(tokens)
    assert calls == ["hidden"]
    assert len(list(islice(tokens, 3))) == 3
    assert calls == ["hidden", "step", "step", "step"]


def test_the_model_is_left_as_it_was():
    model = build(dropout=0.5)
    wanted = collect(model, PROMPTS, max_new_tokens=6, temperature=0)
    model.embed.register_forward_hook(lambda *_: inside.append(torch.is_inference_mode_enabled()))
    model.train()
    model.decoder.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    got, inside = [], []
    for token in stream_tokens(model, PROMPTS, max_new_tokens=6, temperature=0):
        got.append(token)
        assert all(inside)
        assert [module.training for module in model.modules()] == modes
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        model.loss(token.unsqueeze(0)).backward()
        inside.clear()
    assert torch.stack(got, 1).tolist() == wanted
    assert not any(token.is_inference() for token in got)


def test_the_model_is_left_as_it_was_when_it_fails():
    model = build().train()
    tokens = stream_tokens(model, PROMPTS, max_new_tokens=6)
    next(tokens)
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits of the next token are not finite"):
        list(tokens)
    assert all(module.training for module in model.modules())
    assert not torch.is_inference_mode_enabled()


def test_scores_that_are_not_finite_are_refused_by_greed_too():
    model = build()
    with torch.no_grad():
        model.embed.weight[6, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        next(stream_tokens(model, PROMPTS, max_new_tokens=1, temperature=0))


# -------------------------------------------------------------------------------------------------------------- limits


def limits_length(attention):
    module = find_attention(attention).module
    return module.learns_positions or module.bounds_causal


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", None])
@pytest.mark.parametrize("attention", CAUSAL)
def test_learned_positions_are_used_to_the_last_and_no_further(attention, positions):
    model = build(attention, positions=positions)
    longest = len(PROMPTS[0])
    last = LENGTH - longest + 1
    assert len(collect(model, PROMPTS, max_new_tokens=last)[0]) == last
    if positions == "learned" or limits_length(attention):
        message = rf"a prompt of 7 tokens and max_new_tokens = {last + 1} need 25 positions .* has {LENGTH}"
        with pytest.raises(ValueError, match=message):
            stream_tokens(model, PROMPTS, max_new_tokens=last + 1)
    else:
        assert len(collect(model, PROMPTS, max_new_tokens=last + 1)[0]) == last + 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": []}, ValueError, "at least one sequence of tokens, got none"),
        ({"prompts": [[1], []]}, ValueError, r"prompts\[1\] is empty"),
        ({"prompts": [torch.zeros(0)]}, ValueError, r"prompts\[0\] is empty"),
        ({"prompts": [1, 2]}, ValueError, r"prompts\[0\] must be \(length,\), got \(\) int64 .* goes in a list"),
        ({"prompts": torch.tensor([1])}, ValueError, "a single prompt goes in a list"),
        ({"prompts": [[[1]]]}, ValueError, r"prompts\[0\] must be \(length,\), got \(1, 1\)"),
        ({"prompts": "text"}, TypeError, r"prompts\[0\] must be a sequence of tokens, got 't'"),
        ({"prompts": [[1, "a"]]}, TypeError, r"must be a sequence of tokens, got \[1, 'a'\]"),
        ({"prompts": [[1.0]]}, TypeError, r"prompts\[0\] must be integers, got \(1,\) float32"),
        ({"prompts": [[True]]}, TypeError, "must be integers, got .* bool"),
        ({"prompts": [[1], [31]]}, ValueError, r"prompts\[1\] must be from 0 to 30, got 31"),
        ({"prompts": [[-1]]}, ValueError, "must be from 0 to 30, got -1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer, got 2.0"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and not negative, got -0.1"),
        ({"temperature": math.inf}, ValueError, "temperature must be finite"),
        ({"temperature": math.nan}, ValueError, "temperature must be finite"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_k": 1.5}, TypeError, "top_k must be an integer, got 1.5"),
        ({"top_p": 0}, ValueError, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.01}, ValueError, "top_p must be above 0 and at most 1, got 1.01"),
        ({"top_p": math.nan}, ValueError, "top_p must be above 0"),
        ({"top_p": True}, TypeError, "top_p must be a number, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**32 - 2}, ValueError, "seed must be at most 4294967293 for 3 rows, got 4294967294"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got 1.0"),
        ({"eos_token_id": [31]}, ValueError, "eos_token_id must be from 0 to 30, got 31"),
        ({"eos_token_id": [-1]}, ValueError, "eos_token_id must be at least 0, got -1"),
        ({"eos_token_id": "x"}, TypeError, "eos_token_id must be an integer, got 'x'"),
    ],
)
def test_refuses_what_does_not_fit(changes, error, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4, **changes}
    with pytest.raises(error, match=message):
        stream_tokens(build(), arguments.pop("prompts"), **arguments)


def test_the_likeliest_token_has_no_probabilities():
    with pytest.raises(ValueError, match="temperature must be positive for probabilities"):
        next_probabilities(torch.zeros(3), temperature=0)
    assert generation.DONE == -1


# ------------------------------------------------------------------------------------------------ as a method


def test_the_method_gives_whole_rows():
    model = build().train()
    wanted = collect(model, PROMPTS, max_new_tokens=6, temperature=0.8, top_k=9, top_p=0.9, seed=3)
    rows = model.generate(PROMPTS, max_new_tokens=6, temperature=0.8, top_k=9, top_p=0.9, seed=3)
    assert [row.tolist() for row in rows] == [prompt + new for prompt, new in zip(PROMPTS, wanted, strict=True)]
    assert {row.dtype for row in rows} == {torch.int64}
    assert model.training
    square = torch.tensor([PROMPTS[2], PROMPTS[2]])
    assert [row.tolist() for row in model.generate(square, max_new_tokens=2, temperature=0)] == [
        model.generate([PROMPTS[2]], max_new_tokens=2, temperature=0)[0].tolist()
    ] * 2


def test_the_method_ends_rows_at_eos():
    model = build()
    options = {"max_new_tokens": 12, "seed": 0, "temperature": 2.0}
    free = [row.tolist() for row in model.generate(PROMPTS, **options)]
    eos = free[0][len(PROMPTS[0]) + 2]
    for given in (eos, [eos], {eos, VOCABULARY - 1}):
        ends = {eos} if given == eos else set(given)
        for prompt, row, whole in zip(
            PROMPTS, model.generate(PROMPTS, eos_token_id=given, **options), free, strict=True
        ):
            new = whole[len(prompt) :]
            stop = next((place + 1 for place, token in enumerate(new) if token in ends), len(new))
            assert row.tolist() == prompt + new[:stop]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": []}, ValueError, "at least one sequence of tokens"),
        ({"prompts": [[]]}, ValueError, r"prompts\[0\] is empty"),
        ({"prompts": torch.tensor([1, 2])}, ValueError, "a single prompt goes in a list"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"eos_token_id": True}, TypeError, "eos_token_id must be an integer"),
        ({"temperature": -1}, ValueError, "temperature must be finite and not negative"),
    ],
)
def test_the_method_refuses(changes, error, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4, **changes}
    with pytest.raises(error, match=message):
        build().generate(arguments.pop("prompts"), **arguments)


@pytest.mark.parametrize(
    ("prompts", "options", "error", "says"),
    [
        (None, {}, TypeError, "prompts must be sequences of tokens, one for each row, got None"),
        (5, {}, TypeError, "prompts must be sequences of tokens"),
        (torch.tensor(1), {}, TypeError, "prompts must be sequences of tokens"),
        ([[10**30]], {}, TypeError, r"prompts\[0\] must be a sequence of tokens, got .*Overflow"),
        ([[1]], {"eos_token_id": 1.5}, TypeError, "eos_token_id must be an integer or a collection of them, got float"),
        ([[1]], {"eos_token_id": torch.tensor(1)}, TypeError, "eos_token_id must be an integer or a collection"),
    ],
)  # fmt: skip
def test_wrong_prompts_are_named(prompts, options, error, says):
    with pytest.raises(error, match=says):
        build().generate(prompts, max_new_tokens=1, **options)


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="the model is on the meta device, where it has no weights"):
        build(device="meta").generate([[1]], max_new_tokens=1)
