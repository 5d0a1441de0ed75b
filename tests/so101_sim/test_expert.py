"""The scripted expert, and with it the scene: what it grasps must stay grasped."""

from collections.abc import Iterator
from pathlib import Path

import mujoco
import numpy as np
import pytest

from so101_sim.expert import JAW_CLOSED_RAD, JAW_OPEN_RAD, ScriptedExpert

SCENE = Path(__file__).parents[2] / "model" / "scene.xml"
KEYS = ("home", "home_wrist_turned")
SUBSTEPS = 10
NUM_STEPS = 150
LIFTED_HEIGHT = 0.08
BLOCK_HALF_SIZE = 0.0125


@pytest.fixture(scope="module")
def model() -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_path(str(SCENE))


@pytest.fixture(scope="module")
def expert(model: mujoco.MjModel) -> ScriptedExpert:
    return ScriptedExpert(model)


def random_blocks(count: int, seed: int) -> Iterator[tuple[np.ndarray, float]]:
    """Block centres (3,) and yaws: 0.20 to 0.30 m from the base, +-45 degrees off straight ahead, any yaw."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        radius, angle = rng.uniform(0.20, 0.30), rng.uniform(-np.pi / 4, np.pi / 4)
        position = np.array([radius * np.sin(angle), radius * np.cos(angle), BLOCK_HALF_SIZE])
        yield position, float(rng.uniform(-np.pi, np.pi))


def reset(model: mujoco.MjModel, key: str, block_pos: np.ndarray, block_yaw_rad: float) -> mujoco.MjData:
    data = mujoco.MjData(model)
    mujoco.mj_resetDataKeyframe(model, data, model.key(key).id)
    data.qpos[6:9] = block_pos
    data.qpos[9:13] = [np.cos(block_yaw_rad / 2), 0.0, 0.0, np.sin(block_yaw_rad / 2)]
    return data


def follow(model: mujoco.MjModel, data: mujoco.MjData, targets_rad: np.ndarray) -> None:
    for target in targets_rad:
        data.ctrl[:] = target
        mujoco.mj_step(model, data, SUBSTEPS)


def block_yaw(data: mujoco.MjData) -> float:
    w, x, y, z = data.qpos[9:13]
    return float(np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)))


def count_lifted(model: mujoco.MjModel, expert: ScriptedExpert, key: str, count: int, seed: int) -> int:
    lifted = 0
    for position, yaw in random_blocks(count, seed):
        data = reset(model, key, position, yaw)
        follow(model, data, expert.plan(data.qpos[:6], position, yaw))
        lifted += data.qpos[8] > LIFTED_HEIGHT
    return lifted


def test_lifts_random_blocks(model: mujoco.MjModel, expert: ScriptedExpert) -> None:
    lifted = sum(count_lifted(model, expert, key, 30, seed) for seed, key in enumerate(KEYS))
    assert lifted >= 59


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_lifts_300_random_blocks(model: mujoco.MjModel, expert: ScriptedExpert, key: str) -> None:
    assert count_lifted(model, expert, key, 300, seed=7) >= 297


@pytest.mark.parametrize("key", KEYS)
def test_plans_are_smooth_repeatable_and_within_limits(model: mujoco.MjModel, expert: ScriptedExpert, key: str) -> None:
    for position, yaw in random_blocks(10, seed=3):
        q_rad = model.key(key).qpos[:6]
        plan = expert.plan(q_rad, position, yaw)
        assert plan.shape == (NUM_STEPS, 6)
        np.testing.assert_array_equal(plan, ScriptedExpert(model).plan(q_rad, position, yaw))
        assert (plan >= model.jnt_range[:6, 0]).all()
        assert (plan <= model.jnt_range[:6, 1]).all()
        steps = np.abs(np.diff(np.vstack([q_rad, plan]), axis=0))
        assert steps.max() * 50 < 4.9  # rad/s: where the servos saturate


@pytest.mark.parametrize("quarter_turns", [-1, 1, 2])
def test_equivalent_yaws_give_the_same_plan(model: mujoco.MjModel, expert: ScriptedExpert, quarter_turns: int) -> None:
    q_rad = model.key("home_wrist_turned").qpos[:6]
    position = np.array([0.05, 0.25, BLOCK_HALF_SIZE])
    turned = expert.plan(q_rad, position, 0.3 + quarter_turns * np.pi / 2)
    np.testing.assert_allclose(turned, expert.plan(q_rad, position, 0.3), atol=1e-3)


def test_chunk_boundaries_fall_on_natural_states(model: mujoco.MjModel, expert: ScriptedExpert) -> None:
    data = reset(model, "home_wrist_turned", position := np.array([0.03, 0.26, BLOCK_HALF_SIZE]), 0.5)
    plan = expert.plan(data.qpos[:6], position, 0.5)
    follow(model, data, plan[:50])
    assert data.qpos[5] == pytest.approx(JAW_OPEN_RAD, abs=0.02)
    offset = data.site("tool").xpos - position
    assert np.linalg.norm(offset[:2]) < 0.01
    assert offset[2] > 0.04
    follow(model, data, plan[50:100])
    assert plan[99, 5] == pytest.approx(JAW_CLOSED_RAD)
    for name in ("fixed_jaw_contact", "moving_jaw_contact"):
        assert np.linalg.norm(data.sensor(name).data) > 1.0
    follow(model, data, plan[100:])
    assert data.qpos[8] > 0.12


@pytest.mark.parametrize("start_step", [0, 20, 50, 60, 75, 100, 149])
def test_a_plan_covers_the_rest_of_the_episode(model: mujoco.MjModel, expert: ScriptedExpert, start_step: int) -> None:
    position = np.array([0.0, 0.25, BLOCK_HALF_SIZE])
    q_rad = model.key("home").qpos[:6]
    plan = expert.plan(q_rad, position, 0.0, start_step=start_step)
    assert plan.shape == (NUM_STEPS - start_step, 6)
    assert np.abs(plan[0] - q_rad).max() < 0.05


@pytest.mark.parametrize("start_step", [25, 50, 70, 85, 110])
def test_recovers_from_a_push(model: mujoco.MjModel, expert: ScriptedExpert, start_step: int) -> None:
    rng = np.random.default_rng(start_step)
    lifted = 0
    for position, yaw in random_blocks(6, seed=11):
        data = reset(model, "home_wrist_turned", position, yaw)
        plan = expert.plan(data.qpos[:6], position, yaw)
        push = np.linspace(0.0, 1.0, 11)[1:, None] * rng.normal(0.0, np.deg2rad(4.0), 6)
        follow(model, data, plan[: start_step - 10])
        follow(model, data, plan[start_step - 10 : start_step] + push)
        again = expert.plan(data.qpos[:6], data.qpos[6:9], block_yaw(data), start_step)
        assert np.abs(again[0] - data.qpos[:6]).max() < 0.05
        follow(model, data, again)
        lifted += data.qpos[8] > LIFTED_HEIGHT
    assert lifted >= 5


def test_replanning_unperturbed_ends_at_the_same_pose(model: mujoco.MjModel, expert: ScriptedExpert) -> None:
    data = reset(model, "home", position := np.array([0.03, 0.26, BLOCK_HALF_SIZE]), 0.5)
    plan = expert.plan(data.qpos[:6], position, 0.5)
    follow(model, data, plan[:60])
    again = expert.plan(data.qpos[:6], position, 0.5, start_step=60)
    np.testing.assert_allclose(again[-1], plan[-1], atol=1e-3)
    np.testing.assert_allclose(again[14], plan[74], atol=1e-3)  # around the block, before the jaws close


def test_planning_leaves_its_arguments_alone(model: mujoco.MjModel, expert: ScriptedExpert) -> None:
    q_rad, position = model.key("home").qpos[:6].copy(), np.array([0.0, 0.25, 0.2])
    expert.plan(q_rad, position, 0.0)
    np.testing.assert_array_equal(q_rad, model.key("home").qpos[:6])
    np.testing.assert_array_equal(position, [0.0, 0.25, 0.2])
