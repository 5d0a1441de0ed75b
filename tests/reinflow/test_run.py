"""One run of any task: what it writes, resumes, keeps and says. On the fake environment; no robot, no VLA."""

import errno
import json
import math
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from reinflow import ConfigError, UserError, progress
from reinflow.checkpoint import checkpoint_step, load_training_state, resolve_checkpoint, save_checkpoint
from reinflow.checksums import replace_with_sum, sha256
from reinflow.evaluate import EpisodeRow, EvalResult, EvaluationStopped, evaluate_seeds
from reinflow.flow import ChainSpec
from reinflow.learner import LearnerSettings, PPOLearner
from reinflow.metrics import read_metrics
from reinflow.rollout import RolloutSettings, RolloutState, collect_rollout, noise_free_actor
from reinflow.run import Run, RunError, RunSettings
from reinflow.sinks import Sink
from reinflow.training_state import CheckpointError
from tests.fakes import ReachEnv, make_policy

SPEC = ChainSpec(1, "action")
UPDATE = LearnerSettings(policy_lr=1e-3, minibatch_size=8, gradient_accumulation_steps=1, gamma=0.99)


def make_run(directory: Path, episodes: int = 16, **settings) -> Run:
    policy = make_policy()
    learner = PPOLearner(policy, SPEC, UPDATE, 0)
    how = RunSettings(num_episodes=episodes, **({"save_interval": 8, "seed": 3} | settings))
    return Run(directory, policy, ReachEnv(4), learner, how, asdict(UPDATE), resume_command="go on")


def act_and_learn(run: Run) -> None:
    """An iteration is 4 episodes of 2 decisions."""
    buffer, info, run.current = collect_rollout(
        run.policy, run.env, run.current, 2, SPEC, RolloutSettings(gamma=0.99), run.learner.normalizer, run.seeds
    )
    run.count(info.episodes)
    run.metrics |= info.metrics() | run.learner.update(buffer)


def iterate(run: Run) -> None:
    """The loop without evaluations."""
    with run:
        for _ in run.iterations():
            act_and_learn(run)
            run.log()
            run.save_if_due()
        run.finish()


def figures(directory: Path) -> list[dict]:
    rows = read_metrics(directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def test_resumed_equals_straight_bit_for_bit(tmp_path):
    straight = make_run(tmp_path / "straight").start()
    iterate(straight)
    iterate(make_run(tmp_path / "parts", episodes=8).start())
    resumed = make_run(tmp_path / "parts").resume()
    assert (resumed.iteration, resumed.episodes) == (2, 8)
    iterate(resumed)
    assert figures(tmp_path / "parts") == figures(tmp_path / "straight") and len(figures(tmp_path / "parts")) == 4
    for name, tensor in straight.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name


def test_what_a_run_leaves_behind(tmp_path):
    iterate(make_run(tmp_path, keep_checkpoints=1).start())
    assert json.loads((tmp_path / "config.json").read_text())["policy_lr"] == 1e-3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000004", "last"]
    assert (tmp_path / "checkpoints/last/pretrained_model/model.safetensors").is_file()


def test_a_start_that_never_came_to_a_checkpoint_may_be_started_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"progress/iteration": 1.0}\n')
    (tmp_path / "checkpoints/.tmp-000000").mkdir(parents=True)  # killed while it saved
    iterate(make_run(tmp_path).start())
    assert [row["progress/iteration"] for row in figures(tmp_path)] == [1, 2, 3, 4]


def test_a_run_can_be_resumed_before_its_first_iteration_and_is_never_started_over(tmp_path):
    run = make_run(tmp_path / "run").start()
    with run:
        pass  # the process ends here: during a report, say
    with pytest.raises(ConfigError, match="holds a run already"):
        make_run(tmp_path / "run").start()
    resumed = make_run(tmp_path / "run").resume()
    assert resumed.iteration == 0
    iterate(resumed)
    iterate(make_run(tmp_path / "straight").start())
    assert figures(tmp_path / "run") == figures(tmp_path / "straight")


def test_a_named_checkpoint_is_gone_on_from_and_what_came_later_is_kept(tmp_path, capsys):
    iterate(make_run(tmp_path, save_interval=4, keep_checkpoints=9).start())
    before = figures(tmp_path)
    run = make_run(tmp_path, save_interval=4, keep_checkpoints=9).resume(tmp_path / "checkpoints/000002")
    assert run.iteration == 2 and "kept in" in capsys.readouterr().out
    iterate(run)
    (aside,) = (tmp_path / "set_aside").iterdir()
    assert sorted(path.name for path in aside.iterdir()) == ["000003", "000004", "metrics.jsonl"]
    assert read_metrics(aside / "metrics.jsonl")[-1]["progress/iteration"] == 4
    assert figures(tmp_path) == before  # the same iterations, played again


