"""MuJoCo Warp worlds: they agree with the batched form to fp32's rounding, and what cannot be had is said at once.

What needs kernels is slow: a fresh machine compiles them for two minutes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from reinflow import ConfigError
from reinflow.env import ChunkResult, Observation, take_rows
from reinflow.evaluate import evaluate
from reinflow.metrics import read_metrics
from reinflow.rollout import noise_free_actor
from reinflow.settings import CONFIG_FILE, check_same_settings, config_to_json, read_config
from reinflow_so101.command_line import CHANGEABLE_ON_RESUME
from reinflow_so101.opening import make_policy
from reinflow_vla.base import lerobot_batch
from so101_gym_env import SO101PickEnv
from so101_mujoco_utils import model_dir
from so101_sim.config import EnvConfig
from so101_sim.expert import ScriptedExpert
from so101_sim.vector import warp
from so101_sim.vector.base import ObservationBuffer, SO101VectorEnv
from so101_sim.vector.batched import BatchedVectorEnv
from so101_sim.vector.make import make_vector_env
from so101_sim.vector.warp import WarpVectorEnv, WarpWorlds
from train_reinflow import PRESETS, parse_args, start, train

TINY = replace(PRESETS["tiny"].env(), cameras=("wrist_camera", "camera_up", "camera_side"), environment_state=True)
BLIND = replace(TINY, render_images=False)
CHUNK, EPISODES = 50, 100
needs_warp = pytest.mark.skipif(not find_spec("mujoco_warp"), reason='pip install "reinflow-so101[warp]"')


def expert_plans(seeds: range, config: EnvConfig = BLIND) -> np.ndarray:
    """Actions (N, 150, 6) of the scripted expert."""
    env = SO101PickEnv(replace(config, render_images=False))
    expert, actions = ScriptedExpert(env.model), np.empty((len(seeds), 150, 6))
    for row, seed in enumerate(seeds):
        env.reset(seed=seed)
        state = env.scene.layout.scene_state(env.row)
        yaw = 2.0 * np.arctan2(state.block_quat[3], state.block_quat[0])
        actions[row] = env.scene.frame.from_rad(expert.plan(state.joint_pos_rad, state.block_pos, yaw, num_steps=150))
    return actions


# --- Without a kernel -----------------------------------------------------------------------------------------------


def test_without_the_packages_a_run_is_refused_before_its_policy_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(warp, "find_spec", lambda name: None if name == "mujoco_warp" else object())
    wanted = r'vector=warp needs MuJoCo Warp: pip install "reinflow-so101\[warp\]"'
    flags = ["--preset", "flow_mlp", "--vector", "warp", "--no-wandb", "--output-dir", str(tmp_path / "run")]
    with pytest.raises(ConfigError, match=wanted):
        start([*flags, "--flow-mlp-pretrained-path", "nowhere"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=wanted):
        make_vector_env(BLIND, 2, "warp")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use-subproc-env"], "use_subproc_env contradicts vector=warp: drop one"),
        (["--num-envs", "1", "--render"], "render shows the sequential form, not vector=warp: drop one"),
        (["--env-id", "Hopper-v5"], "vector=warp is of the arm and not read with env_id=Hopper-v5: drop it"),
        (["--rollout-backend", "ray"], "vector=warp is not read with rollout_backend=ray: drop one"),
    ],
)
def test_what_worlds_cannot_be_joined_with_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_args(["--preset", "flow_mlp", "--vector", "warp", *flags])
    assert message in str(error.value)


def test_subproc_has_two_names() -> None:
    assert parse_args(["--preset", "flow_mlp", "--vector", "subproc", "--use-subproc-env"]).vector == "subproc"


def test_a_run_of_before_resumes_and_keeps_its_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """warp rounds otherwise, and a resumed run keeps its numbers."""
    saved = config_to_json(replace(PRESETS["flow_mlp"], output_dir=str(tmp_path)))
    del saved["vector"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(saved))
    (tmp_path / "checkpoints").mkdir()
    resumed = parse_args(["--resume", "--output-dir", str(tmp_path)])
    assert resumed.vector == "auto" and "vector=auto" in capsys.readouterr().out
    check_same_settings(config_to_json(resumed), read_config(tmp_path), CHANGEABLE_ON_RESUME)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(saved | {"vector": "warp"}))
    with pytest.raises(ConfigError, match=r"vector \(warp -> auto\)"):
        check_same_settings(config_to_json(resumed), read_config(tmp_path), CHANGEABLE_ON_RESUME)


def test_observations_take_tensors_for_images() -> None:
    config = EnvConfig(image_size=8, cameras=("camera_up",))
    buffer = ObservationBuffer(config, 3, {"camera_up": torch.zeros(3, 8, 8, 3, dtype=torch.uint8)})
    images = torch.randint(0, 255, (2, 8, 8, 3), dtype=torch.uint8)
    shown: Observation = {"agent_pos": np.ones((2, 6), dtype=np.float32), "pixels": {"camera_up": images}}
    buffer.write([0, 2], shown)
    kept = buffer.read()
    rows = take_rows(kept, np.array([2, 0, 2]))
    assert torch.equal(rows["pixels"]["camera_up"], images[[1, 0, 1]]) and rows["agent_pos"].any()
    assert torch.equal(buffer.read(np.array([2]))["pixels"]["camera_up"], images[1:])
    buffer.write([2], take_rows(kept, np.array([1])))
    assert torch.equal(kept["pixels"]["camera_up"][2], images[1])  # a copy
    other = {"pixels": {"camera_up": kept["pixels"]["camera_up"].numpy()}}
    batch, same = (lerobot_batch(kept | part, ["camera_up"]) for part in ({}, other))  # type: ignore[arg-type, operator]
    assert torch.equal(batch["observation.images.camera_up"], same["observation.images.camera_up"])


# --- With kernels ---------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """The same expert episodes in one form: what each chunk gave, and where it left the worlds."""

    results: list[ChunkResult]
    rows: list[np.ndarray]  # (N, R) after each chunk
    images: list[dict[str, Any]]  # at the start and after each chunk


@pytest.fixture(scope="module")
def expert_episodes() -> dict[str, Played]:
    seeds = range(5_000, 5_000 + EPISODES)
    actions, played = expert_plans(seeds), {}
    for form in ("warp", "batched"):
        with make_vector_env(TINY, EPISODES, form) as env:  # type: ignore[arg-type]
            record = Played([], [], [env.reset(seeds)["pixels"]])
            for first in range(0, 150, CHUNK):
                record.results.append(env.step_chunk(actions[:, first : first + CHUNK]))
                record.rows.append(env.get_state()["rows"])
                record.images.append(record.results[-1].observation["pixels"])
        played[form] = record
    return played


@needs_warp
@pytest.mark.slow
def test_a_chunk_ends_where_the_batched_form_ends(expert_episodes: dict[str, Played]) -> None:
    warps, batched = expert_episodes["warp"].rows[0], expert_episodes["batched"].rows[0]
    far = np.abs(warps[:, :13] - batched[:, :13]).max(axis=1)  # qpos, radians and metres
    print(f"qpos after a chunk: median {np.median(far):.1e}, largest {far.max():.1e}")
    assert 0.0 < far.max() < 1e-4


@needs_warp
@pytest.mark.slow
def test_the_same_expert_episodes_succeed(expert_episodes: dict[str, Played]) -> None:
    outcomes = {}
    for form, played in expert_episodes.items():
        stats = sorted((s for result in played.results for s in result.episodes), key=lambda s: s.env)
        assert [s.seed for s in stats] == list(range(5_000, 5_000 + EPISODES)) and not any(s.broken for s in stats)
        outcomes[form] = np.array([s.success for s in stats])
    agreed = int((outcomes["warp"] == outcomes["batched"]).sum())
    print(f"{agreed} of {EPISODES} agree; succeeded {[int(values.sum()) for values in outcomes.values()]}")
    assert agreed >= 98 and outcomes["batched"].sum() > 90


@needs_warp
@pytest.mark.slow
def test_images_differ_by_rounding(expert_episodes: dict[str, Played]) -> None:
    """Of the same state: the start, and the end of the first chunk, whose difference no eye sees."""
    for at in (0, 1):
        for camera in TINY.cameras:
            drawn, reference = (expert_episodes[form].images[at][camera] for form in ("warp", "batched"))
            assert isinstance(drawn, torch.Tensor) and drawn.shape == reference.shape and drawn.dtype == torch.uint8
            difference = np.abs(drawn.numpy().astype(float) - reference)
            print(
                f"{camera} {at}: {difference.mean():.2f}, the worst image {difference.mean(axis=(1, 2, 3)).max():.2f}"
            )
            assert difference.mean() < 1.0
            assert (difference.max(axis=3) > 8.0).mean() < 0.01  # edges


@pytest.fixture(scope="module")
def worlds() -> Iterator[WarpVectorEnv]:
    with WarpVectorEnv(BLIND, 4) as env:
        yield env


SEEDS = range(5_000, 5_004)


def chunks(env: SO101VectorEnv, actions: np.ndarray, first: int = 0) -> list[ChunkResult]:
    return [env.step_chunk(actions[:, at : at + CHUNK], [7, 8, 9, 10]) for at in range(first, 150, CHUNK)]


def assert_same(a: list[ChunkResult], b: list[ChunkResult]) -> None:
    for one, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(one.rewards, other.rewards)
        np.testing.assert_array_equal(one.environment_states, other.environment_states)
        np.testing.assert_array_equal(one.observation["environment_state"], other.observation["environment_state"])
        assert one.episodes == other.episodes


@needs_warp
@pytest.mark.slow
def test_a_state_goes_on_bit_for_bit(worlds: WarpVectorEnv) -> None:
    actions = expert_plans(SEEDS)
    worlds.reset(SEEDS)
    worlds.step_chunk(actions[:, :CHUNK])
    state = worlds.get_state()
    straight = chunks(worlds, actions, CHUNK)
    after = worlds.get_state()
    assert any(result.episodes for result in straight)
    with WarpVectorEnv(BLIND, 4) as other:
        other.set_state(state)
        again = other.get_state()
        np.testing.assert_array_equal(again["integration"], state["integration"])
        assert_same(chunks(other, actions, CHUNK), straight)
        np.testing.assert_array_equal(other.get_state()["integration"], after["integration"])
    with pytest.raises(ValueError, match="another model"):
        worlds.set_state(state | {"integration": state["integration"][:, 1:]})


@needs_warp
@pytest.mark.slow
def test_a_state_comes_from_the_batched_form_and_goes_back(worlds: WarpVectorEnv) -> None:
    actions = expert_plans(SEEDS)
    with BatchedVectorEnv(BLIND, 4) as batched:
        batched.reset(SEEDS)
        batched.step_chunk(actions[:, :CHUNK])
        worlds.set_state(batched.get_state())
        np.testing.assert_allclose(
            worlds.get_state()["integration"], batched.get_state()["integration"], rtol=1e-6, atol=1e-9
        )
        (one,), (two,) = ([env.step_chunk(actions[:, 50:60])] for env in (worlds, batched))
        np.testing.assert_allclose(one.rewards, two.rewards, atol=1e-3)
        batched.set_state(worlds.get_state())
        results = [batched.step_chunk(actions[:, at : at + 45]) for at in (60, 105)]
        assert [stats.success for result in results for stats in result.episodes] == [True] * 4


@needs_warp
@pytest.mark.slow
def test_the_next_episodes_start_as_elsewhere(worlds: WarpVectorEnv) -> None:
    actions = expert_plans(SEEDS)
    with BatchedVectorEnv(BLIND, 4) as batched:
        ends, following = [], []
        for env in (worlds, batched):
            env.reset(SEEDS)
            ends.append(chunks(env, actions)[-1])
            following.append(env.step_chunk(actions[:, :CHUNK]))
    assert [[(s.env, s.seed, s.success) for s in end.episodes] for end in ends] == [
        [(env, seed, True) for env, seed in enumerate(SEEDS)]
    ] * 2
    for name in ("agent_pos", "environment_state"):
        np.testing.assert_array_equal(ends[0].observation[name], ends[1].observation[name])  # type: ignore[literal-required]
    np.testing.assert_allclose(following[0].rewards, following[1].rewards, atol=1e-3)


@needs_warp
@pytest.mark.slow
def test_a_world_does_not_depend_on_the_others(worlds: WarpVectorEnv) -> None:
    """So that the environments of a training can be shared by several processes."""
    actions = expert_plans(SEEDS)
    worlds.reset(SEEDS)
    result = worlds.step_chunk(actions[:, :CHUNK])
    with WarpVectorEnv(BLIND, 1) as alone:
        alone.reset([SEEDS[2]])
        single = alone.step_chunk(actions[2:3, :CHUNK])
    np.testing.assert_array_equal(single.rewards[0], result.rewards[2])
    np.testing.assert_array_equal(single.observation["agent_pos"][0], result.observation["agent_pos"][2])


@needs_warp
@pytest.mark.slow
def test_ended_worlds_stay_and_the_others_go_on(worlds: WarpVectorEnv) -> None:
    actions = expert_plans(SEEDS)
    actions[3] = actions[3, :1]  # does not move
    worlds.reset(SEEDS)
    results = [worlds.step_chunk(actions[:, at : at + CHUNK]) for at in (0, 50, 100)]
    assert results[-1].terminated[:3].all() and results[-1].truncated.tolist() == [False, False, False, True]
    final = results[-1].final_observation
    assert final is not None and final["environment_state"][0, -1] == 1.0
    after = worlds.step_chunk(actions[:, :5])
    assert not after.active.any() and not after.episodes
    np.testing.assert_array_equal(after.observation["environment_state"], results[-1].observation["environment_state"])
    worlds.reset(SEEDS)
    assert worlds.step_chunk(actions[:, :5]).active.all()


@needs_warp
@pytest.mark.slow
def test_a_world_that_breaks_costs_its_episode_alone(worlds: WarpVectorEnv) -> None:
    actions = expert_plans(SEEDS)
    worlds.reset(SEEDS)
    sound = chunks(worlds, actions)[0]
    worlds.reset(SEEDS)
    state = worlds.get_state()
    state["integration"][0, 20:26] = 1e30
    worlds.set_state(state)
    results = [worlds.step_chunk(actions[:, :CHUNK], [7, 8, 9, 10]), worlds.step_chunk(actions[:, :CHUNK])]
    (lost,) = results[0].episodes
    assert (lost.env, lost.seed, lost.broken, lost.success, lost.length) == (0, 5_000, True, False, 1)
    assert results[0].truncated.tolist() == [True, False, False, False] and not results[0].rewards[0].any()
    np.testing.assert_array_equal(results[0].rewards[1:], sound.rewards[1:])
    assert not results[1].episodes and results[1].active.all()  # it goes on, with seed 7
    assert all(np.isfinite(result.observation["agent_pos"]).all() for result in results)


@needs_warp
@pytest.mark.slow
def test_more_contacts_than_expected_are_made_room_for(worlds: WarpVectorEnv) -> None:
    actions = expert_plans(SEEDS)
    worlds.reset(SEEDS)
    expected = chunks(worlds, actions)
    with WarpVectorEnv(BLIND, 4) as small:
        small.worlds = WarpWorlds(small.scene, 4, "cpu", contacts=2)
        small.reset(SEEDS)
        assert_same(chunks(small, actions), expected)
        assert small.worlds._contacts > 2


@needs_warp
@pytest.mark.slow
def test_a_scene_that_cannot_be_simulated_is_refused(tmp_path: Path) -> None:
    spec = mujoco.MjSpec.from_file(str(model_dir() / "scene.xml"))
    spec.option.solver = mujoco.mjtSolver.mjSOL_PGS
    other = tmp_path / "scene.xml"
    other.write_text(spec.to_xml())
    with pytest.raises(ConfigError, match=r"vector=warp cannot simulate the scene \(.*\): use --vector batched"):
        make_vector_env(replace(BLIND, model_path=str(other)), 1, "warp")


@needs_warp
@pytest.mark.slow
def test_the_embedded_policy_succeeds_as_often() -> None:
    """200 tuning seeds of the tiny policy, from pixels that MuJoCo Warp drew."""
    config = PRESETS["tiny"]
    policy = make_policy(config)
    act, rates = noise_free_actor(policy, config.chain()), {}
    for form in ("warp", "batched"):
        with make_vector_env(config.env(), 50, form) as env:  # type: ignore[arg-type]
            rates[form] = evaluate(act, env, range(5_000, 5_200))
        print(form, rates[form].summary())
    low, high = rates["batched"].interval
    assert low <= rates["warp"].success_rate <= high


@needs_warp
@pytest.mark.slow
def test_a_training_resumes_with_the_numbers_of_an_unbroken_one(tmp_path: Path) -> None:
    config = replace(
        PRESETS["tiny"], vector="warp", num_episodes=8, num_parallel_envs=2, episodes_per_iteration=2, minibatch_size=3,
        gradient_accumulation_steps=1, num_critic_epochs=1, critic_warmup_iters=0, lr_decay_ratio=1.0, save_interval=4,
        eval_interval=2, eval_episodes=2, report_episodes=0, wandb_enabled=False, device="cpu", num_threads=1,
        output_dir=str(tmp_path / "straight"),
    )  # fmt: skip
    train(config)
    other = replace(config, output_dir=str(tmp_path / "resumed"), num_episodes=4)
    train(other)
    train(replace(other, resume=True, num_episodes=8))
    straight, resumed = (
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_metrics(run / "metrics.jsonl")]
        for run in (tmp_path / "straight", tmp_path / "resumed")
    )
    assert len(straight) == 4 and straight == resumed
