"""Extras of the package, and the modules that each of them installs."""

from __future__ import annotations

_TRAINING = ("lightning", "rich", "safetensors", "jsonargparse", "matplotlib")
EXTRAS = {
    "timeseries": (*_TRAINING, "aeon", "pandas", "sklearn"),
    "xgboost": ("xgboost",),
    "text": (*_TRAINING, "transformers", "tokenizers", "accelerate", "pyarrow", "gensim"),
    "vision": (*_TRAINING, "PIL", "pyarrow", "sklearn", "timm", "torchvision"),
    "rl": ("lightning", "rich", "safetensors", "jsonargparse", "gymnasium", "minari", "h5py"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "bench": ("matplotlib", "rich"),
}


def find_extra(module: str) -> str | None:
    """Return the first extra that installs a module; ``None`` if none does."""
    name = module.split(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if name in modules), None)
