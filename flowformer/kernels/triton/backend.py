"""Backend of the Triton kernels for GPUs; with ``TRITON_INTERPRET=1`` in the environment they run on the CPU too."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os

import torch

from flowformer.core.backends import Backend

OLDEST = (3, 2)  # Triton, by major and minor


def interpreted() -> bool:
    """Return whether Triton interprets its kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# The interpreter rounds to bfloat16 in its own way.
DTYPES = (torch.float32, torch.float16, *(() if interpreted() else (torch.bfloat16,)))


def _refuses(device: str, dtype: torch.dtype) -> str:
    if device != "cuda" and not (device == "cpu" and interpreted()):
        return f"the Triton kernels run on GPUs, not on {device}"
    if dtype not in DTYPES:
        known = " and ".join(_name(one) for one in DTYPES)
        return f"the Triton kernels{' as interpreted' if interpreted() else ''} support {known}, not {_name(dtype)}"
    return _missing()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _missing() -> str:
    """Why there is no Triton to run; empty where there is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    version = importlib.metadata.version("triton")
    numbers = version.split(".")[:2]
    if all(part.isdigit() for part in numbers) and tuple(map(int, numbers)) < OLDEST:
        return f"Triton {version} is older than {'.'.join(map(str, OLDEST))}"
    return ""


def _describe() -> str:
    version = f"Triton {importlib.metadata.version('triton')}"
    if not torch.cuda.is_available():
        return f"{version}, interpreted on the CPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{version} on {torch.cuda.get_device_name()}, capability {major}.{minor}"


BACKEND = Backend(
    "triton", "Triton kernels: float32 and half precision on GPUs", DTYPES, _refuses, _describe, rank=5,
    longest=130 if interpreted() else 0,  # the interpreter takes milliseconds for what a GPU does in microseconds
    by_request="the Triton kernels have not been checked on a GPU, and run only where they are asked for by name",
)  # fmt: skip
