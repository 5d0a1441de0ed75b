"""The faults of benchmarks/nulls.py are what they say, and the doctor names those that a fake can show."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reinflow.doctor import RULES, diagnose
from reinflow.env import EpisodeStats
from reinflow.flow import ChainSpec
from reinflow.learner import RatioGuardError
from reinflow.rollout import RolloutInfo
from reinflow.seeds import PASS, RUN, TrainingSeeds
from so101_mujoco_utils import RewardConfig, compute_reward
from so101_sim.config import EnvConfig
from so101_sim.vector.make import make_vector_env
from tests.reinflow.test_learner import SETTINGS, Loop
from tests.test_reward import BASE

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import _null_faults as faults  # noqa: E402, the benchmarks are no package
import nulls  # noqa: E402

CONFIG = {"policy_lr": SETTINGS.policy_lr, "num_episodes": 32 * 20, "grad_clip_norm": 1.0, "value_clip_epsilon": 0.2}


class FakeRun:
    """What the faults ask of a run, on the fake."""

    def __init__(self, loop):
        self.loop, self.learner, self.policy, self.seeds = loop, loop.learner, loop.policy, loop.seeds
        self.env = loop.env

    @property
    def current(self):
        return self.loop.current

    @current.setter
    def current(self, value):
        self.loop.current = value


def train(fault, settings=SETTINGS, spec=None, iterations=6):
    """Rows of metrics of the real loop on the fake with a fault."""
    loop = Loop(spec or ChainSpec(1, "action"), settings)
    run = FakeRun(loop)
    fault.enter(run)
    rows = []
    for iteration in range(1, iterations + 1):
        fault.before_rollout(run)
        metrics = loop.learner.update(loop.rollout(2)[0])
        counts = {"progress/iteration": float(iteration), "progress/episodes": 32.0 * iteration}
        rows.append(metrics | counts)
    return rows


def named(rows, config=CONFIG):
    return {finding.rule for finding in diagnose(rows, config, RULES)}


def test_a_healthy_fake_shows_none_of_the_new_symptoms():
    new = {"weights_stay", "nothing_moves", "too_few_episodes", "return_against_success", "evaluated_on_training"}
    assert not named(train(faults.Fault())) & (new | {"ratio_off_one"})


def test_batch_shape_is_refused_by_the_guard_and_named_without_it(monkeypatch):
    """64 rows act, 32 are scored: the sums are split otherwise."""
    loop = Loop(ChainSpec(1, "action"), num_envs=64)
    faults.split_products(loop.policy)
    with pytest.raises(RatioGuardError):
        loop.learner.update(loop.rollout()[0])
    monkeypatch.setattr("reinflow.learner.RATIO_TOLERANCE", float("inf"))
    row = loop.learner.update(loop.rollout()[0]) | {"progress/iteration": 1.0}
    assert row["ppo/ratio_error_before_update"] > 1e-3 and row["ppo/kl_before_update"] > 1e-7
    assert "ratio_off_one" in named([row])


def test_bf16_weights_stay_where_they_were():
    settings = replace(SETTINGS, policy_lr=1e-5)
    rows = train(faults.Bf16Weights(), settings)
    assert max(row["ppo/weights_moved"] for row in rows) < 0.5
    assert "weights_stay" in named(rows)
    healthy = train(faults.Fault(), settings)
    assert min(row["ppo/weights_moved"] for row in healthy) > 0.7 and "weights_stay" not in named(healthy)


def test_a_mean_ratio_at_a_rate_for_sums_moves_nothing():
    spec, settings = ChainSpec(1, "mean"), replace(SETTINGS, policy_lr=1e-8)
    assert "nothing_moves" in named(train(faults.Fault(), settings, spec), CONFIG | {"policy_lr": 1e-8})
    assert "nothing_moves" not in named(train(faults.Fault(), SETTINGS, spec))


def test_groups_compare_an_episode_with_the_others_of_its_group():
    """By hand: the advantage of a decision is its episode's return against the mean of the other seven."""
    loop = Loop(ChainSpec(1, "action"))
    run, fault = FakeRun(loop), faults.MixedGroups()
    fault.enter(run)
    fault.before_rollout(run)
    buffer = loop.rollout(4)[0]  # two episodes of two decisions in every environment
    advantages = loop.learner._advantages(buffer)
    returns = (buffer.reward[0] + buffer.discount[0] * buffer.reward[1]).double().numpy()  # of the first episodes
    others = [np.mean(np.delete(returns[:8], i)) for i in range(8)]
    expected = (returns[:8] - others) / (returns[:8].std() + 1e-6)
    for decision in (0, 1):
        np.testing.assert_allclose(advantages.advantage[decision, :8], expected, rtol=1e-4)
    np.testing.assert_allclose(advantages.value.view(4, 32)[0, :8], others, rtol=1e-5)


