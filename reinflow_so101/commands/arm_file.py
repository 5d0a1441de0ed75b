"""A robot's config as lerobot-rollout takes it, from a file: every field that a policy is compared with, checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinflow import ConfigError
from so101_mujoco_utils import JOINT_NAMES

ARMS = ("so101_follower", "so100_follower")
FIELDS = (
    "type", "id", "port", "calibration_dir", "cameras", "use_degrees", "max_relative_target",
    "disable_torque_on_disconnect", "position_p_coefficient", "position_i_coefficient", "position_d_coefficient",
    "num_read_retries",
)  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """One camera of the arm."""

    width: float
    height: float
    fps: float


@dataclass(frozen=True)
class Arm:
    """What of a robot's config matters to a policy."""

    use_degrees: bool
    bound: Mapping[str, float] | None
    """max_relative_target by motor, degrees or percent; None is none."""
    cameras: Mapping[str, Camera]
    calibration: str
    """LeRobot's calibration file; empty where there is none."""


def read_arm(path: Path, calibration: str = "") -> Arm:
    """The robot's config in a YAML or JSON file, by itself or under the name robot.

    Args:
        path: of the file.
        calibration: LeRobot's calibration file; empty looks where the config says, or where LeRobot keeps them.

    Raises:
        ConfigError: it cannot be read, is of another robot, or a field is not what LeRobot takes.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"robot_config={path} cannot be read: {' '.join(str(error).split())}") from error
    robot = content.get("robot", content) if isinstance(content, dict) else content
    if not isinstance(robot, dict) or "type" not in robot:
        raise ConfigError(f"robot_config={path} names no robot: write type: so101_follower, port, id, cameras")
    if robot["type"] not in ARMS:
        raise ConfigError(f"robot_config={path} is of a {robot['type']}: this project's policies drive {ARMS[0]}")
    for name, value in robot.items():
        if name not in FIELDS:
            close = difflib.get_close_matches(str(name), FIELDS, 1)
            hint = f"is {close[0]} meant?" if close else f"LeRobot knows {', '.join(FIELDS)}"
            raise ConfigError(f"robot_config={path} has {name}, which is no setting of the arm: {hint}")
        if name in ("port", "id", "calibration_dir") and not isinstance(value, str | None):
            raise ConfigError(f"robot_config={path}: {name} is {value!r}: write a text")
    degrees = robot.get("use_degrees", True)
    if not isinstance(degrees, bool):
        raise ConfigError(f"robot_config={path}: use_degrees is {degrees!r}: write true or false, without quotes")
    return Arm(degrees, _bound(path, robot), _cameras(path, robot), calibration or _calibration(robot))


def _bound(path: Path, robot: Mapping[str, Any]) -> dict[str, float] | None:
    value = robot.get("max_relative_target")
    if value is None:
        return None
    if isinstance(value, dict) and set(value) != set(JOINT_NAMES):
        raise ConfigError(f"robot_config={path}: max_relative_target must name every motor: {', '.join(JOINT_NAMES)}")
    found = value if isinstance(value, dict) else dict.fromkeys(JOINT_NAMES, value)
    return {joint: _above_zero(path, "max_relative_target", number) for joint, number in found.items()}


def _cameras(path: Path, robot: Mapping[str, Any]) -> dict[str, Camera]:
    cameras = robot.get("cameras") or {}
    if not isinstance(cameras, dict) or not all(isinstance(settings, dict) for settings in cameras.values()):
        raise ConfigError(f"robot_config={path}: cameras is no mapping: write NAME: {{type: opencv, width: 640, ...}}")
    found = {}
    for name, settings in cameras.items():
        sizes = {f: _above_zero(path, f"cameras.{name}.{f}", settings.get(f)) for f in ("width", "height", "fps")}
        found[str(name)] = Camera(**sizes)
    return found


def _above_zero(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"robot_config={path}: {name} is {value!r}: write a number above 0")
    return float(value)


def _calibration(robot: Mapping[str, Any]) -> str:
    from lerobot.utils.constants import HF_LEROBOT_CALIBRATION

    folder = Path(str(robot.get("calibration_dir") or HF_LEROBOT_CALIBRATION / "robots" / "so_follower"))
    file = folder / f"{robot.get('id')}.json"
    return str(file) if file.is_file() else ""
