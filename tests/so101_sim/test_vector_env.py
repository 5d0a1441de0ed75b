"""The three vector forms agree to the last bit, whatever happens inside a chunk."""

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest

from reinflow import ConfigError
from reinflow.env import ChunkResult
from so101_gym_env import SO101PickEnv
from so101_mujoco_utils import model_dir
from so101_sim.config import EnvConfig
from so101_sim.expert import ScriptedExpert
from so101_sim.scene import PickScene
from so101_sim.vector import subproc
from so101_sim.vector.base import SO101VectorEnv
from so101_sim.vector.make import make_vector_env

FORMS = ("sequential", "subproc", "batched")
NUM_ENVS, CHUNK = 3, 40
# 125 is no multiple of the chunk: the time limit falls inside one, and so does the expert's lift, some steps earlier.
CONFIG = EnvConfig(
    image_size=24,
    cameras=("camera_up", "wrist_camera"),
    environment_state=True,
    randomize_block=True,
    start_noise_deg=1.0,
    reward_mode="staged",
    max_steps_per_episode=125,
)
BLIND = replace(CONFIG, render_images=False)


def make(form: str, config: EnvConfig = CONFIG, num_envs: int = NUM_ENVS, **kwargs: Any) -> SO101VectorEnv:
    return make_vector_env(config, num_envs, form, num_threads=2, **kwargs)


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Equal types, keys, shapes, dtypes and bits."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{index}]")
    elif isinstance(a, np.ndarray):
        assert (a.shape, a.dtype, a.tobytes()) == (b.shape, b.dtype, b.tobytes()), path
    elif hasattr(a, "__dataclass_fields__"):
        assert_same(vars(a), vars(b), path)
    else:
        assert a == b, path


def plans(seeds: list[int], config: EnvConfig = BLIND) -> np.ndarray:
    """Actions (N, 160, 6): the expert in odd rows, a drifting arm with targets beyond the limits in even ones."""
    env = SO101PickEnv(replace(config, render_images=False))
    expert = ScriptedExpert(env.model)
    actions = np.empty((len(seeds), 160, 6))
    for row, seed in enumerate(seeds):
        env.reset(seed=seed)
        state = env.scene.layout.scene_state(env.row)
        if row % 2:
            yaw = 2.0 * np.arctan2(state.block_quat[3], state.block_quat[0])
            targets = expert.plan(state.joint_pos_rad, state.block_pos, yaw, num_steps=160)
        else:
            noise = np.random.default_rng(seed).normal(size=(160, 6))
            targets = state.joint_pos_rad + 0.05 * noise.cumsum(axis=0)
        actions[row] = env.scene.frame.from_rad(targets)
    return actions


def run(env: SO101VectorEnv, seeds: list[int], actions: np.ndarray, n: int = CHUNK, restart: bool = True) -> list[Any]:
    """Everything that can be seen of an environment along some chunks."""
    seen: list[Any] = [env.reset(seeds), env.get_state()]
    for start in range(0, actions.shape[1] - n + 1, n):
        following = [seed + 100 * (start + 1) for seed in seeds] if restart else None
        seen += [env.step_chunk(actions[:, start : start + n], following), env.get_state()]
    return seen


@pytest.mark.parametrize("restart", [True, False])
def test_forms_agree_to_the_last_bit(restart: bool) -> None:
    seeds = [11, 12, 13]
    actions = plans(seeds)
    seen = {}
    for form in FORMS:
        with make(form) as env:
            seen[form] = run(env, seeds, actions, restart=restart)
            if restart:
                seen[form] += run(env, seeds[::-1], actions[:, :CHUNK])  # a second reset
    assert_same(seen["sequential"], seen["batched"])
    assert_same(seen["sequential"], seen["subproc"])
    results = [item for item in seen["sequential"] if isinstance(item, ChunkResult)]
    # The run has what it is meant to have: a lift and a time limit, both inside a chunk.
    assert any(result.terminated.any() for result in results)
    assert any(result.truncated.any() for result in results)
    assert any(stats.extras["clipped_targets"] for result in results for stats in result.episodes)


@pytest.fixture(scope="module")
def blind_run() -> Iterator[list[ChunkResult]]:
    """Three environments for 160 steps without images: row 1 is an expert's."""
    seeds = [11, 12, 13]
    with make("batched", BLIND) as env:
        yield [item for item in run(env, seeds, plans(seeds)) if isinstance(item, ChunkResult)]


def test_nothing_counts_after_the_end(blind_run: list[ChunkResult]) -> None:
    for result in blind_run:
        ended = result.terminated | result.truncated
        assert not (result.terminated & result.truncated).any()
        assert not result.rewards[~result.active].any()
        assert result.environment_states is not None
        assert not result.environment_states[~result.active].any()
        assert (np.diff(result.active.astype(int), axis=1) <= 0).all()  # no step after a gap
        assert (result.active.all(axis=1) | ended).all()
        np.testing.assert_allclose(sum(result.reward_terms.values()), result.rewards, atol=1e-12)
        np.testing.assert_array_equal(result.final_indices, np.flatnonzero(result.truncated))
        assert (result.final_observation is None) == (not result.truncated.any())


