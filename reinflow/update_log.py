"""What one update says of itself: means over its steps, and whether its weights moved at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from reinflow import distributed

PROBE_SIZE = 65_536  # weights that stand for all: a share of them is known to .2 %, and a copy of 98 M is spared


class MeanLog:
    """Means (and extremes) of metrics over the steps of one update.

    Where ranks share the steps' rows, each adds its part of a step's mean (``distributed.part``), and ``join`` sums.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._extremes: dict[str, float] = {}

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            if name in ("ppo/ratio_min", "ppo/ratio_max"):
                self.extreme(name, value, min if name.endswith("min") else max)
                continue
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value, count + 1)

    def extreme(self, name: str, value: float, pick: Callable[[float, float], float]) -> None:
        self._extremes[name] = pick(value, self._extremes.get(name, value))

    def join(self, steps: int) -> None:
        """Take in what the other ranks added to the same ``steps`` steps; a rank may have had no row of any."""
        if distributed.size() == 1:
            return
        logs = distributed.gather(({name: total for name, (total, _) in self._sums.items()}, self._extremes))
        self._sums, self._extremes = {}, {}
        for sums, extremes in logs:
            self.add(extremes)
            for name, value in sums.items():
                self._sums[name] = (self._sums.get(name, (0.0, 0))[0] + value, steps)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self._sums.items()} | self._extremes


class Probe:
    """Up to about ``size`` entries of a policy's weights and of their gradients, spread evenly over all tensors.

    Figures of an update that need no exact sum (a share of weights, the angle of two gradients) are taken from these,
    so that a large policy costs neither a second copy of itself nor a pass over it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], size: int = PROBE_SIZE) -> None:
        self.parameters = list(parameters)
        self.stride = max(1, sum(p.numel() for p in self.parameters) // size)

    @torch.no_grad()
    def weights(self) -> Tensor:
        """(M,) copies of the entries as they are."""
        return torch.cat([p.detach().flatten()[:: self.stride].clone() for p in self.parameters])

    @torch.no_grad()
    def gradients(self) -> Tensor:
        """(M,) copies of their gradients, 0 where there is none."""
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([part.detach().flatten()[:: self.stride].float() for part in parts])

    def moved_share(self, before: Tensor) -> float | None:
        """Share of the entries with a gradient that differ from ``before``; None where none has one."""
        learns = self.gradients() != 0
        return (self.weights() != before)[learns].float().mean().item() if bool(learns.any()) else None
