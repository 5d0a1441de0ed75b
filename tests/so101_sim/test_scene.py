"""The MuJoCo scene: kinematics, names, sensors and cameras."""

import json
from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np
import pytest

SCENE = Path(__file__).parents[2] / "model" / "scene.xml"
FORWARD_KINEMATICS = Path(__file__).parents[1] / "data" / "forward_kinematics.json"
JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = ("camera_up", "camera_side", "wrist_camera")
HOME_DEG = (0.06, -100.21, 89.95, 66.46, 5.96, 1.0)
JAW_OPEN_RAD, JAW_CLOSED_RAD = np.deg2rad(50.0), np.deg2rad(-5.0)


@pytest.fixture(scope="module")
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_path(str(SCENE))


@pytest.fixture
def data(model: mujoco.MjModel) -> mujoco.MjData:
    return at_keyframe(model, "home")


@pytest.fixture(scope="module")
def renderer(model: mujoco.MjModel) -> Iterator[mujoco.Renderer]:
    with mujoco.Renderer(model, 96, 96) as renderer:
        yield renderer


def at_keyframe(model: mujoco.MjModel, name: str) -> mujoco.MjData:
    data = mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, model.key(name).id)
    mujoco.mj_forward(model, data)
    return data


def close_on_block(model: mujoco.MjModel) -> mujoco.MjData:
    """The jaws closed on a block that was put between them, the hand level above the floor."""
    data = at_keyframe(model, "home_wrist_turned")
    data.qpos[:6] = data.ctrl[:] = [0.0, -0.2, 0.2, 1.4, -np.pi / 2, JAW_OPEN_RAD]
    mujoco.mj_forward(model, data)
    data.qpos[6:9] = data.site("tool").xpos
    mujoco.mju_mat2Quat(data.qpos[9:13], data.site("tool").xmat)
    data.ctrl[5] = JAW_CLOSED_RAD
    gravity = model.opt.gravity.copy()
    model.opt.gravity[:] = 0.0  # the block floats until the jaws have it
    try:
        mujoco.mj_step(model, data, 200)
    finally:
        model.opt.gravity[:] = gravity
    mujoco.mj_step(model, data, 300)
    return data


