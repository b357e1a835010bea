"""What `python -m build` and `pip install` do beyond packing files: they compile the C++ kernels into the wheel.

A wheel with kernels is for one platform and any Python. Without a compiler, or with FLOWFORMER_PURE_WHEEL=1 in the
environment, the wheel is a pure one: its kernels are then compiled where it is installed, on first use. An editable
install is left alone, because its kernels must follow their sources.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging import tags

PACKAGE_FOLDER = "flowformer/kernels/native"


class NativeKernels(BuildHookInterface):
    """Puts the compiled kernels into wheels."""

    built: tempfile.TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the kernels, unless the wheel is an editable or a pure one."""
        if version != "standard" or os.environ.get("FLOWFORMER_PURE_WHEEL", "0") != "0":
            return
        build = load_build(Path(self.root))
        if build.find_compiler() is None:
            self.app.display_warning("no C++ compiler: a pure wheel, whose kernels are compiled on first use")
            return
        self.built = tempfile.TemporaryDirectory()
        try:
            files = build.ship(Path(self.built.name), Path(self.root, PACKAGE_FOLDER, "source"))
        except build.BuildError as error:  # plain PyTorch runs everywhere: no reason to refuse the installation
            self.built.cleanup()
            self.app.display_warning(f"a pure wheel, whose kernels are compiled on first use, because {error}")
            return
        build_data["force_include"].update({str(file): f"{PACKAGE_FOLDER}/{file.name}" for file in files})
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{next(tags.platform_tags())}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the compiled files: the wheel has them."""
        if self.built:
            self.built.cleanup()


def load_build(root: Path) -> ModuleType:
    """The module `flowformer.kernels.native.compiler`, without its packages, which need torch."""
    name = "flowformer_native_compiler"
    spec = importlib.util.spec_from_file_location(name, root / PACKAGE_FOLDER / "compiler.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{root / PACKAGE_FOLDER} holds no compiler.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
