"""reinflow.json beside a policy or in the metadata of a data set: the task and environment it was made for. LeRobot
ignores the file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_type_hints

from reinflow import ConfigError
from reinflow.checksums import check_sums
from reinflow.settings import is_of, type_name
from reinflow_vla.adaptation import features_of, known_cameras
from reinflow_vla.directory import CONFIG_FILE, OBS_IMAGES_PREFIX, read_json
from so101_mujoco_utils import CAMERA_NAMES, FRAMES
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import DEFAULT_TASK, TASKS, nearest_task, task_env

CARD_FILE = "reinflow.json"
TASK_GROUP = "so101_pick"  # what eval_info.json calls the task
TRAIN_CONFIG_FILE = "train_config.json"  # of lerobot-train, beside its policies
PLUGIN_ENV = "so101_reinflow"  # our environment's type in LeRobot


def policy_card(env: EnvConfig) -> dict[str, str]:
    """File name -> content. Paths stay out of it: a policy travels."""
    fields = {name: value for name, value in dataclasses.asdict(env).items() if name != "model_path"}
    content = {"env": {"task": nearest_task(env), **fields}}  # the name is for people: the fields are what is played
    return {CARD_FILE: json.dumps(content, indent=2) + "\n"}


def write_card(directory: Path, env: EnvConfig) -> None:
    """Put the card beside a policy, or into the metadata of a data set."""
    for name, content in policy_card(env).items():
        (directory / name).write_text(content, encoding="utf-8")


def known_env(policy_dir: Path) -> tuple[EnvConfig, Path] | None:
    """The environment that a policy was made for, and the file that says so: reinflow.json beside it, or in the data
    set that lerobot-train names, or the environment that it evaluated in. None where nothing says so."""
    own = policy_dir / CARD_FILE
    if own.is_file():
        return card_env(own), own
    root, training = data_root(policy_dir), policy_dir / TRAIN_CONFIG_FILE
    card = root / "meta" / CARD_FILE if root else None
    if card and card.is_file():
        return as_seen_by(policy_dir, card_env(card)), card
    played = read_json(training).get("env") if training.is_file() else None
    env = _played_env(played) if isinstance(played, dict) else None
    return (as_seen_by(policy_dir, env), training) if env else None


def data_root(policy_dir: Path) -> Path | None:
    """The folder of the data set that lerobot-train trained a policy on, where that is on this machine."""
    training = policy_dir / TRAIN_CONFIG_FILE
    data = read_json(training).get("dataset") if training.is_file() else None
    root = data.get("root") if isinstance(data, dict) else None
    return Path(root) if isinstance(root, str) and Path(root).is_dir() else None


def _played_env(settings: dict[str, Any]) -> EnvConfig | None:
    """The environment that lerobot-train evaluated in, if it is ours and what is written of it makes sense."""
    task, rate, frame = settings.get("task"), settings.get("fps"), settings.get("joint_frame")
    noise = settings.get("start_noise_deg")
    if settings.get("type") != PLUGIN_ENV or not isinstance(task, str) or task not in TASKS:
        return None
    env = task_env(task)
    if frame in FRAMES:
        env = dataclasses.replace(env, joint_frame=frame)
    if isinstance(rate, int | float) and 1 <= rate <= 1_000 and rate != 50:
        env = dataclasses.replace(env, control_hz=float(rate))
    if isinstance(noise, int | float) and 0 <= noise <= 180:
        env = dataclasses.replace(env, start_noise_deg=float(noise))
    return env


def stored_env(policy_dir: Path) -> EnvConfig:
    """The policy's own environment, or the default one with the policy's cameras and image size."""
    check_sums(policy_dir, "take another export (after a change on purpose remove checksums.json)")
    known = known_env(policy_dir)
    return known[0] if known else as_seen_by(policy_dir, task_env(DEFAULT_TASK))


def env_of_task(policy_dir: Path, task: str) -> EnvConfig:
    """A named task as a policy sees it: through its own cameras, in its own units and at its own rate."""
    check_sums(policy_dir, "take another export (after a change on purpose remove checksums.json)")
    known = known_env(policy_dir)
    env = as_seen_by(policy_dir, task_env(task))
    if not known:
        return env
    own = known[0]
    rate, substeps = own.control_hz, own.steps_per_action
    return dataclasses.replace(env, joint_frame=own.joint_frame, control_hz=rate, steps_per_action=substeps)


def card_env(path: Path) -> EnvConfig:
    """The environment in a reinflow.json; raises ConfigError where it holds none, or what is no value of it."""
    stored = read_json(path).get("env")
    if isinstance(stored, dict) and "env_id" in stored:
        raise ConfigError(f"{path} is of the Gymnasium environment {stored['env_id']}: this needs a policy of the arm")
    if not isinstance(stored, dict) or not stored:
        raise ConfigError(
            f"{path} holds no environment (env is {stored!r}): restore the file, or remove it and say --task"
        )
    hints = get_type_hints(EnvConfig)
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in hints}
    for name, value in values.items():
        if not is_of(value, hints[name]):
            raise ConfigError(f"{path}: {name} is {value!r}, which is no {type_name(hints[name])}: mend or remove it")
    return EnvConfig(**values)


def as_seen_by(policy_dir: Path, env: EnvConfig) -> EnvConfig:
    """An environment with a policy's own cameras and image size, without images for one that has no eyes."""
    blind = read_json(policy_dir / CONFIG_FILE).get("type") == "flow_mlp"
    cameras = [] if blind else known_cameras(policy_dir)[0]
    if not cameras:
        return dataclasses.replace(env, render_images=False, environment_state=True)
    size = int(features_of(policy_dir)[OBS_IMAGES_PREFIX + cameras[0]].get("shape", [3, 256, 256])[1])
    seen = tuple(cameras) if set(cameras) <= set(CAMERA_NAMES) else CAMERA_NAMES
    return dataclasses.replace(env, cameras=seen, image_size=size)