def test_episodes_are_accounted_for(blind_run: list[ChunkResult]) -> None:
    episodes = [stats for result in blind_run for stats in result.episodes]
    assert [(stats.env, stats.seed, stats.success) for stats in sorted(episodes, key=lambda s: s.env)] == [
        (0, 11, False),
        (1, 12, True),
        (2, 13, False),
    ]
    for stats in episodes:
        earned = np.concatenate([result.rewards[stats.env][result.active[stats.env]] for result in blind_run])
        assert stats.return_ == pytest.approx(earned[: stats.length].sum())
        assert stats.return_ == pytest.approx(sum(stats.reward_terms.values()))
        assert (stats.length == BLIND.max_steps_per_episode) == (not stats.success)
        assert (stats.extras["max_height"] > BLIND.lift_threshold) == stats.success
        assert (stats.outcome == "success") == stats.success and stats.facts["jerk"] > 0.0


def test_final_observations_are_the_last_instant_and_not_the_next_episode(blind_run: list[ChunkResult]) -> None:
    result = next(result for result in blind_run if result.truncated.any())
    assert result.final_observation is not None
    assert result.environment_states is not None
    last = result.active.sum(axis=1) - 1
    for row, env in enumerate(result.final_indices):
        final = result.final_observation["environment_state"][row]
        np.testing.assert_array_equal(final, result.environment_states[env, last[env]])
        assert final[-1] == 1.0  # progress: all of the time is used
        assert result.observation["environment_state"][env, -1] == 0.0  # the next episode's
    assert result.final_observation["task"] == [BLIND.instruction] * len(result.final_indices)


def test_vector_rows_are_single_environments() -> None:
    seeds = [21, 22, 23]
    actions = plans(seeds)[:, :CHUNK]
    with make("batched") as env:
        env.reset(seeds)
        result = env.step_chunk(actions)
    for row, seed in enumerate(seeds):
        single = SO101PickEnv(CONFIG)
        single.reset(seed=seed)
        observation, rewards, *_ = single.step_chunk(actions[row])
        np.testing.assert_array_equal(rewards, result.rewards[row])
        np.testing.assert_array_equal(observation["agent_pos"], result.observation["agent_pos"][row])
        for camera, image in observation["pixels"].items():
            np.testing.assert_array_equal(image, result.observation["pixels"][camera][row])
        single.close()


def test_without_a_next_seed_ended_environments_stay(blind_run: list[ChunkResult]) -> None:
    seeds = [11, 12, 13]
    with make("batched", BLIND) as env:
        results = [item for item in run(env, seeds, plans(seeds), restart=False) if isinstance(item, ChunkResult)]
        assert results[-1].terminated[1] or not results[-1].active[1].any()
        after = env.step_chunk(np.zeros((NUM_ENVS, 5, 6)))
        assert not after.active.any()
        assert not (after.terminated | after.truncated).any()
        assert after.episodes == []
        assert_same(after.observation, results[-1].observation)
        env.reset(seeds)
        assert env.step_chunk(np.zeros((NUM_ENVS, 5, 6))).active.all()
    ended = [stats for result in results for stats in result.episodes]
    assert ended == [stats for result in blind_run for stats in result.episodes]


@pytest.mark.parametrize(("source", "target"), [("batched", "batched"), ("subproc", "batched"), ("batched", "subproc")])
def test_state_moves_between_forms(source: str, target: str) -> None:
    seeds = [11, 12, 13]
    actions = plans(seeds)
    with make(source) as env:
        env.reset(seeds)
        env.step_chunk(actions[:, :80])
        state = env.get_state()
        straight = [env.step_chunk(actions[:, start : start + 40]) for start in (80, 120)]
        before = env.get_state()
    with make(target) as other:
        observation = other.set_state(state)
        assert_same(other.get_state(), state)
        resumed = [other.step_chunk(actions[:, start : start + 40]) for start in (80, 120)]
        assert_same(resumed, straight)
        assert_same(other.get_state(), before)
    assert observation["pixels"]["camera_up"].shape == (NUM_ENVS, 24, 24, 3)


def test_results_are_not_overwritten_by_later_chunks() -> None:
    for form in FORMS:
        with make(form) as env:
            observation = env.reset([1, 2, 3])
            kept = {camera: images.copy() for camera, images in observation["pixels"].items()}
            moved = observation["agent_pos"][:, None] + np.linspace(0.0, 20.0, 20)[None, :, None]
            later = env.step_chunk(moved).observation
        for camera, images in kept.items():
            np.testing.assert_array_equal(observation["pixels"][camera], images)
            assert (later["pixels"][camera] != images).any()


