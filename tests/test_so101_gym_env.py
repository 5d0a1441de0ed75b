"""SO101PickEnv: the gymnasium contract, resets, chunks, the end of an episode, state, errors."""

import json
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from so101_gym_env import SO101PickEnv
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, FRAMES, JOINT_NAMES
from so101_sim.config import EnvConfig
from so101_sim.expert import ScriptedExpert

SMALL = EnvConfig(image_size=32, cameras=("camera_up", "wrist_camera"), environment_state=True, randomize_block=True)
BLIND = EnvConfig(render_images=False, environment_state=True, randomize_block=True, reward_mode="staged")


def expert_actions(env: SO101PickEnv) -> np.ndarray:
    state = env.scene.layout.scene_state(env.row)
    yaw = 2.0 * np.arctan2(state.block_quat[3], state.block_quat[0])
    return env.scene.frame.from_rad(ScriptedExpert(env.model).plan(state.joint_pos_rad, state.block_pos, yaw))


def wander(env: SO101PickEnv, steps: int, seed: int = 0) -> np.ndarray:
    """Targets (steps, 6) that drift away from where the arm is."""
    noise = np.random.default_rng(seed).normal(size=(steps, 6)).cumsum(axis=0)
    return env.scene.agent_pos(env.row) + 1.5 * noise


@pytest.mark.parametrize("config", [SMALL, BLIND, EnvConfig(image_size=32)])
def test_gymnasium_contract_without_warnings(config: EnvConfig) -> None:
    """All but one: gymnasium advises actions within -1..1; ours are joint targets, by design."""
    env = gymnasium.make("so101/SO101Pick-v0", config=config, render_mode="rgb_array")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*we recommend using a symmetric and normalized space")
        check_env(env.unwrapped)
    env.close()


def test_observation_and_attributes() -> None:
    env = SO101PickEnv(SMALL, render_mode="rgb_array")
    observation, info = env.reset(seed=0)
    assert observation["agent_pos"].shape == (6,)
    assert observation["environment_state"].shape == (len(ENVIRONMENT_STATE_NAMES),)
    assert {name: image.shape for name, image in observation["pixels"].items()} == {
        "camera_up": (32, 32, 3),
        "wrist_camera": (32, 32, 3),
    }
    assert env.observation_space.contains(observation)
    assert info["is_success"] is False
    assert (env.task, env.task_description, env._max_episode_steps) == ("pick up the block", "pick up the block", 150)
    assert env.metadata["render_fps"] == 50
    frame = env.render()
    assert frame is not None
    assert frame.shape == (32, 64, 3)
    np.testing.assert_array_equal(frame[:, :32], observation["pixels"]["camera_up"])
    env.close()


def test_made_by_name_with_fields_of_the_config() -> None:
    env = gymnasium.make("so101/SO101Pick-v0", image_size=32, cameras=("camera_side",), randomize_block=True)
    observation, _ = env.reset(seed=0)
    assert observation["pixels"]["camera_side"].shape == (32, 32, 3)
    assert env.render_mode is None
    env.close()


def test_the_block_is_seen() -> None:
    env = SO101PickEnv(EnvConfig(image_size=64, cameras=("camera_up",)))
    left = env.reset(seed=0, options={"block_pos": (-0.1, 0.25, 0.0125)})[0]["pixels"]["camera_up"].astype(int)
    right = env.reset(seed=0, options={"block_pos": (0.1, 0.25, 0.0125)})[0]["pixels"]["camera_up"].astype(int)
    columns = [np.argwhere(i[..., 0] > 2 * i[..., 1] + 40)[:, 1].mean() for i in (left, right)]
    assert columns[0] < 32 < columns[1]
    env.close()


def test_lerobot_eval_finds_what_it_needs() -> None:
    lerobot_utils = pytest.importorskip("lerobot.envs.utils")
    make = [lambda: gymnasium.make("so101/SO101Pick-v0", config=SMALL, render_mode="rgb_array")] * 2
    env = gymnasium.vector.SyncVectorEnv(make)
    observation, _ = env.reset(seed=[0, 1])
    batch = lerobot_utils.preprocess_observation(observation)
    assert batch["observation.images.camera_up"].shape == (2, 3, 32, 32)
    assert batch["observation.state"].shape == (2, 6)
    assert env.call("task_description") == ("pick up the block",) * 2
    assert env.call("_max_episode_steps") == (150, 150)
    env.close()


