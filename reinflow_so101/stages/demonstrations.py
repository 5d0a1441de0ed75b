"""Demonstrations of the scripted expert as a LeRobotDataset v3.

The expert plans at every decision (control steps 0, 50, 100) from the state it finds, while a smooth disturbance is
added to what the servos are told. The dataset holds the undisturbed targets: what the expert wanted, from states that
the disturbance has led to. So recovery is in the data, as it must be for a policy that makes errors of its own.

Every episode is 150 control steps: after the lift the block is held up, so that the last chunk's actions are complete.

    reinflow-demos --output-dir runs/demos --episodes 300

For offline RL, `--noisy-share` lets a clumsy expert play a part of the episodes, and `--rewards` keeps what fails and
adds the task's own reward and end. Its mark stays set after the lift, where the task would have ended: what a chunk
still holds from there on was told but is worth nothing (reinflow_so101/stages/state_data.py).

    reinflow-demos --output-dir runs/half --episodes 200 --noisy-share .5 --rewards --environment-state --no-images
"""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from reinflow import ConfigError, UserError, run_command
from reinflow.progress import progress_bar
from reinflow.settings import FRACTION, POSITIVE, SEED, Range, check_ranges
from reinflow_so101.policy_card import write_card
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, JOINT_NAMES, compute_reward, is_success
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import RANGES, demonstration_env, describe, named, task_env

if TYPE_CHECKING:  # MuJoCo and LeRobot are loaded when a recording starts
    from so101_gym_env import SO101PickEnv
    from so101_sim.expert import ScriptedExpert

DECISION_STEPS = 50
# A block of three pixels: full resolution of colour and little loss, where LeRobot's default halves one (yuv420p) and
# compresses as for people to watch (crf 30).
FINE_VIDEO: dict[str, Any] = {"vcodec": "h264", "pix_fmt": "yuv444p", "crf": 10, "g": 2}


class DemoError(UserError, RuntimeError):
    """The recording cannot start or cannot succeed; the message holds the remedy."""


@dataclass(frozen=True)
class DemoConfig:
    """Record scripted-expert episodes as a LeRobotDataset v3."""

    output_dir: Path
    """Folder of the dataset; refused if it exists."""
    task: str = "lift"
    """Named task to record, such as lift or lift_wide (so101_sim/tasks/registry.py); the fields below override it."""
    episodes: Annotated[int, POSITIVE] = 300
    """Successful episodes to keep; failed ones are not stored."""
    first_seed: Annotated[int, SEED] = 1_000
    """Episode i tried uses environment seed first_seed + i; the default stays below the trainer's tuning seeds."""
    repo_id: str = "local/so101_pick"
    """Name in the dataset's metadata; nothing is uploaded."""
    cameras: tuple[str, ...] = ()
    """Recorded cameras; empty takes the task's."""
    image_size: Annotated[int, Range(8, 4_096)] = 96
    """Pixels, height and width."""
    video: bool = False
    """h264 video instead of images, for lerobot-train, which decodes all images of a chunk to get at its actions where
    they are images. Nearly lossless, since the block is 3 pixels wide."""
    block_radius_range: tuple[float, float] | None = None
    """Metres from the base axis; None takes the task's, for lift a centimetre beyond, so that its edge is not the
    data's."""
    block_angle_deg: float | None = None
    """To either side of straight ahead; None takes the task's, for lift 3 degrees beyond."""
    block_yaw_deg: float | None = None
    """Turn of the block to either side; None takes the task's, for lift 3 degrees beyond."""
    start_noise_deg: Annotated[float, Range(0, 180)] = 2.0
    """Uniform noise on every starting joint, to either side."""
    disturbance_deg: tuple[float, ...] = (4.0, 1.5, 1.0)
    """Largest smooth disturbance of an arm joint in each chunk; the second closes on the block and bears less."""
    starting_position: tuple[float, ...] | None = None
    """MuJoCo degrees; None takes the task's."""
    noisy_share: Annotated[float, FRACTION] = 0.0
    """Share of the episodes that a noisy expert plays, evenly among the others. Their data holds what the servos were
    really told, noise and all, so that imitating them is a mistake."""
    noisy_disturbance_deg: tuple[float, ...] = (24.0, 12.0, 6.0)
    """Largest disturbance in those episodes, as disturbance_deg in the others."""
    rewards: bool = False
    """Keep failed episodes too, and store the task's reward and end: next.reward, next.done, next.truncated."""
    environment_state: bool = False
    """Store the simulator's state too (observation.environment_state), which state-based policies see."""
    images: bool = True
    """Off (--no-images): nothing is rendered, and the data set has no cameras."""
    instruction: str = ""
    """The task string of every frame; empty takes the task's."""

    def __post_init__(self) -> None:
        moves = demonstration_env(self.task).randomize_block  # an unknown task is refused here
        unread = [name for name in RANGES if getattr(self, name) is not None]
        if unread and not moves:
            raise ConfigError(f"{', '.join(unread)} not read by task={self.task}, where the block lies still: drop it")
        check_ranges(self)
        for name in ("disturbance_deg", "noisy_disturbance_deg"):
            if len(given := getattr(self, name)) != 3 or not all(0 <= degrees <= 180 for degrees in given):
                raise ConfigError(f"{name} is {given}: give three numbers from 0 to 180")
        if not self.images and (self.video or self.cameras):
            raise ConfigError("video and cameras need images: leave --no-images out, or leave them out")
        self.env()  # ranges that contradict each other

    def env(self) -> EnvConfig:
        """The environment that is recorded; it never ends early, so that episodes are complete."""
        names = ("cameras", "block_radius_range", "block_angle_deg", "block_yaw_deg", "starting_position")
        given: dict[str, Any] = {name: getattr(self, name) for name in (*names, "instruction")}
        given = {name: value for name, value in given.items() if value is not None and value not in ((), "")}
        changes: dict[str, Any] = {
            "image_size": self.image_size,
            "start_noise_deg": self.start_noise_deg,
            "lift_threshold": 10.0,
            "environment_state": self.environment_state,
            "render_images": self.images,
        }
        return replace(demonstration_env(self.task), **changes, **given)

    def task_env(self) -> EnvConfig:
        """The environment that the recording is for, whose name travels with the data: the task's own ranges, or those
        that were given."""
        ours, task = self.env(), task_env(self.task)
        margins = named(self.task).demonstrations
        kept: dict[str, Any] = {name: getattr(task, name) for name in margins if getattr(self, name) is None}
        noise, height = task.start_noise_deg, task.lift_threshold
        return replace(ours, **kept, start_noise_deg=noise, lift_threshold=height)

    def is_noisy(self, number: int) -> bool:
        """Whether the noisy expert plays the episode that is tried as number 0, 1, ..."""
        return int((number + 1) * self.noisy_share) > int(number * self.noisy_share)


