"""Weights that act as what a narrower type holds of them, over fp32 masters that learn.

A program that loads an export into bf16 rounds it: of an update of 1e-4 on weights of .03 a tenth to a fifth is lost.
With ``act_rounded`` the policy never acts with anything else than the rounded weights, in rollouts, updates and
evaluations, while the optimiser moves the masters; so what is exported is what was trained, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rounded(weight: Tensor) -> Tensor:
    """The nearest bf16 values, as fp32; the gradient goes straight through to ``weight``."""
    return weight + (weight.detach().bfloat16().float() - weight.detach())


class RoundedLinear(nn.Linear):
    """A linear layer whose product takes rounded weights; ``weight`` and ``bias`` stay the masters."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(inputs, rounded(self.weight), None if self.bias is None else rounded(self.bias))


def _rounded_weight(module: nn.Module) -> Tensor | None:
    weight = module._parameters["weight"]
    return None if weight is None else rounded(weight)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {}


def _rounded_kind(kind: type[nn.Module]) -> type[nn.Module]:
    """``kind`` with a ``weight`` that reads as rounded; the parameter behind it stays the master."""
    if kind not in _KINDS:
        _KINDS[kind] = type(f"Rounded{kind.__name__}", (kind,), {"weight": property(_rounded_weight)})
    return _KINDS[kind]


def act_rounded(module: nn.Module) -> None:
    """Let a module without children act with rounded weights, in place.

    Raises:
        TypeError: it has parameters besides ``weight`` (and a linear layer's ``bias``).
    """
    if isinstance(module, nn.Linear):
        module.__class__ = RoundedLinear
    elif module._parameters.keys() == {"weight"}:
        module.__class__ = _rounded_kind(type(module))
    else:
        raise TypeError(
            f"{type(module).__name__} has parameters {sorted(module._parameters)}: only a weight is rounded"
        )


def narrow_products(context: Mapping[str, Tensor]) -> str:
    """What computes with less than fp32, in words; empty if nothing is known to."""
    if any(tensor.is_cuda for tensor in context.values()) and torch.get_float32_matmul_precision() != "highest":
        return "matrix products are in TF32"
    narrow = sorted(name for name, tensor in context.items() if tensor.dtype in (torch.bfloat16, torch.float16))
    return f"{', '.join(narrow)} of the prefix are in bf16" if narrow else ""
