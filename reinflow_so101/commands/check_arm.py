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
confuse the policy is an error and exit code 1, what the files cannot tell is for you to look at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from reinflow import ConfigError, UserError, run_command
from reinflow.seeds import FIRST_TUNING_SEED
from reinflow.settings import Range, check_ranges
from reinflow_so101.commands.arm_file import Arm, read_arm
from reinflow_so101.commands.evaluate import EvalConfig, find_policy, make_actor
from reinflow_so101.door import half_ranges, joint_frames, misfits_of, read_rename_map
from reinflow_so101.policy_card import data_root, env_of_task, known_env, stored_env
from reinflow_vla.adaptation import features_of, known_cameras, stored_statistics
from reinflow_vla.directory import ACTION, CONFIG_FILE, OBS_IMAGES_PREFIX, OBS_STATE, read_json
from so101_mujoco_utils import JOINT_NAMES, NUM_JOINTS, Array
from so101_sim.config import EnvConfig
from so101_sim.tasks.registry import describe, how_to_choose, named

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
    """All answers. Raises ConfigError for flags that are wrong and files that cannot be read."""
    check_ranges(config)
    if config.task:
        named(config.task)
    rename, directory = read_rename_map(config.rename_map), find_policy(config.policy)
    arm = read_arm(config.robot_config, config.calibration)
    if read_json(directory / CONFIG_FILE).get("type") == "flow_mlp":
        return [Finding("features", "error", "a flow_mlp sees the simulator's state, which no real arm has")]
    return [
        *_features(directory), *_order(directory), *_units(directory, arm),
        *_cameras(directory, arm, rename, config.fps), *_limits(directory, arm), *_rate(directory, config.fps),
        *_safety(arm), *_speeds(directory, arm, config),
    ]  # fmt: skip


def _features(directory: Path) -> Iterator[Finding]:
    own = {name: len(next(iter(values.values()))) for name, values in stored_statistics(directory)[0].items() if values}
    for name in (OBS_STATE, ACTION):
        size = own.get(name) or (features_of(directory).get(name, {}).get("shape") or [0])[0]
        good = size == NUM_JOINTS
        yield Finding(name, "ok" if good else "error", f"{size} numbers, the arm has {NUM_JOINTS} motors")


def _order(directory: Path) -> Iterator[Finding]:
    """By the policy's own names, or those of the data it was trained on, or the simulator's."""
    names = read_json(directory / CONFIG_FILE).get("action_feature_names")
    root = data_root(directory)
    if not names and root and (root / "meta" / "info.json").is_file():
        names = read_json(root / "meta" / "info.json").get("features", {}).get(ACTION, {}).get("names")
    if not isinstance(names, list):
        simulated = known_env(directory) is not None
        text = f"{', '.join(JOINT_NAMES)}, as " + ("in the simulator" if simulated else "nothing in its files denies")
        yield Finding("joint order", "ok" if simulated else "look", text)
        return
    order = [str(name).removesuffix(".pos") for name in names]
    good = order == list(JOINT_NAMES)
    yield Finding("joint order", "ok" if good else "error", ", ".join(order) + ("" if good else ": not the arm's"))


def _units(directory: Path, arm: Arm) -> Iterator[Finding]:
    theirs = "lerobot" if arm.use_degrees else "lerobot_m100_100"
    found = {name: values for name, values in stored_statistics(directory)[0].items() if name in (OBS_STATE, ACTION)}
    known, misfits = known_env(directory), misfits_of(found, joint_frames(arm.calibration))
    fits = [name for name, misfit in misfits.items() if not misfit]
    own = known[0].joint_frame if known else ""
    if own and own != theirs:
        remedy = "set use_degrees: true" if own == "lerobot" else "a training here writes it in LeRobot's degrees"
        yield Finding("units", "error", f"the policy's are {own}, the arm's would be {theirs}: {remedy}")
    elif theirs not in fits:
        text = f"as {theirs} the policy's data has {misfits[theirs]}; what would fit: {', '.join(fits) or 'none'}"
        yield Finding("units", "error", text)
    elif own:
        yield Finding("units", "ok", f"{theirs}, gripper in percent")
    else:
        text = f"the arm's are {theirs}; the policy does not say, its statistics would fit {', '.join(fits)}"
        yield Finding("units", "look" if len(fits) > 1 else "ok", text)


def _cameras(directory: Path, arm: Arm, rename: dict[str, str], fps: float) -> Iterator[Finding]:
    wanted = known_cameras(directory)[0]
    if strange := [a for a in rename if a not in arm.cameras] + [b for b in rename.values() if b not in wanted]:
        raise ConfigError(
            f"rename_map names {', '.join(strange)}: it goes from the arm's cameras ({', '.join(arm.cameras)}) "
            f"to what the policy looks through ({', '.join(wanted)})"
        )
    seen = {rename.get(name, name): camera for name, camera in arm.cameras.items()}
    if absent := [name for name in wanted if name not in seen]:
        free = [name for name in arm.cameras if rename.get(name, name) not in wanted]
        pairs = {OBS_IMAGES_PREFIX + a: OBS_IMAGES_PREFIX + b for a, b in zip(free, absent, strict=False)}
        remedy = f"name the arm's so, or --rename_map='{json.dumps(pairs)}'" if pairs else "mount and name one"
        yield Finding("cameras", "error", f"the policy looks through {', '.join(absent)}, the arm does not: {remedy}")
    for name in [name for name in wanted if name in seen]:
        camera = seen[name]
        remarks = []
        if camera.fps < fps:
            remarks.append(f"{camera.fps:g} images a second for {fps:g} control steps: some are seen twice")
        if camera.width != camera.height and known_env(directory):
            remarks.append("LeRobot pads it to a square with black, the simulator shows the whole square")
        text = f"{camera.width:g}x{camera.height:g}, {camera.fps:g} images a second"
        yield Finding(f"camera {name}", "look" if remarks else "ok", "; ".join([text, *remarks]))


