"""Demonstrations: a dataset that LeRobot reads, honest labels, refusal to overwrite."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reinflow_so101.stages import demonstrations
from reinflow_so101.stages.state_data import read_state_dataset
from so101_gym_env import SO101PickEnv
from so101_mujoco_utils import FRAMES
from so101_sim.expert import ScriptedExpert
from so101_sim.tasks.registry import differences, nearest_task


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> demonstrations.DemoConfig:
    return demonstrations.DemoConfig(output_dir=tmp_path_factory.mktemp("demos") / "dataset", episodes=2)


@pytest.fixture(scope="module")
def counts(config: demonstrations.DemoConfig) -> tuple[int, int]:
    return demonstrations.record(config)


def test_dataset_is_readable_by_lerobot(config: demonstrations.DemoConfig, counts: tuple[int, int]) -> None:
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    kept, tried = counts
    assert kept == 2 <= tried
    dataset = LeRobotDataset(config.repo_id, root=config.output_dir, video_backend="pyav")
    assert (dataset.num_episodes, len(dataset), dataset.fps) == (2, 300, 50)
    assert dataset.features["action"]["names"][0] == "shoulder_pan.pos"
    frame = dataset[0]
    assert frame["task"] == "pick up the block"
    assert frame["observation.images.camera_up"].shape == (3, 96, 96)
    assert abs(float(frame["observation.state"][4]) + 84.04) < 3  # LeRobot degrees, start noise included
    assert {"mean", "std", "q01", "q99"} <= dataset.meta.stats["action"].keys()


def test_refuses_to_overwrite(config: demonstrations.DemoConfig, counts: tuple[int, int]) -> None:
    with pytest.raises(demonstrations.DemoError, match="exists"):
        demonstrations.record(config)


def test_actions_are_the_undisturbed_plan_and_recovery_is_seen(tmp_path: Path) -> None:
    config = demonstrations.DemoConfig(output_dir=tmp_path)
    env = demonstrations.make_env(config)
    expert = ScriptedExpert(env.model)
    frames, lifted = demonstrations.record_episode(env, expert, 1_000_000, config.disturbance_deg)
    calm, calm_lifted = demonstrations.record_episode(env, expert, 1_000_000, (0.0, 0.0, 0.0))
    env.close()
    assert lifted
    assert calm_lifted
    assert len(frames) == len(calm) == 150
    action, calm_action = (np.array([f["action"] for f in episode]) for episode in (frames, calm))
    assert np.array_equal(action[:50], calm_action[:50])  # planned from the same start: the disturbance is not in it
    state, calm_state = (np.array([f["agent_pos"] for f in episode]) for episode in (frames, calm))
    assert np.abs(state[50] - calm_state[50])[:5].max() > 0.3  # degrees: the second decision starts elsewhere
    assert np.abs(FRAMES["lerobot"].to_rad(action)).max() < np.pi


def test_disturbance_is_smooth_bounded_and_spares_the_gripper() -> None:
    motion = np.rad2deg(demonstrations.smooth_disturbance(np.random.default_rng(0), 50, 4.0))
    assert motion.shape == (50, 6)
    assert 0 < np.abs(motion).max() <= 4.0
    assert np.abs(np.diff(motion, axis=0)).max() < 1.0
    assert not motion[:, 5].any()


def test_what_is_recorded_and_what_it_is_for() -> None:
    config = demonstrations.DemoConfig(output_dir=Path("x"))
    assert config.env().block_radius_range == (0.19, 0.29) and nearest_task(config.task_env()) == "lift"
    assert differences(config.task_env(), "lift") == {}
    still = demonstrations.DemoConfig(output_dir=Path("x"), block_yaw_deg=0.0)
    assert still.env().block_yaw_deg == still.task_env().block_yaw_deg == 0.0
    wide = demonstrations.DemoConfig(output_dir=Path("x"), task="lift_wide")
    assert wide.env().block_angle_deg == 60.0 and differences(wide.task_env(), "lift_wide") == {}


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="episodes"):
        demonstrations.DemoConfig(output_dir=Path("x"), episodes=0)
    with pytest.raises(ValueError, match="block_angle_deg not read by task=lift_fixed"):
        demonstrations.DemoConfig(output_dir=Path("x"), task="lift_fixed", block_angle_deg=40.0)
    with pytest.raises(ValueError, match="task=lfit is unknown"):
        demonstrations.DemoConfig(output_dir=Path("x"), task="lfit")
    with pytest.raises(ValueError, match="block_radius_range"):
        demonstrations.DemoConfig(output_dir=Path("x"), block_radius_range=(0.3, 0.2))
    with pytest.raises(ValueError, match="image_size must be at least 8"):
        demonstrations.DemoConfig(output_dir=Path("x"), image_size=3)
    with pytest.raises(ValueError, match="disturbance_deg"):
        demonstrations.DemoConfig(output_dir=Path("x"), disturbance_deg=(1.0,))


def test_gives_up_when_the_expert_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demonstrations, "record_episode", lambda *_: ([], False))
    with pytest.raises(demonstrations.DemoError, match="only 0 of 20"):
        demonstrations.record(demonstrations.DemoConfig(output_dir=tmp_path / "d", episodes=1))
    assert not (tmp_path / "d").exists()  # nothing was recorded: the corrected command may take the folder


# --- For offline RL ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> demonstrations.DemoConfig:
    """Every second of four episodes is the noisy expert's."""
    config = demonstrations.DemoConfig(
        tmp_path_factory.mktemp("half") / "data", episodes=4, noisy_share=0.5, rewards=True, environment_state=True,
        images=False,
    )  # fmt: skip
    assert demonstrations.record(config) == (4, 4)  # what fails is kept
    return config


