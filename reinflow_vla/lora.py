"""Adapters of low rank (LoRA) beside an expert's linear layers, and the expert with them merged in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

ADAPTED_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def add_adapters(expert: nn.Module, rank: int) -> None:
    """LoRA of ``rank`` beside all linear layers of the expert's attention and MLPs; zero at the start."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=ADAPTED_LAYERS, lora_dropout=0.0)
    inject_adapter_in_model(config, expert)


def adapters(expert: nn.Module) -> list[nn.Module]:
    """The low-rank factors."""
    return [module for name, module in expert.named_modules() if name.rsplit(".", 1)[-1] in ("lora_A", "lora_B")]


@contextmanager
def merged_adapters(expert: nn.Module) -> Iterator[None]:
    """The expert with plain linear layers that hold what layer and adapter give together; put back bit for bit."""
    from peft.tuners.lora import Linear

    adapted = [(name, module) for name, module in expert.named_modules() if isinstance(module, Linear)]
    originals = []
    for name, module in adapted:
        base: Any = module.get_base_layer()
        originals.append(base.weight.data)
        base.weight.data = base.weight.data + module.get_delta_weight("default")
        _put(expert, name, base)
    try:
        yield
    finally:
        for (name, module), weight in zip(adapted, originals, strict=True):
            module.get_base_layer().weight.data = weight
            _put(expert, name, module)


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule ``name`` of ``root``."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
