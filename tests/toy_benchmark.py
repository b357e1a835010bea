"""A benchmark in one file: is a cloud of points a disc or a ring? `test_additions.py` runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.common.errors import DataError
from flowformer.common.fields import option
from flowformer.models import create_model
from flowformer.recipes.registry import register_recipe
from flowformer.tasks.metric import Metric
from flowformer.training.recipe import EpochRecipe

POINTS = 16
ACCURACY = Metric("accuracy", "accuracy", "percent", lambda share: 100 * share)
Cloud = tuple[np.ndarray, int]


def draw(count: int, seed: int) -> list[Cloud]:
    """Clouds of points with their labels, half of them rings."""
    generator = np.random.default_rng(seed)
    angles, radii = generator.uniform(0, 2 * np.pi, (count, POINTS)), generator.uniform(0, 1, (count, POINTS))
    radii[1::2] = 1.0
    points = np.stack((radii * np.cos(angles), radii * np.sin(angles)), -1)
    return [(cloud, number % 2) for number, cloud in enumerate(points)]


@dataclass(frozen=True)
class CloudFormat:
    """How clouds become batches, and are read from files."""

    classes: tuple[str, ...] = ("disc", "ring")
    item: ClassVar[str] = "cloud"
    files: ClassVar[str] = "clouds as .json: a list of points"

    def collate(self, items: Sequence[Cloud]) -> dict[str, Tensor]:
        x = torch.from_numpy(np.stack([cloud for cloud, _ in items])).float()
        y = torch.tensor([label for _, label in items])
        return {"x": x, "mask": torch.ones(x.shape[:2], dtype=torch.bool), "y": y}

    def to_json(self) -> dict[str, Any]:
        return {"classes": list(self.classes)}

    def classify_files(self, model: nn.Module, paths: Sequence[Path]) -> tuple[list[str], np.ndarray]:
        clouds = [np.asarray(json.loads(path.read_text())) for path in paths]
        if any(cloud.shape != (POINTS, 2) for cloud in clouds):
            raise DataError(f"want {POINTS} points of 2 coordinates in each of {', '.join(map(str, paths))}")
        batch = self.collate([(cloud, 0) for cloud in clouds])
        with torch.inference_mode():
            return [path.stem for path in paths], model(batch["x"], batch["mask"]).double().softmax(-1).numpy()


@dataclass(frozen=True, eq=False)
class CloudTask:
    """Data, loss and metric."""

    name: str = "clouds"
    source: str = "drawn at random"
    licence: str = "made here; no terms"
    metric: Metric = ACCURACY
    published: Mapping[str, float] = field(default_factory=lambda: {"flow": 99.0})
    format: CloudFormat = CloudFormat()
    train: list[Cloud] = field(default_factory=lambda: draw(512, seed=0))
    test: list[Cloud] = field(default_factory=lambda: draw(64, seed=1))

    @property
    def evaluated(self) -> dict[str, list[Cloud]]:
        return {"test": self.test}

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = model(batch["x"], batch["mask"])
        right = (logits.argmax(-1) == batch["y"]).float().mean()
        return {"loss": nn.functional.cross_entropy(logits, batch["y"]), "accuracy": right}

    def size(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["y"])


@dataclass(frozen=True, kw_only=True)
class CloudRecipe(EpochRecipe):
    """A classifier of clouds."""

    attention: str = option("flow", "attention mechanism", group="attention")

    @property
    def label(self) -> str:
        return f"{self.attention}-seed{self.seed}"

    def build_task(self, form=None) -> CloudTask:
        return CloudTask()

    def read_format(self, values: dict[str, Any]) -> CloudFormat:
        return CloudFormat(tuple(values["classes"]))

    def build_model(self, form: CloudFormat) -> nn.Module:
        sizes = {"dim": 16, "num_heads": 2, "num_layers": 1, "ffn_dim": 16, "dropout": 0.1}
        return create_model(
            "flowformer_timeseries", in_chans=2, num_classes=2, max_length=POINTS, attention=self.attention, **sizes
        )

    @property
    def row(self) -> str:
        return self.attention


@register_recipe("toys/clouds")
def clouds(**fields: Any) -> CloudRecipe:
    """Discs and rings, told apart in seconds."""
    return CloudRecipe(
        **{
            "name": "toys/clouds",
            "epochs": 4,
            "accelerator": "cpu",
            "learning_rate": 1e-2,
            "optimizer": "adam",
            **fields,
        }
    )