def test_results_of_an_end_are_set_aside_when_training_goes_on(tmp_path, capsys):
    names = ("eval_after*", "report.html", "films/after.mp4", "nosuch.txt")
    first = make_run(tmp_path)
    first.results = names
    iterate(first.start())
    (tmp_path / "films").mkdir()
    for name in ("eval_before.json", "eval_after.json", "report.html", "films/before.mp4", "films/after.mp4"):
        (tmp_path / name).write_text(name)
    (tmp_path / "eval_after").mkdir()
    for episodes in (16, 24):  # all of 16 are done
        resumed = make_run(tmp_path, episodes)
        resumed.results, resumed.changeable = names, {"num_episodes"}
        iterate(resumed.resume())
        assert (tmp_path / "report.html").exists() == (episodes == 16)
    (aside,) = (tmp_path / "set_aside").iterdir()
    assert sorted(path.name for path in aside.iterdir()) == [
        "after.mp4", "eval_after", "eval_after.json", "report.html",
    ]  # fmt: skip
    assert (tmp_path / "eval_before.json").exists() and (tmp_path / "films/before.mp4").exists()
    assert f"results before training went on are kept in {aside}" in capsys.readouterr().out


def test_a_signal_after_the_end_says_that_the_policy_is_saved(tmp_path, capsys):
    run = make_run(tmp_path).start()
    with run:
        for _ in run.iterations():
            act_and_learn(run)
            run.log()
        run.finish()
        capsys.readouterr()
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stop_requested
    said = capsys.readouterr().out
    assert "SIGINT: the policy is saved, the report is being stopped (once more" in said and "iteration" not in said


def test_a_damaged_last_checkpoint_is_left_for_an_earlier_one(tmp_path):
    iterate(make_run(tmp_path, save_interval=4).start())
    arrays = tmp_path / "checkpoints/last/training_state/arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="take an earlier checkpoint"):
        make_run(tmp_path).resume()
    run = make_run(tmp_path).resume(tmp_path / "checkpoints/000003")
    assert run.iteration == 3
    iterate(run)
    assert checkpoint_step(resolve_checkpoint(tmp_path)) == 4


def test_a_second_process_is_refused_by_name_and_a_dead_ones_lock_is_none(tmp_path):
    run = make_run(tmp_path).start()
    with pytest.raises(ConfigError, match=rf"in use by .*{os.getpid()}"):
        make_run(tmp_path).resume()
    with run:
        pass
    (tmp_path / "run.lock").write_text('{"host": "gone", "pid": 1}')  # its process was killed
    with make_run(tmp_path).resume() as resumed:
        assert resumed.iteration == 0


def with_episodes(directory: Path, episodes: int) -> Run:
    run = make_run(directory, episodes=episodes)
    run.config["num_episodes"], run.changeable = episodes, ("num_episodes",)
    return run


def test_what_a_resume_changes_is_written_down_and_said(tmp_path, capsys):
    iterate(with_episodes(tmp_path, 8).start())
    with with_episodes(tmp_path, 12).resume():
        assert "num_episodes 8 -> 12" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["num_episodes"] == 12
    iterate(with_episodes(tmp_path, 12).resume())
    capsys.readouterr()
    iterate(with_episodes(tmp_path, 12).resume())
    assert "all 12 episodes are done" in capsys.readouterr().out


def test_a_resume_with_other_settings_is_refused(tmp_path):
    iterate(make_run(tmp_path).start())
    run = make_run(tmp_path)
    run.config["gamma"] = 0.5
    with pytest.raises(ConfigError, match=r"gamma \(0.99 -> 0.5\)"):
        run.resume()


def test_a_long_log_interval_loses_nothing(tmp_path):
    run = make_run(tmp_path, episodes=24, log_interval=12).start()
    result = EvalResult(tuple(EpisodeRow(i, i < 3, 0.0, 8, 0.0) for i in range(4)), 1.0)
    returns = []
    with run:
        for iteration in run.iterations():
            act_and_learn(run)
            returns.append(run.metrics["rollout/return_mean"])
            if iteration == 2:
                run.metrics |= result.metrics()
            run.log()
        run.finish()
    rows = figures(tmp_path)
    assert [row["progress/iteration"] for row in rows] == [2, 5, 6]  # an evaluation is always written
    assert rows[0]["eval/success_rate"] == 0.75
    assert rows[1]["rollout/return_mean"] == pytest.approx(sum(returns[2:5]) / 3)


