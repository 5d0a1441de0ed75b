"""Credit for a rollout: advantages for the policy and targets for the critic, by decision or by control step.

Dimensions as in reinflow/flow.py; S is the length of the privileged state, R the number of rows the critic learns from.

By decision, the critic values the moments at which the policy chose a chunk, and GAE counts chunks. By control step, a
critic on the simulator's state values every step inside the chunks (an asymmetric actor-critic: it is not deployed),
GAE counts control steps, and each executed action has an advantage of its own: what came of a chunk's last actions no
longer depends on how its first ones turned out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reinflow import ppo
from reinflow.policy import Context, FlowPolicy
from reinflow.ppo import ReturnNormalizer
from reinflow.rollout import RolloutBuffer


class Advantages(NamedTuple):
    """Advantages for the policy, and what the critic is to learn: in return units until the learner normalises it."""

    advantage: Tensor  # (T, N) of decisions, or (T, N, n) of actions, 0 where none was executed
    context: Context  # R rows for the critic
    value: Tensor  # (R,) when the rollout was collected
    target: Tensor  # (R,) advantage + value


def advantages_by_decision(buffer: RolloutBuffer, gae_lambda: float) -> Advantages:
    """GAE over decisions: R = T * N, less those of broken episodes."""
    advantages, returns = ppo.compute_gae(
        buffer.reward, buffer.value, buffer.next_value, buffer.terminated, buffer.truncated, buffer.discount, gae_lambda
    )
    context = {name: tensor.flatten(0, 1) for name, tensor in buffer.context.items()}
    valid = buffer.valid.flatten()
    if not bool(valid.all()):
        context = {name: tensor[valid.to(tensor.device)] for name, tensor in context.items()}
    return Advantages(advantages, context, buffer.value.flatten()[valid], returns.flatten()[valid])


@torch.no_grad()
def advantages_by_control_step(
    buffer: RolloutBuffer,
    policy: FlowPolicy,
    normalizer: ReturnNormalizer,
    *,
    gamma: float,
    gae_lambda: float,
    time_limit_is_terminal: bool,
) -> Advantages:
    """GAE over control steps: R executed steps.

    Args:
        buffer: a rollout with ``states`` and ``step_reward``.
        policy: its critic reads the privileged state; the weights that collected the rollout.
        normalizer: turns the critic's output into return units, as it did during the rollout.
        gamma: discount of one control step.
        gae_lambda: lambda, per control step.
        time_limit_is_terminal: nothing is worth anything after a time limit, instead of V(last state).

    Raises:
        ValueError: the rollout did not record its control steps.
    """
    if buffer.states is None or buffer.step_reward is None:
        raise ValueError("the rollout holds no control steps: collect it with RolloutSettings(credit='control_step')")
    active, states = buffer.active, buffer.states
    # One chunk step at a time: the hidden layer of all of them would be the largest tensor of the update.
    values = torch.stack([normalizer.denormalize(policy.value(policy.state_context(row))) for row in states])
    last = torch.arange(active.shape[2], device=active.device) == active.sum(2, keepdim=True) - 1
    terminated, timed_out = last & buffer.terminated[..., None], last & buffer.truncated[..., None]
    before = values[:, :, :-1] * active
    after = values[:, :, 1:] * active
    if time_limit_is_terminal:
        after = after.masked_fill(timed_out, 0.0)
    advantages, returns = ppo.compute_gae(
        _by_time(buffer.step_reward * active), _by_time(before), _by_time(after), _by_time(terminated),
        _by_time(timed_out | ~active), torch.full_like(_by_time(before), gamma), gae_lambda,
    )  # fmt: skip
    rows = _by_time(active)
    return Advantages(
        advantages.unflatten(0, (active.shape[0], active.shape[2])).transpose(1, 2),
        policy.state_context(states[:, :, :-1].transpose(1, 2).flatten(0, 1)[rows]),
        _by_time(before)[rows],
        returns[rows],
    )


def _by_time(steps: Tensor) -> Tensor:
    """(T, N, n) -> (T * n, N), control steps in the order in which they happened."""
    return steps.transpose(1, 2).flatten(0, 1)
