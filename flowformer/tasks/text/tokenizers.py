"""Tokenizers: bytes, characters, words, or a tokenizer of Hugging Face.

A tokenizer can be written as JSON and read again elsewhere, without the files it was made from.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from flowformer.common.errors import DataError
from flowformer.common.names import nearest
from flowformer.tasks.encodings import decode

if TYPE_CHECKING:
    import tokenizers

UNKNOWN_CHARACTER = "\ufffd"
END_OF_LINE = "<eos>"
UNKNOWN_WORD = "<unk>"


class HuggingFaceForm(NamedTuple):
    """A tokenizer of the library `tokenizers`.

    Attributes:
        tokenizer: Gives the same numbers for the same text.
        special_tokens: Names of transformers ("eos_token", "unk_token") and the tokens they mean.
    """

    tokenizer: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]


class Tokenizer(Protocol):
    """Base class of tokenizers.

    Attributes:
        kind: ``"bytes"``, ``"characters"``, ``"words"`` or ``"hugging-face"``.
        vocab_size: Tokens are 0 to vocab_size - 1.
    """

    kind: str
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text: (n,) of :attr:`dtype`.

        Raises:
            ValueError: for text that the vocabulary cannot express.
        """
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens.

        Raises:
            ValueError: for tokens outside the vocabulary.
        """
        ...

    def stream(self) -> Callable[[int], str]:
        """Return a function that takes one token at a time, and returns the text completed by it.

        It gives "" while a character is unfinished.
        """
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as JSON values, for :func:`read_tokenizer`."""
        ...

    def to_hugging_face(self) -> HuggingFaceForm:
        """Return the same tokenizer as one of the library `tokenizers`.

        Raises:
            ModuleNotFoundError: without `tokenizers`.
        """
        ...

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint8, uint16 and int32 that fits the vocabulary."""
        ...


class _Vocabulary:
    """What the tokenizers here share."""

    vocab_size: int

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint8, uint16 and int32 that fits the vocabulary."""
        if self.vocab_size <= 2**8:
            return np.dtype(np.uint8)
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.int32)

    def _check(self, token: int) -> int:
        # Tokens come as numbers of Python, NumPy and PyTorch; a negative one would count from the end.
        if not 0 <= (token := int(token)) < self.vocab_size:
            raise ValueError(f"tokens must be 0 to {self.vocab_size - 1}, got {token}")
        return token


class BytesTokenizer(_Vocabulary):
    """The bytes of UTF-8."""

    kind: str = "bytes"
    vocab_size: int = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the bytes of a text, (n,) uint8."""
        # Bytes that are no UTF-8 stand in command lines and file names as lone surrogates: they go as they came.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of bytes; invalid UTF-8 is replaced by U+FFFD."""
        return bytes(map(self._check, tokens)).decode("utf-8", "replace")

    def stream(self) -> Callable[[int], str]:
        """As :meth:`Tokenizer.stream`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return lambda token: decoder.decode(bytes([self._check(token)]))

    def to_json(self) -> dict[str, Any]:
        """As :meth:`Tokenizer.to_json`."""
        return {"kind": self.kind}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BytesTokenizer:
        """Read a tokenizer that :meth:`to_json` wrote."""
        return cls()

    def to_hugging_face(self) -> HuggingFaceForm:
        """As :meth:`Tokenizer.to_hugging_face`."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        made = Tokenizer(models.BPE({_byte_name(byte): byte for byte in range(256)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        return HuggingFaceForm(made, {})