def test_the_number_of_threads_does_not_matter() -> None:
    seeds = list(range(5))
    actions = plans(seeds)[:, :CHUNK]
    seen = []
    for threads in (1, 3):
        with make_vector_env(BLIND, 5, "batched", num_threads=threads) as env:
            seen.append(run(env, seeds, actions))
    assert_same(seen[0], seen[1])


def test_an_unstable_simulation_costs_its_episode_alone_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file in the working directory
    actions = plans([1, 2])[:, :CHUNK]
    seen = []
    for form in FORMS:
        with make(form, num_envs=2) as env:
            env.reset([1, 2])
            state = env.get_state()
            state["integration"][0, 20:] = 1e12  # speeds that no arm has
            env.set_state(state)
            chunks = [env.step_chunk(actions, [3, 4]), env.step_chunk(actions)]
        (lost,) = chunks[0].episodes
        assert (lost.env, lost.seed, lost.broken, lost.success, lost.length) == (0, 1, True, False, 1)
        assert lost.outcome == "unstable" and lost.facts["closest"] > 0.0
        assert chunks[0].truncated.tolist() == [True, False] and not chunks[0].terminated.any()
        assert not chunks[0].rewards[0].any() and chunks[0].active[1].all()
        assert all(np.isfinite(chunk.observation["agent_pos"]).all() for chunk in chunks)
        assert not chunks[1].episodes and chunks[1].active.all()  # both go on: the first one with seed 3
        seen.append(chunks)
    for chunks in seen[1:]:
        assert_same(chunks, seen[0])


def test_the_control_period_is_that_of_the_task(tmp_path: Path) -> None:
    spec = mujoco.MjSpec.from_file(str(model_dir() / "scene.xml"))
    spec.option.timestep = 0.5
    slow = tmp_path / "slow.xml"
    slow.write_text(spec.to_xml())
    with pytest.raises(ConfigError, match=r"steps_per_action=10 time steps of 0.5 s .* 50 Hz"):
        make("batched", replace(BLIND, model_path=str(slow)))
    with pytest.raises(ConfigError, match="lower the scene's timestep"):
        make("batched", replace(BLIND, model_path=str(slow), control_hz=50.0))
    scene = PickScene(replace(BLIND, control_hz=30.0))
    assert (scene.substeps, scene.control_period_s) == (17, pytest.approx(1 / 30))


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'threads'"):
        make_vector_env(BLIND, 2, "threads")
    with pytest.raises(ValueError, match="num_envs is 0"):
        make_vector_env(BLIND, 0)
    with make("batched", BLIND, num_envs=2) as env:
        with pytest.raises(RuntimeError, match="reset"):
            env.step_chunk(np.zeros((2, 5, 6)))
        with pytest.raises(RuntimeError, match="reset"):
            env.get_state()
        with pytest.raises(ValueError, match="1 seeds for 2"):
            env.reset([1])
        env.reset([1, 2])
        for bad in (np.zeros((2, 6)), np.zeros((3, 5, 6)), np.full((2, 5, 6), np.nan)):
            with pytest.raises(ValueError, match="actions"):
                env.step_chunk(bad)
        with make("batched", BLIND, num_envs=3) as other, pytest.raises(ValueError, match="holds 2 environments"):
            other.set_state(env.get_state())


def test_a_dead_worker_is_reported() -> None:
    with make("subproc", BLIND) as env:
        env.reset([1, 2, 3])
        worker = env._workers[1]  # type: ignore[attr-defined]
        worker.kill()
        worker.wait()
        with pytest.raises(RuntimeError, match=r"environment worker 1 \(environments \[2\]\): it died"):
            env.step_chunk(np.zeros((NUM_ENVS, 5, 6)))


def test_a_stopped_worker_is_named_and_does_not_outlive_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subproc, "POLL_S", 0.2)
    env = make("subproc", BLIND)
    try:
        worker = env._workers[0]  # type: ignore[attr-defined]
        worker.send_signal(signal.SIGTERM)  # a whole process group gets it: it is the trainer's to handle
        worker.send_signal(signal.SIGHUP)
        env.reset([1, 2, 3])
        worker.send_signal(signal.SIGSTOP)
        with pytest.raises(
            subproc.WorkerError, match=r"environment worker 0 \(environments \[0, 1\]\): it was stopped"
        ):
            env.reset([1, 2, 3])
    finally:
        monkeypatch.setattr(subproc, "CLOSE_TIMEOUT_S", 0.2)
        env.close()
    assert worker.poll() == -signal.SIGKILL


def test_an_error_in_a_worker_carries_its_cause() -> None:
    with pytest.raises(RuntimeError, match="camera 'camera_front'"):
        make("subproc", replace(CONFIG, cameras=("camera_front",)))
