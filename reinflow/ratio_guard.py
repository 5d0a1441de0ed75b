"""The ratio before the first optimiser step must be 1: the policy that is updated is the one that acted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reinflow import UserError, distributed
from reinflow.flow import ChainScore, ChainSpec
from reinflow.policy import FlowPolicy
from reinflow.rollout_batch import RolloutBatch
from reinflow.rounding import narrow_products


class RatioGuardError(UserError, RuntimeError):
    """The policy that is about to be updated does not give the log-probs it acted with."""


def check_ratio(
    policy: FlowPolicy, spec: ChainSpec, part: RolloutBatch, score: ChainScore | None, least: float
) -> float:
    """How far the ratios of ``part`` are off 1, the worst of all ranks.

    Args:
        policy: as it acted.
        spec: the denoising chain.
        part: of the rollout.
        score: of ``part``; None where all of it is with other ranks.
        least: what is allowed at least; see ``tolerance``.

    Raises:
        RatioGuardError: too far; on all ranks, with the cause that the worst of them sees.
    """
    new, own, magnitudes = part.log_prob, 0.0, (0.0, 0.0, -math.inf)
    if score is not None:
        new = score.log_prob.detach()
        own = (new - part.log_prob).exp().sub(1).abs().max().item()
        tensors = part.chain.abs().max(), part.log_prob.abs().max(), -score.noise_std.min()
        magnitudes = tensors[0].item(), tensors[1].item(), tensors[2].item()
    error, chain, log_prob, std = distributed.largest(own, *magnitudes)
    allowed = tolerance(policy, spec, part, (chain, log_prob, -std), least)
    if not error <= allowed:
        causes = distributed.gather((own, _cause(policy, new, part)))
        _, cause = max(causes, key=lambda found: (math.isnan(found[0]), found[0]))
        text = f"ratio is off 1 by {error:.2e} (allowed {allowed:.0e}) before the first optimiser step: {cause}"
        raise RatioGuardError(text)
    return error


def tolerance(
    policy: FlowPolicy, spec: ChainSpec, part: RolloutBatch, magnitudes: tuple[float, float, float], least: float
) -> float:
    """How far the ratio may be off 1 by fp32's rounding alone: ``least``, and more in two cases.

    A log-prob of -500 has steps of 6e-5, and a GPU sums a batch of another shape in another order. And a mean that
    is rounded otherwise moves each of a group's m coordinates by its last digit over the noise's std: sums over
    hundreds of them under a std of .01 differ by 1e-3 though nothing is wrong.

    Args:
        policy: as it acted.
        spec: the denoising chain.
        part: what is compared.
        magnitudes: largest denoising state and log-prob of it, smallest std.
        least: the answer where rounding is small.
    """
    chain, log_prob, std = magnitudes
    eps, groups = torch.finfo(torch.float32).eps, part.log_prob.shape[1]
    coordinates = spec.noised_dimensions(policy.n_action_steps, policy.action_dim) / groups
    if spec.reduction == "mean":
        coordinates = 1.0
    return max(least, 8 * eps * log_prob, 4 * eps * chain / std * math.sqrt(coordinates))


def _cause(policy: FlowPolicy, new: Tensor, part: RolloutBatch) -> str:
    old = part.log_prob
    if not (torch.isfinite(new).all() and torch.isfinite(old).all()):
        return "a log-prob is not finite: the weights or observations hold NaN or infinity"
    if (new.dtype, old.dtype) != (torch.float32, torch.float32):
        return f"log-probs are {old.dtype} when acting and {new.dtype} when updating; both must be float32"
    if policy.training:
        return "the policy is in training mode (dropout?); it must be in eval mode for acting and updating"
    if narrow := narrow_products(part.context):
        return (
            f"{narrow}, which round by the shape of their batch: add --rescore-log-probs, or set minibatch_size to "
            "the number of environments"
        )
    return (
        "acting and updating do not see the same thing: weights or noise bounds changed after the rollout, "
        "or the context does not hold everything that the velocity depends on"
    )
