"""The names of all metrics, each with an explanation, and the files that hold them.

METRICS is what every run logs. An environment declares more: each of its ``extras`` is a metric of rollouts and of
evaluations. Logging a name that nobody explained is an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reinflow import UserError
from reinflow.env import Extra

REWARD_FAMILY = "reward/"
METRICS_FILE = "metrics.jsonl"

METRICS: dict[str, str] = {
    "progress/iteration": "Iterations completed.",
    "progress/episodes": "Training episodes completed.",
    "progress/timesteps": "Control steps of the training's episodes.",
    "rollout/episodes_broken": "Episodes lost to unstable physics, or to a reward or observation that is not finite.",
    "rollout/success_rate": "Share of the iteration's training episodes that succeeded, with exploration noise.",
    "rollout/return_mean": "Mean undiscounted return of the iteration's episodes.",
    "rollout/return_std": "Standard deviation of the undiscounted returns of the iteration's episodes.",
    "rollout/failure_return_median": "Median return of those that failed; above the mean of all, not trying pays.",
    "rollout/episode_length": "Mean control steps per episode.",
    "reward/<term>": "Mean over episodes of one reward term, summed over the episode; the terms add up to the return.",
    "logprob/new_mean": "Mean log-prob of a ratio group under the weights being trained. Positive for small noise.",
    "logprob/per_dimension": "Log-prob per noise coordinate; about -log(sigma) - 1.42 while the policy is unchanged.",
    "logprob/groups": "Ratio groups per decision (G), set by the log-prob reduction.",
    "logprob/coordinates": "Noise coordinates that one ratio group sums (D of a ratio).",
    "training/clip_fraction": "Share of ratios outside 1 +- clip_epsilon. Healthy: 0.05 to 0.3.",
    "ppo/ratio_min": "Smallest ratio of new to old probability seen in the iteration's updates.",
    "ppo/ratio_max": "Largest such ratio.",
    "ppo/ratio_mean": "Mean ratio; far from 1 means the old data no longer tells about the new policy.",
    "ppo/approx_kl": "KL from the old to the new policy per ratio group after the last policy step (k3 estimator).",
    "ppo/decision_kl": "KL of a whole decision from old to new policy, the same scale for every log-prob reduction.",
    "ppo/kl_before_update": "KL between acting and scoring before the first step; what a step's KL cannot fall below.",
    "ppo/weights_moved": "Share of the weights with a gradient that the update changed at all; about 1 in fp32.",
    "ppo/ratio_error_before_update": "Largest distance of a ratio from 1 before the first step; the guard allows 1e-4.",
    "ppo/explained_variance": "1 - Var[return - value] / Var[return] before the update: 1 is a perfect critic.",
    "ppo/epochs_done": "Passes over the rollout that the policy made before it stopped.",
    "ppo/optimizer_steps": "Optimiser steps of the policy.",
    "ppo/early_stopped": "1 if the KL limit ended the policy's updates early.",
    "ppo/steps_undone": "Policy steps taken back because their KL overshot the limit.",
    "ppo/steps_refused": "Share of policy steps refused because their gradient was not finite; the weights stayed.",
    "loss/policy": "Clipped surrogate loss less the entropy's part, mean over the iteration's updates; 0 at first.",
    "loss/value": "Half mean squared error of the value in normalised returns.",
    "loss/entropy": "Mean entropy of one noise coordinate.",
    "gradients/policy_norm": "Policy gradient norm before clipping.",
    "gradients/policy_norm_first": "The same at the iteration's first optimiser step.",
    "gradients/policy_norm_last": "And at its last; growth means that later steps work against the first.",
    "gradients/signal_share": "Signal's share of a step's squared gradient, by its two halves; average it.",
    "gradients/noise_scale": "Episodes a step at which that share would be half: the simple noise scale.",
    "gradients/critic_norm": "Critic gradient norm before clipping.",
    "gradients/policy_clipped": "Share of policy steps whose gradient was clipped.",
    "gradients/critic_clipped": "Share of critic steps whose gradient was clipped.",
    "critic/return_mean": "Mean GAE target, in reward units.",
    "critic/return_std": "Standard deviation of the GAE targets, in reward units.",
    "critic/reward_to_go_mean": "Mean discounted sum of rewards to the episode's end: what rewards alone explain.",
    "critic/bootstrap_mean": "Mean V(final observation) that targets add where the time limit struck.",
    "critic/target_shift": "Mean normalised target minus the critic's mean output at sampling.",
    "critic/advantage_std": "Standard deviation of the advantages before normalisation, in reward units.",
    "noise/std_mean": "Mean exploration std, in normalised action units.",
    "noise/sigma_min": "Lower bound of the exploration std.",
    "noise/sigma_max": "Upper bound of the exploration std, as scheduled.",
    "lr/policy": "Learning rate of the policy; 0 during critic warm-up. Natural steps do not use it.",
    "lr/critic": "Learning rate of the critic.",
    "eval/success_rate": "Share of noise-free episodes on fixed seeds that succeeded: the result.",
    "eval/ci_low": "Lower end of its 95 % Wilson interval.",
    "eval/ci_high": "Upper end of its 95 % Wilson interval.",
    "eval/return_mean": "Mean undiscounted return of the evaluation episodes.",
    "eval/episode_length": "Mean control steps per evaluation episode.",
    "eval/trained_share": "Share of the evaluation's seeds that the iteration trained on; above 0 it says little.",
    "eval/episodes": "Number of evaluation episodes.",
    "time/rollout": "Seconds of the iteration's rollout.",
    "time/rollout_env": "Seconds of it in the environments.",
    "time/rollout_policy": "Seconds of it in the policy.",
    "time/broadcast": "Seconds of it until all rollout workers had the changed weights.",
    "time/gather": "Seconds of it beyond the slowest rollout worker's playing: its part's way here, and the joining.",
    "time/update": "Seconds of the iteration's update.",
    "time/sync": "Seconds of it in exchanges with the other ranks, the wait for the slowest included.",
    "time/eval": "Seconds of the evaluation.",
    "time/iteration": "Seconds of the whole iteration.",
    "ray/broadcast_mb": "Megabytes of changed weights that every rollout worker was sent.",
    "ray/rollout_mb": "Megabytes of the rollout that came back from all rollout workers.",
    "ray/workers_lost": "Rollout workers that were lost and replaced in the iteration.",
}


class TrackingError(UserError, RuntimeError):
    """A metric is unknown, or a tracker cannot be started; the message says what to do."""


def known_metrics(extras: Mapping[str, Extra]) -> dict[str, str]:
    """METRICS and those that an environment's extras add, name -> explanation."""
    declared = {
        f"{stage}/{name}": f"Mean over the episodes of {where}: {extra.explanation}"
        for stage, where in (("rollout", "the rollout"), ("eval", "the evaluation"))
        for name, extra in extras.items()
    }
    return METRICS | declared


