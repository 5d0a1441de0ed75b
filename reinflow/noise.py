"""Noise that depends on an episode's seed and on which of its decisions it is for, and on nothing else.

So an episode plays the same way alone, among thousands, in any order and after a resume. The generator is Philox, a
counter-based one (Salmon et al., SC 2011): going to any (seed, decision) costs a microsecond, whatever came before. It
runs on the host, so that every device sees the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["x_0", "exploration", "noisy_step"]
PURPOSES: tuple[Purpose, ...] = ("x_0", "exploration", "noisy_step")


def episode_noise(
    seeds: Sequence[int],
    decisions: Sequence[int],
    shape: tuple[int, ...],
    purpose: Purpose,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal numbers (N, *shape), fp32.

    Args:
        seeds: (N,) of the episodes, below 2^64.
        decisions: (N,) how many decisions each episode made before this one.
        shape: of one decision's noise.
        purpose: what it is for; purposes share no numbers.
        device: where it is wanted.
    """
    rows = np.empty((len(seeds), math.prod(shape)), dtype=np.float32)
    philox = np.random.Philox(0)
    generator, state = np.random.Generator(philox), philox.state
    for row, seed, decision in zip(rows, seeds, decisions, strict=True):
        # The first word of the counter is the generator's own; nothing is left over from the row before.
        state["state"]["key"][:] = seed, PURPOSES.index(purpose)
        state["state"]["counter"][:] = 0, decision, 0, 0
        state["buffer_pos"], state["has_uint32"] = 4, 0
        philox.state = state
        generator.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows).view(len(seeds), *shape).to(device)


def episode_choice(seeds: Sequence[int], decisions: Sequence[int], among: int, purpose: Purpose) -> Tensor:
    """Whole numbers from 0 to ``among`` - 1 with equal chances, (N,) int64; what they depend on as in episode_noise."""
    normal = episode_noise(seeds, decisions, (1,), purpose)[:, 0].double()
    return (torch.special.ndtr(normal) * among).long().clamp(max=among - 1)
