"""Advantage-weighted offline RL of a flow policy: pure functions ``(loss, info)``, and the value of a chunk.

Stage 2 of the three-stage pipeline: two critics learn what a chunk of actions is worth, and every chunk of the data is
imitated with the weight ``min(exp(beta (Q - mean Q)), w_max) / mean``. The policy only ever learns actions of the data.

A decision is a chunk: the policy submits n actions, tau <= n of them are run (fewer where the episode ends), and the
value of the next decision is discounted by gamma^tau. Dimensions: B decisions, n executed of H predicted actions of A
dims, S entries of a state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reinflow.flow import time_grid
from reinflow.flow_losses import Info, StepVelocity, Velocity, action_weight, flow_matching_loss, shortcut_loss
from reinflow.policy import Context, FlowPolicy


class DoubleQ(nn.Module):
    """Two values of a chunk: the smaller one does not overestimate what the data has not tried (Fujimoto et al.,
    arXiv 1802.09477). Layer-normalised, so that values far from the data stay bounded (Ball et al., 2302.02948)."""

    def __init__(self, state_dim: int, chunk_dim: int, hidden_size: int = 256):
        """``chunk_dim``: n * A."""
        super().__init__()
        self.critics = nn.ModuleList(self._critic(state_dim + chunk_dim, hidden_size) for _ in range(2))

    @staticmethod
    def _critic(inputs: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, hidden), nn.LayerNorm(hidden), nn.SiLU(),
            nn.Linear(hidden, 1),
        )  # fmt: skip

    def forward(self, states: Tensor, chunks: Tensor) -> Tensor:
        """Normalised states (B, S) and executed actions (B, n, A) -> both values (2, B)."""
        inputs = torch.cat([states, chunks.flatten(1)], dim=1)
        return torch.stack([critic(inputs)[:, 0] for critic in self.critics])

    def least(self, states: Tensor, chunks: Tensor) -> Tensor:
        """The smaller of both, (B,)."""
        return self(states, chunks).min(dim=0).values


@dataclass(frozen=True)
class Transitions:
    """M decisions of a data set, normalised as the policy sees them."""

    states: Tensor  # (M, S)
    actions: Tensor  # (M, H, A) from the decision on
    rewards: Tensor  # (M,) of the chunk, discounted from its first action on, scaled
    steps: Tensor  # (M,) tau, control steps that were run
    terminated: Tensor  # (M,) 1 where nothing comes after the chunk
    next_states: Tensor  # (M, S) of the next decision; of no meaning where terminated
    next_actions: Tensor  # (M, n, A) what the data did there
    returns: Tensor  # (M,) discounted rewards from the decision to the episode's end, scaled

    def __len__(self) -> int:
        return len(self.states)

    def rows(self, index: Tensor) -> Transitions:
        """Those of ``index`` (B,)."""
        return Transitions(**{name: tensor[index] for name, tensor in vars(self).items()})


def chunk_rewards(rewards: Tensor, steps: Tensor, gamma: float) -> Tensor:
    """r_chunk = sum over the tau executed steps of gamma^i r_i: (B, n) and (B,) -> (B,)."""
    step = torch.arange(rewards.shape[1], device=rewards.device)
    return (rewards * gamma**step * (step < steps[:, None])).sum(dim=1)


def chunk_targets(rewards: Tensor, steps: Tensor, terminated: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """r_chunk + gamma^tau (1 - terminated) Q'(s', a'), all (B,)."""
    return rewards + gamma**steps * (1 - terminated) * next_values


def critic_loss(values: Tensor, targets: Tensor) -> tuple[Tensor, Info]:
    """Squared error of both critics (2, B) against the targets (B,)."""
    loss = ((values - targets.detach()) ** 2).mean()
    return loss, {"critic_loss": float(loss.detach())}


def advantage_weights(values: Tensor, beta: float, w_max: float) -> tuple[Tensor, Info]:
    """min(exp(beta (Q - mean Q)), w_max) / mean, of a batch of values (B,) -> (B,) with mean 1.

    Info: ``weight_entropy`` of the normalised weights over log B (1: all the same), ``weight_clipped`` (share),
    ``weight_max``, and ``weight_effective_share``: the effective sample size over B.
    """
    exponent = (beta * (values - values.mean())).detach()
    clipped = exponent > math.log(w_max)
    weights = exponent.clamp(max=math.log(w_max)).exp()
    share = weights / weights.sum()
    entropy = -(share * share.clamp(min=1e-12).log()).sum() / math.log(max(2, len(share)))
    info = {
        "weight_entropy": float(entropy),
        "weight_clipped": float(clipped.float().mean()),
        "weight_max": float(share.max() * len(share)),
        "weight_effective_share": float(1 / ((share**2).sum() * len(share))),
    }
    return share * len(share), info


def weighted_flow_loss(
    velocity: Velocity, actions: Tensor, weights: Tensor, one_step_share: float = 0.0
) -> tuple[Tensor, Info]:
    """Flow matching on chunks (B, H, A), each row times its weight (B,).

    ``one_step_share`` of the rows is at flow time 1, where a sampler of one step looks. As everywhere for these
    policies t^2 makes it the error of the predicted action.
    """
    time = 1 - torch.rand(len(actions))
    if one_step_share > 0:
        time = time.masked_fill(torch.rand(len(actions)) < one_step_share, 1.0)
    noise = torch.randn(actions.shape)
    return flow_matching_loss(velocity, actions, noise, time, action_weight(time) * weights)


def weighted_consistency_loss(
    velocity: StepVelocity, teacher: StepVelocity, actions: Tensor, weights: Tensor, times: tuple[Tensor, Tensor]
) -> tuple[Tensor, Info]:
    """A shortcut model's self-consistency on the same rows, at (flow times, step sizes) (B,) each, with the same
    weights."""
    time, step_size = times
    noise = torch.randn(actions.shape)
    weight = action_weight(time) * weights
    return shortcut_loss(velocity, teacher, actions, noise, time, step_size, weight)


@torch.no_grad()
def policy_chunk(policy: FlowPolicy, context: Context, num_denoising_steps: int, rows: int) -> Tensor:
    """What the policy would do, (B, n, A) normalised: its ODE without exploration noise, from x_0 ~ N(0, 1)."""
    x_t = torch.randn(rows, policy.denoised_steps, policy.padded_action_dim)
    for time in time_grid(num_denoising_steps):  # sample_chain would compute the noise's std too, half of the time
        x_t = x_t - policy.velocity(context, x_t, time.expand(rows))[0] / num_denoising_steps
    return x_t[:, : policy.n_action_steps, : policy.action_dim]


def value_figures(values: Tensor, returns: Tensor) -> Info:
    """Q of the data's own chunks (B,) beside what the data then earned (B,).

    ``q_correlation`` (0 where one of them does not vary), ``q_bias`` (mean of Q - return), ``q_mean``, ``q_top`` and
    ``top_return`` (the largest of each), ``return_spread`` (standard deviation).
    """
    pair = torch.stack([values, returns])
    centred = pair - pair.mean(dim=1, keepdim=True)
    spread = centred.norm(dim=1)
    varies = bool((spread > 1e-6).all())
    return {
        "q_correlation": float((centred[0] * centred[1]).sum() / (spread[0] * spread[1])) if varies else 0.0,
        "q_bias": float((pair[0] - pair[1]).mean()),
        "q_mean": float(pair[0].mean()),
        "q_top": float(pair[0].max()),
        "top_return": float(pair[1].max()),
        "return_spread": float(pair[1].std(correction=0)),
    }
