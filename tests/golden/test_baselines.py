"""Every recorded file is computed by ours; the comparison itself finds what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden.__main__ import main
from golden.files import READERS, Golden, check, compared, find_reader, load, load_readers, reads
from safetensors.torch import save_file

BASELINES = Path(__file__).parent / "baselines"
FILES = {path.stem: path for path in sorted(BASELINES.glob("*.safetensors"))}

load_readers()


@pytest.mark.parametrize("name", FILES)
def test_recorded_numbers_are_computed(name):
    same, line = check(FILES[name])
    assert same, line


def test_every_file_has_its_own_reader():
    assert set(FILES) <= set(READERS)


# ------------------------------------------------------------------------------------------- what the comparison finds


@pytest.fixture
def doubling(tmp_path, monkeypatch):
    """A function that writes a file of y = 2 x, with given changes, and returns its folder."""
    monkeypatch.delitem(READERS, "doubling", raising=False)

    @reads("doubling")
    def double(golden: Golden):
        return compared(golden, lambda x: golden.options["factor"] * x, "x")

    def write(name="doubling", **changes):
        x = torch.arange(6.0, dtype=torch.float64)
        tensors = {"x": x, "out": 2 * x, "grad_out": x + 1, "grad_x": 2 * (x + 1), **changes}
        header = {"options": '{"factor": 2}', "baseline": "doubling", "kind": "op"}
        save_file(tensors, str(tmp_path / f"{name}.safetensors"), header)
        return tmp_path

    yield write
    del READERS["doubling"]


def test_same_numbers_pass(doubling, capsys):
    assert main([str(doubling())]) == 0
    assert capsys.readouterr().out.startswith("doubling: the same, 2 results, at most 0.0e+00 off")


@pytest.mark.parametrize(
    "changes",
    [
        {"out": 2 * torch.arange(6.0, dtype=torch.float64) + 1e-10},
        {"grad_x": torch.full((6,), torch.nan, dtype=torch.float64)},
        {"out": torch.arange(1.0, dtype=torch.float64)},
        {"grad.weight": torch.zeros(3, dtype=torch.float64)},
    ],
    ids=["value", "nan", "shape", "a gradient that is not computed"],
)
def test_different_numbers_do_not(changes, doubling, capsys):
    assert main([str(doubling(**changes))]) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_reader_that_fails_is_told(doubling, capsys):
    folder = doubling("doubling_9")
    header = {"options": '{"weight": 2}'}
    save_file(dict(load(folder / "doubling_9.safetensors").tensors), str(folder / "doubling.safetensors"), header)
    assert main([str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "doubling: FAILS, KeyError: 'factor'" in printed
    assert "doubling_9: the same" in printed


def test_file_without_reader_is_unknown(doubling, capsys):
    assert main([str(doubling("halving"))]) == 1
    assert "halving: unknown" in capsys.readouterr().out


def test_empty_folder_is_no_success(tmp_path):
    assert main([str(tmp_path)]) == 1


def test_reader_is_found_by_the_longest_stem(doubling):
    doubling()
    reads("doubling_twice", tolerance=1e-3)(lambda golden: {})
    try:
        assert find_reader("doubling_twice-7").tolerance == 1e-3
        assert find_reader("doubling_7").tolerance == 1e-12
        assert find_reader("doublings") is None
        with pytest.raises(ValueError, match="already"):
            reads("doubling")(lambda golden: {})
    finally:
        del READERS["doubling_twice"]


def test_header_is_read():
    golden = load(FILES["rfa_cross"])
    assert golden.baseline == golden.name == "rfa_cross"
    assert (golden.kind, golden.options["proj_dim"]) == ("op", 20)
    assert golden.recorded == {"out", "grad_q", "grad_k", "grad_v", "grad.sigma"}
