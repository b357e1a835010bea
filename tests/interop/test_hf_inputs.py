"""What Trainer, generate and collators of transformers pass to a Flowformer: keywords, positions, packed batches."""

import pytest
import torch
from hf_models import CAUSAL, VOCABULARY, build, close, configure, draw, padded
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from flowformer.interop.hf import FlowformerForCausalLM, FlowformerForSequenceClassification, FlowformerModel
from flowformer.interop.hf.inputs import read_packing

LENGTHS = (4, 1, 5, 7)


def rows(lengths=LENGTHS):
    return [draw(1, length, seed=number)[0] for number, length in enumerate(lengths)]


def flatten(features, **options):
    return DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in features])


def arguments(folder, **options):
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **options}
    return TrainingArguments(
        str(folder), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        dataloader_pin_memory=False, **options,
    )  # fmt: skip


def train(model, folder, dataset, collator=None, **options):
    trainer = Trainer(model, arguments(folder, **options), train_dataset=dataset, data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ------------------------------------------------------------------------------------------------ classification


PROBLEMS = pytest.mark.parametrize(
    ("labels", "one"),
    [
        (3, lambda i: i % 3),
        (1, lambda i: float(i)),
        (2, lambda i: [1.0, float(i % 2)]),
    ],
    ids=["classes", "number", "several"],
)


@PROBLEMS
def test_trainer_trains_a_classifier(tmp_path, labels, one):
    """The loss of a step is the mean over its labels, however many batches they come in."""
    # Columns that the model does not have are removed by Trainer.
    dataset = [{"input_ids": [1 + i % 5, 2, 3], "labels": one(i), "idx": i, "text": "a"} for i in range(8)]
    found = []
    for batch, parts in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        model = FlowformerForSequenceClassification(configure(num_labels=labels, dropout=0.0, pad_token_id=0))
        found.append(
            train(model, tmp_path, dataset, per_device_train_batch_size=batch, gradient_accumulation_steps=parts)
        )
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_classifier_evaluates_in_trainer(tmp_path):
    dataset = [{"input_ids": [1 + i % 5, 2, 3], "labels": i % 3} for i in range(8)]
    model = build(kind=FlowformerForSequenceClassification, num_labels=3, pad_token_id=0)
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), eval_dataset=dataset)
    assert torch.tensor(trainer.evaluate()["eval_loss"]).isfinite()
    assert trainer.predict(dataset).predictions.shape == (8, 3)


def test_smoothed_labels_are_shifted(tmp_path):
    model = build()
    dataset = [{"input_ids": draw(1, 6)[0], "labels": draw(1, 6)[0]}]
    found = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.5), eval_dataset=dataset).evaluate()
    log = model(draw(1, 6), use_cache=False).logits[0, :-1].log_softmax(-1).detach()
    wanted = -0.5 * log.gather(1, draw(1, 6)[0, 1:, None]).mean() - 0.5 * log.mean()
    assert found["eval_loss"] == pytest.approx(float(wanted), rel=1e-4)


# ------------------------------------------------------------------------------------------------ keywords


@pytest.mark.parametrize("kind", [FlowformerModel, FlowformerForCausalLM, FlowformerForSequenceClassification])
def test_keywords_of_transformers_are_accepted(kind):
    model = build(kind=kind)
    wanted = model(draw(2, 5))[0]
    extra = {
        "num_items_in_batch": 3, "output_router_logits": False, "is_causal": True, "tokenizer": object(),
        "assistant_tokenizer": None, "max_length_q": 5,
        "assistant_model": object(), "token_type_ids": torch.zeros(2, 5, dtype=torch.int64),
        "position_ids": torch.arange(5).unsqueeze(0), "nothing": None,
    }  # fmt: skip
    assert torch.equal(model(draw(2, 5), **extra)[0], wanted)
    assert torch.equal(model(draw(2, 5), return_dict=False)[0], wanted)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"is_causal": False}, ValueError, "is_causal=False is not supported"),
        ({"token_type_ids": torch.ones(2, 5, dtype=torch.int64)}, ValueError, "token_type_ids must be zeros"),
        ({"idx": torch.arange(2)}, TypeError, "unexpected keyword argument 'idx'"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2]] * 2)}, ValueError, "only 1 .a real token. and 0"),
        ({"attention_mask": torch.zeros(2, 5) - torch.inf}, ValueError, "only 1 .a real token. and 0"),
        ({"position_ids": torch.arange(5.0)[None]}, TypeError, "position_ids must be integers"),
        ({"position_ids": torch.arange(5)[None] + 2}, ValueError, "has 2 where 0 real tokens come before"),
        ({"position_ids": torch.tensor([[0, 1, 1, 2, 3]])}, ValueError, "has 1 where 2 real tokens"),
        ({"seq_idx": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, r"seq_idx must be \(2, 5\) or"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, ValueError, "batch of size 1 without padding, got a batch of size 2"),
        ({"attention_mask": [[1] * 5] * 2}, TypeError, "attention_mask must be a tensor, got list"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor of integers, got list"),
        (
            {"input_ids": None, "inputs_embeds": torch.ones(2, 5, 16).long()},
            TypeError,
            "inputs_embeds must be a tensor",
        ),
        ({"cu_seq_lens_q": [0, 5]}, TypeError, "boundaries as integers, got"),
    ],
)
def test_what_a_model_cannot_do_is_refused(given, error, message):
    for kind in (FlowformerForCausalLM, FlowformerForSequenceClassification):
        with pytest.raises(error, match=message):
            build(kind=kind)(**{"input_ids": draw(2, 5), **given})


