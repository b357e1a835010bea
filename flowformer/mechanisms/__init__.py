"""Attention mechanisms, one file or folder each.

Each contains the operation, its float64 reference as rows of weights, calls of native kernels, its module, and its row
of the registry. All of them are imported here, together with the files named after backends; a new file needs no change
elsewhere.
"""

import importlib
import pkgutil

from flowformer.core.backends import list_backends
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import LIMITS, Mechanism, create_attention, find_attention, list_attentions

__all__ = ["LIMITS", "Attention", "Mechanism", "create_attention", "find_attention", "list_attentions"]


def _import_rooms() -> None:
    """Import every mechanism, and re-export what its ``__all__`` names."""
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