def test_a_hangup_saves_like_any_signal(tmp_path):
    run = make_run(tmp_path).start()
    with run:
        for _ in run.iterations():
            os.kill(os.getpid(), signal.SIGHUP)
        run.finish()
    assert run.stop_requested


def test_a_signal_ends_an_evaluation(tmp_path):
    with make_run(tmp_path).start() as run:
        act = run.unless_stopped(lambda *_: "actions")
        assert act({}, [], 0) == "actions"
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(EvaluationStopped):
            act({}, [], 1)


def test_best_is_what_load_best_brings_back(tmp_path):
    run = make_run(tmp_path).start()
    good, bad = (EvalResult(tuple(EpisodeRow(i, i < k, 0.0, 8, 0.0) for i in range(100)), 1.0) for k in (90, 10))
    with run:
        run.iteration = 1
        run.keep_if_best(good)
        weights = {name: tensor.clone() for name, tensor in run.policy.trainable_state().items()}
        for parameter in run.policy.parameters():
            parameter.data += 1
        run.iteration = 2
        run.keep_if_best(bad)
        assert checkpoint_step(resolve_checkpoint(tmp_path / "checkpoints/best")) == 1
        run.load_best()
    assert all(torch.equal(weights[name], tensor) for name, tensor in run.policy.trainable_state().items())


def test_a_signal_saves_after_the_iteration_and_says_how_to_go_on(tmp_path, capsys):
    run = make_run(tmp_path, episodes=1_000).start()
    update = run.learner.update

    def interrupted(buffer):
        os.kill(os.getpid(), signal.SIGTERM)
        return update(buffer)

    run.learner.update = interrupted
    iterate(run)
    assert "go on with: go on" in capsys.readouterr().out
    assert make_run(tmp_path, episodes=1_000).resume().iteration == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_another_policys_checkpoint_is_refused(tmp_path):
    iterate(make_run(tmp_path).start())
    run = make_run(tmp_path)
    run.policy.critic = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="does not fit"):
        run.resume()
    with pytest.raises(CheckpointError):
        make_run(tmp_path / "nowhere").resume()


def test_a_batch_larger_than_the_rollout_is_refused(tmp_path):
    run = make_run(tmp_path).start()
    run.learner.settings = LearnerSettings(minibatch_size=16, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="exceeds the 8 decisions of a rollout"):
        iterate(run)


def test_a_run_stops_when_its_minutes_are_over(tmp_path, capsys):
    iterate(make_run(tmp_path, max_minutes=1e-9).start())
    out = capsys.readouterr().out
    assert "max_minutes=1e-09 are over" in out and "stopped at 4 episodes; go on with: go on" in out
    iterate(make_run(tmp_path).resume())
    assert "finished 16 episodes" in capsys.readouterr().out


def test_damaged_weights_are_neither_saved_nor_resumed_from(tmp_path):
    run = make_run(tmp_path).start()
    with run, torch.no_grad():
        run.policy.policy_parameters()[0].view(-1)[0] = torch.nan
        with pytest.raises(CheckpointError, match=r"nothing was saved.*NaN or infinity.*go on"):
            run.save()
    file = tmp_path / "checkpoints/last/training_state/policy.safetensors"
    weights = load_file(file)
    weights[min(weights)].view(-1)[0] = torch.inf
    save_file(weights, file)
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        make_run(tmp_path).resume()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    iterate(make_run(tmp_path).start())
    assert "cannot be locked" in capsys.readouterr().out


class FaultyEnv(ReachEnv):
    """Spoils what environment 1 shows or earns in the chunks whose number is in ``when``."""

    def __init__(self, what: str, when: range, poison: float = math.nan) -> None:
        super().__init__(4)
        self.what, self.when, self.poison, self.chunk = what, when, poison, 0

    def step_chunk(self, actions, next_seeds=None):
        result = super().step_chunk(actions, next_seeds)
        if self.chunk in self.when and self.what == "reward":
            result.rewards[1, -1] = self.poison
        elif self.chunk in self.when and self.what == "observation":
            result.observation["environment_state"][1, 0] = self.poison
        elif self.chunk in self.when:
            result = replace(result, episodes=[replace(e, broken=e.env == 1) for e in result.episodes])
        self.chunk += 1
        return result


