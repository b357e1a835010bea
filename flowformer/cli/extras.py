"""The extras of the package, and the modules that each needs."""

from __future__ import annotations

_TRAINING = ("lightning", "rich", "safetensors", "jsonargparse", "matplotlib")
EXTRAS = {
    "timeseries": (*_TRAINING, "aeon", "pandas", "sklearn"),
    "text": (*_TRAINING, "transformers", "tokenizers", "accelerate", "pyarrow", "gensim"),
    "vision": (*_TRAINING, "PIL", "pyarrow", "sklearn", "timm", "torchvision"),
    "rl": ("lightning", "rich", "safetensors", "jsonargparse", "gymnasium", "minari"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "bench": ("matplotlib", "rich"),
}


def find_extra(module: str) -> str | None:
    """The first extra that a module, or a part of it, belongs to; ``None`` for a module of no extra."""
    name = module.split(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if name in modules), None)
