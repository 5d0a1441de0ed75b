"""PPO as pure functions: GAE on [T, N], clipped policy and value losses, and the normalisers around them.

Dimensions: T chunk steps, N environments, B decisions of a minibatch, G ratio groups per decision (1 for the
``chunk`` reduction, one per control step for ``action``, ...). Losses return ``(loss, info)``; ``info`` holds
detached 0-dim tensors under the names that the metrics use after their slash.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

Info = dict[str, Tensor]


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    discounts: Tensor,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16) over chunks of any duration.

        delta_t = r_t + d_t * (1 - terminated_t) * V'_t - V_t
        A_t     = delta_t + d_t * lambda * (1 - terminated_t) * (1 - truncated_t) * A_{t+1}

    ``V'_t`` is the value of the observation that follows decision t in *its own* episode: the final observation where
    a time limit ended the episode, never the first observation of the next one. The last row bootstraps from
    ``next_values`` and its lambda sum ends there. Pass values in reward units, not normalised ones.

    Args:
        rewards: (T, N) reward of each decision; inside a chunk already summed (and discounted, if wanted).
        values: (T, N) V of the observation that each decision saw.
        next_values: (T, N) V'; ignored (may be NaN) where ``terminated``.
        terminated: (T, N) bool, the episode reached an absorbing state.
        truncated: (T, N) bool, the episode was cut by a time limit.
        discounts: (T, N) gamma ** tau, tau the number of control steps executed (or gamma itself, as the paper).
        gae_lambda: lambda, per decision.

    Returns:
        ``(advantages, returns)``, both (T, N), with ``returns = advantages + values`` (the TD(lambda) targets).

    Raises:
        ValueError: shapes differ, the tensors are not 2-D, or an episode is both terminated and truncated.
    """
    tensors = (rewards, values, next_values, terminated, truncated, discounts)
    if rewards.dim() != 2 or any(tensor.shape != rewards.shape for tensor in tensors):
        raise ValueError(f"compute_gae wants six [T, N] tensors of one shape, got {[tuple(t.shape) for t in tensors]}")
    terminated, truncated = terminated.bool(), truncated.bool()
    if bool((terminated & truncated).any()):
        raise ValueError("an episode cannot be both terminated and truncated: success at the time limit is terminated")
    # `where`, not a product: an ignored next value may be NaN, and 0 * NaN would poison the whole column.
    bootstrap = torch.where(terminated, torch.zeros_like(values), discounts * next_values)
    deltas = rewards + bootstrap - values
    carry = torch.where(terminated | truncated, torch.zeros_like(values), discounts * gae_lambda)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        running = deltas[t] + carry[t] * running
        advantages[t] = running
    return advantages, advantages + values


def _active(values: Tensor, mask: Tensor | None) -> Tensor:
    """The entries of ``values`` that count, as a flat tensor."""
    return values.flatten() if mask is None else values[mask.bool()]


