"""Replace ``torch.nn.MultiheadAttention`` in a model, for :func:`flowformer.swap_attention`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from flowformer.mechanisms.registry import Mechanism
from flowformer.models.swap.multihead import DropInMultiheadAttention


def find_multiheads(model: nn.Module, pattern: str) -> list[tuple[list[str], nn.MultiheadAttention]]:
    """Find ``torch.nn.MultiheadAttention`` modules, each with all its names that match a pattern.

    A subclass with a forward of its own computes something else, and is not among them.
    """
    found: dict[nn.MultiheadAttention, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.MultiheadAttention) or not fnmatchcase(name, pattern):
            continue
        if type(module).forward is nn.MultiheadAttention.forward:
            found.setdefault(module, []).append(name)
    return [(names, module) for module, names in found.items()]


@dataclass(frozen=True)
class MultiheadSwap:
    """A ``torch.nn.MultiheadAttention`` of a model and its replacement."""

    names: list[str]
    module: nn.MultiheadAttention
    attention: DropInMultiheadAttention

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @classmethod
    def build(
        cls,
        model: nn.Module,
        names: list[str],
        module: nn.MultiheadAttention,
        mechanism: Mechanism,
        num_heads: int | None,
        options: Mapping[str, Any],
    ) -> MultiheadSwap:
        """Build the replacement with the parameters of the old module; the model is not changed.

        Warns:
            UserWarning: where a causal decoder would not be causal any more.

        Raises:
            TypeError, ValueError: for what the mechanism cannot do, in words.
        """
        _check(model, names[0], module, mechanism)
        weight = module.out_proj.weight
        built = DropInMultiheadAttention(
            module.embed_dim, num_heads or module.num_heads, kdim=module.kdim, vdim=module.vdim,
            batch_first=module.batch_first, device=weight.device, dtype=weight.dtype, mechanism=mechanism.name,
            **{"bias": module.in_proj_bias is not None, **options},
        )  # fmt: skip
        built.adopt(module)
        if _decodes(model, names[0]) and _queries_meet(built):
            warnings.warn(
                f"swap_attention: in {mechanism.name} attention the queries of {names[0]} compete for the memory: in a "
                "causal decoder later targets change earlier outputs, and padded targets real ones. "
                f"modules='*self_attn' leaves {names[0]} as it is",
                stacklevel=3,
            )
        return cls(names, module, built)

    def carry_out(self, model: nn.Module, grid: Any = None) -> tuple[list[str], dict[str, int]]:
        """Replace the module.

        Returns:
            Names of parameters that are fresh, and what is gone, as in :class:`flowformer.models.swap.SwapReport`.
        """
        for name in self.names:
            model.set_submodule(name, self.attention)
        now, before = dict(self.attention.named_parameters()), dict(self.module.named_parameters())
        gone = {f"{self.name}.{name}": old.numel() for name, old in before.items() if name not in now}
        gone |= {f"{self.name}.{what}": 0 for what in ("dropout", "add_zero_attn") if getattr(self.module, what)}
        return [f"{self.name}.{name}" for name in now if name not in before], gone


def _check(model: nn.Module, name: str, module: nn.MultiheadAttention, mechanism: Mechanism) -> None:
    if not name:
        raise ValueError(
            "swap_attention: the model itself is an attention module: use FlowMultiheadAttention.from_torch"
        )
    if mechanism.name == "softmax" and (module.bias_k is not None or module.add_zero_attn):
        raise ValueError(
            f"swap_attention: softmax does not support the keys that {name} appends (add_bias_kv, add_zero_attn), and "
            "would compute different outputs"
        )
    if _decodes(model, name) and not mechanism.can("cross"):
        raise ValueError(
            f"swap_attention: {mechanism.name} attention is self-attention, and {name} is cross-attention; "
            "modules='*self_attn' leaves it as it is"
        )


def _decodes(model: nn.Module, name: str) -> bool:
    """Whether a module is the cross-attention of PyTorch's decoder layer."""
    parent, _, child = name.rpartition(".")
    return child == "multihead_attn" and isinstance(model.get_submodule(parent), nn.TransformerDecoderLayer)


@torch.no_grad()
def _queries_meet(attention: DropInMultiheadAttention) -> bool:
    """Whether an output of cross-attention depends on other queries: found by trying, for options decide it."""
    form = copy.deepcopy(attention.attention)
    if any(parameter.is_meta for parameter in form.parameters()):
        return False
    form.to("cpu", torch.float64)
    x = form.split(torch.arange(3.0 * attention.embed_dim, dtype=torch.float64).sin().view(1, 3, -1))
    given = (x[:, :2], x[:, :2], *form.learned())
    several, alone = (form.mechanism.operation(q, *given, **form.arguments()) for q in (x, x[:, :1]))
    return not torch.allclose(several[:, :1], alone)