def _limits(directory: Path, arm: Arm) -> Iterator[Finding]:
    if not arm.calibration:
        yield Finding("limits", "look", "no calibration file: name it by --calibration to compare the joints' ranges")
        return
    halves, stats = np.array(half_ranges(arm.calibration)), stored_statistics(directory)[0].get(ACTION, {})
    if not {"mean", "std"} <= stats.keys():
        yield Finding("limits", "look", "the policy keeps no mean and std of its actions: nothing to compare")
        return
    if not arm.use_degrees:
        yield Finding("limits", "ok", "in -100..100 of the calibrated range by construction")
        return
    reach = np.abs(stats["mean"][:5]) + 2 * stats["std"][:5]
    for joint, half, farthest in zip(JOINT_NAMES, halves, reach, strict=False):
        good = farthest <= half + LIMIT_DEG
        text = f"actions reach {farthest:.0f} degrees from the middle, the arm turns by {half:.0f}"
        yield Finding(f"limit {joint}", "ok" if good else "error", text + ("" if good else ": calibrate again"))


def _rate(directory: Path, fps: float) -> Iterator[Finding]:
    known = known_env(directory)
    if known is None:
        yield Finding("rate", "look", f"the policy says of no rate that it was made for; --fps={fps:g} is yours")
        return
    own, text = known[0].control_hz or 50.0, f"{fps:g} control steps a second"
    good = abs(own - fps) < 0.5
    if not good:
        text = f"the policy was made for --fps={own:g}: at {fps:g} it moves {fps / own:.2f} times as fast"
    yield Finding("rate", "ok" if good else "error", text)


def _safety(arm: Arm) -> Iterator[Finding]:
    if arm.bound is None:
        text = "max_relative_target is not set: nothing bounds a step of the arm; begin with 5"
        yield Finding("safety", "look", text)
    else:
        yield Finding("safety", "ok", f"a target is at most {max(arm.bound.values()):g} from where the joint is")


def _speeds(directory: Path, arm: Arm, config: CheckArmConfig) -> Iterator[Finding]:
    if not config.speeds:
        return
    env = env_of_task(directory, config.task) if config.task else stored_env(directory)
    try:
        steps, speeds = motions(directory, env)
    except UserError as error:
        yield Finding("speeds", "look", f"not measured, the policy cannot be played here: {error}")
        return
    why = "" if config.task or known_env(directory) else f"; the policy says of no task, {how_to_choose()}"
    yield Finding("speeds", "look" if why else "ok", f"measured in {EPISODES} episodes of {describe(env)}{why}")
    for joint, step, per_step in zip(JOINT_NAMES, steps, speeds, strict=True):
        speed, unit = per_step * config.fps, "percent" if joint == "gripper" else "degrees"
        text = f"up to {speed:.0f} {unit} a second, {step:.1f} from one target (or the pose) to the next"
        if joint != "gripper" and speed > SERVO_DEG_S:
            yield Finding(f"speed {joint}", "error", f"{text}; the servo turns by {SERVO_DEG_S:g} without load")
        elif arm.bound and step > arm.bound[joint]:
            yield Finding(f"speed {joint}", "look", f"{text}; max_relative_target={arm.bound[joint]:g} holds it back")
        else:
            yield Finding(f"speed {joint}", "ok", text)


def motions(directory: Path, env: EnvConfig) -> tuple[Array, Array]:
    """How fast a policy moves its targets, over a few noise-free simulated episodes.

    Returns:
        (6,) degrees or percent: the largest change from one target to the next, and from the pose at a decision to its
        first target; and the largest per control step over WINDOW steps, which a servo would have to follow.
    """
    from functools import partial

    from reinflow.evaluate import evaluate_seeds
    from so101_sim.vector.make import make_vector_env

    act = make_actor(EvalConfig(policy_path=str(directory), output_dir="", env=env), directory)
    targets: dict[int, list[Array]] = {}  # of each episode: its first pose, then all that it was told
    steps = np.zeros(NUM_JOINTS)

    def watched(observation: Any, seeds: Sequence[int], decision: int) -> Any:
        chunk = act(observation, seeds, decision)  # (N, n, 6)
        np.maximum(steps, np.abs(chunk[:, 0] - observation["agent_pos"]).max(axis=0), out=steps)
        for seed, pose, told in zip(seeds, observation["agent_pos"], chunk, strict=True):
            targets.setdefault(seed, [pose[None]]).append(told)
        return chunk

    evaluate_seeds(watched, partial(make_vector_env, env), FIRST_TUNING_SEED, EPISODES, EPISODES)
    speeds = np.zeros(NUM_JOINTS)
    for parts in targets.values():
        whole = np.concatenate(parts)  # (1 + control steps, 6)
        window = min(WINDOW, len(whole) - 1)
        np.maximum(steps, np.abs(np.diff(whole, axis=0)).max(axis=0), out=steps)
        np.maximum(speeds, np.abs(whole[window:] - whole[:-window]).max(axis=0) / window, out=speeds)
    return steps, speeds


def run(config: CheckArmConfig) -> None:
    """Print the answers; raises ArmError when one of them is an error."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    findings = check_arm(config)
    table = Table("what", "", "found", title=escape(f"{config.policy} on {config.robot_config}"))
    colours = {"ok": "green", "look": "yellow", "error": "red"}
    for finding in findings:
        table.add_row(escape(finding.what), f"[{colours[finding.verdict]}]{finding.verdict}[/]", escape(finding.text))
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
