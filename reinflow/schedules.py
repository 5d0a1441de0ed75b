"""Schedules as pure functions of the iteration or of the fraction of training done."""

from __future__ import annotations

import math
from typing import Literal, get_args

NoiseSchedule = Literal["hold_cosine", "constant", "linear", "exponential"]


def warmup_lr(iteration: int, warmup: int) -> float:
    """Factor on the learning rate: linear from 1/warmup at iteration 0 to 1 at iteration warmup - 1, then 1.

    It never is 0, so that no iteration is wasted; ``warmup=0`` turns it off.
    """
    return 1.0 if warmup <= 0 else min(1.0, (iteration + 1) / warmup)


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Learning-rate factor: linear to 1 over ``warmup`` steps, then a cosine to 0 at ``total``."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / total)))


def linear_decay(progress: float, final: float) -> float:
    """Factor that falls linearly from 1 to ``final`` over training; ``progress`` is clamped to [0, 1]."""
    return 1.0 - (1.0 - final) * min(max(progress, 0.0), 1.0)


def in_critic_warmup(iteration: int, critic_warmup_iters: int) -> bool:
    """True while only the critic learns (ReinFlow, appendix D.2), on the same GAE targets as afterwards."""
    return iteration < critic_warmup_iters


def _hold_cosine(progress: float, sigma_max: float, decay_start: float, decay_ratio: float) -> float:
    """sigma_max up to decay_start, then half a cosine down to sigma_max * decay_ratio."""
    if progress <= decay_start or decay_start >= 1.0:
        return sigma_max
    phase = (progress - decay_start) / (1.0 - decay_start)
    final = sigma_max * decay_ratio
    return final + (sigma_max - final) * 0.5 * (1.0 + math.cos(math.pi * phase))


def noise_bounds(
    progress: float,
    sigma_min: float,
    sigma_max: float,
    schedule: NoiseSchedule,
    decay_start: float,
    decay_ratio: float,
    decay_end: float = 1.0,
) -> tuple[float, float]:
    """Bounds of the exploration noise's std after a fraction ``progress`` of training.

    * ``hold_cosine`` (ReinFlow, appendix D): sigma_max until ``decay_start``, then a cosine to
      ``sigma_max * decay_ratio``, the end that the hyperparameter reference (seeds/000) defines. The official code
      ends at ``sigma_min + 0.7 * (sigma_max - sigma_min)`` instead: for .25-.50 that is .425, here .35.
    * ``linear``: ``sigma_max * (1 - p) + sigma_min * p``; ``exponential``: ``sigma_min + (sigma_max - sigma_min) *
      exp(-3 p)`` (both of the rlft pipeline, seeds/004), p the share of ``decay_end`` that is done. ``decay_start`` and
      ``decay_ratio`` do not apply to them, ``decay_end`` not to the others.
    * ``constant``: sigma_max.

    Args:
        progress: fraction of training done; clamped to [0, 1].
        sigma_min: lower bound; never changes.
        sigma_max: upper bound at the start.
        schedule: one of the four above.
        decay_start: fraction of training to hold sigma_max; 1 = never decay.
        decay_ratio: final sigma_max as a fraction of the first.
        decay_end: fraction of training after which linear and exponential stay where they are.

    Returns:
        ``(sigma_min, current sigma_max)`` with sigma_min <= current sigma_max <= sigma_max.

    Raises:
        ValueError: unknown schedule, or bounds that are not 0 < sigma_min <= sigma_max.
    """
    if not 0.0 < sigma_min <= sigma_max:
        raise ValueError(f"noise bounds must satisfy 0 < sigma_min <= sigma_max, got {sigma_min}, {sigma_max}")
    progress = min(max(progress, 0.0), 1.0)
    fallen = min(progress / decay_end, 1.0)
    match schedule:
        case "hold_cosine":
            current = _hold_cosine(progress, sigma_max, decay_start, decay_ratio)
        case "constant":
            current = sigma_max
        case "linear":
            current = sigma_max * (1.0 - fallen) + sigma_min * fallen
        case "exponential":
            current = sigma_min + (sigma_max - sigma_min) * math.exp(-3.0 * fallen)
        case _:
            raise ValueError(f"unknown noise schedule {schedule!r}: choose one of {', '.join(get_args(NoiseSchedule))}")
    return sigma_min, min(max(current, sigma_min), sigma_max)
