"""How much of a policy gradient is signal: the simple noise scale of McCandlish et al. 2018 (arXiv 1812.06162).

A gradient over B episodes is g = G + noise, with |noise|^2 = tr(S) / B on average: G the gradient of endlessly many
episodes, S the covariance of a single episode's. A step along g gains |G|^2 / (|G|^2 + tr(S) / B) of what one along G
would (its eq. 2.7): the signal's share, one half where B is the noise scale tr(S) / |G|^2.

The paper solves for both from gradient norms at two batch sizes (its appendix A.1): the larger the ratio of the sizes,
the less chance is in it. Here the sizes are a step's batch and the last iterations together. Rollouts are independent
of each other, so the dot product of a step's gradient with the mean of earlier ones is an unbiased |G|^2, as long as G
stays about the same over some iterations; the gradients are those of the update, and nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reinflow.update_log import Probe

MEMORY = 0.8  # share of the former sum that is kept: some 9 iterations count, over which a policy changes little


class GradientMemory:
    """The mean of a run's recent gradients, at the entries of ``probe``."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.weight, self.sum = 0.0, probe.weights().new_zeros(0)
        self._learning: list[bool] | None = None  # the tensors that the gradients in it are of

    def remember(self) -> dict[str, float]:
        """Take the gradients as they are; {"gradients/signal_share": |G|^2 / (|G|^2 + tr(S) / B)} of them.

        Single values scatter about the true one, negative ones included: average them over iterations. Empty at first,
        and where nothing has a gradient or it is not finite.
        """
        fresh = self.probe.gradients()
        square = _dot(fresh, fresh)
        if not 0.0 < square < float("inf"):
            return {}
        learning = [parameter.grad is not None for parameter in self.probe.parameters]
        if self._learning not in (None, learning):  # other parts of the policy learn from here on
            self.weight = 0.0
        self._learning = learning
        known = {"gradients/signal_share": _dot(fresh, self.sum) / self.weight / square} if self.weight else {}
        self.sum = MEMORY * self.sum + fresh if self.weight else fresh
        self.weight = MEMORY * self.weight + 1.0
        return known

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"weight": self.weight, "sum": self.sum}

    def load_state_dict(self, state: dict[str, Tensor | float]) -> None:
        """Inverse of ``state_dict``."""
        self.weight, self.sum = float(state["weight"]), torch.as_tensor(state["sum"]).to(self.sum)


def _dot(a: Tensor, b: Tensor) -> float:
    """By a sum, which rounds the same wherever the tensors lie in memory: a BLAS product does not."""
    return float((a * b).sum())


def noise_scale(signal_share: float, episodes: float) -> float:
    """tr(S) / |G|^2, in episodes: with so many a step gains half of what one without noise would.

    Args:
        signal_share: of a step's batch, above 0.
        episodes: in that batch.
    """
    return episodes * (1 / signal_share - 1)