def _byte_name(byte: int) -> str:
    """The character that stands for a byte in byte-level vocabularies: itself if it is printable (GPT-2's rule)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(other not in printable for other in range(byte)))


class CharacterTokenizer(_Vocabulary):
    """One token for each character.

    Args:
        alphabet: The characters, each once. Those it lacks become U+FFFD if it has that, and are refused otherwise.

    Raises:
        ValueError: for an alphabet that is empty or has a character twice.
    """

    kind: str = "characters"

    def __init__(self, alphabet: str) -> None:
        counts = Counter(alphabet)
        if twice := [character for character, count in counts.items() if count > 1]:
            raise ValueError(f"characters of an alphabet must be unique, got {twice[0]!r} {counts[twice[0]]} times")
        if not alphabet:
            raise ValueError("an alphabet must have at least one character, got none")
        self.alphabet, self.vocab_size = alphabet, len(alphabet)
        self._tokens: np.ndarray | None = None

    @classmethod
    def fit(cls, text: Iterable[str]) -> CharacterTokenizer:
        """Build the alphabet of a text, or of its pieces: its characters in order, and U+FFFD for all others."""
        alphabet = {UNKNOWN_CHARACTER}
        for piece in text:
            alphabet.update(piece)
        return cls("".join(sorted(alphabet)))

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text, one for each character.

        Raises:
            ValueError: for a character that is not in the alphabet, where U+FFFD is not either.
        """
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        tokens = self._table()[points]
        if (tokens < 0).any():
            raise ValueError(f"character {text[int(np.argmin(tokens))]!r} is not in the alphabet")
        return tokens.astype(self.dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens."""
        return "".join(map(self.stream(), tokens))

    def stream(self) -> Callable[[int], str]:
        """As :meth:`Tokenizer.stream`."""
        return lambda token: self.alphabet[self._check(token)]

    def to_json(self) -> dict[str, Any]:
        """As :meth:`Tokenizer.to_json`."""
        return {"kind": self.kind, "alphabet": self.alphabet}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CharacterTokenizer:
        """Read a tokenizer that :meth:`to_json` wrote."""
        return cls(values["alphabet"])

    def to_hugging_face(self) -> HuggingFaceForm:
        """As :meth:`Tokenizer.to_hugging_face`."""
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {character: token for token, character in enumerate(self.alphabet)}
        # If the alphabet lacks the unknown character, `tokenizers` drops what is not in the alphabet.
        made = Tokenizer(models.WordLevel(vocabulary, UNKNOWN_CHARACTER))
        made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        made.decoder = decoders.Fuse()
        return HuggingFaceForm(made, {"unk_token": UNKNOWN_CHARACTER} if UNKNOWN_CHARACTER in vocabulary else {})

    def _table(self) -> np.ndarray:
        """The token of every code point, (0x110000,) int32, -1 where it has none."""
        if self._tokens is None:
            self._tokens = np.full(0x110000, self.alphabet.find(UNKNOWN_CHARACTER), np.int32)
            self._tokens[[ord(character) for character in self.alphabet]] = np.arange(self.vocab_size)
        return self._tokens


class WordTokenizer(_Vocabulary):
    """Words separated by whitespace, and ``<eos>`` for the end of a line.

    Args:
        words: The vocabulary, each word once; ``<eos>`` among them. Words it lacks become ``<unk>`` if it has that, and
            are refused otherwise.

    Raises:
        ValueError: for a vocabulary without ``<eos>``, or with a word twice.
    """

    kind: str = "words"

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.vocab_size = list(words), len(words)
        self._tokens = {word: token for token, word in enumerate(self.words)}
        if len(self._tokens) != len(self.words):
            twice = next(word for token, word in enumerate(self.words) if self._tokens[word] != token)
            raise ValueError(f"words of a vocabulary must be unique, got {twice!r} more than once")
        if END_OF_LINE not in self._tokens:
            raise ValueError(
                f"a vocabulary of words must contain {END_OF_LINE!r}, got {self.vocab_size} words without it"
            )

    @classmethod
    def fit(cls, text: Iterable[str]) -> WordTokenizer:
        """Build the vocabulary of a text in pieces, none of which ends within a word.

        The order is by count, most frequent first; words of one count by their characters. ``<eos>`` and ``<unk>`` are
        always in it.
        """
        counts = Counter({END_OF_LINE: 0, UNKNOWN_WORD: 0})
        for piece in [text] if isinstance(text, str) else text:
            counts.update(piece.split())
            counts[END_OF_LINE] += piece.count("\n")
        return cls(sorted(counts, key=lambda word: (-counts[word], word)))

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text; a last line that does not end in a line feed gets no ``<eos>``.

        Raises:
            ValueError: for a word that is not in the vocabulary, where ``<unk>`` is not either.
        """
        words = text.replace("\n", f" {END_OF_LINE} ").split()
        unknown = self._tokens.get(UNKNOWN_WORD)
        if unknown is None:
            try:
                return np.array([self._tokens[word] for word in words], self.dtype)
            except KeyError as error:
                raise ValueError(f"word {error} is not in the vocabulary") from None
        return np.array([self._tokens.get(word, unknown) for word in words], self.dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens: a space between words, a line feed for ``<eos>``."""
        return "".join(map(self.stream(), tokens))

    def stream(self) -> Callable[[int], str]:
        """As :meth:`Tokenizer.stream`."""
        starts_line = True

        def add(token: int) -> str:
            nonlocal starts_line
            word = self.words[self._check(token)]
            space, starts_line = "" if starts_line else " ", word == END_OF_LINE
            return "\n" if starts_line else space + word

        return add

    def to_json(self) -> dict[str, Any]:
        """As :meth:`Tokenizer.to_json`."""
        return {"kind": self.kind, "words": self.words}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> WordTokenizer:
        """Read a tokenizer that :meth:`to_json` wrote."""
        return cls(values["words"])

    def to_hugging_face(self) -> HuggingFaceForm:
        """As :meth:`Tokenizer.to_hugging_face`."""
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        made = Tokenizer(models.WordLevel(dict(self._tokens), UNKNOWN_WORD))
        made.normalizer = normalizers.Replace("\n", f" {END_OF_LINE} ")
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        unknown = {"unk_token": UNKNOWN_WORD} if UNKNOWN_WORD in self._tokens else {}
        return HuggingFaceForm(made, {"eos_token": END_OF_LINE, **unknown})


class HuggingFaceTokenizer(_Vocabulary):
    """A tokenizer of Hugging Face, without added special tokens or truncation.

    Args:
        source: A ``tokenizer.json``, a folder that holds a tokenizer, or a name on the Hugging Face hub.
        definition: What ``tokenizer.json`` holds, if it is at hand; ``source`` is then a name only.

    Raises:
        ValueError: where ``source`` gives no tokenizer, or one that is written in Python only.
        ModuleNotFoundError: without ``tokenizers`` or, for other files than ``tokenizer.json``, ``transformers``.
    """

    kind: str = "hugging-face"

    def __init__(self, source: str | Path, *, definition: str | None = None) -> None:
        self.source = str(source)
        self._tokenizer = _open_hugging_face(self.source, definition)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # Numbers may be left out, so their count would not do.
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of a text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, self.dtype)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._tokenizer.decode([self._check(token) for token in tokens], skip_special_tokens=False)

    def stream(self) -> Callable[[int], str]:
        """As :meth:`Tokenizer.stream`."""
        from tokenizers.decoders import DecodeStream

        decoder = DecodeStream(skip_special_tokens=False)
        return lambda token: decoder.step(self._tokenizer, self._check(token)) or ""

    def to_json(self) -> dict[str, Any]:
        """As :meth:`Tokenizer.to_json`."""
        return {"kind": self.kind, "source": self.source, "tokenizer": json.loads(self._tokenizer.to_str())}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HuggingFaceTokenizer:
        """Read a tokenizer that :meth:`to_json` wrote."""
        return cls(values["source"], definition=json.dumps(values["tokenizer"]))

    def to_hugging_face(self) -> HuggingFaceForm:
        """As :meth:`Tokenizer.to_hugging_face`: a copy."""
        import tokenizers

        return HuggingFaceForm(tokenizers.Tokenizer.from_str(self._tokenizer.to_str()), {})


def _open_hugging_face(source: str, definition: str | None) -> tokenizers.Tokenizer:
    import tokenizers

    path = Path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        if definition is not None:
            return tokenizers.Tokenizer.from_str(definition)
        if path.is_file():
            return tokenizers.Tokenizer.from_str(decode(path.read_bytes(), path))
    except DataError:
        raise
    except Exception as error:  # tokenizers raises nothing more special
        raise ValueError(f"{source} contains no readable tokenizer: {error}") from error
    return _convert_hugging_face(source)


def _convert_hugging_face(source: str) -> tokenizers.Tokenizer:
    """The tokenizer of older files, or of the hub."""
    import transformers

    try:
        local = Path(source).is_dir() or _is_unreachable(source)
        theirs = transformers.AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # of the hub's client, or of damaged files
        reason = " ".join(str(error).split())
        raise ValueError(
            f"no tokenizer {source!r}: expected bytes, {', '.join(FITTED)}, a tokenizer.json, a folder with a "
            f"tokenizer, or a name on the Hugging Face hub; {type(error).__name__}: {reason}"
        ) from error
    backend = getattr(theirs, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer {source!r}: {type(theirs).__name__} is written in Python and has no tokenizer.json"
        )
    return backend


def _is_unreachable(name: str) -> bool:
    """Whether the hub does not answer: it is asked once, where transformers would ask a dozen times for a minute."""
    import huggingface_hub

    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "tokenizer_config.json"), timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        return False  # it answers, and says what is wrong
    except Exception:  # of the network, or of the client's HTTP library
        return True
    return False


def create_tokenizer(name: str, text: Iterable[str] | None = None) -> Tokenizer:
    """Create a tokenizer by name.

    Args:
        name: ``"bytes"``, ``"characters"``, ``"words"``, or what :class:`HuggingFaceTokenizer` takes: a folder, a
            ``tokenizer.json`` or a name on the hub.
        text: The training text, or its pieces, none of which ends within a word; ``"characters"`` and ``"words"`` take
            their vocabulary from it.

    Raises:
        ValueError: without a text where it is needed; as :class:`HuggingFaceTokenizer`.
    """
    if name == "bytes":
        return BytesTokenizer()
    if name in FITTED:
        if text is None:
            raise ValueError(f"{name!r} require a training text for their vocabulary, got none")
        return FITTED[name].fit(text)
    if not name:
        raise ValueError("the name of a tokenizer must not be empty")
    if not Path(name).exists() and (hint := nearest(name, ("bytes", *FITTED))):
        raise ValueError(f"no tokenizer {name!r}{hint}")
    return HuggingFaceTokenizer(name)


FITTED: Mapping[str, type[CharacterTokenizer] | type[WordTokenizer]] = {
    "characters": CharacterTokenizer,
    "words": WordTokenizer,
}


def read_tokenizer(values: Mapping[str, Any]) -> Tokenizer:
    """Read a tokenizer that :meth:`Tokenizer.to_json` wrote.

    Raises:
        ValueError: for a description of another kind, or an incomplete one.
    """
    try:
        kind = values["kind"]
        if kind in _KINDS:
            return _KINDS[kind].from_json(values)
    except KeyError as error:
        raise ValueError(
            f"the description of a tokenizer must contain {error}, got {', '.join(values) or 'nothing'}"
        ) from None
    *others, last = _KINDS
    raise ValueError(f"the kind of a tokenizer must be {', '.join(others)} or {last}, got {kind!r}")


_KINDS: Mapping[str, Any] = {
    one.kind: one for one in (BytesTokenizer, CharacterTokenizer, WordTokenizer, HuggingFaceTokenizer)
}