def test_labels_that_are_none_are_refused():
    model = build()
    for labels, error, message in (
        (draw(1, 5) + VOCABULARY, ValueError, "labels must be from 0 to 60, or -100, got"),
        (-draw(1, 5) - 1, ValueError, "labels must be from 0 to 60, or -100"),
        (draw(1, 5).float(), TypeError, "labels must be a tensor of integers"),
        ([[1] * 5], TypeError, "labels must be a tensor of integers, got list"),
    ):
        with pytest.raises(error, match=message):
            model(draw(1, 5), labels=labels)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, r"must rise from 0 to the length 5, got \[0, 3\]"),
        ({"cu_seq_lens_k": torch.tensor([0, 4, 3, 5])}, "must rise from 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 2, 5])}, "must be equal"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5]), "position_ids": torch.arange(5)[None]}, "has 3 where 0"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 5]), "use_cache": True}, "use_cache is not supported with packed"),
        ({"cu_seq_lens_q": torch.tensor([0, 5]), "attention_mask": torch.tensor([[0, 1, 1, 1, 1]])}, "with padding"),
    ],
)
def test_boundaries_that_contradict_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        build()(draw(1, 5), **given)


def test_packed_sequences_are_refused_where_there_is_one_state_or_result():
    model = build()
    restart = torch.tensor([[0, 1, 0, 1, 2]])
    cache = model(draw(1, 3)).cache
    with pytest.raises(ValueError, match="packed sequences are not supported after a cache"):
        model(draw(1, 5), cache=cache, position_ids=restart)
    with pytest.raises(ValueError, match="use_cache is not supported with packed"):
        model(draw(1, 5), cache=DynamicCache(config=model.config), position_ids=restart)
    with pytest.raises(ValueError, match="output_hidden_states is not supported with several packed rows"):
        model(draw(2, 5), position_ids=restart, output_hidden_states=True)
    with pytest.raises(ValueError, match="packed sequences are not supported by a classifier"):
        build(kind=FlowformerForSequenceClassification)(draw(1, 5), position_ids=restart)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_the_mask_tells_change_nothing(side):
    model = build()
    tokens, mask = padded(side)
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    real = mask.bool()
    assert torch.equal(model(tokens, mask, position_ids=position_ids).logits[real], model(tokens, mask).logits[real])
    cache = model(tokens, mask).cache
    grown, places = torch.cat((mask, mask.new_ones(3, 1)), 1), mask.sum(1, keepdim=True)
    with pytest.raises(ValueError, match="position_ids has 10 where 9"):
        model(draw(3, 1), grown, cache, position_ids=places + 1)
    assert model(draw(3, 1), grown, cache, position_ids=places).logits.shape == (3, 1, VOCABULARY)


# ------------------------------------------------------------------------------------------------ packed batches

