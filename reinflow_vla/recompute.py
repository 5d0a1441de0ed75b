"""Gradient checkpointing of an expert that attends to a cached prefix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache


class FixedPrefix:
    """A layer's cached prefix that a layer may look at but not change, so that it can run twice."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of prefix and suffix, (B, heads, P + n, head_dim)."""
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


def recompute_layers(expert: Any) -> None:
    """Gradient checkpointing of every layer.

    The library's own works in training mode only and drops the cache; here modules act and learn in eval mode.
    """
    for index, layer in enumerate(expert.layers):
        layer.forward = _recomputed(layer.forward, index)


def _recomputed(forward: Callable[..., Tensor], index: int) -> Callable[..., Tensor]:
    def run(hidden_states: Tensor, *, past_key_values: DynamicCache, **options: Any) -> Tensor:
        layer: Any = past_key_values.layers[index]
        options["past_key_values"] = FixedPrefix(layer.keys, layer.values)
        if not torch.is_grad_enabled():
            return forward(hidden_states, **options)
        return checkpoint(forward, hidden_states, use_reentrant=False, preserve_rng_state=False, **options)

    return run
