"""The one supervised loop: AdamW, a linear warm-up and then a cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reinflow import UserError
from reinflow.schedules import warmup_cosine


class FitError(UserError, RuntimeError):
    """A supervised stage cannot go on; the message holds the remedy."""


@dataclass(frozen=True)
class FitSettings:
    """How a supervised stage descends."""

    steps: int
    lr: float  # the peak
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 50
    grad_clip_norm: float = 1.0  # 0 is off


def fit(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], tuple[Tensor, Mapping[str, float]]],
    settings: FitSettings,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Descend; the loop's body evaluates and saves between the steps.

    Args:
        parameters: what learns.
        loss: draws a batch; its loss with a graph, and figures to report.
        settings: of the descent.

    Yields:
        After every optimiser step its number, from 1, and the figures with "loss" among them.

    Raises:
        FitError: a loss or its gradient is not finite; the weights are those before its step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, settings.warmup_steps, settings.steps)
    )
    for step in range(1, settings.steps + 1):
        value, info = loss()
        if not bool(torch.isfinite(value.detach())):
            raise FitError(f"the loss is not finite at step {step}: lower lr={settings.lr}")
        optimizer.zero_grad()
        value.backward()
        limit = settings.grad_clip_norm if settings.grad_clip_norm > 0 else math.inf
        if not bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, limit))):
            raise FitError(f"the gradient is not finite at step {step}: lower lr={settings.lr}")
        optimizer.step()
        schedule.step()
        yield step, {**info, "loss": float(value.detach())}
