"""reinflow-collect: a policy that learns, a recording that is what was played, and a training that survives kill -9."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason='pip install "reinflow-so101[gym]"')

from reinflow import ConfigError
from reinflow_gym.collect import MediumPolicy, TrainSettings, evaluate_return, known_target, record
from reinflow_gym.config import GymConfig
from reinflow_gym.vector import GymVectorEnv
from reinflow_so101.stages.collect import CollectConfig, collect
from reinflow_so101.stages.state_data import read_state_dataset

ROOT = Path(__file__).parents[2]
TASK = GymConfig("InvertedPendulum-v5", max_steps_per_episode=100)  # random: some 8 steps; the best there is: 100
SETTINGS = TrainSettings(target_return=30.0, max_steps=30_000, save_interval=2_048, eval_episodes=5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A policy at its target, and the figures on the way."""
    policy = MediumPolicy(TASK, SETTINGS, tmp_path_factory.mktemp("medium"))
    with GymVectorEnv(TASK, 4, 0) as env:
        figures = list(policy.train(lambda: evaluate_return(env, policy.act, SETTINGS.eval_episodes)))
    yield policy, figures
    policy.close()


def test_training_ends_at_the_target(trained):
    policy, figures = trained
    assert figures[0]["return"] < 20 and figures[-1]["eval_return"] >= 30.0
    assert policy.trained and policy.steps == figures[-1]["steps"] < 30_000
    assert not list(policy.train(lambda: 0.0))


def test_what_a_killed_training_goes_on_from(trained):
    """Weights, normalisation and counters come back, without a pickle; the loaded policy acts the same."""
    policy, _ = trained
    assert {path.suffix for path in policy.directory.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    again = MediumPolicy(TASK, SETTINGS, policy.directory)
    assert (again.steps, again.trained) == (policy.steps, True)
    states, noise = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), np.ones((5, 1))
    np.testing.assert_array_equal(again.act(states, noise), policy.act(states, noise))
    assert len(again.model.policy.optimizer.state_dict()["state"]) > 0
    again.close()


def test_a_recording_is_what_was_played(trained):
    """The recorded actions, played in the plain environment, give the recorded states and rewards."""
    policy, _ = trained
    with GymVectorEnv(TASK, 3, 0) as env:
        episodes = record(env, policy.act, range(5))
        alone = record(env, policy.act, [4])
        by_steps = record(env, policy.act, range(100), min_steps=1)
    assert episodes.seeds == list(range(5)) and len(by_steps.seeds) == 3
    np.testing.assert_allclose(alone.actions[0], episodes.actions[4], atol=1e-5)
    plain = gymnasium.make("InvertedPendulum-v5", max_episode_steps=100)
    for seed in range(5):
        seen, _ = plain.reset(seed=seed)
        for state, action, reward in zip(
            episodes.states[seed], episodes.actions[seed], episodes.rewards[seed], strict=True
        ):
            np.testing.assert_array_equal(state, seen.astype(np.float32))
            seen, played, terminated, truncated, _ = plain.step(action)
            assert np.float32(played) == reward
        assert (terminated or truncated) and terminated == episodes.terminated[seed]


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--target-return"):
        CollectConfig(tmp_path / "data", env_id="Pendulum-v1")
    with pytest.raises(ConfigError, match="episodes=5001"):
        CollectConfig(tmp_path / "data", episodes=5_001)
    with pytest.raises(ConfigError, match="minutes"):
        CollectConfig(tmp_path / "data", minutes=0)
    assert CollectConfig(tmp_path, env_id="Hopper-v5").settings().target_return == known_target("Hopper-v5") > 0
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ConfigError, match=r"reinflow-so101\[gym\]"):
        collect(CollectConfig(tmp_path / "data"))
    with pytest.raises(ConfigError, match="no seed"), GymVectorEnv(TASK, 1, 0) as env:
        record(env, lambda states, noise: noise, [])
    assert not (tmp_path / "data").exists()


def test_help_is_quick_to_load():
    code = (
        "import sys, reinflow_so101.stages.collect as c, pathlib\n"
        "c.CollectConfig(pathlib.Path('d'))\n"
        "print({'torch', 'lerobot', 'gymnasium', 'mujoco', 'stable_baselines3'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_killed_collection_goes_on(tmp_path):
    """kill -9 in the training; --resume trains on from there, records, and the data set reads back."""
    config = CollectConfig(
        tmp_path / "data", env_id=TASK.env_id, max_steps_per_episode=100, target_return=1e6, max_steps=4_096,
        save_interval=2_048, episodes=3,
    )  # fmt: skip
    process = subprocess.Popen(command(config), cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(config.output_dir.glob("progress/checkpoints/0*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(ConfigError, match="--resume"):
        collect(config)
    figures = collect(replace(config, resume=True))
    steps = [json.loads(line)["step"] for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2_048, 4_096] and figures["trained_steps"] == 4_096
    data = read_state_dataset(config.output_dir, rewards=True)
    assert len(data.states) == 3 and (data.state_dim, data.action_dim) == (4, 1)
    assert np.mean(data.returns()) == pytest.approx(figures["return_mean"])
    card = json.loads((config.output_dir / "meta/reinflow.json").read_text())
    assert GymConfig.from_json(card["env"]) == TASK
    assert not (config.output_dir / "progress").exists()
    with pytest.raises(ConfigError, match="finished"):
        collect(replace(config, resume=True))


def command(config: CollectConfig) -> list[str]:
    """What a user types for it."""
    names = ("env_id", "max_steps_per_episode", "target_return", "max_steps", "save_interval", "episodes", "output_dir")
    flags = [word for name in names for word in ("--" + name.replace("_", "-"), str(getattr(config, name)))]
    return [sys.executable, "-c", "from reinflow_so101.stages.collect import main; main()", *flags]