def metrics_markdown(extras: Mapping[str, Extra]) -> str:
    """All metrics of a run in an environment with these extras, as a markdown table."""
    rows = [f"| `{name}` | {explanation} |" for name, explanation in known_metrics(extras).items()]
    return "\n".join(["| metric | meaning |", "|---|---|", *rows]) + "\n"


def check_names(names: Iterable[str], known: Mapping[str, str]) -> None:
    """Raise a TrackingError that names every metric without an explanation."""
    unknown = [name for name in names if name not in known and not name.startswith(REWARD_FAMILY)]
    if unknown:
        raise TrackingError(
            f"unknown metrics {unknown}: add them to reinflow.metrics.METRICS or to the environment's extras, with an "
            "explanation"
        )


def finite_or_none(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """``metrics`` as metrics.jsonl holds them: None for what is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(path: Path | str) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out.

    Raises:
        TrackingError: it is not there, or a line is damaged.
    """
    rows = read_lines(path)
    for number, row in enumerate(rows, 1):
        if wrong := [name for name, value in row.items() if value is not None and type(value) not in (int, float)]:
            raise TrackingError(f"{path}, line {number}, is damaged in {wrong[0]!r}: mend or remove the line")
    return rows


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a file that tells of iterations, as ``read_metrics``, with any values."""
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise TrackingError(f"{path} cannot be read ({error.strerror}): name a run that has it") from error
    return [_read_line(path, number, line) for number, line in enumerate(lines, 1)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole; [] where there is none."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"line {number} of {path.name} is damaged") from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {path.name} is damaged")
        rows.append(row)
    return rows


def _read_line(path: Path | str, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
        if not isinstance(row, dict) or not isinstance(row.get("progress/iteration"), int | float):
            raise ValueError("no progress/iteration")
    except (ValueError, RecursionError) as error:
        raise TrackingError(
            f"{path}, line {number}, is damaged, not JSON that names an iteration ({error}): mend or remove it"
        ) from error
    return row


def truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines after ``iteration``, which the resumed run will write again; atomically."""
    if not path.exists():
        return
    kept = [line for line in read_lines(path) if line["progress/iteration"] <= iteration]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
