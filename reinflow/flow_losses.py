"""Supervised losses of flow-matching policies as pure functions ``(loss, info)``.

Time runs from 1 (noise) to 0 (action), ``v = noise - action`` and a step of size d goes from t to t - d, as in
reinflow/flow.py; the papers count the other way round. Dimensions: B rows, H actions of D dims.

* Flow matching (Lipman et al., arXiv 2210.02747): the velocity at a point of the straight line from noise to action.
* Reflow (Liu et al., arXiv 2209.03003): the same loss with coupled ends, the noise x_0 and what the teacher's ODE makes
  of it. So it has no function of its own.
* Shortcut models (Frans et al., arXiv 2410.12557): the network is told its step size d, and a step of size d must do
  what two of d / 2 do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Info = dict[str, float]
Velocity = Callable[[Tensor, Tensor], Tensor]
"""(B, H, D) noised actions at (B,) flow times -> velocity (B, H, D)."""
StepVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The same, told (B,) how far the step will go."""


def interpolate(action: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """(B, H, D) between action (time 0) and noise (time 1) at flow times (B,)."""
    t = time[:, None, None]
    return t * noise + (1 - t) * action


def action_weight(time: Tensor) -> Tensor:
    """t^2, (B,): makes the velocity's squared error that of the predicted action ``x_t - t v``. It moves no minimum of
    a row, and small times, where a velocity says little of the action, do not dominate."""
    return time**2


def _weighted(errors: Tensor, weight: Tensor | None, counts: Tensor | None = None) -> Tensor:
    """Mean of squared errors (B, H, D), each row times its weight (B,); of a row only what ``counts`` (B, H, D)."""
    if counts is None:
        rows = (errors**2).mean(dim=(1, 2))
    else:
        rows = (errors**2 * counts).sum(dim=(1, 2)) / counts.expand_as(errors).sum(dim=(1, 2)).clamp(min=1)
    return (rows if weight is None else rows * weight).mean()


def flow_matching_loss(
    velocity: Velocity,
    action: Tensor,
    noise: Tensor,
    time: Tensor,
    weight: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Info]:
    """Squared error of the velocity on the straight line between action and noise.

    Args:
        velocity: of the policy that learns.
        action: (B, H, D) normalised; for reflow the teacher's end point of ``noise``.
        noise: (B, H, D); for reflow the start of the teacher's ODE, for flow matching drawn independently.
        time: (B,) in [0, 1].
        weight: (B,) of each row's error; None is 1.
        counts: bool, broadcast to (B, H, D): what has an error; not what lies beyond an episode, nor padded dims.
    """
    error = velocity(interpolate(action, noise, time), time) - (noise - action)
    loss = _weighted(error, weight, counts)
    return loss, {"flow_loss": float(loss.detach())}


def shortcut_loss(
    velocity: StepVelocity,
    teacher: StepVelocity,
    action: Tensor,
    noise: Tensor,
    time: Tensor,
    step_size: Tensor,
    weight: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, Info]:
    """Self-consistency: one step of ``step_size`` against two half steps of the teacher, from the same point.

    The target is the mean of the two half steps' velocities, the second at the place that the first leads to
    (rlft's ``v1 + d * v2`` is a fault of that code).

    Args:
        velocity: of the policy that learns.
        teacher: of its exponential average; no gradient goes through it.
        action: (B, H, D) normalised.
        noise: (B, H, D).
        time: (B,) where the step starts, at least ``step_size``.
        step_size: (B,) d.
        weight: (B,) of each row's error; None is 1.
        counts: bool, broadcast to (B, H, D): what has an error; not what lies beyond an episode, nor padded dims.

    Raises:
        ValueError: a step leads beyond the action.
    """
    if bool((step_size > time + 1e-6).any()):
        raise ValueError("a step of size d needs d <= flow time: it would lead beyond the action")
    x_t, half = interpolate(action, noise, time), step_size / 2
    with torch.no_grad():
        first = teacher(x_t, time, half)
        second = teacher(x_t - half[:, None, None] * first, time - half, half)
        target = (first + second) / 2
    loss = _weighted(velocity(x_t, time, step_size) - target, weight, counts)
    return loss, {"consistency_loss": float(loss.detach())}


def sample_shortcut_times(
    rows: int, finest: int, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Flow times and step sizes (B,) each for ``shortcut_loss``.

    A step size is 1, 1/2, 1/4, ..., 2/finest with equal chances (its halves are the next finer ones), its time one of
    the places at which a sampler of that step size stands: d, 2 d, ..., 1.

    Args:
        rows: B.
        finest: the largest number of steps that the policy is taught, a power of two.
        generator: on the CPU; None is torch's own.
        device: where the times are wanted.

    Raises:
        ValueError: ``finest`` is no power of two above 1.
    """
    if finest < 2 or finest & (finest - 1):
        raise ValueError(f"the finest number of steps is {finest}: use a power of two, 2 or more")
    steps = 2 ** torch.randint(0, finest.bit_length() - 1, (rows,), generator=generator)
    place = (torch.rand(rows, generator=generator) * steps).long() + 1
    return (place / steps).to(device), (1.0 / steps).to(device)
