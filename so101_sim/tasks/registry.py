"""Named tasks: what an episode starts from, what it pays and when it ends, under a name that commands, data sets and
policies can carry.

A task says nothing of how it is seen or in which units it is driven (image size, joint frame, control rate): that is
the policy's. Its cameras are those that data of it is recorded with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reinflow import ConfigError
from so101_sim.config import BLOCK_YAW_DEG, EnvConfig
from so101_sim.outcome import LIFT, Taxonomy

ASPECTS = (
    "instruction", "block_pos", "randomize_block", "block_radius_range", "block_angle_deg", "block_yaw_deg",
    "starting_position", "start_noise_deg", "cameras", "reward_mode", "contact_bonus", "height_alignment_bonus",
    "reach_scale", "reach_length", "grasp_scale", "lift_scale", "success_bonus", "lift_threshold",
    "max_steps_per_episode",
)  # fmt: skip
"""The fields of EnvConfig that a task sets."""
RANGES = ("block_radius_range", "block_angle_deg", "block_yaw_deg")
WRIST_TURNED = (0.06, -100.21, 89.95, 66.46, -84.04, 1.0)  # so that the jaws close across the block


@dataclass(frozen=True)
class Task:
    """A named task."""

    summary: str
    settings: Mapping[str, Any]
    """Fields of EnvConfig that differ from its defaults."""
    demonstrations: Mapping[str, Any] = field(default_factory=dict)
    """Ranges to record in: a little beyond the task's own, so that its edge is not the data's."""
    taxonomy: Taxonomy = LIFT
    """How its episodes can end."""


_LIFT: dict[str, Any] = {
    "randomize_block": True,
    "starting_position": WRIST_TURNED,
    "cameras": ("camera_up", "wrist_camera"),
    "reward_mode": "staged",
}
TASKS: dict[str, Task] = {
    "lift": Task(
        "lift a block that lies at random in front of the arm",
        {**_LIFT, "block_radius_range": (0.20, 0.28), "block_angle_deg": 30.0, "block_yaw_deg": BLOCK_YAW_DEG},
        {"block_radius_range": (0.19, 0.29), "block_angle_deg": 33.0, "block_yaw_deg": 26.0},
    ),
    "lift_wide": Task(
        "lift a block that lies at random nearly anywhere within reach, turned by any angle",
        {**_LIFT, "block_radius_range": (0.15, 0.32), "block_angle_deg": 60.0, "block_yaw_deg": 180.0},
    ),
    "lift_fixed": Task("lift a block that always lies at the same place, as documented first", {}),
}
DEFAULT_TASK = "lift_fixed"  # EnvConfig's own defaults


def task_env(name: str, **overrides: Any) -> EnvConfig:
    """The environment of a named task, with fields of EnvConfig that override it; raises ConfigError."""
    return EnvConfig(**{**named(name).settings, **overrides})


def demonstration_env(name: str) -> EnvConfig:
    """The environment to record demonstrations of a named task in."""
    task = named(name)
    return EnvConfig(**{**task.settings, **task.demonstrations})


def named(name: str) -> Task:
    """The task of that name; raises ConfigError with the names there are."""
    if name not in TASKS:
        raise ConfigError(f"task={name} is unknown: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def aspects(env: EnvConfig) -> dict[str, Any]:
    """What of an environment is the task."""
    return {name: getattr(env, name) for name in ASPECTS}


def differences(env: EnvConfig, name: str) -> dict[str, Any]:
    """The aspects in which an environment is not the named task; ranges that it does not draw from do not count, nor
    do cameras, which are the policy's."""
    own = aspects(task_env(name))
    unread = {"cameras", *(("block_pos",) if env.randomize_block else RANGES)}
    return {k: v for k, v in aspects(env).items() if k not in unread and not _same(v, own[k])}


def nearest_task(env: EnvConfig) -> str:
    """The name of the task that an environment differs from least."""
    return min(TASKS, key=lambda name: len(differences(env, name)))


def taxonomy_of(env: EnvConfig) -> Taxonomy:
    """How episodes of an environment can end, as its task declares it."""
    return TASKS[nearest_task(env)].taxonomy


def describe(env: EnvConfig) -> str:
    """The task of an environment in words: its name, what it is, and in what it differs from that."""
    name = nearest_task(env)
    changed = ", ".join(f"{field}={value}" for field, value in differences(env, name).items())
    return f"{name} ({TASKS[name].summary})" + (f" with {changed}" if changed else "")


def how_to_choose() -> str:
    """How a user names another task."""
    return f"--task {' | '.join(TASKS)} chooses another"


def shows_one_scene(env: EnvConfig) -> bool:
    """Whether all seeds start from the same scene."""
    low, high = env.block_radius_range
    moves = env.randomize_block and (high > low or env.block_angle_deg > 0 or env.block_yaw_deg > 0)
    return not moves and env.start_noise_deg == 0


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return math.isclose(one, other, rel_tol=1e-9) if isinstance(one, float) else one == other
