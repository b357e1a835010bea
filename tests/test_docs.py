"""README, docs and examples do what they say."""

import doctest
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from flowformer import cli
from flowformer.cli.arguments.recipes import read_command

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_a_page_runs(page, monkeypatch, tmp_path):
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path))
    names: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "bash") for line in block.splitlines()]
    return sorted({line.split("#")[0].strip() for line in lines})


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("flowformer train")])
def test_training_command_is_understood(command, capsys):
    _, _, name, *options = shlex.split(command)
    if "--help" in options:
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", name, "--help"])
        assert stop.value.code == 0
        assert "--learning-rate" in capsys.readouterr().out
    else:
        assert read_command(name, options).recipe.name == name


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("flowformer list")])
def test_list_command_runs(command, capsys):
    assert cli.main(shlex.split(command)[1:]) == 0
    assert capsys.readouterr().out


def test_other_commands_exist():
    words = [shlex.split(line) for line in commands() if line.startswith("flowformer")]
    assert {line[1] for line in words} <= set(cli.COMMANDS)


def test_make_targets_exist():
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    wanted = {line.split()[1] for line in commands() if line.startswith("make ")}
    assert wanted == {"demo", "test"}
    assert wanted <= set(targets)


@pytest.mark.parametrize("page", [*PAGES, CONTRIBUTING], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_contributing_shows_code_that_is_there():
    linked = re.findall(r"\]\(([\w/]+\.py)\)", CONTRIBUTING.read_text(encoding="utf-8"))
    there = {line.strip() for path in linked for line in (ROOT / path).read_text(encoding="utf-8").splitlines()}
    lines = [line.strip() for block in blocks(CONTRIBUTING, "python") for line in block.splitlines()]
    shown = {line.removesuffix(" ...") for line in lines}
    assert shown
    assert shown - {"..."} <= there, shown - there


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^  - (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) >= {page.name for page in PAGES} - {"README.md"}


def test_reference_names_modules_that_are_there():
    named = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert named
    for module in named:
        importlib.import_module(module)


def test_architecture_names_what_is_there():
    package = ROOT / "flowformer"
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = {path.name for path in package.rglob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"\b(\w+\.py)\b", page)) - {"laws.py", "toy_benchmark.py"}
    assert named <= files, named - files
    for folder in package.iterdir():
        if folder.is_dir() and any(folder.glob("*.py")):
            assert f"{folder.name}/" in page, folder.name


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_example_runs(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "module",
    [
        "mechanisms.flow.module",
        "mechanisms.mobile.module",
        "mechanisms.aft.modules",
        "models.generation",
        "models.language",
        "interop.estimator",
    ],
)
def test_examples_in_docstrings_run(module):
    outcome = doctest.testmod(importlib.import_module(f"flowformer.{module}"))
    assert outcome.attempted
    assert not outcome.failed