def test_forward_kinematics_match_the_published_arm(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    fixture = json.loads(FORWARD_KINEMATICS.read_text())
    assert tuple(fixture["joints"]) == JOINTS
    to_base = np.zeros(4)
    mujoco.mju_negQuat(to_base, model.body("base").quat)
    position, orientation = np.zeros(3), np.zeros(4)
    for pose in fixture["poses"]:
        data.qpos[:6] = pose["qpos_rad"]
        mujoco.mj_kinematics(model, data)
        for name, expected in pose["bodies"].items():
            mujoco.mju_rotVecQuat(position, data.body(name).xpos, to_base)
            np.testing.assert_allclose(position, expected["pos_m"], atol=1e-5)
            mujoco.mju_mulQuat(orientation, to_base, data.body(name).xquat)
            wanted = np.array(expected["quat_wxyz"]) / np.linalg.norm(expected["quat_wxyz"])
            chord = min(np.linalg.norm(orientation - wanted), np.linalg.norm(orientation + wanted))
            assert 2.0 * chord < 1e-4, name  # the rotation angle in rad, for small angles


@pytest.mark.parametrize("kind", ["body", "jnt", "geom", "site", "cam", "light", "sensor", "actuator", "key"])
def test_everything_is_named(model: mujoco.MjModel, kind: str) -> None:
    addresses = getattr(model, f"name_{kind}adr")
    assert len(addresses) > 0
    assert all(model.names[address : address + 1] != b"\0" for address in addresses)


def test_joints_and_servos_line_up(model: mujoco.MjModel) -> None:
    assert [model.joint(i).name for i in range(model.njnt)] == [*JOINTS, "block_joint"]
    assert [model.actuator(i).name for i in range(model.nu)] == list(JOINTS)
    np.testing.assert_allclose(model.actuator_ctrlrange, model.jnt_range[:6])
    np.testing.assert_allclose(model.actuator_forcerange, np.tile([-2.94, 2.94], (6, 1)))


@pytest.mark.parametrize(("key", "wrist_roll_deg"), [("home", 5.96), ("home_wrist_turned", -84.04)])
def test_home_is_the_documented_pose_and_stays(model: mujoco.MjModel, key: str, wrist_roll_deg: float) -> None:
    data = at_keyframe(model, key)
    wanted = np.deg2rad([*HOME_DEG[:4], wrist_roll_deg, HOME_DEG[5]])
    wanted = np.clip(wanted, model.jnt_range[:6, 0], model.jnt_range[:6, 1])
    np.testing.assert_allclose(data.qpos[:6], wanted, atol=1e-6)
    np.testing.assert_array_equal(data.ctrl, data.qpos[:6])
    np.testing.assert_allclose(data.qpos[6:], [0.0, 0.3, 0.0125, 1.0, 0.0, 0.0, 0.0])
    mujoco.mj_step(model, data, 500)
    np.testing.assert_allclose(data.qpos[:6], wanted, atol=0.01)
    np.testing.assert_allclose(data.qpos[6:9], [0.0, 0.3, 0.0125], atol=5e-4)


def test_block_is_a_50_gram_cube(model: mujoco.MjModel) -> None:
    np.testing.assert_allclose(model.geom("block").size, 0.0125)
    np.testing.assert_allclose(model.body("block").mass, 0.05)


@pytest.mark.parametrize(
    ("jaw_deg", "gap"), [(-10, 0.004), (0, 0.016), (10, 0.030), (30, 0.057), (60, 0.094), (100, 0.133)]
)
def test_tip_gap_follows_the_jaw(model: mujoco.MjModel, data: mujoco.MjData, jaw_deg: float, gap: float) -> None:
    data.joint("gripper").qpos = np.deg2rad(jaw_deg)
    mujoco.mj_kinematics(model, data)
    tips = data.site("fixed_fingertip").xpos - data.site("moving_fingertip").xpos
    assert np.linalg.norm(tips) == pytest.approx(gap, abs=0.004)


def test_sensors_read_the_scene(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    np.testing.assert_allclose(data.sensor("tool_pos").data, data.site("tool").xpos)
    np.testing.assert_allclose(data.sensor("block_pos").data, [0.0, 0.3, 0.0125])
    np.testing.assert_allclose(data.sensor("block_quat").data, [1.0, 0.0, 0.0, 0.0])
    data.joint("block_joint").qvel[:3] = [0.1, -0.2, 0.3]
    mujoco.mj_forward(model, data)
    np.testing.assert_allclose(data.sensor("block_linvel").data, [0.1, -0.2, 0.3], atol=1e-12)


def test_jaw_forces_are_zero_without_contact(data: mujoco.MjData) -> None:
    for name in ("fixed_jaw_contact", "moving_jaw_contact"):
        np.testing.assert_array_equal(data.sensor(name).data, np.zeros(3))


def test_jaw_forces_oppose_and_carry_the_block(model: mujoco.MjModel) -> None:
    data = close_on_block(model)
    fixed, moving = data.sensor("fixed_jaw_contact").data, data.sensor("moving_jaw_contact").data
    closing_axis = data.site("tool").xmat.reshape(3, 3)[:, 0]  # from the fixed jaw to the moving one
    assert fixed @ closing_axis > 1.0
    assert moving @ closing_axis < -1.0
    # Signs as documented: what the jaws exert on the block, so that together they carry its weight.
    np.testing.assert_allclose(fixed + moving, [0.0, 0.0, 0.05 * 9.81], atol=0.02)


def red_pixels(image: np.ndarray) -> int:
    """Pixels of an RGB uint8 image (h, w, 3) that only the block can have: the arm's yellow has green in it."""
    red, green, blue = image.astype(int).transpose(2, 0, 1)
    return int(((red > 60) & (green < red / 3) & (blue < red / 3)).sum())


@pytest.mark.parametrize(("camera", "least"), [("camera_up", 3), ("camera_side", 3)])
def test_outer_cameras_see_the_block(data: mujoco.MjData, renderer: mujoco.Renderer, camera: str, least: int) -> None:
    renderer.update_scene(data, camera)
    assert red_pixels(renderer.render()) >= least


def test_wrist_camera_sees_what_is_between_the_jaws(model: mujoco.MjModel, renderer: mujoco.Renderer) -> None:
    renderer.update_scene(close_on_block(model), "wrist_camera")
    image = renderer.render()
    assert red_pixels(image) > 0.05 * image.shape[0] * image.shape[1]
    assert red_pixels(image[:, 32:64]) > 0.5 * red_pixels(image)


@pytest.mark.parametrize("camera", CAMERAS)
def test_cameras_show_the_arm(data: mujoco.MjData, renderer: mujoco.Renderer, camera: str) -> None:
    renderer.update_scene(data, camera)
    red, green, blue = renderer.render().astype(int).transpose(2, 0, 1)
    assert ((red > 80) & (green > 0.6 * red) & (blue < 0.5 * red)).sum() > 50
