"""How straight a flow is, and what a reflow is watched by: the loss on coupled pairs, figures of those held out, and
what a loss that rises or oscillates asks for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinflow.flow import ChainSpec, sample_chain
from reinflow.flow_losses import action_weight, flow_matching_loss, interpolate
from reinflow.flow_mlp import FlowMLP
from reinflow.policy import Context, FlowPolicy

if TYPE_CHECKING:
    from reinflow_so101.stages.observations import Pairs

BATCH = 64  # held-out pairs at once
TIMES = tuple((number + 0.5) / 10 for number in range(10))  # along the flow
RISE, SWING = 1.1, 0.1  # a loss so far above its lowest has risen; one that swings by such a share of it oscillates


def reflow_loss(policy: FlowPolicy, context: Context, x_0: Tensor, x_1: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The flow-matching loss on coupled ends (B, C, D): that of the real dims, and that of the padded ones added to it.

    A flow_mlp predicts the action, and its velocity is the distance to that over the time: its rows are weighted by
    t^2, or those at small times would drown all others.

    Args:
        policy: the student.
        context: encoded observations.
        x_0: noise.
        x_1: what the teacher's ODE makes of it.
        time: (B,) flow times.

    Returns:
        The loss, and how far the velocity is from the line's (B, C, D), without a graph.
    """
    velocity, real = policy.velocity(context, interpolate(x_1, x_0, time), time)[0], policy.action_dim
    weight = action_weight(time) if isinstance(policy, FlowMLP) else None

    def of(dims: slice) -> Tensor:
        part = velocity[..., dims]
        return flow_matching_loss(lambda *_: part, x_1[..., dims], x_0[..., dims], time, weight)[0]

    loss = of(slice(real))
    if policy.padded_action_dim > real:
        loss = loss + of(slice(real, None))
    return loss, velocity.detach() - (x_0 - x_1)


@torch.no_grad()
def measure(policy: FlowPolicy, pairs: Pairs, ks: Sequence[int]) -> dict[str, float]:
    """Figures of the held-out pairs.

    Returns:
        "held_out_loss"; "straightness", the mean of |v - (x_0 - x_1)|^2 over the real dims, and "straightness_t0.05"
        and so on along the flow; "action_error_K1" and so on, the root mean squared distance between the action of K
        steps and the teacher's. All in normalised units.
    """
    sums = dict.fromkeys(["held_out_loss", *(f"straightness_t{t:.2f}" for t in TIMES)], 0.0)
    squares = dict.fromkeys(ks, 0.0)
    held_out = torch.arange(pairs.num_training, len(pairs.row))
    for index in held_out.split(BATCH):
        context, x_0, x_1 = pairs.batch(policy, index)
        for t in TIMES:
            loss, off = reflow_loss(policy, context, x_0, x_1, x_0.new_full((len(index),), t))
            sums["held_out_loss"] += float(loss) * len(index) / len(TIMES)
            sums[f"straightness_t{t:.2f}"] += float((off[..., : policy.action_dim] ** 2).mean()) * len(index)
        for k in ks:
            off = sample_chain(policy, context, ChainSpec(k), x_0).chain[:, -1] - x_1
            squares[k] += float((off[..., : policy.action_dim] ** 2).mean()) * len(index)
    figures = {name: value / len(held_out) for name, value in sums.items()}
    figures["straightness"] = sum(figures[f"straightness_t{t:.2f}"] for t in TIMES) / len(TIMES)
    return figures | {f"action_error_K{k}": (squares[k] / len(held_out)) ** 0.5 for k in ks}


def trouble(history: Sequence[Mapping[str, Any]], lr: float) -> str:
    """What is wrong with a loss, with figures and the remedy; empty if nothing is.

    Args:
        history: measurements with "step", "held_out_loss" and, from the second on, "loss", the training's since.
        lr: the peak rate.
    """
    return _risen(history, lr) or _oscillating(history[-6:], lr)


def _risen(history: Sequence[Mapping[str, Any]], lr: float) -> str:
    """The last two measurements are above the lowest one."""
    lowest, last = min(history, key=lambda row: row["held_out_loss"]), history[-1]
    if len(history) < 3 or not all(row["held_out_loss"] > RISE * lowest["held_out_loss"] for row in history[-2:]):
        return ""
    figures = (
        f"the held-out loss rose from {lowest['held_out_loss']:.4g} at step {lowest['step']} to "
        f"{last['held_out_loss']:.4g} at step {last['step']}"
    )
    if last["loss"] < lowest.get("loss", 0.0):
        return f"{figures}, that of the training fell to {last['loss']:.4g}: too few observations, raise --episodes"
    return f"{figures}: rate too high, lower --lr (it is {lr:g})"


def _oscillating(recent: Sequence[Mapping[str, Any]], lr: float) -> str:
    """Six measurements go up and down in turn."""
    losses = [row["held_out_loss"] for row in recent]
    steps = [after - before for before, after in itertools.pairwise(losses)]
    turns = sum(before * after < 0 for before, after in itertools.pairwise(steps))
    swing, level = sum(map(abs, steps)) / max(1, len(steps)), sum(losses) / len(losses)
    if turns < 4 or swing <= SWING * level:
        return ""
    return (
        f"the held-out loss oscillates by {100 * swing / level:.0f} % around {level:.4g} (steps {recent[0]['step']} to "
        f"{recent[-1]['step']}): rate too high, lower --lr (it is {lr:g})"
    )


def summary(step: int, row: Mapping[str, float], teacher: Mapping[str, float]) -> str:
    """One line of a measurement, the teacher's figures in brackets."""
    errors = ", ".join(
        f"K={name.removeprefix('action_error_K')} {value:.4f} ({teacher[name]:.4f})"
        for name, value in row.items()
        if name.startswith("action_error_")
    )
    return (
        f"step {step}  loss {row['loss']:.4f}  held out {row['held_out_loss']:.4f} ({teacher['held_out_loss']:.4f})  "
        f"gradient {row['grad_norm']:.3f}  rate {row['lr']:.1e}  straightness {row['straightness']:.4f} "
        f"({teacher['straightness']:.4f})  action error at {errors}"
    )
