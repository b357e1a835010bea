"""The entry of the command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import flowformer
from flowformer import cli
from flowformer.common.extras import EXTRAS, find_extra


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["list", "--help"], ["nonsense"]])
def test_what_needs_no_torch_does_not_import_it(words):
    code = f"""
import sys
from flowformer.cli import main
try:
    main({words!r})
except SystemExit:
    pass
heavy = {{"torch", "numpy", "lightning", "rich", "jsonargparse", "aeon"}} & set(sys.modules)
print(heavy, file=sys.stderr)
sys.exit(bool(heavy))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_help_is_quick():
    """In seconds of this process and its children alone, whatever else the machine does."""
    import resource

    def seconds():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = seconds()
        out = subprocess.run([sys.executable, "-m", "flowformer", "--help"], capture_output=True, text=True, check=True)
        times.append(seconds() - before)
        assert "commands:" in out.stdout
    assert min(times) < 0.4


def test_python_runs_the_package():
    process = subprocess.run([sys.executable, "-m", "flowformer", "--version"], capture_output=True, text=True)
    assert process.stdout == f"flowformer {flowformer.__version__}\n"
    process = subprocess.run([sys.executable, "-m", "flowformer", "trian"], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("flowformer: no command 'trian' (did you mean 'train'?)")
    assert process.stderr.count("\n") == 1


def test_every_command_is_described_in_one_line_and_has_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    for name, function in cli.COMMANDS.items():
        assert (function.__doc__ or "").count("\n") == 0
        assert f"  {name:10} {function.__doc__}" in out


def test_modules_lead_to_their_extra():
    assert find_extra("aeon.datasets") == "timeseries"
    assert find_extra("jsonargparse") == "timeseries"
    assert find_extra("onnx") == "export"
    assert find_extra("torch") is None


def test_extras_name_what_the_package_asks_for():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    lines = re.findall(r"^(\w+) = \[(.*)\]$", text, re.MULTILINE)
    required = {name: set(re.findall(r'"([\w-]+)', packages)) for name, packages in lines}
    names = {"sklearn": "scikit-learn"}
    brought = {"PIL", "tokenizers", "h5py"}  # by torchvision, transformers and minari
    for extra, modules in EXTRAS.items():
        assert {names.get(module, module) for module in modules if module not in brought} <= required[extra], extra
