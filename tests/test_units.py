"""Joint frames and units, limits, and the model file."""

from pathlib import Path

import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from so101_mujoco_utils import (
    CAMERA_NAMES,
    ENVIRONMENT_STATE_NAMES,
    FRAMES,
    JOINT_NAMES,
    SMOLVLA_STATE_MEAN,
    SMOLVLA_STATE_STD,
    SceneLayout,
    clip_to_limits,
    environment_state,
    load_model,
    model_dir,
)

LIMITS = np.tile([-1.0, 1.0], (6, 1))
joints = arrays(np.float64, (4, 6), elements=st.floats(-3.2, 3.2))


@pytest.mark.parametrize("name", FRAMES)
@given(q_rad=joints)
def test_round_trip_is_exact(name: str, q_rad: np.ndarray) -> None:
    frame = FRAMES[name]
    np.testing.assert_allclose(frame.to_rad(frame.from_rad(q_rad)), q_rad, atol=1e-12)
    np.testing.assert_allclose(frame.to_rad(frame.from_rad(q_rad).astype(np.float32)), q_rad, atol=1e-6)


def test_lerobot_frame_has_degrees_and_a_gripper_percentage() -> None:
    closed = [np.pi / 2, -np.pi / 2, 0.0, np.pi, 0.1, -0.174533]
    opened = [0.0, 0.0, 0.0, 0.0, 0.0, -0.174533 + 1.919862]
    expected = [[90.0, -90.0, 0.0, 180.0, np.rad2deg(0.1), 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 100.0]]
    np.testing.assert_allclose(FRAMES["lerobot"].from_rad([closed, opened]), expected, atol=1e-9)


def test_legacy_frame_has_the_documented_offsets_and_statistics() -> None:
    np.testing.assert_allclose(FRAMES["so100_legacy"].from_rad(np.zeros(6)), [0.0, 120.0, 110.0, 57.0, -27.0, 12.0])
    np.testing.assert_allclose(FRAMES["so100_legacy"].from_rad(np.full(6, np.pi / 6))[5], 42.0)
    assert SMOLVLA_STATE_MEAN == (1.596, 119.944, 109.770, 56.706, -27.423, 12.003)
    assert SMOLVLA_STATE_STD == (26.392, 52.411, 49.854, 36.998, 59.360, 19.040)


@pytest.mark.parametrize("bad", [np.zeros(5), np.float64(1.0), np.zeros((6, 2))])
def test_frames_refuse_other_shapes(bad: np.ndarray) -> None:
    for frame in FRAMES.values():
        with pytest.raises(ValueError, match="6 joints"):
            frame.from_rad(bad)
        with pytest.raises(ValueError, match="6 joints"):
            frame.to_rad(bad)


def test_clipping_counts_targets_outside_the_limits() -> None:
    targets = np.zeros((2, 6))
    targets[0, 1], targets[0, 4], targets[1, 2] = 1.5, -2.0, 1.0 + 1e-6  # the last one is float32 noise
    clipped, count = clip_to_limits(targets, LIMITS)
    assert clipped.min() >= -1.0
    assert clipped.max() <= 1.0
    assert count.tolist() == [2, 0]


@pytest.mark.parametrize("name", FRAMES)
def test_a_float32_target_at_a_limit_is_not_counted(name: str) -> None:
    limits = SceneLayout(load_model()).limits_rad
    for side in (0, 1):
        values = FRAMES[name].from_rad(limits[:, side]).astype(np.float32)
        assert clip_to_limits(FRAMES[name].to_rad(values), limits)[1] == 0


def test_environment_state_has_its_documented_length() -> None:
    model = load_model()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    layout = SceneLayout(model)
    rows = np.stack([layout.row(data)] * 6).reshape(2, 3, -1)
    states = environment_state(layout.scene_state(rows), np.full((2, 3), 0.25))
    assert states.shape == (2, 3, len(ENVIRONMENT_STATE_NAMES))
    assert states.dtype == np.float32
    assert len(set(ENVIRONMENT_STATE_NAMES)) == len(ENVIRONMENT_STATE_NAMES)
    assert states[0, 0, ENVIRONMENT_STATE_NAMES.index("progress")] == 0.25
    assert states[0, 0, ENVIRONMENT_STATE_NAMES.index("block_pos_y")] == pytest.approx(0.3)


def test_scene_state_reads_the_named_elements() -> None:
    model = load_model()
    data = mujoco.MjData(model)
    data.qpos[:] = model.key_qpos[0]
    data.joint("elbow_flex").qpos = 0.5
    data.joint("gripper").qvel = 0.25
    mujoco.mj_forward(model, data)
    state = SceneLayout(model).scene_state(SceneLayout(model).row(data))
    np.testing.assert_array_equal(state.tool_pos, data.site("tool").xpos)
    np.testing.assert_array_equal(state.block_pos, data.body("block").xpos)
    assert state.joint_pos_rad[JOINT_NAMES.index("elbow_flex")] == 0.5
    assert state.joint_vel[JOINT_NAMES.index("gripper")] == 0.25


def test_missing_elements_are_all_listed(tmp_path: Path) -> None:
    spec = mujoco.MjSpec.from_file(str(model_dir() / "scene.xml"))
    for element in (*spec.keys, spec.sensor("block_linvel")):
        spec.delete(element)
    spec.delete(spec.camera("camera_side"))
    spec.delete(spec.actuator("gripper"))
    path = tmp_path / "other.xml"
    path.write_text(spec.to_xml())
    with pytest.raises(ValueError, match="actuator 'gripper', sensor 'block_linvel', camera 'camera_side'"):
        load_model(path, CAMERA_NAMES)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no_such\.xml"):
        load_model("no_such.xml")
