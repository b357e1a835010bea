"""Registries: items by name, registered by the files that hold them."""

from __future__ import annotations

import sys

import pytest

from flowformer.common.registry import Registry


def test_item_is_found_listed_and_removed():
    registry: Registry[int] = Registry("number")
    registry.add("two", 2)
    registry.add("one", 1)
    assert registry.find("two") == 2
    assert registry.names() == ["one", "two"]
    assert "one" in registry
    registry.remove("one")
    assert "one" not in registry
    with pytest.raises(ValueError, match="unknown number 'one'"):
        registry.remove("one")


def test_decorator_registers_and_returns_what_it_decorates():
    registry = Registry("function")

    @registry.register("half")
    def halve(x):
        return x / 2

    assert registry.find("half") is halve


def test_unknown_name_is_refused_with_the_nearest():
    registry: Registry[int] = Registry("number")
    registry.add("seven", 7)
    with pytest.raises(ValueError, match=r"unknown number 'sevn'; available: seven \(did you mean 'seven'\?\)"):
        registry.find("sevn")
    pointed: Registry[int] = Registry("number", see="`count` shows them")
    pointed.add("seven", 7)
    with pytest.raises(ValueError, match=r"^unknown number 'sevn' \(did you mean 'seven'\?\); `count` shows them$"):
        pointed.find("sevn")
    with pytest.raises(ValueError, match=r"^unknown number 'x'; `count` shows them$"):
        pointed.find("x")


def test_name_that_is_taken_is_refused():
    registry: Registry[str] = Registry("word")
    registry.add("a", "one")
    registry.add("a", "one")  # as when a module is imported twice
    with pytest.raises(ValueError, match="the word 'a' is already registered"):
        registry.add("a", "another")


def test_files_of_a_package_register_their_items_when_the_registry_is_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "zoo_of_a_test"
    (package / "birds").mkdir(parents=True)
    (package / "__init__.py").write_text("from flowformer.common.registry import Registry\n")
    (package / "registry.py").write_text(
        "from flowformer.common.registry import Registry\nANIMALS = Registry('animal', package='zoo_of_a_test')\n"
    )
    (package / "cat.py").write_text("from zoo_of_a_test.registry import ANIMALS\nANIMALS.add('cat', 'miaow')\n")
    (package / "birds" / "__init__.py").write_text(
        "from zoo_of_a_test.registry import ANIMALS\nANIMALS.add('hen', 'cluck')\n"
    )
    from zoo_of_a_test.registry import ANIMALS  # pyright: ignore[reportMissingImports] - written above

    assert "zoo_of_a_test.cat" not in sys.modules
    assert ANIMALS.names() == ["cat", "hen"]
    for name in [name for name in sys.modules if name.startswith("zoo_of_a_test")]:
        monkeypatch.delitem(sys.modules, name)
