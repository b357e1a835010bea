"""Normalised scores of D4RL: 0 is the return of a random policy, 100 that of an expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import numpy as np

Values = TypeVar("Values", float, np.ndarray)
_NAME = re.compile(r"(?:[^:]*:)?(?:.*/)?(?P<family>[^/]+?)(?:-v(?P<version>\d+))?")


class Reference(NamedTuple):
    """Returns between which scores are normalised.

    Attributes:
        minimum: Mean return of a random policy, score 0.
        maximum: Mean return of an expert, score 100.
    """

    minimum: float
    maximum: float


# Farama-Foundation/D4RL, commit 89141a6, d4rl/infos.py: the same for all qualities and versions of the data.
REFERENCES: Mapping[str, Reference] = {
    "halfcheetah": Reference(-280.178953, 12135.0),
    "hopper": Reference(-20.272305, 3234.3),
    "walker2d": Reference(1.629008, 4592.3),
}
PUBLISHED_VERSION = 3  # Wu et al., 2022, evaluate in Hopper-v3, HalfCheetah-v3 and Walker2d-v3, with MuJoCo 2.0


def split_environment(environment: str) -> tuple[str, int | None]:
    """Split the name of an environment into its family and its version: ``Hopper-v5`` into ``Hopper`` and 5.

    A module (``package:Name-v0``) or a namespace (``folder/Name-v0``) is left out; the version is ``None`` where the
    name has none.
    """
    match = _NAME.fullmatch(environment)
    if match is None:
        return environment, None
    return match["family"], None if match["version"] is None else int(match["version"])


def reference_of(environment: str) -> Reference | None:
    """Return the references of an environment, whatever its version; ``None`` where D4RL has none."""
    return REFERENCES.get(split_environment(environment)[0].lower())


def normalise(returns: Values, environment: str) -> Values | None:
    """Return normalised scores, ``100 (return - minimum) / (maximum - minimum)``.

    Args:
        returns: A return, or an array of them.
        environment: Name of the environment; the references do not depend on its version. See :func:`caution`.

    Returns:
        Scores of the same form, or ``None`` where D4RL has no references for the environment.
    """
    reference = reference_of(environment)
    if reference is None:
        return None
    return 100 * (returns - reference.minimum) / (reference.maximum - reference.minimum)


def caution(environment: str) -> str:
    """Return what to say beside scores in an environment: that its version is not the published one.

    Returns:
        A sentence; "" for the published version, and where there are no scores.
    """
    family, version = split_environment(environment)
    if reference_of(environment) is None or version == PUBLISHED_VERSION:
        return ""
    published = f"{family}-v{PUBLISHED_VERSION}"
    return (
        f"Scores in {environment} are normalised by D4RL's references for {published}; another version of the "
        f"environment is another simulator, and its scores are not comparable with published scores in {published}."
    )
