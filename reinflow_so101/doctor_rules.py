"""The doctor's rules for the SO-101: those of every run with this project's settings in their remedies, and its own."""

from __future__ import annotations

from statistics import fmean

from reinflow.doctor import RULES as GENERAL_RULES
from reinflow.doctor import Rule, with_remedies
from reinflow.symptoms import RECENT, History, Symptom, span

CLIPPED_PER_STEP = 0.5  # joint targets per control step: one joint leans on its limit half of the time


def joint_limits(h: History) -> Symptom | None:
    rows = h.last(RECENT, RECENT, "rollout/clipped_targets", "rollout/episode_length")
    rates = [r["rollout/clipped_targets"] / max(r["rollout/episode_length"], 1) for r in rows]
    if not rows or fmean(rates) <= CLIPPED_PER_STEP:
        return None
    sigma = rows[-1].get("noise/sigma_max") or 0.0
    return Symptom(f"{span(rows)}: {fmean(rates):.2f} joint targets clipped per control step", {"sigma": sigma / 2})


JOINT_LIMITS = Rule(
    joint_limits,
    f"more than {CLIPPED_PER_STEP} clipped joint targets per control step ({RECENT} iterations)",
    "actions beyond the joint limits all do the same: they carry no gradient, and the policy drifts there",
    "lower sigma_max ({sigma:.3f}), check that the policy's units are the environment's, lower policy_lr",
)
REMEDIES = {
    "critic_feeds_on_itself": "set time_limit_is_terminal=True (--time-limit-is-terminal)",
    "weak_start": "train the start of pretrained_path longer (reinflow-sft) or start from easier episodes, e.g. "
    "randomize_block=False",
    "reward_without_success": "lower the reward term that rose (reward/{term}; contact_bonus and "
    "height_alignment_bonus are fields), or use reward_mode=staged, which pays for progress once",
}
*CAUSES, LAST = with_remedies(GENERAL_RULES, REMEDIES)
RULES: tuple[Rule, ...] = (*CAUSES, JOINT_LIMITS, LAST)
