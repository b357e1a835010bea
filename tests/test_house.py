"""The house of DESIGN.md: imports go down, never around; files and folders stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import flowformer

PACKAGE = Path(flowformer.__file__).parent
# A floor may import itself and those before it; core and kernels share one.
FLOORS = (
    ("_version", "common"), ("core", "kernels"), ("distributed",), ("mechanisms",), ("models",), ("tasks",),
    ("training",), ("recipes",), ("bench",), ("report",),
)  # fmt: skip
LEVELS = {name: level for level, names in enumerate(FLOORS) for name in names}
# They may import any floor, and no floor imports them; "" is the package's face.
OUTSIDE = {"", "cli", "interop", "ops", "__main__"}
MOST_LINES = 500
MOST_FILES = 14  # in a folder, its __init__.py apart; as many as there are mechanisms in mechanisms/


class Import(NamedTuple):
    """One import, in a module's head or in a function.

    Attributes:
        source: The module that imports, as its dotted name below the package.
        target: The module or package that is imported, likewise; "" for the package itself.
        line: Where.
        for_types: Whether it is for type checkers only.
    """

    source: str
    target: str
    line: int
    for_types: bool


def modules_of(package: Path) -> dict[str, Path]:
    """Every module below a package, by its dotted name in it; packages by theirs."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(package: Path) -> list[Import]:
    """Every import of one module of a package in another."""
    modules = modules_of(package)
    return [found for name, path in modules.items() for found in _imports(name, path, package.name, modules)]


def _imports(source: str, path: Path, top: str, modules: dict[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = {id(inner) for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            stem = _stem(node, source, path, top)
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, below = name.partition(".")
            if first == top:
                target = below if below in modules else below.rpartition(".")[0]
                yield Import(source, target, node.lineno, id(node) in typed)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _stem(node: ast.ImportFrom, source: str, path: Path, top: str) -> str:
    if not node.level:
        return node.module or ""
    parts = [top, *source.split(".")] if source else [top]
    up = node.level - (path.stem == "__init__")
    return ".".join([*parts[: len(parts) - up], *filter(None, [node.module])])


def wrong_directions(imports: list[Import]) -> list[str]:
    """Imports that go up, or from a floor to what stands outside of the house."""
    found = []
    for source, target, line, _ in imports:
        here, there = source.partition(".")[0], target.partition(".")[0]
        if here in OUTSIDE:
            continue
        if there in OUTSIDE or LEVELS[there] > LEVELS[here]:
            found.append(f"{source}:{line} imports {target or 'the face of the package'}")
    return found


def circles(imports: list[Import]) -> list[set[str]]:
    """Groups of modules each of which imports all others, by way of the rest; imports for types do not count."""
    after: dict[str, set[str]] = {}
    for source, target, _, for_types in imports:
        if not for_types and source != target:
            after.setdefault(source, set()).add(target)
    reached = {source: _reach(source, after) for source in after}
    groups = [{other for other in there if name in reached.get(other, ())} for name, there in reached.items()]
    return [group for place, group in enumerate(groups) if group and group not in groups[:place]]


def _reach(source: str, after: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    waiting = [source]
    while waiting:
        new = after.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


# --------------------------------------------------------------------------------------------------------------- house


def test_every_part_of_the_package_has_its_place():
    parts = {name.partition(".")[0] for name in modules_of(PACKAGE)}
    assert parts <= set(LEVELS) | OUTSIDE


def test_imports_go_down():
    assert wrong_directions(imports_of(PACKAGE)) == []


def test_imports_go_in_no_circle():
    assert circles(imports_of(PACKAGE)) == []


def test_benchmarks_use_mechanisms_rather_than_the_face():
    assert [found for found in imports_of(PACKAGE) if found.source.startswith("bench") and found.target == "ops"] == []


def test_files_are_short():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules_of(PACKAGE).items()}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_folders_are_small():
    folders = {path.parent for path in modules_of(PACKAGE).values()} - {PACKAGE / "mechanisms"}
    counts = {str(folder.relative_to(PACKAGE)): len(list(folder.glob("[!_]*.py"))) for folder in folders}
    assert {folder for folder, count in counts.items() if count > MOST_FILES} == set(), counts


# ------------------------------------------------------------------------------------------------ what the rules catch


@pytest.fixture
def house(tmp_path):
    """A function that writes a package of modules, text by name, and returns its imports."""

    def build(**files):
        for name, text in files.items():
            path = tmp_path / "flowformer" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(text)
        (tmp_path / "flowformer" / "__init__.py").touch()
        return imports_of(tmp_path / "flowformer")

    return build


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("from flowformer.bench import runner", ["core.sums:1 imports bench.runner"]),
        ("def f():\n    import flowformer.models.swap", ["core.sums:2 imports models"]),
        ("from flowformer import ops", ["core.sums:1 imports ops"]),
        ("import flowformer", ["core.sums:1 imports the face of the package"]),
        ("if TYPE_CHECKING:\n    from flowformer.cli import main", ["core.sums:2 imports cli.main"]),
        ("from ..cli import main", ["core.sums:1 imports cli.main"]),
        ("from flowformer.common import files\nfrom flowformer.kernels import native\nfrom . import scan", []),
    ],
)
def test_import_that_goes_up_is_found(text, wrong, house):
    rest = {"bench__runner": "", "models__base": "", "cli__main": "", "ops": "", "common__files": ""}
    found = house(core__sums=text, core__scan="", kernels__native="", **rest)
    assert wrong_directions(found) == wrong


def test_circle_is_found_also_by_late_imports(house):
    found = house(
        core__a="from flowformer.core import b",
        core__b="from flowformer.core.c import x",
        core__c="def f():\n    from flowformer.core.a import y",
        core__d="from flowformer.core import a\nif TYPE_CHECKING:\n    from flowformer.core import e",
        core__e="from flowformer.core import d",
    )
    assert circles(found) == [{"core.a", "core.b", "core.c"}]
