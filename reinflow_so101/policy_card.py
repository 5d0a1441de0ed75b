"""reinflow.json beside a policy: the environment that it was made for. LeRobot ignores the file."""

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
from so101_mujoco_utils import CAMERA_NAMES
from so101_sim.config import EnvConfig

CARD_FILE = "reinflow.json"
TASK_GROUP = "so101_pick"  # what eval_info.json calls the task


def policy_card(env: EnvConfig) -> dict[str, str]:
    """File name -> content. Paths stay out of it: a policy travels."""
    content = {"env": {name: value for name, value in dataclasses.asdict(env).items() if name != "model_path"}}
    return {CARD_FILE: json.dumps(content, indent=2) + "\n"}


def write_card(directory: Path, env: EnvConfig) -> None:
    """Put the card beside a policy."""
    for name, content in policy_card(env).items():
        (directory / name).write_text(content, encoding="utf-8")


def stored_env(policy_dir: Path) -> EnvConfig:
    """The policy's own environment, or the default one with the policy's cameras and image size."""
    path = policy_dir / CARD_FILE
    check_sums(policy_dir, "take another export (after a change on purpose remove checksums.json)")
    stored = read_json(path).get("env") if path.exists() else None
    if isinstance(stored, dict) and stored:
        hints = get_type_hints(EnvConfig)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in hints}
        for name, value in values.items():
            if not is_of(value, hints[name]):
                raise ConfigError(
                    f"{path}: {name} is {value!r}, which is no {type_name(hints[name])}: mend or remove it"
                )
        return EnvConfig(**values)
    if read_json(policy_dir / CONFIG_FILE).get("type") == "flow_mlp":
        return EnvConfig(render_images=False, environment_state=True)
    features, (cameras, _) = features_of(policy_dir), known_cameras(policy_dir)
    if not cameras:
        return EnvConfig(render_images=False, environment_state=True)
    size = int(features[OBS_IMAGES_PREFIX + cameras[0]].get("shape", [3, 256, 256])[1])
    return EnvConfig(cameras=tuple(cameras) if set(cameras) <= set(CAMERA_NAMES) else CAMERA_NAMES, image_size=size)
