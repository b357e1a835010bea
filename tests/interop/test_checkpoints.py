"""Published weights give published numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowformer.interop.checkpoints import load_timeseries, timeseries_state_dict

GOLDEN = Path(__file__).parent.parent / "golden" / "model_timeseries.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


def published(golden):
    return {name.removeprefix("state."): value for name, value in golden.items() if name.startswith("state.")}


def test_timeseries_matches_golden(golden):
    model = load_timeseries(published(golden), num_heads=8, mask_padding=False)
    out = model(golden["input.x"], golden["input.padding_mask"])
    torch.testing.assert_close(out, golden["output"], rtol=1e-5, atol=3e-6)


def test_timeseries_with_invisible_padding_differs_only_where_there_is_padding(golden):
    model = load_timeseries(published(golden), num_heads=8)
    mask = golden["input.padding_mask"]
    difference = (model(golden["input.x"], mask) - golden["output"]).abs().amax(-1)
    whole = mask.all(-1)
    assert whole.any()
    assert not whole.all()
    assert difference[whole].max() < 3e-6
    assert difference[~whole].min() > 1e-3


def test_every_published_name_is_used_once(golden):
    state = timeseries_state_dict(published(golden))
    assert len(state) == len(published(golden))


def test_unknown_name_is_refused(golden):
    with pytest.raises(ValueError, match=r"'encoder\.surprise' is no parameter"):
        timeseries_state_dict({"encoder.surprise": torch.zeros(1)})
