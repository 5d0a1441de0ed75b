"""A policy against a robot's config, without hardware: what would harm or confuse is an error by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from reinflow import ConfigError
from reinflow_so101.commands.check_arm import ArmError, CheckArmConfig, check_arm, run
from so101_mujoco_utils import JOINT_NAMES, model_dir
from tests.foreign import rename_cameras

CAMERAS = {
    name: {"type": "opencv", "index_or_path": i, "width": 480, "height": 480, "fps": 60}
    for i, name in enumerate(("camera_up", "wrist_camera"))
}
ARM = {"type": "so101_follower", "port": "/dev/ttyACM0", "id": "mine", "max_relative_target": 10, "cameras": CAMERAS}
RANGES = {
    "shoulder_pan": 110,
    "shoulder_lift": 100,
    "elbow_flex": 97,
    "wrist_flex": 95,
    "wrist_roll": 180,
    "gripper": 55,
}


def arm(folder: Path, calibrated: dict[str, int] | None = None, **changes: object) -> Path:
    """A robot's config file, with a calibration of so many degrees to either side of each joint's middle."""
    if calibrated is not None:
        half = {name: round(degrees / 360 * 4096) for name, degrees in calibrated.items()}
        content = {name: {"range_min": 2048 - half[name], "range_max": 2048 + half[name]} for name in JOINT_NAMES}
        (folder / "mine.json").write_text(json.dumps(content))
        changes["calibration_dir"] = str(folder)
    file = folder / "arm.yaml"
    file.write_text(yaml.safe_dump(ARM | changes))
    return file


def verdicts(file: Path, policy: str = "tiny", **changes: object) -> dict[str, tuple[str, str]]:
    config = CheckArmConfig(policy, file, **{"speeds": False, **changes})
    return {f.what: (f.verdict, f.text) for f in check_arm(config)}


def test_an_arm_that_fits(tmp_path, capsys):
    file = arm(tmp_path, RANGES)
    found = verdicts(file)
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    wanted = {"observation.state", "action", "joint order", "units", "camera camera_up", "limit shoulder_lift", "rate"}
    assert wanted <= set(found)
    run(CheckArmConfig("tiny", file))  # with the speeds of simulated episodes
    assert "speed shoulder_pan" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "options", "what", "text"), [
    ({"use_degrees": False}, {}, "units", "set use_degrees: true"),
    ({"cameras": {"camera_up": CAMERAS["camera_up"]}}, {}, "cameras", "wrist_camera"),
    ({}, {"fps": 30.0}, "rate", "0.60 times as fast"),
    ({"cameras": CAMERAS | {"camera_up": {"type": "opencv"}}}, {}, "camera camera_up", "width, height and fps"),
    ({"max_relative_target": {"gripper": 5}}, {}, "safety", "every motor"),
])  # fmt: skip
def test_what_would_go_wrong_is_an_error(tmp_path, changes, options, what, text):
    file = arm(tmp_path, **changes)
    verdict, found = verdicts(file, **options)[what]
    assert verdict == "error" and text in found
    with pytest.raises(ArmError, match=what):
        run(CheckArmConfig("tiny", file, **{"speeds": False, **options}))


def test_what_to_look_at(tmp_path):
    wide = {**CAMERAS["camera_up"], "width": 640, "fps": 30}
    found = verdicts(arm(tmp_path, cameras=CAMERAS | {"camera_up": wide}, max_relative_target=None))
    assert found["camera camera_up"][0] == "look" and "1.33 times smaller" in found["camera camera_up"][1]
    assert found["limits"][0] == found["safety"][0] == "look"


def test_a_joint_that_turns_less_than_the_policy_wants(tmp_path):
    verdict, text = verdicts(arm(tmp_path, RANGES | {"shoulder_lift": 40}))["limit shoulder_lift"]
    assert verdict == "error" and "the arm turns by 40" in text


def test_cameras_by_a_rename_map(tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(model_dir() / "tiny_smolvla", policy, ignore=shutil.ignore_patterns("checksums.json"))
    rename_cameras(policy, {"camera_up": "front"})
    file = arm(tmp_path)
    _, text = verdicts(file, str(policy))["cameras"]
    proposed = text.split("--rename_map='")[1].rstrip("'")
    assert "cameras" not in verdicts(file, str(policy), rename_map=proposed)


@pytest.mark.parametrize(("text", "problem"), [
    ("type: koch_follower", "is of a koch_follower"), ("port: x", "names no robot"), ("a: [", "cannot be read"),
    ("type: so101_follower\ncameras: 3", "no mapping"),
])  # fmt: skip
def test_files_that_are_no_arms(tmp_path, text, problem):
    file = tmp_path / "arm.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        verdicts(file)
