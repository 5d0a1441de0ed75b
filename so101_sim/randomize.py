"""What the start of an episode draws; the order of the draws is part of what a seed means."""

from __future__ import annotations

import math

import numpy as np

from so101_mujoco_utils import NUM_JOINTS, Array
from so101_sim.config import EnvConfig


def draw_block(config: EnvConfig, rng: np.random.Generator) -> tuple[tuple[float, float, float], float]:
    """The block's centre in metres and its yaw in radians; nothing is drawn without randomize_block."""
    if not config.randomize_block:
        return config.block_pos, 0.0
    radius = rng.uniform(*config.block_radius_range)
    angle = math.radians(rng.uniform(-config.block_angle_deg, config.block_angle_deg))
    yaw = math.radians(rng.uniform(-config.block_yaw_deg, config.block_yaw_deg))
    return (radius * math.sin(angle), radius * math.cos(angle), config.block_pos[2]), yaw


def draw_start_deg(config: EnvConfig, rng: np.random.Generator) -> Array:
    """Joint angles (6,) in MuJoCo degrees, not yet clipped to the limits."""
    start_deg = np.array(config.starting_position)
    if config.start_noise_deg > 0.0:
        start_deg = start_deg + rng.uniform(-1.0, 1.0, NUM_JOINTS) * config.start_noise_deg
    return start_deg
