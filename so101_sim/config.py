"""The task's settings. Free of mujoco, so that a wrong one is refused in half a second."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from reinflow import ConfigError
from so101_mujoco_utils import CAMERA_NAMES, FRAMES, NUM_JOINTS, REWARD_TERMS, RewardConfig

REACH_M = 1.0  # more than the arm's, less than a slip of the keyboard
BLOCK_YAW_DEG = 0.4 * 180 / math.pi


@dataclass(frozen=True)
class EnvConfig:
    """Everything that defines the task. Raises ConfigError, naming the field and the remedy, when it is built wrong."""

    model_path: str | None = None
    """MJCF file; None is the shipped scene."""
    cameras: tuple[str, ...] = CAMERA_NAMES
    """Cameras to render."""
    image_size: int = 256
    """Pixels, height and width of every image."""
    render_images: bool = True
    """Off: observations have no pixels, for state-based policies."""
    environment_state: bool = False
    """On: observations carry the privileged simulator state as well."""
    steps_per_action: int = 10
    """Physics substeps per control step: 10 of the shipped scene's 2 ms are 50 Hz."""
    control_hz: float = 0.0
    """Control steps per second; the substeps follow. 0: what steps_per_action gives, which must be 50."""
    max_steps_per_episode: int = 150
    """Time limit in control steps: 150 is 3 s, three chunks of 50."""
    lift_threshold: float = RewardConfig.lift_threshold
    """Height in metres above the floor that counts as lifted."""
    instruction: str = "pick up the block"
    """What the policy is told to do."""
    block_pos: tuple[float, float, float] = (0.0, 0.3, RewardConfig.block_rest_height)
    """Metres; where the block starts unless randomize_block, and its height in any case."""
    randomize_block: bool = False
    """Draw the block's place and turn for every episode."""
    block_radius_range: tuple[float, float] = (0.20, 0.28)
    """Distance of a random block from the robot's base axis, metres."""
    block_angle_deg: float = 30.0
    """A random block lies up to so many degrees to either side of straight ahead."""
    block_yaw_deg: float = BLOCK_YAW_DEG
    """A random block is turned by up to so many degrees to either side."""
    starting_position: tuple[float, ...] = (0.06, -100.21, 89.95, 66.46, 5.96, 1.0)
    """Joint angles at the start, MuJoCo degrees for all six joints, the gripper too; clipped to the joint limits."""
    start_noise_deg: float = 0.0
    """Uniform perturbation of every starting joint, degrees to either side."""
    reward_mode: Literal["seed", "staged", "sparse"] = "seed"
    """The mode "seed" is the documented formula, "staged" cannot be farmed by staying, "sparse" pays success alone."""
    contact_bonus: float = RewardConfig.contact_bonus
    """Reward for a jaw that touches the block; formulas in so101_mujoco_utils.compute_reward."""
    height_alignment_bonus: float = RewardConfig.height_alignment_bonus
    """Reward for the tool above the block."""
    reach_scale: float = RewardConfig.reach_scale
    """Staged reward for coming near the block."""
    reach_length: float = RewardConfig.reach_length
    """Metres at which half of reach_scale is earned."""
    grasp_scale: float = RewardConfig.grasp_scale
    """Staged reward for a grasp by both jaws."""
    lift_scale: float = RewardConfig.lift_scale
    """Staged reward for the height gained."""
    success_bonus: float = RewardConfig.success_bonus
    """Reward of the step that lifts the block above lift_threshold, staged and sparse."""
    joint_frame: Literal["lerobot", "so100_legacy"] = "lerobot"
    """Units of actions and agent_pos: a key of so101_mujoco_utils.FRAMES."""

    def __post_init__(self) -> None:
        _check_choice("joint_frame", self.joint_frame, FRAMES)
        _check_choice("reward_mode", self.reward_mode, REWARD_TERMS)
        for name, most in (("image_size", 4_096), ("steps_per_action", 1_000), ("max_steps_per_episode", 100_000)):
            _require(
                1 <= getattr(self, name) <= most, name, getattr(self, name), f"use a whole number from 1 to {most:,}"
            )
        rate = self.control_hz == 0.0 or 1.0 <= self.control_hz <= 1_000.0
        _require(rate, "control_hz", self.control_hz, "use 1 to 1,000 control steps a second, or 0 for 50")
        for name, size in (("block_pos", 3), ("block_radius_range", 2), ("starting_position", NUM_JOINTS)):
            value = getattr(self, name)
            numbers = len(value) == size and all(math.isfinite(number) for number in value)
            _require(numbers, name, value, f"give {size} finite numbers")
        for name in ("block_angle_deg", "block_yaw_deg", "start_noise_deg"):
            _require(0.0 <= getattr(self, name) <= 180.0, name, getattr(self, name), "use 0 to 180 degrees")
        bonuses = ("contact_bonus", "height_alignment_bonus")
        for name in (*bonuses, "reach_scale", "grasp_scale", "lift_scale", "success_bonus"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0.0, name, value, "use a finite number of at least 0")
        _require(self.reach_length > 0.0, "reach_length", self.reach_length, "use a distance above 0, such as 0.05 m")
        low, high = self.block_radius_range
        _require(high <= REACH_M, "block_radius_range", (low, high), f"the arm reaches less than {REACH_M} m")
        x, y, z = self.block_pos
        _require(max(abs(x), abs(y)) <= REACH_M, "block_pos", self.block_pos, f"the arm reaches less than {REACH_M} m")
        _require(0.0 <= z <= REACH_M, "block_pos", self.block_pos, "the floor is at height 0, the arm below 1 m")
        _require(0.0 < low <= high, "block_radius_range", (low, high), "order it as (nearest, farthest), above 0 m")
        above = self.block_pos[2] < self.lift_threshold
        _require(above, "lift_threshold", self.lift_threshold, f"use more than the block's start {self.block_pos[2]} m")
        _require(bool(self.instruction.strip()), "instruction", self.instruction, "say what to do")
        _require(len(set(self.cameras)) == len(self.cameras), "cameras", self.cameras, "name each camera once")
        seen = bool(self.cameras) or not self.render_images
        _require(seen, "cameras", self.cameras, "name at least one camera, or set render_images=False")

    @property
    def reward(self) -> RewardConfig:
        """The fields that `compute_reward` reads."""
        return RewardConfig(
            mode=self.reward_mode,
            contact_bonus=self.contact_bonus,
            height_alignment_bonus=self.height_alignment_bonus,
            lift_threshold=self.lift_threshold,
            block_rest_height=self.block_pos[2],
            reach_scale=self.reach_scale,
            reach_length=self.reach_length,
            grasp_scale=self.grasp_scale,
            lift_scale=self.lift_scale,
            success_bonus=self.success_bonus,
        )


def _require(condition: bool, name: str, value: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(f"EnvConfig.{name} is {value!r}: {remedy}")


def _check_choice(name: str, value: str, choices: Mapping[str, object]) -> None:
    _require(value in choices, name, value, f"choose one of {', '.join(repr(choice) for choice in choices)}")