def test_half_of_the_episodes_are_noisy_and_rewards_are_the_tasks(half: demonstrations.DemoConfig) -> None:
    found = read_state_dataset(half.output_dir, rewards=True)
    assert found.rewards is not None and [len(a) for a in found.actions] == [150] * 4
    roughness = [float(np.abs(np.diff(a[:50, :5], n=2, axis=0)).sum()) for a in found.actions]
    assert [half.is_noisy(i) for i in range(4)] == [False, True, False, True]
    assert min(roughness[1::2]) > max(roughness[::2])  # a disturbance is in what the noisy expert's data holds
    for paid, ended, end in zip(found.rewards, found.terminated, found.ends, strict=True):
        assert not paid[end:].any() and (ended or end == 150)
        assert not ended or (paid[end - 1] > 5.0 and end < 150)  # the lift is paid for in the step that ends it
    assert found.terminated[0] and found.returns()[0] > 8.0


def test_recorded_rewards_are_those_that_the_task_pays(half: demonstrations.DemoConfig) -> None:
    """The noisy expert's actions are what was really told: played in the task they earn what the data says."""
    found = read_state_dataset(half.output_dir, rewards=True)
    assert found.rewards is not None
    env = SO101PickEnv(replace(half.env(), lift_threshold=half.task_env().lift_threshold))
    for number in (1, 3):
        observation, _ = env.reset(seed=half.first_seed + number)
        assert np.array_equal(observation["environment_state"], found.states[number][0])
        _, rewards, terminated, _, info = env.step_chunk(found.actions[number])
        assert (int(info["active"].sum()), terminated) == (found.ends[number], found.terminated[number])
        assert np.allclose(rewards, found.rewards[number], atol=1e-3)  # actions were stored as float32
    env.close()


def test_columns_are_only_those_asked_for(half: demonstrations.DemoConfig, config: demonstrations.DemoConfig) -> None:
    plain = demonstrations.dataset_features(config)
    cameras = ["observation.images.camera_up", "observation.images.wrist_camera"]
    assert list(plain) == ["observation.state", "action", *cameras]
    more = ["observation.environment_state", "next.reward", "next.done", "next.truncated"]
    assert list(demonstrations.dataset_features(half)) == ["observation.state", "action", *more]


def test_shares_are_spread_evenly() -> None:
    config = demonstrations.DemoConfig(output_dir=Path("x"), noisy_share=0.3)
    assert sum(config.is_noisy(i) for i in range(100)) == 30
    assert not any(demonstrations.DemoConfig(output_dir=Path("x")).is_noisy(i) for i in range(100))
    for changes in ({"noisy_share": 1.5}, {"noisy_disturbance_deg": (1.0,)}, {"video": True, "images": False}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            demonstrations.DemoConfig(output_dir=Path("x"), **changes)
