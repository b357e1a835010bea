"""Attention mechanisms, one room each: a file, or a folder where there is more.

A room holds the operation, its float64 truth as rows of weights, its callers of native kernels, its module, and its row
of the registry. All rooms are imported here, and with them the files that are named after backends; a new file is found
without a change elsewhere.
"""

import importlib
import pkgutil

from flowformer.core.backends import list_backends
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import LIMITS, Mechanism, create_attention, find_attention, list_attentions

__all__ = ["LIMITS", "Attention", "Mechanism", "create_attention", "find_attention", "list_attentions"]


def _import_rooms() -> None:
    """Import every room, and offer what its ``__all__`` names from here."""
    backends = {row.name for row in list_backends()}
    for found in pkgutil.iter_modules(__path__, f"{__name__}."):
        room = importlib.import_module(found.name)
        if found.ispkg:
            for file in pkgutil.iter_modules(room.__path__, f"{found.name}."):
                if file.name.rpartition(".")[2] in backends:
                    importlib.import_module(file.name)
        public = getattr(room, "__all__", ())
        globals().update({name: getattr(room, name) for name in public})
        __all__.extend(public)


_import_rooms()
