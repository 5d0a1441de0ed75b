"""Natural-gradient policy steps: K-FAC (Martens & Grosse, arXiv 1503.05671), as ACKTR uses it for actor-critics
(Wu et al., arXiv 1708.05144).

A policy step is limited by its KL, so the direction that counts is the one that gains most per KL. Adam's is not: it
moves every weight by about the same amount, the noisy ones too. K-FAC divides by the Fisher matrix, approximated for a
linear layer with inputs ``a`` and output gradients ``g`` by ``E[g g^T] x E[a a^T]``. How far to go along the direction
is measured, not tuned: ``step_to_kl`` scales the step until it has the wanted KL.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from reinflow import distributed

KL_TRIALS, KL_TRIAL_TOLERANCE = 12, 0.2  # to find the length of a step that has the wanted KL


class NaturalGradient(torch.optim.Optimizer):
    """K-FAC over the linear layers of a policy; weights outside linear layers (norm scales) stay as they are.

    Between ``zero_grad`` and ``move``, every backward pass through a layer adds to its two covariances.

    Args:
        policy: module that holds the layers.
        parameters: the trainable ones; a layer takes part if its weight is among them.
        damping: added to both covariances, as a share of their mean diagonal. Larger is closer to the plain gradient.
        momentum: share of the former average that gradient and covariances keep from one update to the next.
    """

    def __init__(self, policy: nn.Module, parameters: Iterable[nn.Parameter], damping: float, momentum: float):
        self._parameters = list(parameters)
        wanted = {id(p) for p in self._parameters}
        self.layers = [m for m in policy.modules() if isinstance(m, nn.Linear) and id(m.weight) in wanted]
        if not self.layers:
            raise ValueError("no linear layer is trainable: the natural gradient has nothing to move")
        super().__init__([m.weight for m in self.layers], {"lr": 0.0, "damping": damping, "momentum": momentum})
        self._sums: dict[nn.Linear, tuple[Tensor, Tensor]] = {}  # of a a^T and g g^T
        for layer in self.layers:
            layer.register_forward_hook(self._watch)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, of the weights that stay as they are too, and covariances of the last batch."""
        self._sums.clear()
        for parameter in self._parameters:
            parameter.grad = None

    def _watch(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not output.requires_grad:
            return
        a = inputs[0].detach().flatten(0, -2).float()
        if layer.bias is not None:
            a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        output.register_hook(lambda g: self._add(layer, a, g.detach().flatten(0, -2).float()))

    def _add(self, layer: Any, a: Tensor, g: Tensor) -> None:
        inputs, outputs = a.T @ a, g.T @ g
        if layer in self._sums:
            inputs, outputs = inputs + self._sums[layer][0], outputs + self._sums[layer][1]
        self._sums[layer] = inputs, outputs

    def state_shapes(self, weight: Tensor) -> dict[str, tuple[int, ...]]:
        """Shapes of what is kept for a layer's weight, for the strict loading of checkpoints."""
        layer = next(layer for layer in self.layers if layer.weight is weight)
        width = layer.in_features + (layer.bias is not None)
        outputs = layer.out_features
        return {"input": (width, width), "output": (outputs, outputs), "gradient": (outputs, width)}

    @torch.no_grad()
    def add_up(self) -> None:
        """Covariances become their sums over the ranks, as gradients do by ``distributed.add_gradients``."""
        if distributed.size() == 1:
            return
        took_part = distributed.total(*(float(layer in self._sums) for layer in self.layers))
        layers = [layer for layer, ranks in zip(self.layers, took_part, strict=True) if ranks]
        for layer in layers:
            if layer not in self._sums:  # no row of this batch is this rank's
                shapes, like = self.state_shapes(layer.weight), layer.weight
                self._sums[layer] = like.new_zeros(shapes["input"]), like.new_zeros(shapes["output"])
        distributed.add_up([sums for layer in layers for sums in self._sums[layer]])

    @torch.no_grad()
    def directions(self) -> list[Tensor]:
        """Natural gradient (out, in [+ 1 for the bias]) of every layer, in the order of ``layers``.

        Each rank solves for its share of the layers.

        Raises:
            RuntimeError: no backward pass since ``zero_grad``.
        """
        if not self._sums:
            raise RuntimeError("directions needs a backward pass first")
        own = distributed.share(len(self.layers))
        directions = []
        for number, layer in enumerate(self.layers):
            if self._average(layer) and number in own:
                directions.append(self._solve(layer))
            else:
                directions.append(layer.weight.new_zeros(self.state_shapes(layer.weight)["gradient"]))
        distributed.add_up([d for layer, d in zip(self.layers, directions, strict=True) if layer in self._sums])
        return directions

    def _average(self, layer: nn.Linear) -> bool:
        """Take the batch into a layer's running means; whether it has a gradient at all."""
        group, state = self.param_groups[0], self.state[layer.weight]
        covariances = self._sums.get(layer)
        if covariances is None or not bool(covariances[1].any()):  # fixed noise: the noise head gets no gradient
            return False
        gradients = [p.grad for p in (layer.weight, layer.bias) if p is not None and p.grad is not None]
        gradient = torch.cat([g.float().reshape(layer.out_features, -1) for g in gradients], dim=1)
        fresh = (*covariances, gradient)
        for name, new in zip(("input", "output", "gradient"), fresh, strict=True):
            keep = group["momentum"] if name in state else 0.0
            state[name] = new if keep == 0.0 else keep * state[name] + (1 - keep) * new
        return True

    def _solve(self, layer: nn.Linear) -> Tensor:
        state, damping = self.state[layer.weight], self.param_groups[0]["damping"]
        left, right = self._damped(state["output"], damping), self._damped(state["input"], damping)
        return torch.linalg.solve(right, torch.linalg.solve(left, state["gradient"]).T).T

    @staticmethod
    def _damped(covariance: Tensor, damping: float) -> Tensor:
        return covariance + damping * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)

    @torch.no_grad()
    def move(self, directions: list[Tensor], scale: float) -> None:
        """``weights -= scale * direction``; a second call with ``-scale`` takes it back up to rounding."""
        for layer, direction in zip(self.layers, directions, strict=True):
            layer.weight.sub_(scale * direction[:, : layer.in_features])
            if layer.bias is not None:
                layer.bias.sub_(scale * direction[:, -1])

    @torch.no_grad()
    def step_to_kl(self, target: float, measure: Callable[[], float]) -> float:
        """Go along the natural gradient until the KL is about ``target``, never beyond.

        Args:
            target: the KL that the step should have, within a fifth.
            measure: KL of the weights as they are against those before the step.

        Returns:
            The KL reached; 0 without a step where ``target`` is 0, as at the end of a decay to 0. NaN without a step
            where a gradient or covariance is not finite: neither weights nor running means take it.
        """
        if not self._finite():
            return math.nan
        directions = self.directions()
        snapshot = [p.detach().clone() for p in self._parameters]
        length = float(torch.stack([d.norm() for d in directions]).norm())
        if length == 0.0 or target <= 0.0:
            return 0.0
        scale, too_short, too_long, kl, kept = 1e-3 / length, 0.0, math.inf, 0.0, 0.0
        for _ in range(KL_TRIALS):
            self._restore(snapshot)
            self.move(directions, scale)
            kl = measure()
            if abs(kl / target - 1) < KL_TRIAL_TOLERANCE:
                return kl
            if kl < target:
                too_short, kept = scale, kl
            else:
                too_long = scale
            scale *= min(max((target / max(kl, 1e-12)) ** 0.5, 0.1), 30.0)  # KL grows with the square of the step,
            if not too_short < scale < too_long:  # unless ratios explode
                scale = (too_short * too_long) ** 0.5
        self._restore(snapshot)
        self.move(directions, too_short)
        return kept

    def _finite(self) -> bool:
        fresh = [t for pair in self._sums.values() for t in pair] + [
            p.grad for p in self._parameters if p.grad is not None
        ]
        return all(bool(torch.isfinite(t).all()) for t in fresh)

    def _restore(self, snapshot: list[Tensor]) -> None:
        for parameter, saved in zip(self._parameters, snapshot, strict=True):
            parameter.copy_(saved)
