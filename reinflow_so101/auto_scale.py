"""`--auto-scale`: the three settings that depend on how many dimensions one log-prob sums, from the paper's to yours.

The rule is that of the project's debugging notes: with D = n_action_steps x joints x K noised dimensions against the
paper's 28 (chunks of 4 x 7), sigma x sqrt(D / 28), policy_lr x 28 / D, target_kl x D / 28. It is more cautious than it
need be: as measured (benchmarks/kl_scaling.py, notes/hyperparameters.md), the KL of a step goes as lr^2 / sigma^2 and
slower than D, so that sigma alone restores the paper's KL.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from reinflow import ConfigError
from reinflow.symptoms import PAPER_DIMENSIONS
from reinflow_so101.checks import FlatConfig
from so101_mujoco_utils import NUM_JOINTS


def auto_scale(config: FlatConfig) -> tuple[FlatConfig, str]:
    """Scale sigma bounds, policy_lr and target_kl, taken as the paper's, to this config's D.

    Returns:
        The scaled config, with ``auto_scale`` off so that a resumed run is not scaled again, and what was set and why.

    Raises:
        ConfigError: log_prob_reduction is not ``chunk``: the other reductions do not sum over D.
    """
    if config.log_prob_reduction != "chunk":
        raise ConfigError(
            f"auto_scale scales for a log-prob summed over all D dimensions; log_prob_reduction="
            f"{config.log_prob_reduction} has one ratio per part, where none of it is needed: drop --auto-scale"
        )
    dimensions = config.chain().noised_dimensions(config.n_action_steps, NUM_JOINTS)
    factor = dimensions / PAPER_DIMENSIONS
    values: dict[str, Any] = {
        "sigma_min": config.sigma_min * math.sqrt(factor),
        "sigma_max": config.sigma_max * math.sqrt(factor),
        "policy_lr": config.policy_lr / factor,
        "target_kl": config.target_kl * factor,
    }
    changes = ", ".join(f"{name} {getattr(config, name):.3g} -> {value:.3g}" for name, value in values.items())
    report = (
        f"auto-scale: one ratio sums D = {dimensions} dimensions, {factor:.3g} times the paper's "
        f"{PAPER_DIMENSIONS}: {changes}"
    )
    return dataclasses.replace(config, auto_scale=False, **values), report