def test_seeded_resets_repeat_and_differ() -> None:
    env = SO101PickEnv(BLIND)
    first = [env.reset(seed=3)[0], env.reset()[0], env.reset(seed=4)[0]]
    again = [env.reset(seed=3)[0], env.reset()[0]]
    for a, b in zip(first, again, strict=False):
        np.testing.assert_array_equal(a["environment_state"], b["environment_state"])
    states = [observation["environment_state"] for observation in first]
    assert len({state.tobytes() for state in states}) == 3


def test_random_blocks_stay_in_their_ranges_and_are_no_success() -> None:
    env = SO101PickEnv(BLIND)
    env.reset(seed=0)
    for _ in range(100):
        _, info = env.reset()
        state = env.scene.layout.scene_state(env.row)
        angle = np.rad2deg(np.arctan2(state.block_pos[0], state.block_pos[1]))
        assert 0.20 <= np.hypot(*state.block_pos[:2]) <= 0.28
        assert abs(angle) <= 30.0
        assert abs(2.0 * np.arctan2(state.block_quat[3], state.block_quat[0])) <= 0.4
        assert not info["is_success"]


def test_the_default_start_is_the_documented_one() -> None:
    env = SO101PickEnv(EnvConfig(render_images=False, joint_frame="so100_legacy"))
    observation, _ = env.reset(seed=0)
    degrees = observation["agent_pos"] - np.array([0.0, 120.0, 110.0, 57.0, -27.0, 12.0])
    np.testing.assert_allclose(
        degrees, [0.06, -100.0, 89.95, 66.46, 5.96, 1.0], atol=1e-3
    )  # shoulder_lift at its limit
    np.testing.assert_allclose(env.scene.layout.scene_state(env.row).block_pos, [0.0, 0.3, 0.0125])


def test_start_noise_moves_every_joint() -> None:
    starts = []
    for noise in (0.0, 3.0):
        env = SO101PickEnv(EnvConfig(render_images=False, start_noise_deg=noise))
        starts.append(np.rad2deg(FRAMES["lerobot"].to_rad(env.reset(seed=0)[0]["agent_pos"])))
    moved = np.abs(starts[1] - starts[0])
    assert moved.max() <= 3.0 + 1e-3
    assert np.count_nonzero(moved) >= len(JOINT_NAMES) - 1  # shoulder_lift may be held by its limit


def test_a_chunk_is_its_steps() -> None:
    one, many = SO101PickEnv(SMALL), SO101PickEnv(SMALL)
    one.reset(seed=1)
    many.reset(seed=1)
    actions = wander(one, 12)
    observation, rewards, terminated, truncated, info = many.step_chunk(actions)
    steps = [one.step(action) for action in actions]
    assert [step[1] for step in steps] == rewards.tolist()
    assert (terminated, truncated) == steps[-1][2:4] == (False, False)
    assert info["active"].all()
    for name in ("agent_pos", "environment_state"):
        np.testing.assert_array_equal(observation[name], steps[-1][0][name])
    for camera, image in observation["pixels"].items():
        np.testing.assert_array_equal(image, steps[-1][0]["pixels"][camera])
    for name, values in info["reward_terms"].items():
        assert values.tolist() == [step[4]["reward_terms"][name] for step in steps]
    assert one.episode == many.episode
    one.close()
    many.close()


def test_a_lift_ends_the_episode_inside_a_chunk() -> None:
    env = SO101PickEnv(BLIND)
    env.reset(seed=2)
    _, rewards, terminated, truncated, info = env.step_chunk(expert_actions(env))
    assert (terminated, truncated, info["is_success"]) == (True, False, True)
    length = int(info["active"].sum())
    assert 90 < length < 150
    assert info["active"][:length].all()
    assert not rewards[length:].any()
    assert info["reward_terms"]["success"][length - 1] == BLIND.success_bonus
    assert info["block_height_m"] > BLIND.lift_threshold
    stats = env.episode.stats(0, success=True)
    assert stats.length == length
    assert stats.return_ == pytest.approx(sum(stats.reward_terms.values()))
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(np.zeros(6))


def test_time_limit_truncates_within_a_chunk() -> None:
    env = SO101PickEnv(EnvConfig(render_images=False, max_steps_per_episode=25))
    env.reset(seed=0)
    hold = np.repeat(env.scene.agent_pos(env.row)[None], 10, axis=0)
    assert [env.step_chunk(hold)[2:4] for _ in range(2)] == [(False, False)] * 2
    _, rewards, terminated, truncated, info = env.step_chunk(hold)
    assert (terminated, truncated) == (False, True)
    assert info["active"].tolist() == [True] * 5 + [False] * 5
    assert not rewards[5:].any()
    assert env.episode.length == 25