def test_an_episode_that_is_cut_by_the_rollout_counts_in_no_group():
    loop = Loop(ChainSpec(1, "action"))
    run, fault = FakeRun(loop), faults.MixedGroups()
    fault.enter(run)
    for expected in ([True, True, False], [False, True, True]):
        fault.before_rollout(run)
        _, whole = fault.played(loop.rollout(3)[0])
        assert whole[:, 0].tolist() == expected


def test_scenes_are_those_of_the_group_or_of_few():
    """In the real simulator: what the policy sees of an episode is its scene's."""
    config = EnvConfig(randomize_block=True, render_images=False, environment_state=True)
    with make_vector_env(config, 4) as env:
        few = faults.FewScenes(env, 2)
        states = few.reset([0, 1, 2 * 1 + PASS + RUN, 1 + 5 * PASS])["environment_state"]
        assert (states[1] == states[3]).all() and (states[0] == states[2]).all() and (states[0] != states[1]).any()
        run = type("R", (), {"seeds": TrainingSeeds(0), "settings": type("S", (), {"num_episodes": 32})})
        group = faults.SceneOfGroup(env, run)
        states = group.reset(run.seeds.of(np.arange(4, 8)))["environment_state"]
        assert (states == states[0]).all()  # of the first group
        states = group.reset(run.seeds.of(np.arange(6, 10)))["environment_state"]
        assert (states[1] != states[2]).any()


def test_a_lost_grasp_costs_and_a_lift_does_not():
    config = RewardConfig(mode="staged")
    force = np.array([1.0, 0.0, 0.0])
    grasped = replace(BASE, fixed_jaw_force=force, moving_jaw_force=-force)
    empty = replace(BASE, fixed_jaw_force=0 * force, moving_jaw_force=0 * force)
    lifted = replace(empty, block_pos=np.array([0.0, 0.3, 0.1]))
    for before, after, pays in ((grasped, empty, -faults.DROP_PENALTY), (empty, grasped, 0.0), (grasped, lifted, 0.0)):
        assert faults.with_drop(compute_reward, before, after, config)["drop"] == pays


def test_table_compares_episode_by_episode(tmp_path, monkeypatch, capsys):
    """Made-up runs: 20 seeds, of which the null loses 8 that its control won."""
    recorded = ROOT / "tests/data/doctor/healthy"
    for name, lost in (("natural", 0), ("3 drop penalty", 8)):
        directory = nulls.run_path(name, 0, tmp_path)
        directory.mkdir()
        for file in ("metrics.jsonl", "config.json"):
            (directory / file).write_text((recorded / file).read_text())
        rows = [{"seed": 10_000 + i, "success": i >= lost} for i in range(20)]
        (directory / "eval_info.json").write_text(json.dumps({"per_episode": rows}))
        (directory / "done").touch()
    flags = ["--output-dir", str(tmp_path), "--read-only", "--seeds", "0", "--csv", str(tmp_path / "t.csv")]
    monkeypatch.setattr("sys.argv", ["nulls.py", *flags])
    nulls.main()
    out = capsys.readouterr().out
    assert "| 3 drop penalty | 60.0 | 38.7-78.1 | 60.0 | -40.0 | 0.008 | - |" in out
    with (tmp_path / "t.csv").open() as file:
        assert [row["successes"] for row in csv.DictReader(file)] == ["20", "12"]


def test_rollouts_tell_what_failing_returns():
    """Half of the failures return 1 or more; a rollout without a failure says nothing of them."""

    def played(*results):
        stats = [EpisodeStats(i, i, value, 10, success) for i, (success, value) in enumerate(results)]
        return RolloutInfo(stats, 0.0, 0.0).metrics()

    assert played((True, 9.0), (False, -8.0), (False, 1.0), (False, 2.0))["rollout/failure_return_median"] == 1.0
    assert "rollout/failure_return_median" not in played((True, 9.0))


@pytest.mark.slow
def test_it_runs_and_names_an_evaluation_on_training_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["nulls.py", "--output-dir", str(tmp_path), "--quick"])
    nulls.main()
    assert "| 3 drop penalty |" in capsys.readouterr().out
    directory = nulls.run("4 training scenes", 0, tmp_path, episodes=64, quick=True)
    row = nulls.read(directory, "4 training scenes", 0)
    assert (row["rule"], row["fired_at"]) == ("evaluated_on_training", 4)
    assert 0 <= int(row["successes_on_training_scenes"]) <= 16
