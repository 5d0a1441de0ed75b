"""A simulated SO-101 follower as a LeRobot robot, so that lerobot-rollout runs without hardware.

Observations and actions are those of LeRobot's own follower: joints by name in degrees and percent, images by camera.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

from so101_gym_env import SO101PickEnv
from so101_mujoco_utils import JOINT_NAMES
from so101_sim.tasks.registry import task_env


@RobotConfig.register_subclass("so101_simulated")
@dataclass(kw_only=True)
class SimulatedSO101Config(RobotConfig):
    """A simulated follower."""

    task: str = "lift"
    seed: int = 10_000
    image_size: int = 96
    camera_names: list[str] = field(default_factory=lambda: ["camera_up", "wrist_camera"])
    report: str = ""
    """A JSON file that gets the number of actions, the success and the block's largest height."""


class SimulatedSO101(Robot):
    """The arm of one episode; after its end it stands still."""

    config_class = SimulatedSO101Config
    name = "so101_simulated"

    def __init__(self, config: SimulatedSO101Config) -> None:
        super().__init__(config)
        self.config = config
        cameras = tuple(config.camera_names)
        self.env = SO101PickEnv(task_env(config.task, cameras=cameras, image_size=config.image_size))
        self.observation: dict[str, Any] | None = None
        self.record = {"actions": 0, "success": False, "height": 0.0}

    @property
    def observation_features(self) -> dict[str, Any]:
        size = self.config.image_size
        return {**self.action_features, **{name: (size, size, 3) for name in self.config.camera_names}}

    @property
    def action_features(self) -> dict[str, type]:
        return {f"{name}.pos": float for name in JOINT_NAMES}

    @property
    def is_connected(self) -> bool:
        return self.observation is not None

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self.observation, _ = self.env.reset(seed=self.config.seed)

    def calibrate(self) -> None:
        """Nothing to calibrate."""

    def configure(self) -> None:
        """Nothing to configure."""

    def get_observation(self) -> dict[str, Any]:
        joints = {f"{name}.pos": float(x) for name, x in zip(JOINT_NAMES, self.observation["agent_pos"], strict=True)}
        return joints | {name: np.asarray(image) for name, image in self.observation["pixels"].items()}

    def send_action(self, action: dict[str, Any]) -> dict[str, Any]:
        if not (self.record["success"] or self.record["actions"] >= self.env.config.max_steps_per_episode):
            target = np.array([float(action[f"{name}.pos"]) for name in JOINT_NAMES])
            self.observation, _, terminated, _, info = self.env.step(target)
            self.record["actions"] += 1
            self.record["success"] = terminated
            self.record["height"] = max(self.record["height"], info["block_height_m"])
        return action

    def disconnect(self) -> None:
        self.observation = None
        self.env.close()
        if self.config.report:
            Path(self.config.report).write_text(json.dumps(self.record), encoding="utf-8")
