"""LeRobot's door to the environment: what it is called there, what it shows, and that LeRobot finds it on its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import gymnasium
import numpy as np
import pytest
from lerobot.envs.configs import EnvConfig
from lerobot.envs.factory import make_env, make_env_config
from lerobot.envs.utils import NEW_ROLLOUT_OPTION, env_to_policy_features

import lerobot_env_so101_reinflow as plugin
from reinflow import ConfigError
from reinflow_so101.policy_card import PLUGIN_ENV
from so101_gym_env import SO101PickEnv
from so101_sim.tasks.registry import TASKS, task_env
from tests.lerobot_commands import ROOT, plugin_folder


@pytest.mark.slow
def test_lerobot_finds_it_by_the_distributions_name(tmp_path):
    """By default tests/test_chain.py holds it: LeRobot's commands are given these types there and know them."""
    code = (
        "from lerobot.utils.import_utils import register_third_party_plugins as r; r()\n"
        "from lerobot.envs.configs import EnvConfig; from lerobot.robots import RobotConfig\n"
        "print(EnvConfig.get_choice_class('so101_reinflow'), RobotConfig.get_choice_class('so101_simulated'))"
    )
    paths = os.pathsep.join((str(plugin_folder(tmp_path)), str(ROOT)))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert "SO101ReinFlowEnv" in done.stdout and "SimulatedSO101Config" in done.stdout


def test_it_is_a_distribution_of_that_name(tmp_path):
    """LeRobot compares raw names: the underscores must survive."""
    source = shutil.copytree(ROOT / plugin.__name__, tmp_path / plugin.__name__)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert f"Name: {plugin.__name__}\n" in metadata and f"{plugin.__name__}/__init__.py" in names


def test_its_name_is_the_one_that_policies_are_told_by():
    assert EnvConfig.get_choice_class(PLUGIN_ENV) is plugin.SO101ReinFlowEnv


def test_features_are_the_policys():
    config = make_env_config("so101_reinflow", task="lift")
    features = env_to_policy_features(config)
    assert set(features) == {
        "action", "observation.state", "observation.images.camera_up", "observation.images.wrist_camera"
    }  # fmt: skip
    assert features["observation.images.camera_up"].shape == (3, 96, 96)
    assert features["observation.state"].shape == features["action"].shape == (6,)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_starts_and_seeds_show_our_scenes(task):
    config = make_env_config("so101_reinflow", task=task, cameras=["camera_up"])
    (suite,) = make_env(config, n_envs=2).values()
    (envs,) = suite.values()
    ours = SO101PickEnv(task_env(task, cameras=("camera_up",), image_size=96))
    seen, _ = envs.reset(seed=[10_000, 10_001], options={NEW_ROLLOUT_OPTION: True})
    for row in range(2):
        expected, _ = ours.reset(seed=10_000 + row)
        assert np.array_equal(seen["pixels"]["camera_up"][row], expected["pixels"]["camera_up"])
        assert np.array_equal(seen["agent_pos"][row], expected["agent_pos"])
    assert envs.call("_max_episode_steps") == (150, 150) and envs.call("task_description")[0] == "pick up the block"
    assert envs.metadata["render_fps"] == 50 and envs.call("render")[0].shape == (96, 96, 3)
    envs.close()
    ours.close()


def test_another_rate_changes_the_substeps():
    config = make_env_config("so101_reinflow", fps=30, cameras=["camera_up"])
    env = gymnasium.make(config.gym_id, **config.gym_kwargs)
    assert env.unwrapped.scene.control_period_s == pytest.approx(1 / 30)
    env.close()


@pytest.mark.parametrize(("settings", "problem"), [
    ({"task": "lfit"}, "task=lfit is unknown"), ({"image_size": 0}, "image_size"),
    ({"joint_frame": "x"}, "joint_frame"),
])  # fmt: skip
def test_what_cannot_work_is_refused_by_name(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        make_env_config("so101_reinflow", **settings)
