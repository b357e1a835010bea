"""Protocols of benchmarks: tasks for training, and data formats for the commands.

A command asks a format what it can do and knows no kind of data: ``flowformer predict`` runs where the format is a
:class:`Classifies`, ``generate`` where it is a :class:`Generates`, ``visualize`` where it is a :class:`Shows`,
``export`` where it is a :class:`Tokenizes`, and ``play`` where it is an :class:`Acts`. A format implements the ones
that its models support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from flowformer.tasks.metric import Metric

if TYPE_CHECKING:
    from flowformer.tasks.decision.policies import Policy
    from flowformer.tasks.scenes import Scene, View
    from flowformer.tasks.text.tokenizers import Tokenizer


class Task(Protocol):
    """Data, loss and metric of a benchmark.

    A task whose :attr:`evaluated` sets have no "test" is tested once, when training is over.
    """

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        ...

    @property
    def metric(self) -> Metric:
        """The evaluation metric."""
        ...

    @property
    def published(self) -> Mapping[str, float]:
        """Published values of the metric by method."""
        ...

    @property
    def source(self) -> str:
        """Origin of the data."""
        ...

    @property
    def licence(self) -> str:
        """Terms of the data, as far as known."""
        ...

    @property
    def format(self) -> Format:
        """The data format."""
        ...

    @property
    def train(self) -> Any:
        """The training set, a map-style dataset."""
        ...

    @property
    def test(self) -> Any:
        """The test set."""
        ...

    @property
    def evaluated(self) -> Mapping[str, Any]:
        """The evaluation sets used during training, by name ("test", "validation"), if not empty."""
        ...

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the model on a batch.

        Returns:
            The mean ``"loss"``, and the quantities of the metric: floating-point means, or integers that count
            examples, which become fractions of :meth:`size` without rounding errors.
        """
        ...

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of examples, or tokens, in the means of a batch."""
        ...


class Format(Protocol):
    """A data format: everything needed to use a trained model on new data."""

    def collate(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """Make a batch."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        ...


@runtime_checkable
class Recounts(Protocol):
    """A task that tells more of an evaluation than means over it, such as every episode."""

    def recount(self) -> dict[str, Any]:
        """Return what was evaluated since the last call, as JSON values.

        Returns:
            ``"parts"``: a list of the metric by part, each with ``"name"``, ``"value"`` and ``"spread"`` (the standard
            deviation); and whatever else ``result.json`` is to hold.
        """
        ...


class SupportsLoss(Protocol):
    """A language model with a loss that does not store the logits of a whole batch."""

    def loss(self, tokens: Tensor, targets: Tensor | None = None, mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return the mean cross-entropy of the targets, without ignored ones, in nats."""
        ...


# ---------------------------------------------------------------------------- what else the models of a format can do

Track = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (steps, how many, what they are) -> the same steps


@runtime_checkable
class Classifies(Protocol):
    """A format whose models classify files.

    Attributes:
        classes: Names; class index i means ``classes[i]``.
        item: What one example is called, "series" or "picture".
        files: Which files are accepted, for help and error messages.
    """

    @property
    def classes(self) -> tuple[str, ...]:  # noqa: D102 - see the class
        ...

    @property
    def item(self) -> str:  # noqa: D102
        ...

    @property
    def files(self) -> str:  # noqa: D102
        ...

    def classify_files(self, model: Any, paths: Sequence[Path]) -> tuple[list[str], np.ndarray]:
        """Return class probabilities of the examples in files.

        Args:
            model: A trained model, in evaluation mode.
            paths: Files or folders.

        Returns:
            Names of the examples, and (n, classes) float64.

        Raises:
            DataError: for files that cannot be used.
        """
        ...


@runtime_checkable
class Generates(Protocol):
    """A format whose models generate data, such as text or images.

    Attributes:
        generate_options: A dataclass whose fields are the options, declared by
            :func:`flowformer.common.fields.option`.
    """

    @property
    def generate_options(self) -> type:  # noqa: D102 - see the class
        ...

    def generate(self, model: Any, options: Any, *, track: Track) -> Iterator[str]:
        """Generate samples; samples that are not text are written to a file.

        Args:
            model: A trained model, in evaluation mode.
            options: A :attr:`generate_options`.
            track: Shows progress over steps that take time.

        Yields:
            Text to print, as soon as there is some.

        Raises:
            ValueError, TypeError: for options that cannot be used, before anything is generated.
        """
        ...


@runtime_checkable
class Acts(Protocol):
    """A format whose models act in an environment.

    Attributes:
        targets: Returns that the model is asked for.
        evaluate_options: A dataclass whose fields are the options of an evaluation, declared by
            :func:`flowformer.common.fields.option`.
        play_options: Likewise of a film; one is ``out``, the file to write.
    """

    @property
    def targets(self) -> tuple[float, ...]:  # noqa: D102 - see the class
        ...

    @property
    def evaluate_options(self) -> type:  # noqa: D102
        ...

    @property
    def play_options(self) -> type:  # noqa: D102
        ...

    def policy(self, model: Any, evaluation: Any) -> Policy:
        """Return what chooses the actions of a model, in evaluation mode: by a window, or by its recurrent state."""
        ...

    def evaluate(self, model: Any, options: Any, *, track: Track) -> Iterator[str]:
        """Run episodes; yields the results as text.

        Raises:
            ValueError, RuntimeError: for options that cannot be used, and episodes that all fail.
        """
        ...

    def play(self, model: Any, options: Any, *, track: Track) -> Iterator[str]:
        """Film an episode; yields what came of it.

        Raises:
            ValueError, RuntimeError: for options that cannot be used, and an episode that fails.
        """
        ...


@runtime_checkable
class Shows(Protocol):
    """A format that supports attention maps of an example.

    Attributes:
        show_options: A dataclass whose fields select an example, declared by
            :func:`flowformer.common.fields.option`.
    """

    @property
    def show_options(self) -> type:  # noqa: D102 - see the class
        ...

    def show(self, model: Any, file: Path | None, options: Any, view: View) -> Scene:
        """Return the attention maps of a model for an example.

        Args:
            model: A trained model, in evaluation mode.
            file: The file to read the example from; ``None`` if none was given.
            options: A :attr:`show_options`.
            view: Which queries, layers and heads.

        Raises:
            ValueError: for an example, query, layer or head that is not there.
        """
        ...


@runtime_checkable
class Tokenizes(Protocol):
    """A format of text.

    Attributes:
        tokenizer: Text to tokens and back.
    """

    @property
    def tokenizer(self) -> Tokenizer:  # noqa: D102 - see the class
        ...
