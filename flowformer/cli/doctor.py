"""``flowformer doctor``."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from flowformer.cli.arguments.parser import Parser, usable
from flowformer.common.extras import EXTRAS


def main(words: Sequence[str]) -> int:
    """Show what is installed here, and which backend would run."""
    Parser(prog="flowformer doctor", description=main.__doc__).parse(words)

    import torch

    import flowformer.mechanisms  # enters what each backend implements
    from flowformer.core.backends import choose_and_say_why, list_backends

    chosen, why = usable(choose_and_say_why, "flow_attention")
    rows_of_backends = {
        f"{row.name} backend": f"{row.about}: {usable(row.refuses, 'cpu', torch.float32) or 'runs on this CPU'}"
        for row in list_backends()
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    rows = {
        "flowformer": f"{flowformer.__version__} in {Path(flowformer.__file__).parent}",
        "python": f"{platform.python_version()} in {sys.prefix}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs",
        "GPUs": ", ".join(gpus) or "none",
        "backend": f"{chosen}: {why}",
        **rows_of_backends,
        **{f"extra {extra}": _describe_extra(extra) for extra in EXTRAS},
    }
    for name, value in rows.items():
        print(f"{name:18} {value}")
    return 0


def _describe_extra(extra: str) -> str:
    missing = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    return f"missing {', '.join(missing)}: pip install 'flowformer[{extra}]'" if missing else "installed"
