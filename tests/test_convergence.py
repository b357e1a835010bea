"""The script that shows how approximations converge."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "convergence.py"


@pytest.fixture(scope="module")
def script() -> dict:
    return runpy.run_path(str(SCRIPT))


def test_errors_of_random_numbers_fall_with_their_square_root(script):
    for curve in script["random_curves"](script["make_inputs"](32), 2):
        sizes, errors = list(curve.errors), list(curve.errors.values())
        assert sizes[-1] == 64 * sizes[0]
        assert 1 / 24 < errors[-1] / errors[0] < 1 / 3, curve  # 1/8, but for chance


def test_others_are_exact_at_the_length_and_better_the_nearer_it_is(script):
    curves = list(script["other_curves"](script["make_inputs"](64)))
    assert len(curves) == 4
    for curve in curves:
        errors = list(curve.errors.values())
        assert errors == sorted(errors, reverse=True), curve
        assert errors[0] > 0.01
        assert errors[-1] < 1e-12


def test_picture_is_drawn(script, tmp_path):
    curves = list(script["other_curves"](script["make_inputs"](32)))
    script["draw"](curves[:1], curves, 32, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
