"""LeRobot's door to the simulated SO-101: the environment type `so101_reinflow` for lerobot-eval and lerobot-train.

LeRobot imports every installed distribution whose name begins with `lerobot_env_`, so nothing has to be named but the
type and the task:

    lerobot-eval --policy.path=DIR --env.type=so101_reinflow --env.task=lift --eval.n_episodes=50 --eval.batch_size=10

An episode of a seed starts from the scene that reinflow-eval shows for it. What differs is the noise that the policy
starts from: LeRobot draws it for a whole batch, ours by seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE

from so101_mujoco_utils import NUM_JOINTS
from so101_sim.tasks.registry import TASKS, named, task_env

AGENT_POS = "agent_pos"


@EnvConfig.register_subclass("so101_reinflow")
@dataclass
class SO101ReinFlowEnv(EnvConfig):
    """An SO-101 in MuJoCo. Raises ConfigError for an unknown task, or settings that contradict each other."""

    task: str | None = "lift"
    """Named task, such as lift or lift_wide (so101_sim/tasks/registry.py)."""
    fps: int = 50
    """Control steps a second; policies of 30 fps data take 30."""
    cameras: list[str] = field(default_factory=list)
    """Cameras to render; empty takes the task's. The policy's must be among them, or --rename_map says which is which.
    """
    image_size: int = 96
    """Pixels, height and width; 96 is what the embedded policies and reinflow-demos have."""
    joint_frame: str = "lerobot"
    """Units of joints and actions: lerobot (degrees, gripper percent) or so100_legacy."""
    start_noise_deg: float | None = None
    """Uniform perturbation of every starting joint, degrees to either side; None takes the task's."""
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    """Filled in from the fields above."""
    features_map: dict[str, str] = field(default_factory=dict)
    """Filled in: the environment's names -> the policy's."""

    def __post_init__(self) -> None:
        named(str(self.task))
        self.cameras = self.cameras or list(task_env(str(self.task)).cameras)
        image = PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3))
        self.features = {
            ACTION: PolicyFeature(FeatureType.ACTION, (NUM_JOINTS,)),
            AGENT_POS: PolicyFeature(FeatureType.STATE, (NUM_JOINTS,)),
            **{f"{OBS_IMAGES}.{camera}": image for camera in self.cameras},
        }
        self.features_map = {name: OBS_STATE if name == AGENT_POS else name for name in self.features}
        task_env(str(self.task), **self.settings)  # a contradiction is refused here, not in a worker

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of the environment that override the task's."""
        given = {"cameras": tuple(self.cameras), "image_size": self.image_size, "joint_frame": self.joint_frame}
        if self.start_noise_deg is not None:
            given["start_noise_deg"] = self.start_noise_deg
        return given | ({} if self.fps == 50 else {"control_hz": float(self.fps)})

    @property
    def package_name(self) -> str:
        """The namespace of the environments in gymnasium's registry."""
        return __name__

    @property
    def gym_kwargs(self) -> dict[str, Any]:
        """What gymnasium.make hands to `make`."""
        return {**self.settings, "render_mode": "rgb_array"}


def make(task: str, render_mode: str | None = None, **settings: Any) -> gymnasium.Env[dict[str, Any], Any]:
    """The environment of a named task.

    Args:
        task: its name.
        render_mode: None or "rgb_array".
        settings: fields of so101_sim.config.EnvConfig that override it.
    """
    from so101_gym_env import SO101PickEnv

    return SO101PickEnv(task_env(task, **settings), render_mode)


for _task in TASKS:
    gymnasium.register(f"{__name__}/{_task}", entry_point=f"{__name__}:make", kwargs={"task": _task})
