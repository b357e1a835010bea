"""Platform wheels ship the library, and the hook that builds them."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
from small_kernels import COMPILER, KERNELS, compilations

from flowformer.kernels.native import build, compiler

REPOSITORY = Path(__file__).parents[3]

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.skipif(COMPILER is None or sys.platform == "win32", reason="no C++ compiler for the kernels"),
]


def test_shipped_library_comes_before_any_compiler(
    source: Path, beside: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    compiler.ship(beside, source)
    monkeypatch.setenv("CXX", "/there/is/none")
    library = build.open_library(source, beside)
    assert library.path == beside / compiler.SHIPPED_LIBRARY
    assert library.how == "shipped with the package"
    assert not folder.exists()


@pytest.mark.parametrize("record", [None, "", "[]", "{}", '{"sources": 1}'])
def test_shipped_library_without_a_true_record_is_not_used(record: str | None, source: Path, beside: Path) -> None:
    (beside / compiler.SHIPPED_LIBRARY).touch()
    if record is not None:
        (beside / compiler.SHIPPED_RECORD).write_text(record)
    assert compiler.shipped_library(source, beside) is None


def test_damaged_shipped_library_is_not_used(source: Path, beside: Path, folder: Path) -> None:
    library, _ = compiler.ship(beside, source)
    library.write_bytes(library.read_bytes()[:-1000])
    assert build.open_library(source, beside).path.parent == folder


def test_shipped_library_of_other_sources_is_not_used(source: Path, beside: Path, folder: Path) -> None:
    compiler.ship(beside, source)
    (source / "kernels.cpp").write_text(KERNELS.replace("return 1", "return 2"))
    library = build.open_library(source, beside)
    assert library.path.parent == folder
    assert library.handle.flowformer_version_portable() == 2


@pytest.fixture
def project(source: Path, tmp_path: Path) -> Path:
    """What the hook reads of the repository, with the small sources."""
    root = tmp_path / "project"
    shutil.copytree(source, root / "flowformer/kernels/native/source")
    shutil.copy(compiler.FOLDER / "compiler.py", root / "flowformer/kernels/native")
    return root


class Hook:
    """The hook as hatchling would run it; hatchling itself is not needed here."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        interface = types.ModuleType("hatchling.builders.hooks.plugin.interface")
        interface.BuildHookInterface = object
        monkeypatch.setitem(sys.modules, interface.__name__, interface)
        monkeypatch.setitem(sys.modules, "flowformer_native_compiler", None)  # removed again with the test
        spec = importlib.util.spec_from_file_location("hatch_build", REPOSITORY / "hatch_build.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.said: list[str] = []
        self.data = {"force_include": {}, "pure_python": True}
        self.hook = module.NativeKernels()
        self.hook.root, self.hook.app = str(root), types.SimpleNamespace(display_warning=self.said.append)

    def run(self, version: str = "standard") -> None:
        self.hook.initialize(version, self.data)

    @property
    def pure(self) -> bool:
        return self.data == {"force_include": {}, "pure_python": True}


def test_wheel_holds_the_library_and_is_for_this_platform(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Hook(project, monkeypatch)
    hook.run()
    names = {name: Path(path) for path, name in hook.data["force_include"].items()}
    assert set(names) == {
        f"flowformer/kernels/native/{name}" for name in (compiler.SHIPPED_LIBRARY, compiler.SHIPPED_RECORD)
    }
    library = names[f"flowformer/kernels/native/{compiler.SHIPPED_LIBRARY}"]
    native = project / "flowformer/kernels/native"
    assert compiler.shipped_library(native / "source", library.parent) == (library, library.read_bytes())
    assert hook.data["pure_python"] is False
    assert hook.data["tag"].startswith("py3-none-")
    assert platform.machine() in hook.data["tag"]
    assert {path.name for path in native.iterdir()} <= {"source", "compiler.py", "__pycache__"}
    hook.hook.finalize("standard", hook.data, "")
    assert not library.exists()


def test_editable_install_compiles_nothing(project: Path, wrapper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Hook(project, monkeypatch)
    hook.run("editable")
    assert hook.pure
    assert not hook.said
    assert compilations(wrapper) == 0


def test_pure_wheel_where_asked_for(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWFORMER_PURE_WHEEL", "1")
    hook = Hook(project, monkeypatch)
    hook.run()
    assert hook.pure
    assert not hook.said


def test_pure_wheel_without_a_compiler(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/there/is/none")
    hook = Hook(project, monkeypatch)
    hook.run()
    assert hook.pure
    assert "no C++ compiler" in hook.said[0]


def test_pure_wheel_where_the_compiler_fails(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "flowformer/kernels/native/source/kernels.cpp").write_text("this is no C++;")
    hook = Hook(project, monkeypatch)
    hook.run()
    assert hook.pure
    assert "the compiler failed" in hook.said[0]


@pytest.mark.slow
def test_what_make_wheel_builds(source: Path, tmp_path: Path) -> None:
    root, built = tmp_path / "repository", tmp_path / "dist"
    shutil.copytree(
        REPOSITORY, root, ignore=lambda folder, names: {".git", ".venv", "runs", "dist", "build"} & {*names}
    )
    shutil.rmtree(root / "flowformer/kernels/native/source", ignore_errors=True)
    shutil.copytree(source, root / "flowformer/kernels/native/source")
    command = [sys.executable, "-m", "build", "--outdir", str(built), str(root)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (archive,), (wheel,) = built.glob("*.tar.gz"), built.glob("*.whl")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[-1] for name in file.getnames()}
    assert {"hatch_build.py", "flowformer/kernels/native/source/names.h"} <= names
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    native = tmp_path / "installed/flowformer/kernels/native"
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert json.loads((native / compiler.SHIPPED_RECORD).read_text())
    assert build.open_library(native / "source", native).how == "shipped with the package"
