"""The 22 experiments of the three-stage pipeline's document (seeds/004) as data: a baseline and 21 single changes.

The document counts a million environment steps; a training here counts iterations of whole episodes. What is a share of
training there is one here:

* ``noise_decay_steps``: 500k and 200k of 1M steps are ``noise_decay_end`` .5 and .2.
* ``critic_warmup_steps``: 5k of 1M steps are half a percent of training, less than one iteration of most runs here. The
  steps in their order (0, 2k, 5k, 10k) are 0, 1, 2 and 4 iterations, with 2 in the preset: the document's proportions,
  at a larger share.
* ``rollout_steps`` and ``minibatch_size``: half and twice the preset's, which is the document's 64 and 256 against 128
  with minibatches of 32 and 128 against 64; with a preset of whole episodes it is their number an iteration.
* ``value_coef`` weighs the value's loss in a sum. Policy and critic have an optimiser each here, so there is no such
  sum and no such setting: that experiment would be the baseline under another name, and is not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = "baseline"

OUR_NAMES = {  # the document's parameter -> the training's field
    "num_inference_steps": "num_denoising_steps", "clip_ratio": "clip_epsilon", "lr": "policy_lr",
    "lr_policy": "policy_lr", "lr_critic": "critic_lr", "min_noise_std": "sigma_min", "max_noise_std": "sigma_max",
    "noise_decay_type": "noise_schedule", "noise_decay_steps": "noise_decay_end", "ppo_epochs": "num_ppo_epochs",
    "entropy_coef": "entropy_coeff", "critic_warmup_steps": "critic_warmup_iters",
    "act_horizon": "n_action_steps", "pred_horizon": "chunk_size",
}  # fmt: skip


@dataclass(frozen=True)
class Experiment:
    """One change of the baseline, with the document's words for it and this project's fields."""

    name: str
    category: str
    parameter: str
    """The document's."""
    value: str
    difference: str
    """From the document's baseline."""
    hypothesis: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a training and what they become."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Whole-number fields of a training and what they are multiplied by."""
    note: str = ""
    """Why it is not run."""

    def changes(self, base: Any) -> dict[str, Any]:
        """The fields that it sets, over those of the training ``base``.

        Without rollout_steps a rollout is so many episodes, and has no more environments than episodes.
        """
        whole = "episodes_per_iteration" if not base.rollout_steps else "rollout_steps"
        names = {name: whole if name == "rollout_steps" else name for name in self.factors}
        scaled = {names[name]: max(1, round(getattr(base, names[name]) * by)) for name, by in self.factors.items()}
        changed = dict(self.fields) | scaled
        episodes = changed.get("episodes_per_iteration", base.num_parallel_envs)
        if episodes < base.num_parallel_envs:
            changed["num_parallel_envs"] = episodes
        return changed


def _one(name: str, parameter: str, value: str, difference: str, hypothesis: str, **fields: Any) -> Experiment:
    return Experiment(name, name.split(":", maxsplit=1)[0], parameter, value, difference, hypothesis, fields)


EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        Experiment(BASELINE, BASELINE, "-", "-", "-", "the preset as it is"),
        _one("warmup:0", "critic_warmup_steps", "0", "-5000", "no warm-up, may be unstable", critic_warmup_iters=0),
        _one("warmup:2k", "critic_warmup_steps", "2000", "-3000", "a shorter warm-up", critic_warmup_iters=1),
        _one("warmup:10k", "critic_warmup_steps", "10000", "+5000", "a longer warm-up", critic_warmup_iters=4),
        _one(
            "noise:constant", "noise_decay_type", "constant", "linear -> constant", "noise that never falls",
            noise_schedule="constant",
        ),
        _one(
            "noise:exp", "noise_decay_type", "exponential", "linear -> exponential", "noise that falls early",
            noise_schedule="exponential",
        ),
        _one("noise:fast", "noise_decay_steps", "200k", "-300k", "noise that falls fast", noise_decay_end=0.2),
        _one("noise:low_init", "max_noise_std", "0.15", "-0.15", "half the first noise", sigma_max=0.15),
        _one("noise:high_init", "max_noise_std", "0.5", "+0.2", "more noise at first", sigma_max=0.5),
        _one("ppo:clip_tight", "clip_ratio", "0.1", "-0.1", "smaller steps", clip_epsilon=0.1),
        _one("ppo:clip_loose", "clip_ratio", "0.3", "+0.1", "larger steps", clip_epsilon=0.3),
        _one("ppo:high_entropy", "entropy_coef", "0.05", "+0.04", "more exploration", entropy_coeff=0.05),
        _one("ppo:low_entropy", "entropy_coef", "0.001", "-0.009", "less exploration", entropy_coeff=0.001),
        Experiment(
            "ppo:high_value", "ppo", "value_coef", "1.0", "+0.5", "more weight on the value",
            note="no such setting (policy and critic have an optimiser each): same as baseline",
        ),
        _one(
            "lr:low", "lr, lr_critic", "1e-5, 3e-5", "both / 3", "learning rates a third",
            policy_lr=1e-5, critic_lr=3e-5,
        ),
        _one(
            "lr:high", "lr, lr_critic", "1e-4, 3e-4", "both x 3", "learning rates threefold",
            policy_lr=1e-4, critic_lr=3e-4,
        ),
        _one(
            "lr:equal", "lr, lr_critic", "5e-5, 5e-5", "+2e-5, -5e-5", "one rate for both",
            policy_lr=5e-5, critic_lr=5e-5,
        ),
        _one(
            "infer:4steps", "num_inference_steps", "4", "-4", "faster, quality may fall", num_denoising_steps=4,
        ),
        _one(
            "infer:16steps", "num_inference_steps", "16", "+8", "slower, quality may rise", num_denoising_steps=16,
        ),
        Experiment(
            "rollout:short", "rollout", "rollout_steps, minibatch_size", "64, 32", "both / 2", "smaller batches",
            factors={"rollout_steps": 0.5, "minibatch_size": 0.5},
        ),
        Experiment(
            "rollout:long", "rollout", "rollout_steps, minibatch_size", "256, 128", "both x 2", "larger batches",
            factors={"rollout_steps": 2, "minibatch_size": 2},
        ),
        Experiment(
            "rollout:more_epochs", "rollout", "ppo_epochs", "8", "+4", "more steps on the same data",
            factors={"num_ppo_epochs": 2, "num_critic_epochs": 2},  # its one loop trains both
        ),
    )
}  # fmt: skip
"""By name, in the document's order."""

EXPECTED: dict[str, tuple[tuple[str, ...], str]] = {
    "warmup": ((BASELINE,), "too short is unstable, too long wastes time"),
    "noise": ((BASELINE, "noise:exp"), "exploration must fall step by step"),
    "ppo": ((BASELINE, "ppo:clip_tight"), "large steps may be unstable"),
    "lr": ((BASELINE,), "too large diverges, too small is slow"),
    "infer": ((BASELINE,), "quality against time"),
    "rollout": ((BASELINE, "rollout:long"), "more data is usually better"),
}
"""Category -> what the document expects to be best, and why."""
