"""The denoising chain of a flow-matching policy as a Markov chain: sampled and scored by one kernel.

Direction of time: ``flow_time`` runs from 1 (noise) to 0 (action), ``v = noise - action`` and ``dt = -1/K``, as in
LeRobot's SmolVLA and Pi0. The ReinFlow paper (arXiv 2505.22094) counts the other way round.

Dimensions, here and everywhere in this package:

    N environments      T chunk steps per rollout   B batch of decisions    K denoising steps
    H chunk_size        n executed actions (n_action_steps <= H)            A / D real / padded action dims
    F features          M noise coordinates per joint along the chunk       G ratio groups
    C denoised actions  (n <= C <= H; n where they do not depend on later ones)

The transition is ``x_{k+1} = x_k + dt * v(x_k) + basis @ (std * eps)`` on the A real dims of the executed actions,
``eps ~ N(0, I)`` of shape (M, A). With ``noise_basis="white"`` the basis is the identity (M = n): every executed action
gets its own noise, as in the paper. With ``"dct"`` it holds the M lowest cosines of the chunk's time axis
(orthonormal), so that exploration is smooth and has M * A random dimensions instead of n * A.

What is scored: the coordinates ``basis.T @ (x_{k+1} - mean)``, which are exactly the random variables that were
drawn, under the Gaussian they were drawn from. What is not: the padded dims, actions beyond the executed ones and, for
"dct", the part of the chunk that is orthogonal to the basis. They are deterministic functions of (x_k, observation), so
they carry no probability; x_k itself is conditioned on as it was stored, padded dims included. For "dct" the gradient
is therefore the policy gradient of the low-frequency action, with the high-frequency rest treated as part of the
environment.

``chain_noise="flow_sde"`` (Flow-SDE of pi_RL, arXiv 2510.25889, after Flow-GRPO, arXiv 2505.05470) draws noise in one
of the K steps, chosen at random for every decision, and leaves the others to the ODE. In the flow's own stochastic
differential equation with the same marginals, noise of variance s^2 a unit of time goes along with the drift
``s^2/2 * score``, and the score of the straight flow is ``-(x_t + (1 - t) v) / t``. So there

    mean = x_t - dt * v - dt * s^2 / (2 t) * P (x_t + (1 - t) v),    std = sqrt(dt) * s,    s^2 = a^2 t / max(1 - t, dt)

with dt = 1/K, the noise level a (``sigma_max``, as it falls; the noise head has no part in it), and P the projection on
what gets noise. The floor of 1 - t keeps it finite at t = 1. Only the noisy step is scored and updated: an update costs
1/K of that of the whole chain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reinflow.policy import Context, FlowPolicy

Reduction = Literal["chunk", "action", "dim", "mean"]
NoiseBasis = Literal["white", "dct"]
ChainNoise = Literal["reinflow", "flow_sde"]


@dataclass(frozen=True)
class ChainSpec:
    """What defines the chain's distribution beside the policy's weights; it travels in every checkpoint.

    Attributes:
        num_denoising_steps: K, Euler steps from noise to action.
        reduction: how per-coordinate log-probs become ratios. ``chunk``: one sum; ``action``: one per control step
            (or per cosine), summed over joints and K; ``dim``: one per coordinate, summed over K; ``mean``: one sum
            divided by (K + 1) * M * A, the paper's.
        noise_basis: ``white`` or ``dct``.
        num_noise_coefficients: M for ``dct``; ignored for ``white``.
        noise_last_step_only: draw noise in the last denoising step only; the earlier ones are deterministic.
        chain_noise: ``reinflow``: of the noise head's std, in every step (or the last); ``flow_sde``: in one step,
            drawn for every decision, of a std that keeps the flow's marginals.
    """

    num_denoising_steps: int = 1
    reduction: Reduction = "chunk"
    noise_basis: NoiseBasis = "white"
    num_noise_coefficients: int = 5
    noise_last_step_only: bool = False
    chain_noise: ChainNoise = "reinflow"

    def num_coordinates(self, n: int) -> int:
        """M for a chunk of n executed actions."""
        return n if self.noise_basis == "white" else min(self.num_noise_coefficients, n)

    def noised_dimensions(self, n: int, action_dim: int) -> int:
        """Scalars of one decision that get exploration noise and are scored: K' * M * A."""
        return math.prod(self.noise_shape(n, action_dim))

    def noise_shape(self, n: int, action_dim: int) -> tuple[int, int, int]:
        """(K', M, A) of one decision's exploration noise."""
        return self.num_noisy_steps, self.num_coordinates(n), action_dim

    @property
    def num_noisy_steps(self) -> int:
        """K'."""
        return 1 if self.chain_noise == "flow_sde" else len(self.noisy_steps())

    def noisy_steps(self) -> range:
        """Indices k of the denoising steps that draw noise; with ``flow_sde`` those of which one does."""
        first = self.num_denoising_steps - 1 if self.noise_last_step_only else 0
        return range(first, self.num_denoising_steps)


