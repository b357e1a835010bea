"""Functional interface: operation, step, state and options of every mechanism, by name.

Layout is (batch, length, heads, channels), or (batch, length, channels) for AFT; a decoding step takes (batch, heads,
channels). All names that a mechanism in :mod:`flowformer.mechanisms` exports besides its module are available here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowformer import mechanisms
from flowformer.common.names import nearest
from flowformer.core.backends import Explanation
from flowformer.core.backends import explain as _explain
from flowformer.mechanisms.weights import FlowMaps

if TYPE_CHECKING:  # at run time the names come from flowformer.mechanisms
    from flowformer.mechanisms.aft import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.bigbird import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.cosformer import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.flow import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.linear import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.linformer import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.local import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.longformer import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.mobile import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.nystromformer import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.past import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.performer import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.reformer import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.rfa import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.routing import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.sinkhorn import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.soft import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.softmax import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.sparse import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.synthesizer import *  # noqa: F403 - each has an __all__
    from flowformer.mechanisms.yoso import *  # noqa: F403 - each has an __all__

_SHARED = ("LIMITS", "Attention", "Mechanism", "create_attention", "find_attention", "list_attentions")


def explain(op: str | Callable[..., Any], *arguments: Any, **options: Any) -> Explanation:
    """Return which implementation would run for these arguments, and why, without computing anything.

    The operation is called, checks its arguments, and is left as soon as it has chosen.

    Args:
        op: The operation or its name, for example ``"flow_attention"``.
        *arguments: As the operation takes them: q, k, v, and position bias or filters where it takes them.
        **options: Likewise.

    Raises:
        TypeError, ValueError: what the operation itself would raise for these arguments; TypeError for what is neither
            an operation nor a name; ValueError for an unknown name, and for an operation that has one implementation
            only.
    """
    if not isinstance(op, str) and not callable(op):
        raise TypeError(f"op must be an operation or its name, got {op!r}")
    if isinstance(op, str) and not _is_operation(op):
        of_mechanism = f"{op}_attention"
        hint = (
            f" (did you mean {of_mechanism!r}?)"
            if _is_operation(of_mechanism)
            else nearest(op, filter(_is_operation, __all__))
        )
        raise ValueError(f"flowformer.ops has no operation {op!r}{hint}")
    function: Callable[..., Any] = globals()[op] if isinstance(op, str) else op
    return _explain(function, *arguments, **options)


def _is_operation(name: str) -> bool:
    return name in __all__ and inspect.isfunction(globals()[name])


def _is_functional(name: str) -> bool:
    found = getattr(mechanisms, name)
    return name not in _SHARED and not (isinstance(found, type) and issubclass(found, mechanisms.Attention))


globals().update({name: getattr(mechanisms, name) for name in mechanisms.__all__ if _is_functional(name)})
__all__ = ["Explanation", "FlowMaps", "explain", *filter(_is_functional, mechanisms.__all__)]  # pyright: ignore[reportUnsupportedDunderAll]
