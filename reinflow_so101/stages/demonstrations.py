"""Demonstrations of the scripted expert as a LeRobotDataset v3.

The expert plans at every decision (control steps 0, 50, 100) from the state it finds, while a smooth disturbance is
added to what the servos are told. The dataset holds the undisturbed targets: what the expert wanted, from states that
the disturbance has led to. So recovery is in the data, as it must be for a policy that makes errors of its own.

Every episode is 150 control steps: after the lift the block is held up, so that the last chunk's actions are complete.

    reinflow-demos --output-dir runs/demos --episodes 300
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import ConfigError, UserError, run_command
from so101_mujoco_utils import JOINT_NAMES
from so101_sim.config import EnvConfig

if TYPE_CHECKING:  # MuJoCo and LeRobot are loaded when a recording starts
    from so101_gym_env import SO101PickEnv
    from so101_sim.expert import ScriptedExpert

DECISION_STEPS = 50


class DemoError(UserError, RuntimeError):
    """The recording cannot start or cannot succeed; the message holds the remedy."""


@dataclass(frozen=True)
class DemoConfig:
    """Record scripted-expert episodes as a LeRobotDataset v3."""

    output_dir: Path
    """Folder of the dataset; refused if it exists."""
    episodes: int = 300
    """Successful episodes to keep; failed ones are not stored."""
    first_seed: int = 1_000
    """Episode i tried uses environment seed first_seed + i; the default stays below the trainer's tuning seeds."""
    repo_id: str = "local/so101_pick"
    """Name in the dataset's metadata; nothing is uploaded."""
    cameras: tuple[str, ...] = ("camera_up", "wrist_camera")
    """Recorded cameras."""
    image_size: int = 96
    """Pixels, height and width."""
    video: bool = False
    """h264 video instead of images: smaller and faster for lerobot-train, but lossy, and the block is 3 pixels wide."""
    block_radius_range: tuple[float, float] = (0.19, 0.29)
    """Metres from the base axis: a centimetre beyond the task's, so that its edge is not the data's."""
    block_angle_deg: float = 33.0
    """To either side of straight ahead; the task's 30 and a margin."""
    block_yaw_deg: float = 26.0
    """Turn of the block to either side; the task's 23 and a margin."""
    start_noise_deg: float = 2.0
    """Uniform noise on every starting joint, to either side."""
    disturbance_deg: tuple[float, ...] = (4.0, 1.5, 1.0)
    """Largest smooth disturbance of an arm joint in each chunk; the second closes on the block and bears less."""
    starting_position: tuple[float, ...] = (0.06, -100.21, 89.95, 66.46, -84.04, 1.0)
    """MuJoCo degrees. The wrist is turned so that the jaws close across the block."""
    instruction: str = "pick up the block"
    """The task string of every frame."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ConfigError(f"episodes is {self.episodes}: use at least 1")
        if self.first_seed < 0:
            raise ConfigError(f"first_seed is {self.first_seed}: use at least 0")
        if len(self.disturbance_deg) != 3 or min(self.disturbance_deg) < 0:
            raise ConfigError(f"disturbance_deg is {self.disturbance_deg}: give three numbers of at least 0")


def make_env(config: DemoConfig, **overrides: Any) -> SO101PickEnv:
    """The task's environment with the recording's ranges; it never ends early, so that episodes are complete.

    `overrides`: further fields of EnvConfig, such as render_images=False.
    """
    from so101_gym_env import SO101PickEnv

    return SO101PickEnv(
        EnvConfig(
            cameras=config.cameras,
            image_size=config.image_size,
            randomize_block=True,
            block_radius_range=config.block_radius_range,
            block_angle_deg=config.block_angle_deg,
            block_yaw_deg=config.block_yaw_deg,
            starting_position=config.starting_position,
            start_noise_deg=config.start_noise_deg,
            instruction=config.instruction,
            lift_threshold=10.0,
        ),
        **overrides,
    )


def smooth_disturbance(rng: np.random.Generator, steps: int, largest_deg: float) -> NDArray[np.float64]:
    """(steps, 6) radians on the five arm joints: random half-waves that start at zero and need not end there."""
    fraction = np.arange(1, steps + 1) / steps
    waves = np.stack([np.sin(0.5 * math.pi * k * fraction) for k in (1, 2, 3)])  # (3, steps)
    weights = rng.normal(0.0, 1.0, (5, 3)) / np.array([1.0, 2.0, 3.0])
    motion = (weights @ waves).T  # (steps, 5)
    motion *= rng.uniform(0.0, largest_deg, 5) / np.abs(motion).max(axis=0)
    return np.deg2rad(np.concatenate([motion, np.zeros((steps, 1))], axis=1))


def block_yaw(quaternion: NDArray[np.float64]) -> float:
    """Rotation about z of a wxyz quaternion (4,), radians."""
    w, x, y, z = quaternion
    return math.atan2(2.0 * (w * z + x * y), 1.0 - 2.0 * (y * y + z * z))


def record_episode(
    env: SO101PickEnv, expert: ScriptedExpert, seed: int, disturbance_deg: tuple[float, ...]
) -> tuple[list[dict[str, Any]], bool]:
    """One episode: frames (agent_pos, pixels, action in the policy's units), and whether the block is up at its end."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    frames: list[dict[str, Any]] = []
    for chunk, largest_deg in enumerate(disturbance_deg):
        state = env.scene.layout.scene_state(env.row)
        plan = expert.plan(
            state.joint_pos_rad, state.block_pos, block_yaw(state.block_quat), start_step=chunk * DECISION_STEPS
        )[:DECISION_STEPS]
        told = plan + smooth_disturbance(rng, DECISION_STEPS, largest_deg)
        for wanted, target in zip(plan, told, strict=True):
            frames.append({**observation, "action": env.scene.frame.from_rad(wanted)})
            observation, *_ = env.step(env.scene.frame.from_rad(target))
    return frames, env.scene.block_height(env.row) > EnvConfig().lift_threshold


def dataset_features(config: DemoConfig) -> dict[str, dict[str, Any]]:
    """LeRobot's description of the frames."""
    names = [f"{name}.pos" for name in JOINT_NAMES]
    joints = {"dtype": "float32", "shape": (len(names),), "names": names}
    shape = (config.image_size, config.image_size, 3)
    image = {"dtype": "video" if config.video else "image", "shape": shape, "names": ["height", "width", "channels"]}
    cameras = {f"observation.images.{camera}": dict(image) for camera in config.cameras}
    return {"observation.state": dict(joints), "action": dict(joints), **cameras}


def record(config: DemoConfig) -> tuple[int, int]:
    """Record the dataset. Returns episodes kept and episodes tried.

    Raises:
        DemoError: the root exists, or fewer than one in four episodes succeeds.
    """
    quiet_lerobot()
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from rich.progress import Progress, TextColumn, TimeRemainingColumn

    from so101_sim.expert import ScriptedExpert

    if config.output_dir.exists():
        raise DemoError(f"{config.output_dir} exists: choose another --output-dir or remove it first")
    env = make_env(config)
    expert = ScriptedExpert(env.model)
    dataset = LeRobotDataset.create(
        repo_id=config.repo_id,
        fps=env.metadata["render_fps"],
        features=dataset_features(config),
        root=config.output_dir,
        robot_type="so101_follower",
        use_videos=config.video,
        image_writer_threads=0 if config.video else 2,
        rgb_encoder=RGBEncoderConfig(vcodec="h264") if config.video else None,
    )
    kept = tried = 0
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))
    try:
        with Progress(*columns) as progress:
            bar = progress.add_task("recording", total=config.episodes, rate="")
            while kept < config.episodes:
                seed = config.first_seed + tried
                frames, success = record_episode(env, expert, seed, config.disturbance_deg)
                tried += 1
                if success:
                    store(dataset, frames, config)
                    kept += 1
                progress.update(bar, completed=kept, rate=f"{kept} of {tried} lifted")
                if tried >= 20 and kept < tried / 4:
                    raise DemoError(
                        f"only {kept} of {tried} episodes lifted: lower disturbance_deg or the block's ranges"
                    )
    finally:
        dataset.finalize()
        env.close()
    print(f"wrote {config.output_dir}: {kept} episodes of {tried} tried, {150 * kept} frames")
    return kept, tried


def quiet_lerobot() -> None:
    """Call before importing LeRobot's datasets: no page of traceback because FFmpeg is not installed system-wide (PyAV
    is used then), no progress bar per episode."""
    import datasets

    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def store(dataset: Any, frames: list[dict[str, Any]], config: DemoConfig) -> None:
    """Add one episode to the dataset."""
    for frame in frames:
        images = {f"observation.images.{camera}": frame["pixels"][camera] for camera in config.cameras}
        dataset.add_frame(
            {
                "observation.state": frame["agent_pos"].astype(np.float32),
                "action": frame["action"].astype(np.float32),
                **images,
                "task": config.instruction,
            }
        )
    dataset.save_episode()


def main() -> None:
    """reinflow-demos."""
    import tyro

    config = tyro.cli(DemoConfig, description=DemoConfig.__doc__)
    run_command("reinflow-demos", lambda: record(config))