WAYS = {
    "positions": {},
    "boundaries": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "numbers": {"return_seq_idx": True, "return_position_ids": False},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attention", CAUSAL)
def test_a_packed_batch_is_its_sequences(attention, way):
    model = build(attention, dropout=0.0).train()
    batch = dict(flatten(rows(), **WAYS[way]))
    out = model(**batch)
    for found, row in zip(out.logits[0].split(LENGTHS), rows(), strict=True):
        close(found, model(row[None]).logits[0])
    losses = [model(row[None], labels=row[None]).loss * (len(row) - 1) for row in rows() if len(row) > 1]
    close(out.loss, sum(losses) / sum(length - 1 for length in LENGTHS))
    batch["labels"] = batch["input_ids"]  # the first of each sequence does not count, even if nobody says so
    close(model(**batch).loss, out.loss)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_of_a_packed_batch(checkpointing):
    model = build(dropout=0.0).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    total = sum(length - 1 for length in LENGTHS)
    gradients = []
    for batches in ([flatten(rows())], [{"input_ids": row[None], "labels": row[None]} for row in rows((4, 2, 5, 7))]):
        model.zero_grad()
        for batch in batches:
            if "position_ids" not in batch and batch["input_ids"].shape[1] == 2:
                continue  # the sequence of one token has no target
            model(**batch, num_items_in_batch=total).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def test_several_packed_rows_with_padding():
    model = build()
    tokens = draw(3, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0] * 6])
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 0, 0, 1, 2], [0] * 6])
    out = model(tokens, mask, position_ids=position_ids).logits
    for row, part in ((0, slice(0, 3)), (0, slice(3, 6)), (1, slice(2, 3)), (1, slice(3, 6))):
        close(out[row, part], model(tokens[row : row + 1, part]).logits[0])
    hidden = model.model(tokens, mask, position_ids=position_ids).last_hidden_state
    assert (hidden[mask == 0] == 0).all()


def test_hidden_states_of_a_packed_row():
    model = build()
    hidden = model(**flatten(rows()), output_hidden_states=True).hidden_states
    for number, found in enumerate(hidden):
        for part, row in zip(found[0].split(LENGTHS), rows(), strict=True):
            close(part, model(row[None], output_hidden_states=True).hidden_states[number][0])


def test_trainer_trains_without_padding(tmp_path):
    """A step on a flattened batch is the step on the padded one; a packed column of positions is not removed."""
    dataset = [{"input_ids": row.tolist()} for row in rows((4, 3, 5, 7))]
    packed = [dict(flatten([torch.tensor(row["input_ids"]) for row in dataset]))]
    packed = [{name: value[0] for name, value in packed[0].items()}]
    longest = 7
    padding = [
        {
            "input_ids": row["input_ids"] + [0] * (longest - len(row["input_ids"])),
            "attention_mask": [1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])),
            "labels": row["input_ids"] + [-100] * (longest - len(row["input_ids"])),
        }
        for row in dataset
    ]
    found = []
    for data, collator in ((padding, None), (dataset, DataCollatorWithFlattening()), (packed, None)):
        torch.manual_seed(0)
        found.append(train(FlowformerForCausalLM(configure(dropout=0.0)), tmp_path, data, collator, max_steps=3))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_a_graph_reads_boundaries_and_not_positions(monkeypatch):
    batch = flatten(rows(), return_flash_attn_kwargs=True)
    places, sizes = batch["position_ids"], (1, sum(LENGTHS))
    wanted = read_packing(places, {}, sizes, None)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for found in (read_packing(places, batch, sizes, None), read_packing(None, batch, sizes, None)):
        assert found.tokens is None
        assert all(torch.equal(one, other) for one, other in zip(found[:3], wanted[:3], strict=True))
    with pytest.raises(ValueError, match="pass cu_seq_lens_q as well"):
        read_packing(places, {}, sizes, None)


@pytest.mark.parametrize("parts", [1, 6])
def test_loss_of_trainer_does_not_depend_on_the_side_of_padding(tmp_path, parts):
    """Trainer counts the label of the first real token of a padded row, which the model does not."""
    dataset, found = rows((2, 2, 9, 2, 2, 9)), {}
    for side in ("left", "right"):

        def collate(batch, side=side):
            longest = max(map(len, batch))
            ids, mask = (torch.zeros(len(batch), longest, dtype=torch.int64) for _ in range(2))
            for number, row in enumerate(batch):
                place = slice(longest - len(row), None) if side == "left" else slice(len(row))
                ids[number, place], mask[number, place] = row, 1
            return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

        torch.manual_seed(0)
        model = FlowformerForCausalLM(configure(dropout=0.0))
        options = {
            "per_device_train_batch_size": 6 // parts,
            "gradient_accumulation_steps": parts,
            "learning_rate": 0.0,
        }
        found[side] = train(model, tmp_path, dataset, collate, remove_unused_columns=False, max_steps=1, **options)
    assert found["left"] == pytest.approx(found["right"], rel=1e-4)
