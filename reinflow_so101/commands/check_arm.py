"""reinflow-check-arm: does a policy fit a real arm? Compared without hardware, from the files alone.

    reinflow-check-arm my_policy --robot-config my_arm.yaml --fps 50

The robot's config is what `lerobot-rollout` takes as --robot.*, as a YAML or JSON file:

    type: so101_follower
    port: /dev/ttyACM0
    id: my_arm
    max_relative_target: 10
    cameras:
      camera_up: {type: opencv, index_or_path: 0, width: 640, height: 480, fps: 30}

It answers for features, joint order, units, cameras, limits, joint speeds and control rate; what would harm the arm or
confuse the policy is an error and exit code 1.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from reinflow import ConfigError, UserError, run_command
from reinflow.seeds import FIRST_TUNING_SEED
from reinflow.settings import Range, out_of_range
from reinflow_so101.commands.evaluate import EvalConfig, find_policy, make_actor
from reinflow_so101.door import half_ranges, misfits_of, read_rename_map
from reinflow_so101.policy_card import env_of_task, known_env, stored_env
from reinflow_vla.adaptation import features_of, known_cameras, stored_statistics
from reinflow_vla.directory import ACTION, CONFIG_FILE, OBS_IMAGES_PREFIX, OBS_STATE, read_json
from so101_mujoco_utils import JOINT_NAMES, NUM_JOINTS, Array

ARMS = ("so101_follower", "so100_follower")
SERVO_DEG_S = 270.0  # no-load speed of an STS3215, 45 revolutions a minute (its data sheet)
LIMIT_DEG = 5.0  # so far beyond a calibrated range may an action's mean +- 2 std reach: targets press against things
EPISODES, WINDOW = 8, 5


class ArmError(UserError, RuntimeError):
    """The policy must not drive this arm; what was found is printed above."""


@dataclass(frozen=True)
class CheckArmConfig:
    """Compare a policy with a robot's config, without hardware."""

    policy: tyro.conf.Positional[str]
    """Run directory, checkpoint or policy directory."""
    robot_config: Path
    """LeRobot's config of the arm: what lerobot-rollout takes as --robot.*, in a YAML or JSON file."""
    fps: Annotated[float, Range(1, 1_000)] = 50.0
    """The rate that lerobot-rollout will run at, its --fps (30 unless it is said)."""
    rename_map: str = ""
    """The rename map that it will be given, robot -> policy."""
    calibration: str = ""
    """LeRobot's calibration file of the arm; empty takes the one of the config's id and calibration_dir."""
    speeds: bool = True
    """Play a few simulated episodes and measure how fast the policy moves each joint."""
    task: str = ""
    """Named task of these episodes; empty takes the one that the policy was made for."""


@dataclass(frozen=True)
class Finding:
    """One answer."""

    what: str
    verdict: Literal["ok", "look", "error"]
    text: str


def check_arm(config: CheckArmConfig) -> list[Finding]:
    """All answers. Raises ConfigError for files that cannot be read."""
    if problems := list(out_of_range(config)):
        raise ConfigError("; ".join(problems))
    directory, robot = find_policy(config.policy), read_robot(config.robot_config)
    calibration = config.calibration or calibration_file(robot)
    return [
        *_features(directory), *_units(directory, robot, calibration), *_cameras(directory, robot, config),
        *_limits(directory, calibration), *_rate(directory, robot, config), *_speeds(directory, robot, config),
    ]  # fmt: skip


def read_robot(path: Path) -> dict[str, Any]:
    """The robot's config in a file, by itself or under the name robot; raises ConfigError."""
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
    if not isinstance(robot.get("cameras") or {}, dict):
        raise ConfigError(f"robot_config={path} has cameras that are no mapping: write NAME: {{type: opencv, ...}}")
    return robot


def calibration_file(robot: Mapping[str, Any]) -> str:
    """LeRobot's calibration of the arm, in the config's calibration_dir or LeRobot's own; empty if it is not there."""
    from lerobot.utils.constants import HF_LEROBOT_CALIBRATION

    folder = Path(str(robot.get("calibration_dir") or HF_LEROBOT_CALIBRATION / "robots" / "so_follower")).expanduser()
    path = folder / f"{robot.get('id')}.json"
    return str(path) if path.is_file() else ""