class Transition(NamedTuple):
    """N(mean, basis diag(std^2) basis^T) over x_{k+1}; without noise x_{k+1} is ``euler``."""

    euler: Tensor  # (B, C, D) the ODE's next state
    mean: Tensor  # (B, C, D)
    std: Tensor  # (B, M, A)
    head_input: Tensor  # (B, C, F) what the policy's head made its velocity of


class ChainSample(NamedTuple):
    """One sampled denoising chain per row."""

    chain: Tensor  # (B, K+1, C, D), from noise to action
    log_prob: Tensor  # (B, G)
    noise_std: Tensor  # (B,) mean std of the row's noise
    noisy: Tensor  # (B, K') indices of the denoising steps that drew noise; (B, 0) without exploration
    head_inputs: Tensor | None = None  # (B, K', C, F) in those steps, where the policy keeps them


class ChainScore(NamedTuple):
    """Log-probabilities of stored chains under the current weights."""

    log_prob: Tensor  # (B, G)
    entropy: Tensor  # (B,) mean entropy of one noise coordinate
    noise_std: Tensor  # (B,)
    mean: Tensor  # (B, K', C, A) where the K' noisy steps lead without noise


def dct_basis(n: int, m: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
    """Orthonormal DCT-II basis: the m lowest cosines over n control steps, shape (n, m)."""
    steps = torch.arange(n, dtype=torch.float64) + 0.5
    columns = torch.cos(math.pi / n * steps[:, None] * torch.arange(m, dtype=torch.float64))
    columns *= math.sqrt(2.0 / n)
    columns[:, 0] *= math.sqrt(0.5)
    return columns.to(dtype).to(device)  # in this order: an Apple GPU takes no float64


def _to_coordinates(delta: Tensor, spec: ChainSpec) -> Tensor:
    """Noise coordinates (..., M, A) of a displacement (..., n, A)."""
    if spec.noise_basis == "white":
        return delta
    basis = dct_basis(delta.shape[-2], spec.num_coordinates(delta.shape[-2]), dtype=delta.dtype, device=delta.device)
    return basis.T @ delta


def _from_coordinates(coordinates: Tensor, n: int, spec: ChainSpec) -> Tensor:
    """Displacement (..., n, A) of noise coordinates (..., M, A)."""
    if spec.noise_basis == "white":
        return coordinates
    return dct_basis(n, coordinates.shape[-2], dtype=coordinates.dtype, device=coordinates.device) @ coordinates


def time_grid(num_denoising_steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Flow time at which each step starts, (K,): 1, 1 - 1/K, ..., 1/K, as LeRobot's Euler sampler rounds it."""
    dt = -1.0 / num_denoising_steps
    return torch.tensor([1.0 + k * dt for k in range(num_denoising_steps)], dtype=torch.float32, device=device)


def transition(
    policy: FlowPolicy, context: Context, x_t: Tensor, time: Tensor, spec: ChainSpec, head_input: Tensor | None = None
) -> Transition:
    """The one kernel: the distribution of x_{k+1} given x_k. Nothing is clamped.

    Args:
        policy: supplies velocity and noise std.
        context: encoded observations, leading dim B.
        x_t: (B, C, D) noised actions.
        time: (B,) flow time of every row.
        spec: the chain's definition.
        head_input: (B, C, F) what the head read at x_t when the policy acted: nothing else is run then, and
            ``context`` is not read.
    """
    if head_input is None:
        velocity, features = policy.velocity(context, x_t, time)
    else:
        velocity, features = policy.head_velocity(head_input), head_input
    euler = x_t + (-1.0 / spec.num_denoising_steps) * velocity
    n = policy.n_action_steps
    if spec.chain_noise == "flow_sde":
        return Transition(euler, *_flow_sde(policy, x_t, velocity, euler, time, spec), features)
    std = policy.noise_std(features[:, :n])  # (B, n, A)
    if spec.noise_basis == "dct":
        std = std.mean(dim=1, keepdim=True).expand(-1, spec.num_coordinates(n), -1)
    return Transition(euler, euler, std, features)


def _flow_sde(
    policy: FlowPolicy, x_t: Tensor, velocity: Tensor, euler: Tensor, time: Tensor, spec: ChainSpec
) -> tuple[Tensor, Tensor]:
    """Mean and std of Flow-SDE's noisy step; formulas at the top of this file."""
    n, action_dim, dt = policy.n_action_steps, policy.action_dim, 1.0 / spec.num_denoising_steps
    t = time[:, None, None]
    variance = policy.noise_mlp.sigma_max**2 * t / (1 - t).clamp(min=dt)  # a unit of time, (B, 1, 1)
    drift = (dt * variance / (2 * t)) * (x_t + (1 - t) * velocity)[:, :n, :action_dim]
    drift = _from_coordinates(_to_coordinates(drift, spec), n, spec)
    mean = euler - _pad_to(drift, euler)
    std = (dt * variance).sqrt().expand(-1, spec.num_coordinates(n), action_dim)
    return mean, std


def _pad_to(part: Tensor, whole: Tensor) -> Tensor:
    """(B, n, A) -> the shape of ``whole`` (B, C, D), with zeros."""
    return torch.nn.functional.pad(part, (0, whole.shape[2] - part.shape[2], 0, whole.shape[1] - part.shape[1]))


def _coordinate_log_prob(coordinates: Tensor, std: Tensor) -> Tensor:
    """log N(coordinates; 0, std^2), elementwise."""
    return -0.5 * (coordinates / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def _reduce(log_probs: Tensor, spec: ChainSpec) -> Tensor:
    """(B, K', M, A) per-coordinate log-probs -> (B, G) by the spec's reduction."""
    per_coordinate = log_probs.sum(dim=1)  # (B, M, A)
    if spec.reduction == "dim":
        return per_coordinate.flatten(1)
    if spec.reduction == "action":
        return per_coordinate.sum(dim=2)
    total = per_coordinate.sum(dim=(1, 2))[:, None]
    if spec.reduction == "mean":
        return total / ((spec.num_denoising_steps + 1) * per_coordinate[0].numel())
    return total


def group_mask(active: Tensor, action_dim: int, spec: ChainSpec) -> Tensor:
    """Which ratio groups count, (B, G) bool.

    An action after the end of an episode was never executed. With white noise its ratio group is dropped; a cosine
    or a whole-chunk group always counts, since part of it was executed.

    Args:
        active: (B, n) bool, the control steps that were executed.
        action_dim: A.
        spec: the chain's definition.
    """
    batch, n = active.shape
    per_coordinate = active if spec.noise_basis == "white" else active.new_ones(batch, spec.num_coordinates(n))
    if spec.reduction == "action":
        return per_coordinate
    if spec.reduction == "dim":
        return per_coordinate.repeat_interleave(action_dim, dim=1)
    return active.new_ones(batch, 1)


def group_advantage(advantage: Tensor, action_dim: int, spec: ChainSpec) -> Tensor:
    """Advantages (B,) of decisions or (B, n) of their actions -> what each ratio group is weighted by, (B,) or (B, G).

    With white noise and a group per action (or per coordinate) each is weighted by its own action's advantage. A cosine
    or a whole-chunk group acts from the first action on: it gets that one's, the return of everything that followed.
    """
    if advantage.dim() == 1:
        return advantage
    if spec.noise_basis == "white" and spec.reduction == "action":
        return advantage
    if spec.noise_basis == "white" and spec.reduction == "dim":
        return advantage.repeat_interleave(action_dim, dim=1)
    return advantage[:, 0]


def _all_rows(spec: ChainSpec, batch: int, device: torch.device) -> Tensor:
    """(B, K') the denoising steps that draw noise in every row."""
    if spec.chain_noise == "flow_sde":
        raise ValueError("with flow_sde every row has its own noisy step: give them as `noisy` (B, 1)")
    return torch.tensor([*spec.noisy_steps()], device=device).expand(batch, -1)


@torch.no_grad()
def sample_chain(
    policy: FlowPolicy,
    context: Context,
    spec: ChainSpec,
    initial_noise: Tensor,
    exploration: Tensor | None = None,
    noisy: Tensor | None = None,
) -> ChainSample:
    """Denoise ``initial_noise`` (B, C, D) in K steps.

    Args:
        policy: the acting policy.
        context: encoded observations, leading dim B.
        spec: the chain's definition.
        initial_noise: (B, C, D) standard normal, x_0.
        exploration: (B, K', M, A) standard normal, of the shape ``spec.noise_shape``. None leaves it out, which is
            LeRobot's own Euler sampler; ``log_prob`` is then zero.
        noisy: (B, K') indices of the denoising steps that draw it; None: those of ``spec.noisy_steps``. With flow_sde
            every row has its own.

    Raises:
        ValueError: flow_sde without ``noisy``.
    """
    x_t, states, log_probs, stds = initial_noise, [initial_noise], [], []
    head_inputs: Tensor | None = None
    action_dim, batch, n = policy.action_dim, initial_noise.shape[0], policy.n_action_steps
    device = initial_noise.device
    times = time_grid(spec.num_denoising_steps, device)
    if exploration is None:
        noisy = torch.zeros(batch, 0, dtype=torch.int64, device=device)
    elif noisy is None:
        noisy = _all_rows(spec, batch, device)
    for k in range(spec.num_denoising_steps):
        step = transition(policy, context, x_t, times[k].expand(batch), spec)
        x_t = step.euler
        if exploration is not None and k in spec.noisy_steps():
            chosen = noisy == k  # (B, K')
            if policy.keeps_head_inputs:
                head_inputs = _fill(head_inputs, chosen, step.head_input)
            draws = chosen.any(1)[:, None, None]
            eps = (exploration * chosen[:, :, None, None]).sum(1)  # at most one of them
            x_t = torch.where(draws, step.mean, step.euler)
            x_t[:, :n, :action_dim] += _from_coordinates(step.std * eps, n, spec)
            # Scored from the stored state, not from eps: the update will see only the stored state.
            delta = (x_t - step.mean)[:, :n, :action_dim]
            log_prob = _coordinate_log_prob(_to_coordinates(delta, spec), step.std)
            log_probs.append(log_prob * draws)
            stds.append(step.std.mean(dim=(1, 2)) * draws[:, 0, 0])
        states.append(x_t)
    chain = torch.stack(states, dim=1)
    if not log_probs:
        zero = chain.new_zeros(batch, 1)
        return ChainSample(chain, zero, zero[:, 0], noisy)
    std = torch.stack(stds).sum(0) / noisy.shape[1]
    return ChainSample(chain, _reduce(torch.stack(log_probs, 1), spec), std, noisy, head_inputs)


def _fill(kept: Tensor | None, chosen: Tensor, new: Tensor) -> Tensor:
    """(B, K', C, F) with ``new`` (B, C, F) where ``chosen`` (B, K')."""
    if kept is None:
        kept = new.new_zeros(*chosen.shape, *new.shape[1:])
    return torch.where(chosen[:, :, None, None], new[:, None], kept)


def chain_log_prob(
    policy: FlowPolicy,
    context: Context,
    chain: Tensor,
    spec: ChainSpec,
    noisy: Tensor | None = None,
    head_inputs: Tensor | None = None,
) -> ChainScore:
    """Score stored chains (B, K+1, C, D) with gradient, all noisy steps folded into one batch.

    Args:
        policy: the policy being updated.
        context: what ``to_buffer`` kept of the encoded observations at sampling time (or all of it).
        chain: the stored denoising states.
        spec: the chain's definition, the same as at sampling.
        noisy: (B, K') indices of the denoising steps that drew noise; None: those of ``spec.noisy_steps``.
        head_inputs: (B, K', C, F) what ``ChainSample`` kept: only the heads are run, and ``context`` is not read.
    """
    batch, repeats, n = chain.shape[0], spec.num_noisy_steps, policy.n_action_steps
    noisy = _all_rows(spec, batch, chain.device) if noisy is None else noisy
    rows = torch.arange(batch, device=chain.device)[:, None]
    x_t, x_next = chain[rows, noisy].flatten(0, 1), chain[rows, noisy + 1].flatten(0, 1)  # (B*K', C, D)
    time = time_grid(spec.num_denoising_steps, chain.device)[noisy].flatten()
    if head_inputs is None:
        context = policy.from_buffer(context)
        folded = context if repeats == 1 else {k: v.repeat_interleave(repeats, dim=0) for k, v in context.items()}
        step = transition(policy, folded, x_t, time, spec)
    else:
        step = transition(policy, {}, x_t, time, spec, head_inputs.flatten(0, 1))
    action_dim = policy.action_dim
    delta = (x_next - step.mean)[:, :n, :action_dim]
    log_probs = _coordinate_log_prob(_to_coordinates(delta, spec), step.std)
    shape = (batch, repeats, *log_probs.shape[1:])
    std = step.std.reshape(shape)
    entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).mean(dim=(1, 2, 3))
    mean = step.mean[..., :action_dim].unflatten(0, (batch, repeats))
    return ChainScore(_reduce(log_probs.reshape(shape), spec), entropy, std.detach().mean(dim=(1, 2, 3)), mean)
