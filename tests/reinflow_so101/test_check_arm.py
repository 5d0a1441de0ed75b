"""A policy against a robot's config, without hardware: what would harm or confuse is an error by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from reinflow import ConfigError
from reinflow_so101.commands.check_arm import ArmError, CheckArmConfig, check_arm, motions, run
from reinflow_so101.policy_card import stored_env
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
    file = folder / "arm.yaml"
    file.write_text(yaml.safe_dump(ARM | {"calibration_dir": str(folder)} | changes))
    return file


def answers(file: Path, policy: str | Path = "tiny", **changes: object) -> list[tuple[str, str, str]]:
    config = CheckArmConfig(str(policy), file, **{"speeds": False, **changes})
    return [(f.what, f.verdict, f.text) for f in check_arm(config)]


def answer(file: Path, what: str, policy: str | Path = "tiny", **changes: object) -> tuple[str, str]:
    (found,) = [(verdict, text) for name, verdict, text in answers(file, policy, **changes) if name == what]
    return found


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """A policy that says of no task, as lerobot-train leaves it."""
    policy = tmp_path / "strange"
    shutil.copytree(model_dir() / "tiny_smolvla", policy, ignore=shutil.ignore_patterns("*.json.checksums.json"))
    for name in ("reinflow.json", "checksums.json"):
        (policy / name).unlink(missing_ok=True)
    return policy


def test_an_arm_that_fits(tmp_path, capsys):
    file = arm(tmp_path, RANGES)
    found = answers(file)
    assert {verdict for _, verdict, _ in found} == {"ok"}
    wanted = {"observation.state", "action", "joint order", "units", "camera camera_up", "limit shoulder_lift", "rate"}
    assert wanted | {"safety"} <= {what for what, *_ in found}


def test_speeds_are_those_of_simulated_episodes(tmp_path):
    env = stored_env(model_dir() / "tiny_smolvla")
    steps, speeds = motions(model_dir() / "tiny_smolvla", env)
    assert (steps > 0).all() and (speeds <= steps).all()
    assert 1 < speeds[1] < 10  # the arm unfolds by some 100 degrees within a second
    slow = arm(tmp_path, max_relative_target=0.5)
    verdict, text = answer(slow, "speed shoulder_lift", speeds=True)
    assert verdict == "look" and "max_relative_target=0.5 holds it back" in text
    assert "lift (" in answer(slow, "speeds", speeds=True, task="lift")[1]


@pytest.mark.parametrize(("changes", "options", "what", "text"), [
    ({"use_degrees": False}, {}, "units", "set use_degrees: true"),
    ({"cameras": {"camera_up": CAMERAS["camera_up"]}}, {}, "cameras", "wrist_camera"),
    ({}, {"fps": 30.0}, "rate", "0.60 times as fast"),
])  # fmt: skip
def test_what_would_go_wrong_is_an_error(tmp_path, changes, options, what, text):
    file = arm(tmp_path, **changes)
    verdict, found = answer(file, what, **options)
    assert verdict == "error" and text in found
    with pytest.raises(ArmError, match=what):
        run(CheckArmConfig("tiny", file, **{"speeds": False, **options}))


def test_brackets_in_names_are_shown_as_they_are(tmp_path, capsys):
    (tmp_path / "x[/a]").mkdir(parents=True)
    cameras = {f"{name}[/b]": camera for name, camera in CAMERAS.items()}
    with pytest.raises(ArmError, match="cameras"):
        run(CheckArmConfig("tiny", arm(tmp_path / "x[/a]", cameras=cameras), speeds=False))
    said = "".join(capsys.readouterr().out.split())
    assert "x[/a]" in said and "[/b]" in said


def test_what_to_look_at(tmp_path):
    wide = {**CAMERAS["camera_up"], "width": 640, "fps": 30}
    file = arm(tmp_path, cameras=CAMERAS | {"camera_up": wide}, max_relative_target=None)
    verdict, text = answer(file, "camera camera_up")
    assert verdict == "look" and "some are seen twice; LeRobot pads it to a square" in text
    assert answer(file, "limits")[0] == answer(file, "safety")[0] == "look"


def test_a_policy_that_says_nothing_is_looked_at(tmp_path, strange):
    """Statistics fit degrees and -100..100 alike: nothing in the files tells, so nobody says ok."""
    for degrees in (True, False):
        file = arm(tmp_path, use_degrees=degrees, max_relative_target=None)
        verdict, text = answer(file, "units", strange)
        assert verdict == "look" and "lerobot, " in text and "lerobot_m100_100" in text
        assert {answer(file, what, strange)[0] for what in ("rate", "joint order", "safety")} == {"look"}
    verdict, text = answer(arm(tmp_path), "speeds", strange, speeds=True)
    assert verdict == "look" and "lift_fixed (" in text


def test_the_order_of_the_datas_joints(tmp_path, strange):
    data = tmp_path / "data"
    (data / "meta").mkdir(parents=True)
    names = [f"{name}.pos" for name in reversed(JOINT_NAMES)]
    (data / "meta/info.json").write_text(json.dumps({"features": {"action": {"names": names}}}))
    (strange / "train_config.json").write_text(json.dumps({"dataset": {"root": str(data)}}))
    verdict, text = answer(arm(tmp_path), "joint order", strange)
    assert verdict == "error" and "not the arm's" in text


def test_a_state_based_policy_is_for_no_arm(tmp_path):
    assert answer(arm(tmp_path), "features", "flow_mlp")[0] == "error"


def test_a_joint_that_turns_less_than_the_policy_wants(tmp_path):
    verdict, text = answer(arm(tmp_path, RANGES | {"shoulder_lift": 40}), "limit shoulder_lift")
    assert verdict == "error" and "the arm turns by 40" in text


def test_cameras_by_a_rename_map(tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(model_dir() / "tiny_smolvla", policy, ignore=shutil.ignore_patterns("checksums.json"))
    rename_cameras(policy, {"camera_up": "front"})
    file = arm(tmp_path)
    _, text = answer(file, "cameras", policy)
    proposed = text.split("--rename_map='")[1].rstrip("'")
    assert "cameras" not in {what for what, *_ in answers(file, policy, rename_map=proposed)}


def test_a_rename_map_that_matches_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="rename_map names a, b"):
        answers(arm(tmp_path), rename_map='{"a": "b"}')


@pytest.mark.parametrize(("text", "problem"), [
    ("type: koch_follower", "is of a koch_follower"), ("port: x", "names no robot"), ("a: [", "cannot be read"),
    ("[1, 2]", "names no robot"), ("type: so101_follower\ncameras: 3", "cameras is no mapping"),
    ("type: so101_follower\ncameras: {camera_up: null}", "cameras is no mapping"),
    ("type: so101_follower\ncameras: {a: {width: wide, height: 1, fps: 1}}", "cameras.a.width is 'wide'"),
    ("type: so101_follower\ncameras: {a: {type: opencv}}", "cameras.a.width is None"),
    ("type: so101_follower\nuse_degrees: 'false'", "use_degrees is 'false': write true or false"),
    ("type: so101_follower\nmax_relativ_target: 3", "is max_relative_target meant"),
    ("type: so101_follower\nport: 5", "port is 5: write a text"),
    ("type: so101_follower\nmax_relative_target: true", "max_relative_target is True"),
    ("type: so101_follower\nmax_relative_target: abc", "max_relative_target is 'abc'"),
    ("type: so101_follower\nmax_relative_target: .nan", "max_relative_target is nan"),
    ("type: so101_follower\nmax_relative_target: {gripper: 5}", "must name every motor"),
])  # fmt: skip
def test_files_that_are_no_arms(tmp_path, text, problem):
    file = tmp_path / "arm.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        answers(file)


@pytest.mark.parametrize("content", [{}, {"shoulder_pan": 3}, {"shoulder_pan": {"range_min": "a", "range_max": 1e999}}])
def test_what_is_no_calibration(tmp_path, content):
    file = arm(tmp_path, RANGES)
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="is no calibration of an SO-101"):
        answers(file)


def test_a_task_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="task=lfit is unknown"):
        answers(arm(tmp_path), task="lfit")