def full_batches(num: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches of exactly ``batch`` rows from ``epochs`` shuffled passes over ``num`` rows.

    Passes are joined before they are cut, so that no optimiser step gets a short batch; fewer than ``batch`` rows
    are left over at the very end.
    """
    stream = torch.cat([torch.randperm(num, generator=generator) for _ in range(epochs)])
    for start in range(0, len(stream) - batch + 1, batch):
        yield stream[start : start + batch]


def normalize_advantages(advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    """Zero mean and unit (biased) standard deviation over the active entries; masked entries become 0.

    Equal advantages, a single one included, become zeros instead of NaN: they say nothing about any action.
    """
    active = _active(advantages, mask)
    if active.numel() == 0:
        return torch.zeros_like(advantages)
    normalized = (advantages - active.mean()) / (active.std(correction=0) + 1e-8)
    return normalized if mask is None else torch.where(mask.bool(), normalized, torch.zeros_like(normalized))


def approx_kl(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(old || new) by the k3 estimator, the mean of ``(r - 1) - log r`` over the active groups; 0-dim, detached.

    Unbiased and never negative (Schulman 2020, joschu.net/blog/kl-approx.html).
    """
    log_ratio = (_active(log_prob, mask) - _active(old_log_prob, mask)).detach()
    return (torch.expm1(log_ratio) - log_ratio).mean()


def policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_epsilon: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Info]:
    """PPO's clipped surrogate (Schulman et al., arXiv 1707.06347, eq. 7), averaged over the active ratio groups.

    Ratios are taken per group and neither log-prob is clamped: the official ReinFlow code clamps both to [-1, 1],
    which removes the gradient for small sigma. To accumulate gradients over micro-batches, weight each loss by its
    share of active groups; the sum is then exactly the full batch's loss.

    Args:
        log_prob: (B, G) under the current weights, with gradient.
        old_log_prob: (B, G) under the weights that acted.
        advantages: (B,) shared by a decision's groups, or (B, G).
        clip_epsilon: half-width of the clip range around ratio 1.
        mask: (B, G), False for groups that never acted, e.g. control steps after the episode's end; None: all did.

    Returns:
        ``(loss, info)``; info: ratio_min, ratio_max, ratio_mean, clip_fraction, approx_kl.

    Raises:
        ValueError: shapes do not match, or no group is active.
    """
    if log_prob.dim() != 2 or old_log_prob.shape != log_prob.shape:
        raise ValueError(f"log-probs must be (B, G) twice, got {tuple(log_prob.shape)}, {tuple(old_log_prob.shape)}")
    if mask is not None and mask.shape != log_prob.shape:
        raise ValueError(f"mask must be {tuple(log_prob.shape)}, got {tuple(mask.shape)}")
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(-1, log_prob.shape[1])
    if advantages.shape != log_prob.shape:
        raise ValueError(f"advantages must be (B,) or {tuple(log_prob.shape)}, got {tuple(advantages.shape)}")
    # Selecting before the exponential keeps whatever inactive groups hold (NaN, inf) out of loss and gradient.
    log_ratio = _active(log_prob, mask) - _active(old_log_prob, mask)
    weights = _active(advantages, mask)
    if log_ratio.numel() == 0:
        raise ValueError("no active ratio group in this minibatch: every group is masked")
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon)
    loss = -torch.minimum(ratio * weights, clipped * weights).mean()
    with torch.no_grad():
        info = {
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "ratio_mean": ratio.mean(),
            "approx_kl": approx_kl(log_prob, old_log_prob, mask),
            "clip_fraction": ((ratio - 1.0).abs() > clip_epsilon).float().mean(),
        }
    return loss, {name: value.detach() for name, value in info.items()}


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_epsilon: float) -> tuple[Tensor, Info]:
    """Half the mean squared error to the returns, pessimistically clipped around the old values (PPO2).

    All three are *normalised* by one ReturnNormalizer: a clip range in raw reward units would freeze the critic
    wherever returns are large (facts: clip .2 with returns of -20 to -65).

    Args:
        values: (B,) current predictions, with gradient.
        old_values: (B,) predictions when the data was collected, under the same normalisation as ``values``.
        returns: (B,) targets.
        clip_epsilon: half-width of the allowed change of a prediction; 0 turns clipping off.

    Returns:
        ``(loss, info)``; info: value_clip_fraction (share of predictions outside the clip range), value_mean.

    Raises:
        ValueError: shapes differ.
    """
    if values.shape != returns.shape or old_values.shape != returns.shape:
        shapes = [tuple(t.shape) for t in (values, old_values, returns)]
        raise ValueError(f"values, old_values and returns must have one shape, got {shapes}")
    errors = (values - returns) ** 2
    clip_fraction = torch.zeros((), device=values.device)
    if clip_epsilon > 0:
        clipped = old_values + (values - old_values).clamp(-clip_epsilon, clip_epsilon)
        errors = torch.maximum(errors, (clipped - returns) ** 2)
        clip_fraction = ((values - old_values).abs() > clip_epsilon).float().mean()
    info = {"value_clip_fraction": clip_fraction.detach(), "value_mean": values.detach().mean()}
    return 0.5 * errors.mean(), info


def explained_variance(predictions: Tensor, targets: Tensor) -> Tensor:
    """1 - Var[target - prediction] / Var[target]: 1 perfect, 0 no better than a constant, NaN for equal targets."""
    predictions, targets = (x.detach().cpu().double().flatten() for x in (predictions, targets))  # MPS has no float64
    variance = targets.var(correction=0)
    if float(variance) == 0.0:
        return torch.full_like(variance, torch.nan)
    return 1.0 - (targets - predictions).var(correction=0) / variance


class ReturnNormalizer:
    """Mean and standard deviation of all returns seen so far (Chan et al.'s parallel update, in float64).

    The critic predicts normalised returns, so its learning rate and clip range do not depend on the reward's scale.
    """

    # Nearly equal returns would otherwise blow up the next different one.
    MIN_STD = 1e-3

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.sum_squares = 0.0  # of deviations from the mean

    @property
    def std(self) -> float:
        """Biased standard deviation, at least MIN_STD; 1 before the first update."""
        if self.count == 0:
            return 1.0
        return max((self.sum_squares / self.count) ** 0.5, self.MIN_STD)

    def update(self, returns: Tensor) -> None:
        """Add a batch of returns of any shape.

        Raises:
            ValueError: a return is not finite; it would stay in the statistics for ever.
        """
        batch = returns.detach().cpu().double().flatten()
        if batch.numel() == 0:
            return
        if not bool(torch.isfinite(batch).all()):
            raise ValueError("returns are not finite: look for NaN in rewards or in the critic's values")
        batch_mean = float(batch.mean())
        delta, total = batch_mean - self.mean, self.count + batch.numel()
        self.sum_squares += float(((batch - batch_mean) ** 2).sum()) + delta**2 * self.count * batch.numel() / total
        self.mean += delta * batch.numel() / total
        self.count = total

    def normalize(self, returns: Tensor) -> Tensor:
        """Reward units -> normalised."""
        return (returns - self.mean) / self.std

    def denormalize(self, values: Tensor) -> Tensor:
        """Normalised -> reward units."""
        return values * self.std + self.mean

    def state_dict(self) -> dict[str, float]:
        """JSON-able, exact state."""
        return {"count": self.count, "mean": self.mean, "sum_squares": self.sum_squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Inverse of state_dict.

        Raises:
            ValueError: missing or unexpected keys.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"ReturnNormalizer wants the keys {sorted(self.state_dict())}, got {sorted(state)}")
        self.count, self.mean = float(state["count"]), float(state["mean"])
        self.sum_squares = float(state["sum_squares"])