def make_env(config: DemoConfig, **overrides: Any) -> SO101PickEnv:
    """The recorded environment. `overrides`: further fields of EnvConfig, such as render_images=False."""
    from so101_gym_env import SO101PickEnv

    return SO101PickEnv(config.env(), **overrides)


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
    env: SO101PickEnv, expert: ScriptedExpert, seed: int, disturbance_deg: tuple[float, ...], noisy: bool = False
) -> tuple[list[dict[str, Any]], bool]:
    """One episode: frames (agent_pos, pixels, action in the policy's units), and whether the block is up at its end.

    The action is what the expert wanted, or with ``noisy`` what the servos were told. Every frame also has "rows", the
    simulator's rows before and after its control step, for `reward_columns`.
    """
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    frames: list[dict[str, Any]] = []
    for chunk, largest_deg in enumerate(disturbance_deg):
        state = env.scene.layout.scene_state(env.row)
        plan = expert.plan(
            state.joint_pos_rad, state.block_pos, block_yaw(state.block_quat), start_step=chunk * DECISION_STEPS
        )[:DECISION_STEPS]
        told = plan + smooth_disturbance(rng, DECISION_STEPS, largest_deg)
        for wanted, target in zip(told if noisy else plan, told, strict=True):
            before = env.row
            frame = {**observation, "action": env.scene.frame.from_rad(wanted)}
            observation, *_ = env.step(env.scene.frame.from_rad(target))
            frames.append({**frame, "rows": (before, env.row)})
    return frames, env.scene.block_height(env.row) > EnvConfig().lift_threshold


def reward_columns(env: SO101PickEnv, task: EnvConfig, frames: list[dict[str, Any]]) -> dict[str, NDArray[Any]]:
    """`next.reward`, `next.done` and `next.truncated` (L,) of an episode as the task itself would have paid and ended
    it: nothing is paid after its end, which stays marked."""
    before, after = (
        env.scene.layout.scene_state(np.stack(rows)) for rows in zip(*(f["rows"] for f in frames), strict=True)
    )
    lifted = is_success(after, task.lift_threshold)
    terminated, last = bool(lifted.any()), len(frames) - 1
    step, end = np.arange(len(frames)), int(lifted.argmax()) if terminated else last
    rewards = sum(compute_reward(before, after, task.reward).values())
    return {
        "next.reward": np.where(step <= end, rewards, 0.0).astype(np.float32),
        "next.done": terminated & (step >= end),
        "next.truncated": (not terminated) & (step == last),
    }