@pytest.mark.parametrize("what", ["reward", "observation", "physics"])
def test_a_broken_episode_is_masked_counted_and_named(tmp_path, capsys, what):
    when = range(1, 2) if what == "physics" else range(1)
    weights = []
    for number, poison in enumerate((math.nan, math.inf)):
        run = make_run(tmp_path / str(number))
        run.env = FaultyEnv(what, when, poison)
        iterate(run.start())
        weights.append(run.policy.state_dict())
        rows = figures(tmp_path / str(number))
        assert [row["rollout/episodes_broken"] for row in rows] == [1, 0, 0, 0]
        assert all(row["critic/return_mean"] is not None for row in rows)
        assert "environment 1 lost the episode of seed" in capsys.readouterr().out
    for name, tensor in weights[0].items():  # what was spoiled, and how, leaves no trace
        assert torch.equal(tensor, weights[1][name]) and torch.isfinite(tensor).all(), name


def test_a_broken_episodes_rows_keep_their_place_in_the_buffer():
    run = make_run(Path("unused"))
    env, seeds = FaultyEnv("reward", range(1)), run.seeds
    start = RolloutState.start(run.policy, env, seeds)
    settings = RolloutSettings(gamma=0.99)
    buffer, _, _ = collect_rollout(run.policy, env, start, 4, SPEC, settings, run.learner.normalizer, seeds)
    assert buffer.valid.tolist() == [[True, False, True, True]] * 2 + [[True] * 4] * 2  # an episode is two chunks
    run.learner.update(buffer)
    assert all(torch.isfinite(tensor).all() for tensor in run.policy.state_dict().values())


def test_faults_in_a_row_stop_a_run_with_its_last_good_state_saved(tmp_path):
    run = make_run(tmp_path / "physics", episodes=400)
    run.env = FaultyEnv("reward", range(1000))
    with pytest.raises(RunError, match="stopped after iteration 3, which is saved: 3 broken episodes of environment 1"):
        iterate(run.start())
    run = make_run(tmp_path / "update", episodes=400)
    run.policy.policy_parameters()[0].register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RunError, match="3 updates with a gradient, loss or KL that is not finite in a row"):
        iterate(run.start())
    for name in ("physics", "update"):
        assert checkpoint_step(resolve_checkpoint(tmp_path / name)) == 3
        assert make_run(tmp_path / name, episodes=400).resume().iteration == 3


def test_a_rollout_in_which_everything_broke_moves_nothing(tmp_path):
    run = make_run(tmp_path)
    run.env = FaultyEnv("reward", range(2))
    run.env.step_chunk = lambda *a: (r := FaultyEnv.step_chunk(run.env, *a), r.rewards.fill(math.nan))[0]
    before = {name: tensor.clone() for name, tensor in run.policy.state_dict().items()}
    run.start()
    act_and_learn(run)
    assert run.metrics["ppo/optimizer_steps"] == 0 and run.metrics["rollout/episodes_broken"] == 4
    assert all(torch.equal(before[name], tensor) for name, tensor in run.policy.state_dict().items())
    run.lock.release()


def test_checkpoints_that_cannot_fit_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(ConfigError, match=r"up to 6 checkpoints of 1 MB do not fit into the 0 MB .* lower keep"):
        make_run(tmp_path / "run").start()
    assert not list(tmp_path.glob("run/*"))


def test_the_estimate_of_a_checkpoint_is_not_below_what_it_takes(tmp_path):
    for name, optimizer in (("adam", "adam"), ("natural", "natural")):
        run = make_run(tmp_path / name)
        run.learner = PPOLearner(run.policy, SPEC, replace(UPDATE, policy_optimizer=optimizer, target_kl=0.01), 0)
        iterate(run.start())
        files = [path for path in (tmp_path / name / "checkpoints/000004").rglob("*") if path.is_file()]
        taken = sum(path.stat().st_size for path in files if path.suffix == ".safetensors")
        assert 0.6 * run.checkpoint_bytes < taken < 1.1 * run.checkpoint_bytes, name


def test_a_checkpoint_of_an_older_version_goes_on_with_new_episodes(tmp_path, capsys):
    iterate(make_run(tmp_path, episodes=8).start())
    tensors, state = load_training_state(tmp_path)
    of_format_1 = {name: value for name, value in state.items() if name not in ("playing", "decisions")}
    save_checkpoint(tmp_path, 2, make_run(tmp_path).policy.save_pretrained, tensors, of_format_1)
    run = make_run(tmp_path).resume()
    assert run.current.episodes.tolist() == [8, 9, 10, 11] and "of an older version" in capsys.readouterr().out
    iterate(run)
    assert [row["progress/episodes"] for row in figures(tmp_path)] == [4, 8, 12, 16]