def _features(directory: Path) -> Iterator[Finding]:
    stored, features = read_json(directory / CONFIG_FILE), features_of(directory)
    if stored.get("type") == "flow_mlp":
        yield Finding("features", "error", "a flow_mlp sees the simulator's state, which no real arm has")
        return
    own = {name: len(next(iter(values.values()))) for name, values in stored_statistics(directory)[0].items() if values}
    for name in (OBS_STATE, ACTION):
        size = own.get(name) or (features.get(name, {}).get("shape") or [0])[0]
        good = size == NUM_JOINTS
        yield Finding(name, "ok" if good else "error", f"{size} numbers, the arm has {NUM_JOINTS} motors")
    names = [str(name).removesuffix(".pos") for name in stored.get("action_feature_names") or JOINT_NAMES]
    good = names == list(JOINT_NAMES)
    yield Finding("joint order", "ok" if good else "error", f"{', '.join(names)}" + ("" if good else ": not the arm's"))


def _units(directory: Path, robot: Mapping[str, Any], calibration: str) -> Iterator[Finding]:
    degrees = bool(robot.get("use_degrees", True))
    arm = "lerobot" if degrees else "lerobot_m100_100"
    found = {name: values for name, values in stored_statistics(directory)[0].items() if name in (OBS_STATE, ACTION)}
    known, misfits = known_env(directory), misfits_of(found, calibration)
    own = known[0].joint_frame if known else ""
    if own and own != arm:
        remedy = "set use_degrees: true" if own == "lerobot" else "export it in LeRobot's degrees (reinflow-export)"
        yield Finding("units", "error", f"the policy's are {own}, the arm's would be {arm}: {remedy}")
    elif misfits[arm]:
        fit = ", ".join(name for name, misfit in misfits.items() if not misfit) or "none"
        yield Finding("units", "error", f"as {arm} the policy's data has {misfits[arm]}; what would fit: {fit}")
    else:
        yield Finding("units", "ok", f"{arm}, gripper in percent" + ("" if own else "; the statistics fit"))


def _cameras(directory: Path, robot: Mapping[str, Any], config: CheckArmConfig) -> Iterator[Finding]:
    wanted, cameras = known_cameras(directory)[0], robot.get("cameras") or {}
    rename = {a.removeprefix(OBS_IMAGES_PREFIX): b.removeprefix(OBS_IMAGES_PREFIX)
              for a, b in read_rename_map(config.rename_map).items()}  # fmt: skip
    seen = {rename.get(name, name): settings for name, settings in cameras.items()}
    if absent := [name for name in wanted if name not in seen]:
        free = [name for name in cameras if rename.get(name, name) not in wanted]
        pairs = ", ".join(
            f'"{OBS_IMAGES_PREFIX}{a}": "{OBS_IMAGES_PREFIX}{b}"' for a, b in zip(free, absent, strict=False)
        )
        remedy = f"name the arm's so, or --rename_map='{{{pairs}}}'" if pairs else "mount and name one"
        yield Finding(
            "cameras", "error", f"the policy looks through {', '.join(absent)}, which the arm lacks: {remedy}"
        )
    for name in wanted:
        settings = seen.get(name)
        if not isinstance(settings, dict):
            continue
        width, height, rate = (float(settings.get(key) or 0) for key in ("width", "height", "fps"))
        if not (width and height and rate):
            yield Finding(f"camera {name}", "error", "width, height and fps must be given: LeRobot needs them")
        elif rate < config.fps:
            yield Finding(
                f"camera {name}", "look", f"{rate:g} images a second for {config.fps:g} control steps: some repeat"
            )
        else:
            yield Finding(f"camera {name}", "ok", f"{width:g}x{height:g}, {rate:g} images a second")
        if width != height and width and height and known_env(directory):
            smaller = max(width, height) / min(width, height)
            yield Finding(
                f"camera {name}", "look",
                f"LeRobot pads {width:g}x{height:g} to a square, the simulator renders squares: things look "
                f"{smaller:.2f} times smaller. Crop the images, or fine-tune on the arm's own",
            )  # fmt: skip


def _limits(directory: Path, calibration: str) -> Iterator[Finding]:
    if not calibration:
        yield Finding("limits", "look", "no calibration file: name it by --calibration to compare the joints' ranges")
        return
    stats = stored_statistics(directory)[0].get(ACTION, {})
    if not {"mean", "std"} <= stats.keys():
        yield Finding("limits", "look", "the policy keeps no mean and std of its actions: nothing to compare")
        return
    halves = np.array(half_ranges(calibration))
    reach = np.abs(stats["mean"][:5]) + 2 * stats["std"][:5]
    for joint, half, farthest in zip(JOINT_NAMES, halves, reach, strict=False):
        good = farthest <= half + LIMIT_DEG
        text = f"actions reach {farthest:.0f} degrees from the middle, the arm turns by {half:.0f}"
        yield Finding(f"limit {joint}", "ok" if good else "error", text + ("" if good else ": calibrate again"))


