"""GymVectorEnv keeps the environment's contract: whatever the workers, chunk ends and interruptions."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from reinflow import ConfigError
from reinflow.training_state import pack_tree, unpack_tree
from reinflow_gym.config import GymConfig
from reinflow_gym.vector import GymVectorEnv
from reinflow_gym.workers import WorkerError

ROOT = Path(__file__).parents[2]
HOPPER = GymConfig("Hopper-v5", max_steps_per_episode=15)
BIG = 2**48 * (2**32 - 1) + 4_999  # a training seed
SEEDS = [3, 4_999, BIG]


def assert_same(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{index}]")
    elif isinstance(a, np.ndarray):
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()), path
    elif hasattr(a, "__dataclass_fields__"):
        assert_same(vars(a), vars(b), path)
    else:
        assert a == b, path


def play(env: GymVectorEnv, start: int, chunks: int, num: int = 3, n: int = 4) -> list[Any]:
    """Chunks of random actions, partly beyond the Box; every ended episode restarts."""
    results = []
    for chunk in range(start, start + chunks):
        rng = np.random.default_rng(chunk)
        actions = 1.5 * rng.standard_normal((num, n, env.action_dim))
        results.append(env.step_chunk(actions, [100 * chunk + row for row in range(num)]))
    return results


def test_it_plays_what_gymnasium_plays():
    """Rewards, states, terminations and time limits of a plain loop over gymnasium's own environments."""
    with GymVectorEnv(HOPPER, 3, 0) as env:
        first = env.reset(SEEDS)["environment_state"]
        results = play(env, 0, 12)
    ended = 0
    for row in range(3):
        seed = SEEDS[row]
        plain = gymnasium.make("Hopper-v5", max_episode_steps=15)
        seen, _ = plain.reset(seed=seed)
        np.testing.assert_array_equal(first[row], seen.astype(np.float32))
        return_, length = 0.0, 0
        for chunk, result in enumerate(results):
            actions = 1.5 * np.random.default_rng(chunk).standard_normal((3, 4, 3))[row]
            for i, action in enumerate(np.clip(actions, -1, 1).astype(np.float32)):
                seen, reward, terminated, truncated, _ = plain.step(action)
                return_, length = return_ + reward, length + 1
                assert result.rewards[row, i] == reward and result.active[row, i]
                if terminated or truncated:
                    assert not result.active[row, i + 1 :].any()
                    break
            assert result.terminated[row] == terminated and result.truncated[row] == (truncated and not terminated)
            if terminated or truncated:
                (stats,) = [stats for stats in result.episodes if stats.env == row]
                assert (stats.seed, stats.return_, stats.length) == (seed, return_, length)
                assert stats.success == (not terminated) and stats.reward_terms == {"reward": return_}
                if not terminated:
                    at = result.final_indices.tolist().index(row)
                    final = result.final_observation["environment_state"][at]
                    np.testing.assert_array_equal(final, seen.astype(np.float32))
                seed, ended = 100 * chunk + row, ended + 1
                seen, _ = plain.reset(seed=seed)
                return_, length = 0.0, 0
            np.testing.assert_array_equal(result.observation["environment_state"][row], seen.astype(np.float32))
    assert ended >= 3
    assert any(r.terminated.any() for r in results) and any(r.truncated.any() for r in results)


def test_trajectories_do_not_depend_on_the_workers():
    played = []
    for workers in (0, 2, 3):
        with GymVectorEnv(HOPPER, 3, workers) as env:
            played.append([env.reset(SEEDS), *play(env, 0, 12), env.get_state()])
    assert_same(played[0], played[1])
    assert_same(played[0], played[2])


@pytest.mark.parametrize("env_id", ["Ant-v5", "Pusher-v5", "Pendulum-v1"])
def test_a_state_goes_on_bit_for_bit(env_id):
    """Ant's and Pusher's observations and rewards hold what MuJoCo computed a step ago; Pendulum is not MuJoCo's."""
    config = GymConfig(env_id, max_steps_per_episode=21)
    with GymVectorEnv(config, 2, 0) as env:
        env.reset(SEEDS[:2])
        before = play(env, 0, 4, num=2)
        tensors, rest = pack_tree(env.get_state())  # as a checkpoint keeps it
        after = play(env, 4, 4, num=2)
    with GymVectorEnv(config, 2, 0) as other:
        observation = other.set_state(unpack_tree(tensors, rest))
        assert_same(observation, before[-1].observation)
        assert_same(play(other, 4, 4, num=2), after)


def test_an_ended_environment_stays_without_a_next_seed():
    with GymVectorEnv(GymConfig("Pendulum-v1", max_steps_per_episode=6), 2, 0) as env:
        env.reset([1, 2])
        actions = np.zeros((2, 4, 1))
        env.step_chunk(actions)
        ended = env.step_chunk(actions)
        assert ended.truncated.all() and ended.active.sum(axis=1).tolist() == [2, 2]
        state = env.get_state()
        again = env.step_chunk(actions)
        assert not again.active.any() and not again.truncated.any() and not again.episodes
        assert_same(again.observation, ended.observation)
        assert_same(env.set_state(state), ended.observation)
        assert not env.step_chunk(actions).active.any()