def test_a_changed_config_is_refused_and_one_killed_while_it_is_written_is_not(tmp_path):
    iterate(make_run(tmp_path, episodes=8).start())
    file = tmp_path / "config.json"
    whole = file.read_text()
    file.write_text(whole.replace('"policy_lr": 0.001', '"policy_lr": 0.002'))
    with pytest.raises(UserError, match=r"config.json is missing, or not as .* give changes as flags"):
        make_run(tmp_path).resume()
    file.write_text(whole)
    replace_with_sum(file, whole.replace("{", "{ ", 1))
    digests = json.loads((tmp_path / ".config.json.checksums.json").read_text())["config.json"]
    assert digests == [sha256(file)]  # in between both versions are allowed
    make_run(tmp_path).resume().lock.release()


def test_a_broken_episode_stays_broken_over_a_resume_and_costs_no_step(tmp_path):
    run = make_run(tmp_path)
    run.env = FaultyEnv("reward", range(1))
    run.start()
    buffer, _, run.current = collect_rollout(
        run.policy, run.env, run.current, 1, SPEC, RolloutSettings(gamma=0.99), run.learner.normalizer, run.seeds
    )
    assert run.current.broken.tolist() == [False, True, False, False] and buffer.valid.sum() == 3
    run.env.get_state = lambda: {}
    run.env.set_state = lambda state: run.env._observe()
    run.save()
    run.lock.release()
    resumed = make_run(tmp_path)
    resumed.env = run.env
    assert resumed.resume().current.broken.tolist() == [False, True, False, False]
    resumed.lock.release()
    run.learner.settings = replace(UPDATE, minibatch_size=4)  # all of the rollout's decisions
    assert run.learner.update(buffer)["ppo/optimizer_steps"] == UPDATE.num_ppo_epochs


class Watching(Sink):
    """Keeps what the live bar is told."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def progress(self, episodes: int) -> None:
        self.told.append(episodes)


def with_bars(run: Run, watching: Watching) -> Run:
    """The loop of 8 decisions an iteration, with the bars of a training."""
    with run:
        run.tracker.sinks.append(watching)
        for _ in run.iterations():
            with run.rollout_bar(8) as after_chunk:
                buffer, info, run.current = collect_rollout(
                    run.policy, run.env, run.current, 2, SPEC, RolloutSettings(gamma=0.99), run.learner.normalizer,
                    run.seeds, after_chunk,
                )  # fmt: skip
            run.count(info.episodes, int(buffer.active.sum()))
            run.metrics |= info.metrics() | run.learner.update(buffer)
            run.log()
        run.finish()
    return run


def test_the_live_bar_moves_within_an_iteration_and_changes_nothing(tmp_path):
    iterate(make_run(tmp_path / "without", save_interval=99).start())
    watching = Watching()
    with_bars(make_run(tmp_path / "with", save_interval=99).start(), watching)
    assert watching.told == [0, 4, 4, 8, 8, 12, 12, 16]  # after each of two chunk steps, of which the second ends it
    names = figures(tmp_path / "without")[0].keys() - {"progress/timesteps"}
    with_them, without = (
        [{name: row[name] for name in names} for row in figures(tmp_path / one)] for one in ("with", "without")
    )
    assert with_them == without


def test_the_live_bar_counts_control_steps_where_the_run_does(tmp_path):
    watching = Watching()
    run = with_bars(make_run(tmp_path, total_timesteps=60, save_interval=99).start(), watching)
    assert watching.told[-1] == run.timesteps >= 60
    assert watching.told == sorted(watching.told)


def test_whatever_may_take_long_in_an_iteration_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_EVERY_S", -1.0)  # every move of a bar becomes a line
    run = make_run(tmp_path, episodes=4).start()
    run.learner = PPOLearner(
        run.policy, SPEC, replace(UPDATE, minibatch_size=2, gradient_accumulation_steps=2, anchor_coeff=0.1), 0, True
    )  # fmt: skip
    with_bars(run, Watching())
    evaluate_seeds(noise_free_actor(run.policy, SPEC), ReachEnv, 5000, 8, 4)
    said = dict(re.findall(r"^([a-zA-Z ,]+): [0-9]+ of ([0-9]+)", capsys.readouterr().out, re.MULTILINE))
    epochs = UPDATE.num_ppo_epochs
    assert said == {
        "rollout, decisions": "8", "scoring again, minibatches": "4", "anchor, minibatches": "4",
        "policy, steps": str(2 * epochs), "gradient, minibatches": "2", "KL, minibatches": "4",
        "critic, steps": str(2 * UPDATE.num_critic_epochs), "evaluation, episodes": "8",
    }  # fmt: skip