def dataset_features(config: DemoConfig) -> dict[str, dict[str, Any]]:
    """LeRobot's description of the frames."""
    names = [f"{name}.pos" for name in JOINT_NAMES]
    joints = {"dtype": "float32", "shape": (len(names),), "names": names}
    shape = (config.image_size, config.image_size, 3)
    image = {"dtype": "video" if config.video else "image", "shape": shape, "names": ["height", "width", "channels"]}
    cameras = {f"observation.images.{camera}": dict(image) for camera in config.env().cameras if config.images}
    names = list(ENVIRONMENT_STATE_NAMES)
    state = {"observation.environment_state": {"dtype": "float32", "shape": (len(names),), "names": names}}
    numbers = {"next.reward": "float32", "next.done": "bool", "next.truncated": "bool"}
    rewards = {name: {"dtype": kind, "shape": (1,), "names": None} for name, kind in numbers.items()}
    more = (state if config.environment_state else {}) | (rewards if config.rewards else {})
    return {"observation.state": dict(joints), "action": dict(joints), **cameras, **more}


def record(config: DemoConfig) -> tuple[int, int]:
    """Record the dataset. Returns episodes kept and episodes tried.

    Raises:
        DemoError: the root exists, or fewer than one in four episodes of the expert without noise succeeds.
    """
    quiet_lerobot()
    from so101_sim.expert import ScriptedExpert

    if config.output_dir.exists():
        raise DemoError(f"{config.output_dir} exists: choose another --output-dir or remove it first")
    print(f"recording {describe(config.task_env())}")
    env = make_env(config)
    expert = ScriptedExpert(env.model)
    dataset = create(config, env.metadata["render_fps"])
    kept = tried = lifted = calm = calm_lifted = 0
    try:
        with progress_bar("recording, episodes", config.episodes) as advance:
            while kept < config.episodes:
                noisy = config.is_noisy(tried)
                disturbance = config.noisy_disturbance_deg if noisy else config.disturbance_deg
                frames, success = record_episode(env, expert, config.first_seed + tried, disturbance, noisy)
                tried += 1
                lifted, calm, calm_lifted = lifted + success, calm + (not noisy), calm_lifted + (success and not noisy)
                if keep := success or config.rewards:
                    rewards = reward_columns(env, config.task_env(), frames) if config.rewards else {}
                    store(dataset, frames, env.task, rewards)
                    kept += 1
                advance(int(keep), f"{lifted} of {tried} lifted")
                if calm >= 20 and calm_lifted < calm / 4:
                    raise DemoError(
                        f"only {calm_lifted} of {calm} episodes lifted: lower disturbance_deg or the block's ranges"
                    )
    finally:
        dataset.finalize()
        env.close()
        if kept == 0:  # nothing is lost with it
            shutil.rmtree(config.output_dir)
    write_card(config.output_dir / "meta", config.task_env())
    clumsy = f", {lifted} lifted, {tried - calm} by the noisy expert" if config.noisy_share or config.rewards else ""
    print(f"wrote {config.output_dir}: {kept} episodes of {tried} tried{clumsy}, {150 * kept} frames")
    return kept, tried


def create(config: DemoConfig, fps: int) -> Any:
    """An empty LeRobotDataset to record into."""
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset.create(
        repo_id=config.repo_id,
        fps=fps,
        features=dataset_features(config),
        root=config.output_dir,
        robot_type="so101_follower",
        use_videos=config.video,
        image_writer_threads=2 if config.images and not config.video else 0,
        rgb_encoder=RGBEncoderConfig(**FINE_VIDEO) if config.video else None,
    )


def quiet_lerobot() -> None:
    """Call before importing LeRobot's datasets: no page of traceback because FFmpeg is not installed system-wide (PyAV
    is used then), no progress bar per episode, no lines of the video encoder's."""
    import av
    import datasets

    av.logging.set_libav_level(av.logging.ERROR)  # of the library itself: LeRobot goes back to its own handler
    logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def store(dataset: Any, frames: list[dict[str, Any]], instruction: str, rewards: dict[str, NDArray[Any]]) -> None:
    """Add one episode to the dataset; ``rewards``: further columns (L,), or none."""
    for number, frame in enumerate(frames):
        images = {f"observation.images.{camera}": image for camera, image in frame.get("pixels", {}).items()}
        state = {"observation.environment_state": frame["environment_state"]} if "environment_state" in frame else {}
        dataset.add_frame(
            {
                "observation.state": frame["agent_pos"].astype(np.float32),
                "action": frame["action"].astype(np.float32),
                **images,
                **state,
                **{name: column[number : number + 1] for name, column in rewards.items()},
                "task": instruction,
            }
        )
    dataset.save_episode()


def main() -> None:
    """reinflow-demos."""
    import tyro

    config = tyro.cli(DemoConfig, description=DemoConfig.__doc__)
    run_command("reinflow-demos", lambda: record(config))