def test_a_state_that_comes_out_otherwise_starts_anew(capsys):
    with GymVectorEnv(HOPPER, 2, 0) as env:
        start = env.reset([1, 2])["environment_state"]
        env.step_chunk(np.zeros((2, 3, 3)))
        state = env.get_state()
        state["episodes"][1]["seen"][0] += 1e-12  # as another machine may round
        seen = env.set_state(state)["environment_state"]
        assert "1 of 2 episodes" in capsys.readouterr().out
        np.testing.assert_array_equal(seen[1], start[1])
        assert (seen[0] != start[0]).any()


def test_a_broken_simulation_is_marked():
    with GymVectorEnv(HOPPER, 2, 0) as env:
        env.reset([1, 2])
        env._group.envs[1].unwrapped.data.qpos[0] = np.nan  # MuJoCo then starts again by itself, and goes on
        result = env.step_chunk(np.zeros((2, 2, 3)), [3, 4])
        (stats,) = result.episodes
        assert stats.env == 1 and stats.broken and not stats.success
        assert result.truncated.tolist() == [False, True] and not result.terminated.any()
        assert not env.step_chunk(np.zeros((2, 2, 3)), [5, 6]).episodes


@pytest.mark.parametrize(
    ("env_id", "said"),
    [
        ("Hoper-v5", "Did you mean: `Hopper`"),
        ("CartPole-v1", "actions Discrete(2)"),
        ("Blackjack-v1", "observations Tuple"),
        ("Hopper-v3", "cannot be loaded"),
        ("nowhere:Arm-v0", "nowhere"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_does_not_work_is_refused_in_one_line(env_id, said, workers):
    with pytest.raises(ConfigError) as error:
        GymVectorEnv(GymConfig(env_id), 1, workers)
    text = str(error.value)
    assert f"env_id={env_id}" in text and said in text and "\n" not in text


def test_a_package_that_is_missing_is_named():
    """Gymnasium's MuJoCo environments import imageio."""
    code = (
        "import sys; sys.modules['imageio'] = None\n"
        "from reinflow_gym import config, vector\n"
        "try: vector.make_gym_env(config.GymConfig('Hopper-v5'), 1)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigError env_id=Hopper-v5 cannot be loaded: pip install imageio")


def test_a_worker_loads_neither_torch_nor_the_main_script():
    code = (
        "import sys, reinflow_gym.group as g, reinflow_gym.workers, reinflow_gym.config\n"
        "print({'torch', 'lerobot', 'gymnasium', 'mujoco'} & set(sys.modules))\n"
        "g.GymGroup(g.GymConfig('Hopper-v5'), 1).reset([0])\n"
        "print({'torch', 'lerobot'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


def test_a_dead_worker_is_named_and_a_failed_call_leaves_the_pipe_in_step():
    with GymVectorEnv(HOPPER, 3, 2) as env:
        env.reset(SEEDS)
        with pytest.raises(RuntimeError, match=r"worker 0 \(environments 0 to 1\)[\s\S]*greater or equal"):
            env.reset([-1, 0, 0])
        env.reset(SEEDS)
        os.kill(env.worker_pids[1], signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"worker 1 \(environments 2 to 2\): it died"):
            env.step_chunk(np.zeros((3, 4, 3)))


def test_wrong_calls_are_refused():
    with GymVectorEnv(HOPPER, 2, 0) as env:
        with pytest.raises(RuntimeError, match="reset"):
            env.step_chunk(np.zeros((2, 4, 3)))
        with pytest.raises(ValueError, match="one each"):
            env.reset([1])
        state = (env.reset([1, 2]), env.get_state())[1]
        with pytest.raises(ValueError, match=r"\(2, n, 3\)"):
            env.step_chunk(np.zeros((2, 4, 2)))
        with pytest.raises(ValueError, match="NaN"):
            env.step_chunk(np.full((2, 4, 3), np.nan))
        with pytest.raises(ValueError, match="1 environments"):
            env.set_state({"episodes": state["episodes"][:1]})
    with GymVectorEnv(GymConfig("Pendulum-v1"), 2, 0) as other, pytest.raises(ValueError, match="Pendulum-v1"):
        other.set_state(state)


def test_a_config_survives_json():
    assert GymConfig.from_json(HOPPER.to_json()) == HOPPER
    with pytest.raises(ConfigError, match="max_steps_per_episode"):
        GymConfig("Hopper-v5", max_steps_per_episode=0)
    with pytest.raises(ConfigError, match=r"here\.json.*env_id"):
        GymConfig.from_json({"env_id": 3, "max_steps_per_episode": 5}, "here.json")