def _rate(directory: Path, robot: Mapping[str, Any], config: CheckArmConfig) -> Iterator[Finding]:
    known = known_env(directory)
    if known is None:
        yield Finding(
            "rate", "look", f"the policy does not say what rate it was made for; --fps={config.fps:g} is yours"
        )
        return
    own, text = known[0].control_hz or 50.0, f"{config.fps:g} control steps a second"
    good = abs(own - config.fps) < 0.5
    if not good:
        text = (
            f"--fps={config.fps:g}, the policy was made for {own:g}: it would move {config.fps / own:.2f} times as fast"
        )
    yield Finding("rate", "ok" if good else "error", text)
    bound = robot.get("max_relative_target")
    if bound is None:
        text = "max_relative_target is not set: nothing bounds a step of the arm; begin with 5"
        yield Finding("safety", "look", text)
    elif isinstance(bound, dict) and set(bound) != set(JOINT_NAMES):
        yield Finding("safety", "error", f"max_relative_target must name every motor: {', '.join(JOINT_NAMES)}")


def _speeds(directory: Path, robot: Mapping[str, Any], config: CheckArmConfig) -> Iterator[Finding]:
    if not config.speeds or read_json(directory / CONFIG_FILE).get("type") == "flow_mlp":
        return
    try:
        steps, speeds = motions(directory, config.task)
    except UserError as error:
        yield Finding("speeds", "look", f"not measured, the policy cannot be played here: {error}")
        return
    bound = robot.get("max_relative_target")
    bounds = bound if isinstance(bound, dict) else dict.fromkeys(JOINT_NAMES, bound)
    for joint, step, per_step in zip(JOINT_NAMES, steps, speeds, strict=True):
        speed, allowed = per_step * config.fps, bounds.get(joint)
        unit = "%" if joint == "gripper" else "degrees"
        text = f"up to {speed:.0f} {unit} a second, {step:.1f} in one control step"
        if joint != "gripper" and speed > SERVO_DEG_S:
            yield Finding(f"speed {joint}", "error", f"{text}; the servo turns by {SERVO_DEG_S:g} without load")
        elif allowed is not None and step > float(allowed):
            yield Finding(f"speed {joint}", "look", f"{text}; max_relative_target={allowed} will hold it back")
        else:
            yield Finding(f"speed {joint}", "ok", text)


def motions(directory: Path, task: str = "") -> tuple[Array, Array]:
    """How fast a policy moves its targets within a chunk, over a few noise-free simulated episodes.

    Returns:
        (6,) degrees or percent: the largest change from one control step to the next, and the largest per control step
        over WINDOW steps, which a servo would have to follow.
    """
    from functools import partial

    from reinflow.evaluate import evaluate_seeds
    from so101_sim.vector.make import make_vector_env

    env = env_of_task(directory, task) if task else stored_env(directory)
    act = make_actor(EvalConfig(policy_path=str(directory), output_dir="", env=env), directory)
    steps, speeds = np.zeros(NUM_JOINTS), np.zeros(NUM_JOINTS)

    def watched(observation: Any, seeds: Sequence[int], decision: int) -> Any:
        chunk = act(observation, seeds, decision)  # (N, n, 6)
        window = min(WINDOW, chunk.shape[1] - 1)
        if window:
            np.maximum(steps, np.abs(np.diff(chunk, axis=1)).max(axis=(0, 1)), out=steps)
            change = np.abs(chunk[:, window:] - chunk[:, :-window]).max(axis=(0, 1))
            np.maximum(speeds, change / window, out=speeds)
        return chunk

    evaluate_seeds(watched, partial(make_vector_env, env), FIRST_TUNING_SEED, EPISODES, EPISODES)
    return steps, speeds


def run(config: CheckArmConfig) -> None:
    """Print the answers; raises ArmError when one of them is an error."""
    from rich.console import Console
    from rich.table import Table

    findings = check_arm(config)
    table = Table("what", "", "found", title=f"{config.policy} on {config.robot_config}")
    colours = {"ok": "green", "look": "yellow", "error": "red"}
    for finding in findings:
        table.add_row(finding.what, f"[{colours[finding.verdict]}]{finding.verdict}[/]", finding.text)
    Console().print(table)
    if wrong := [finding.what for finding in findings if finding.verdict == "error"]:
        raise ArmError(f"do not run it yet: {', '.join(wrong)}")


def parse_args(argv: Sequence[str]) -> CheckArmConfig:
    """Which policy, which arm."""
    return tyro.cli(CheckArmConfig, args=list(argv), description=__doc__, prog="reinflow-check-arm")


def main() -> None:
    """reinflow-check-arm."""
    run_command("reinflow-check-arm", lambda: run(parse_args(sys.argv[1:])))


if __name__ == "__main__":
    main()
