"""The doctor: reads a run's metrics and names what goes wrong, why, and which setting to change.

RULES is ordered from cause to consequence: the first finding is the one to act on. Every rule joins a check of
reinflow/symptoms.py to its words. A task adds rules of its own, or words the remedy of one of these its own way.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from reinflow import symptoms
from reinflow.metrics import METRICS_FILE, finite_or_none, read_lines, read_metrics, truncate_metrics
from reinflow.symptoms import (
    AGAINST_MIN,
    AGAINST_SIGMAS,
    BOUND_MARGIN,
    CAMPING_ITERATIONS,
    CAMPING_SIGMAS,
    CLIP_FRACTION,
    CRITIC_MIN,
    CRITIC_SWING,
    CRITIC_WINDOW,
    ENTROPY_GAP,
    EXPLAINED_VARIANCE,
    FEW_EPISODES,
    FLAT_SUCCESS,
    GAP_EVALUATIONS,
    GRADIENT_EXCESS,
    OFTEN,
    PENALTY_SHARE,
    RATIO_ERROR,
    RATIO_LIMIT,
    REACH,
    RECENT,
    SHIFT_EXCESS,
    SIGNAL_MIN,
    SIGNAL_SHARE,
    SIGNAL_WINDOW,
    SUCCESS_GAP,
    SUM_STIFFNESS,
    SURROGATE_LOSS,
    WEAK_EPISODES,
    WEAK_START,
    WEIGHTS_MOVED,
    History,
    MissingSetting,
    Rows,
    Severity,
    Symptom,
)

FINDINGS_FILE = "doctor.jsonl"
REPEAT_AFTER = 20  # iterations after which a finding that persists is shown again


@dataclass(frozen=True)
class Finding:
    """What the user reads. ``error`` means that training cannot work like this."""

    rule: str
    severity: Severity
    evidence: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.rule}\n  evidence: {self.evidence}\n  cause: {self.cause}\n  try: {self.remedy}"


@dataclass(frozen=True)
class Rule:
    """A check with its words. In ``remedy``, values of this run stand in parentheses, which the notes leave out."""

    check: Callable[[History], Symptom | None]
    fires_when: str
    cause: str
    remedy: str

    @property
    def name(self) -> str:
        return self.check.__name__

    def can_judge(self, history: History) -> bool:
        """Whether the run has enough iterations, and all metrics and settings, for a verdict."""
        history.starved = False
        self._symptom(history)
        return not history.starved

    def _symptom(self, history: History) -> Symptom | None:
        try:
            return self.check(history)
        except MissingSetting:
            history.starved = True
            return None

    def examine(self, history: History) -> Finding | None:
        """The finding, or None."""
        symptom = self._symptom(history)
        if symptom is None:
            return None
        return Finding(
            self.name, symptom.severity, symptom.evidence, self.cause, self.remedy.format_map(symptom.values)
        )


RULES: tuple[Rule, ...] = (
    Rule(
        symptoms.ratio_off_one,
        f"`ppo/ratio_error_before_update` above {RATIO_ERROR:.0e}",
        "acting and updating do not see the same policy: changed weights, noise bounds, dropout or precision",
        "run the policy in eval mode and float32, and put all that velocity depends on into the context",
    ),
    Rule(
        symptoms.log_prob_off_entropy,
        f"`logprob/per_dimension` off -`loss/entropy` by more than {ENTROPY_GAP} nats ({RECENT} iterations)",
        "the policy scores its own samples with another distribution than it drew them from",
        "compare the std, flow time and noise_basis of sampling and scoring; both must call flow.transition",
    ),
    Rule(
        symptoms.weights_stay,
        f"`ppo/weights_moved` below {WEIGHTS_MOVED} on average over 2 to {RECENT} iterations",
        "weights that learn are kept in bf16 or fp16, or written back from such a copy: steps below half of a weight's "
        "last digit are lost, and what is left of the others points elsewhere",
        "keep fp32 masters of all that learns (to act as bf16 would, round a copy: reinflow.rounding.act_rounded)",
    ),
    Rule(
        symptoms.summed_log_prob,
        f"`logprob/per_dimension` > 0 and D / sigma^2 of one ratio above {SUM_STIFFNESS:,.0f}",
        "sigma is too small for the number of coordinates D that one ratio sums: densities exceed 1, and the smallest "
        "change of the velocity swings the sum, the ratio and the gradient (KL of a step grows with D / sigma^2)",
        "raise sigma_min and sigma_max by sqrt(D / 28) ({sigma_min:.2f} and {sigma_max:.2f}), or set "
        "log_prob_reduction=action (now {reduction}) so that fewer coordinates share a ratio",
    ),
    Rule(
        symptoms.critic_feeds_on_itself,
        f"time_limit_is_terminal=False and the mean target swings by more than {CRITIC_SWING} spreads of the episodes' "
        f"returns beside what rewards explain ({CRITIC_MIN} to {CRITIC_WINDOW} iterations)",
        "every failed episode's target holds V(final observation), which nothing trains when episodes start at step 0 "
        "and end at the limit: the critic learns its own extrapolation",
        "set time_limit_is_terminal=True",
    ),
    Rule(
        symptoms.weak_start,
        f"fewer than {WEAK_START:.0%} of the first episodes ({WEAK_EPISODES} or more, 3 iterations) succeeded, "
        "and as few in the last",
        "the supervised policy hardly ever reaches a reward that tells good from bad",
        "train the supervised stage longer, or start from easier episodes",
    ),
    Rule(
        symptoms.too_few_episodes,
        f"fewer than {FEW_EPISODES} episodes an iteration, and `gradients/signal_share` below {SIGNAL_SHARE} on "
        f"average ({SIGNAL_MIN} to {SIGNAL_WINDOW} iterations)",
        "nearly all of every gradient is the luck of a few episodes, so that steps cancel out or lead astray",
        "raise episodes_per_iteration ({episodes}) towards `gradients/noise_scale`, with fewer or smaller steps in all",
    ),
    Rule(
        symptoms.noise_at_bound,
        f"learned `noise/std_mean` within {BOUND_MARGIN:.0%} of a bound ({RECENT} iterations)",
        "the noise head wants more or less noise than it may use; at a bound it has no gradient",
        "move the bound ({bound}={value:.3f}), or fix the noise with train_noise_head=False",
    ),
    Rule(
        symptoms.nothing_moves,
        f"at the pace of `ppo/decision_kl` (3 to {RECENT} iterations) all steps of the run together move a decision by "
        f"less than {REACH:.0f} noise std",
        "the policy stays where it was. A ratio that is a mean over many coordinates hides it: its gradient, its KL "
        "and its clip fraction are small whatever the policy does, so limits meant for sums never bind",
        "raise policy_lr ({lr:.1e}), or sum fewer coordinates a ratio (log_prob_reduction=action or dim) instead of "
        "taking their mean",
    ),
    Rule(
        symptoms.kl_stop_at_once,
        f"the KL limit ends {OFTEN:.0%} of the recent updates after the first of several steps",
        "one optimiser step moves the policy further than target_kl allows, so most of a rollout is never used",
        "lower policy_lr so that a step's KL is about target_kl ({lr:.1e}), or plan one full-batch step: "
        "num_ppo_epochs=1 with minibatch_size x gradient_accumulation_steps = decisions of a rollout",
    ),
    Rule(
        symptoms.steps_undone,
        f"{OFTEN:.0%} of the recent iterations took a step back",
        "a step's KL overshoots the limit by half and more although the rate was halved each time",
        "start from a lower policy_lr ({lr:.1e}) or lengthen lr_warmup_iterations (10)",
    ),
    Rule(
        symptoms.ratio_extremes,
        f"ratios beyond {RATIO_LIMIT:.0f} in {OFTEN:.0%} of the recent iterations",
        "the policy left its old self behind within one rollout; the old data says nothing about the new policy",
        "set or lower target_kl (0.03) with undo_overshoot=True, and lower policy_lr to a third ({lr:.1e})",
    ),
    Rule(
        symptoms.clip_fraction,
        f"`training/clip_fraction` above {CLIP_FRACTION} on average over {RECENT} iterations",
        "most ratios left the clip range, where they have no gradient: steps are too large or too many",
        "lower policy_lr to a third ({lr:.1e}) or num_ppo_epochs to 1",
    ),
    Rule(
        symptoms.later_steps_undo,
        f"several steps an iteration, a pass or more, and mean `loss/policy` (without the entropy's part) above "
        f"{SURROGATE_LOSS}",
        "steps after the first undo its work: minibatch gradients disagree or the rate is past the curvature",
        "take one full-batch step per rollout (num_ppo_epochs=1, minibatch_size x gradient_accumulation_steps = its "
        "decisions), or lower policy_lr to a third ({lr:.1e})",
    ),
    Rule(
        symptoms.gradient_excess,
        f"`gradients/policy_norm` above {GRADIENT_EXCESS:.0f} x grad_clip_norm in {OFTEN:.0%} of the recent iterations",
        "nearly all of every gradient is cut away; its length no longer says anything. Usually ratios sum too many "
        "coordinates or sigma is small",
        "raise sigma_min, set log_prob_reduction=action or dim, or check the reward for outliers",
    ),
    Rule(
        symptoms.targets_beyond_value_clip,
        f"mean of target - value beyond {SHIFT_EXCESS:.0f} x value_clip_epsilon, on one side for {RECENT} iterations",
        "the value clip holds the critic back: targets run away faster than it may follow",
        "raise value_clip_epsilon ({clip:.1f}) or turn it off (0), and lengthen critic_warmup_iters",
    ),
    Rule(
        symptoms.blind_critic,
        f"`ppo/explained_variance` below {EXPLAINED_VARIANCE} on average over {RECENT} iterations after the warm-up",
        "the critic is no better than a constant, so advantages are plain returns with all their noise; so is the mean "
        "of a group of episodes in its place, if they began in different states",
        "compare episodes of one start if you compare groups; give a critic more: num_critic_epochs ({epochs}), "
        "critic_lr ({lr:.1e}), critic_warmup_iters (10), larger rollouts",
    ),
    Rule(
        symptoms.failing_pays,
        f"`rollout/failure_return_median` above `rollout/return_mean` by {AGAINST_SIGMAS:.0f} standard errors (3 to "
        f"{RECENT} iterations), though some episodes succeed, and a negative reward term makes up {PENALTY_SHARE:.0%} "
        "of that",
        "a penalty makes trying cost more than it earns: whoever fails safely is paid better than the policy is on "
        "average, and so it learns not to try",
        "lower the penalty (reward/{term}) until a failed try costs little beside what a success pays, or leave it out "
        "until most tries succeed",
    ),
    Rule(
        symptoms.return_against_success,
        f"over {AGAINST_MIN} iterations or more the return rose and success fell by {AGAINST_SIGMAS:.0f} standard "
        "errors",
        "the reward pays for something else than the task, and the policy has found it",
        "lower what rose (reward/{term}), or pay a success more than all else together",
    ),
    Rule(
        symptoms.reward_without_success,
        f"the return rose by {CAMPING_SIGMAS:.0f} standard errors over {CAMPING_ITERATIONS} iterations or more, "
        f"success by less than {FLAT_SUCCESS:.0%}",
        "the policy collects shaping instead of doing the task (hovering, camping in contact)",
        "lower the reward term that rose (reward/{term}), or pay for progress once instead of at every step",
    ),
    Rule(
        symptoms.evaluated_on_training,
        "`eval/trained_share` above 0",
        "the evaluation plays episodes that the training plays: it shows what was memorised, not what was learned",
        "evaluate on seeds that no training episode has",
    ),
    Rule(
        symptoms.sampling_far_from_noise_free,
        f"`eval/success_rate` and `rollout/success_rate` differ by more than {SUCCESS_GAP} in {GAP_EVALUATIONS} to 3 "
        "evaluations",
        "PPO improves the noisy policy, you deploy the noise-free one, and they are two different policies by now",
        "change sigma_max ({direction} it, x {factor}: {sigma:.3f}), or use smooth noise: noise_basis=dct",
    ),
)


def with_remedies(rules: Sequence[Rule], remedies: Mapping[str, str]) -> tuple[Rule, ...]:
    """``rules``, those that ``remedies`` names with these words instead of their own."""
    return tuple(replace(rule, remedy=remedies.get(rule.name, rule.remedy)) for rule in rules)


def diagnose(rows: Rows, config: Mapping[str, Any], rules: Sequence[Rule] = RULES) -> list[Finding]:
    """What is wrong at the end of ``rows``, the most fundamental cause first; empty for a healthy run.

    Args:
        rows: lines of metrics.jsonl.
        config: the run's config.json; a rule that reads a setting which is not there stays silent.
        rules: in the order of their findings.
    """
    history = History(rows, config)
    return [finding for rule in rules if (finding := rule.examine(history))]


def doctor_markdown(rules: Sequence[Rule]) -> str:
    """``rules`` as a markdown table."""
    lines = ["| rule | fires when | likely cause | try |", "|---|---|---|---|"]
    for rule in rules:
        remedy = re.sub(r" \([^()]*\{[^()]*\)", "", rule.remedy)
        lines.append(f"| `{rule.name}` | {rule.fires_when} | {rule.cause} | {remedy} |")
    return "\n".join(lines) + "\n"


class Doctor:
    """Examines a run while it trains. A finding comes once, and again while it persists for many iterations.

    What was shown is in doctor.jsonl, from which a resumed run goes on.
    """

    def __init__(
        self, run_dir: Path, config: Mapping[str, Any], resumed: int | None, rules: Sequence[Rule] = RULES
    ) -> None:
        """``resumed``: iterations completed at the checkpoint that the run goes on from; None for a new run."""
        self.path, self.config, self.rules = run_dir / FINDINGS_FILE, config, rules
        self.rows: list[Mapping[str, float | None]] = []
        self.shown_at: dict[str, float] = {}
        if resumed is not None:
            self._recall(run_dir / METRICS_FILE, resumed)

    def _recall(self, metrics: Path, resumed: int) -> None:
        if metrics.exists():
            self.rows = [row for row in read_metrics(metrics) if (row["progress/iteration"] or 0) <= resumed]
        if self.path.exists():
            truncate_metrics(self.path, resumed)
            shown = read_lines(self.path)
            self.shown_at = {line["rule"]: line["progress/iteration"] for line in shown}

    def examine(self, iteration: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Take an iteration's metrics; the findings to show now, also appended to doctor.jsonl."""
        self.rows.append(finite_or_none(metrics) | {"progress/iteration": float(iteration)})
        due = [
            finding
            for finding in diagnose(self.rows, self.config, self.rules)
            if iteration - self.shown_at.get(finding.rule, -math.inf) >= REPEAT_AFTER
        ]
        with self.path.open("a", encoding="utf-8") as file:
            for finding in due:
                self.shown_at[finding.rule] = float(iteration)
                file.write(json.dumps({"progress/iteration": float(iteration), **asdict(finding)}) + "\n")
        return due
