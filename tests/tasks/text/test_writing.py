"""Text as it is written."""

import pytest
import torch

import flowformer
from flowformer.tasks.text import writing
from flowformer.tasks.text.tokenizers import BytesTokenizer, WordTokenizer
from flowformer.tasks.text.writing import write


def scripted(monkeypatch, *texts):
    """Make the model write these texts, byte by byte; a text that is over gives -1."""
    rows = [text.encode() for text in texts]

    def generate(model, prompts, **options):
        for place in range(max(map(len, rows))):
            yield torch.tensor([row[place] if place < len(row) else -1 for row in rows])

    monkeypatch.setattr(writing, "stream_tokens", generate)


def pieces(prompts=("x",), **options):
    return list(write(None, BytesTokenizer(), prompts, **options))


def test_characters_come_whole(monkeypatch):
    scripted(monkeypatch, "a\u00e9\u20acb")
    assert pieces() == [(0, "a"), (0, "\u00e9"), (0, "\u20ac"), (0, "b")]


def test_stops_before_a_text(monkeypatch):
    scripted(monkeypatch, "abc\n\nabc")
    assert "".join(text for _, text in pieces(stop=["\n\n"])) == "abc"
    assert "".join(text for _, text in pieces(stop=["zz", "bc"])) == "a"


def test_what_may_be_a_stop_is_held_back_and_then_let_go(monkeypatch):
    scripted(monkeypatch, "aab aac")
    shown = pieces(stop=["aac"])
    assert shown[0] == (0, "aab")  # nothing of "aa" before it is known to go on with "b"
    assert "".join(text for _, text in shown) == "aab "
    scripted(monkeypatch, "xaa")
    assert "".join(text for _, text in pieces(stop=["aac"])) == "xaa"


def test_rows_end_by_themselves(monkeypatch):
    scripted(monkeypatch, "one.two", "three.four", "five")
    texts = ["", "", ""]
    for row, text in write(None, BytesTokenizer(), ["x"] * 3, stop=["."]):
        texts[row] += text
    assert texts == ["one", "three", "five"]


def test_writing_ends_when_all_rows_have(monkeypatch):
    asked = []

    def generate(model, prompts, **options):
        for byte in b"ab.cd":
            asked.append(byte)
            yield torch.tensor([byte])

    monkeypatch.setattr(writing, "stream_tokens", generate)
    assert pieces(stop=["."]) == [(0, "a"), (0, "b")]
    assert bytes(asked) == b"ab."


def test_text_goes_on_from_the_prompt(monkeypatch):
    monkeypatch.setattr(writing, "stream_tokens", lambda *_, **__: iter([torch.tensor([2]), torch.tensor([0])]))
    words = WordTokenizer(["<eos>", "river", "runs"])
    assert list(write(None, words, ["river"])) == [(0, " runs"), (0, "\n")]


def test_empty_stop_is_refused():
    with pytest.raises(ValueError, match="a text to stop at must have a character or more"):
        write(None, BytesTokenizer(), ["x"], stop=[""], max_new_tokens=1)


def test_a_model_writes():
    torch.manual_seed(0)
    model = flowformer.create_model("flowformer_gpt_nano", vocab_size=256, max_length=None, positions="sinusoidal")
    one = "".join(text for _, text in write(model, BytesTokenizer(), ["ab"], max_new_tokens=30, seed=1))
    again = "".join(text for _, text in write(model, BytesTokenizer(), ["ab"], max_new_tokens=30, seed=1))
    assert one == again
    assert len(one) >= 5