def test_a_lift_in_the_last_step_is_a_termination() -> None:
    env = SO101PickEnv(BLIND)
    env.reset(seed=2)
    length = int(env.step_chunk(expert_actions(env))[4]["active"].sum())
    limited = SO101PickEnv(BLIND, max_steps_per_episode=length)
    limited.reset(seed=2)
    assert limited.step_chunk(expert_actions(limited))[2:4] == (True, False)


def test_state_goes_on_bit_for_bit_through_json() -> None:
    env, other = SO101PickEnv(BLIND), SO101PickEnv(BLIND)
    env.reset(seed=5)
    env.step_chunk(expert_actions(env)[:90])
    state = env.get_state()
    plain = json.loads(json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in state.items()}))

    def go_on(which: SO101PickEnv) -> list[bytes]:
        actions = np.repeat(which.scene.agent_pos(which.row)[None], 20, axis=0) + 3.0
        seen = [which.step_chunk(actions)[0]["environment_state"].tobytes()]
        return [*seen, which.reset()[0]["environment_state"].tobytes(), str(which.get_state()["rng"]).encode()]

    straight = go_on(env)
    other.set_state(plain)
    assert go_on(other) == straight


def test_targets_outside_the_limits_are_clipped_and_counted() -> None:
    env = SO101PickEnv(BLIND)
    env.reset(seed=0)
    actions = np.repeat(env.scene.agent_pos(env.row)[None], 6, axis=0)
    actions[2:5, 0] = 500.0
    info = env.step_chunk(actions)[4]
    assert info["clipped_targets"] == 3
    assert env.episode.clipped_targets == 3
    assert abs(env.scene.agent_pos(env.row)[0]) < 110.0 + 12.0


@pytest.mark.parametrize("bad", [np.full(6, np.nan), np.full(6, np.inf), np.zeros(5), np.zeros((0, 6))])
def test_bad_actions_are_refused(bad: np.ndarray) -> None:
    env = SO101PickEnv(BLIND)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"NaN or infinity|joints|shape"):
        env.step_chunk(bad if bad.ndim == 2 else bad[None])


def test_reset_options_place_the_block_and_are_checked() -> None:
    env = SO101PickEnv(BLIND)
    env.reset(seed=0, options={"block_pos": (0.05, 0.25, 0.0125), "block_yaw_rad": 0.3})
    state = env.scene.layout.scene_state(env.row)
    np.testing.assert_allclose(state.block_pos, [0.05, 0.25, 0.0125])
    assert 2.0 * np.arctan2(state.block_quat[3], state.block_quat[0]) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="blok_pos: is block_pos meant"):
        env.reset(options={"blok_pos": (0.0, 0.3, 0.0125)})
    env.reset(seed=0, options={"lerobot_new_rollout": True})  # somebody else's
    with pytest.raises(ValueError, match="lift_threshold"):
        env.reset(options={"block_pos": (0.0, 0.3, 0.2)})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("joint_frame", "degrees"),
        ("reward_mode", "dense"),
        ("image_size", 0),
        ("steps_per_action", 0),
        ("max_steps_per_episode", 0),
        ("lift_threshold", 0.01),
        ("block_pos", (0.0, 0.3)),
        ("block_radius_range", (0.3, 0.2)),
        ("block_angle_deg", -1.0),
        ("block_yaw_deg", float("nan")),
        ("start_noise_deg", 400.0),
        ("starting_position", (0.0,) * 5),
        ("contact_bonus", -0.1),
        ("success_bonus", float("inf")),
        ("reach_length", 0.0),
        ("instruction", "  "),
        ("cameras", ()),
        ("cameras", ("camera_up", "camera_up")),
    ],
)
def test_bad_configs_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"EnvConfig\.{field} .*: \w+"):
        EnvConfig(**{field: value})


def test_a_missing_camera_is_named() -> None:
    with pytest.raises(ValueError, match="camera 'camera_front'"):
        SO101PickEnv(EnvConfig(cameras=("camera_front",)))


def test_images_do_not_depend_on_what_was_drawn_before() -> None:
    env = SO101PickEnv(SMALL)
    first = env.reset(seed=0)[0]["pixels"]
    env.step_chunk(wander(env, 10))
    again = env.reset(seed=0)[0]["pixels"]
    for camera, image in first.items():
        np.testing.assert_array_equal(image, again[camera])
    env.close()
