"""One run of any task: what it writes, resumes, keeps and says. On the fake environment; no robot, no VLA."""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from reinflow.checkpoint import checkpoint_step, resolve_checkpoint
from reinflow.evaluate import EpisodeRow, EvalResult
from reinflow.flow import ChainSpec
from reinflow.learner import LearnerSettings, PPOLearner
from reinflow.metrics import read_metrics
from reinflow.rollout import RolloutSettings, collect_rollout
from reinflow.run import Run, RunSettings
from reinflow.training_state import CheckpointError
from tests.fakes import ReachEnv, make_policy

SPEC = ChainSpec(1, "action")
UPDATE = LearnerSettings(policy_lr=1e-3, minibatch_size=8, gradient_accumulation_steps=1, gamma=0.99)


def make_run(directory: Path, episodes: int = 16, **settings) -> Run:
    policy = make_policy()
    learner = PPOLearner(policy, SPEC, UPDATE, 0)
    how = RunSettings(num_episodes=episodes, **({"save_interval": 8, "seed": 3} | settings))
    return Run(directory, policy, ReachEnv(4), learner, how, asdict(UPDATE), resume_command="go on")


def iterate(run: Run) -> None:
    """The loop without evaluations: an iteration is 4 episodes of 2 decisions."""
    with run:
        for _ in run.iterations():
            buffer, info, run.current = collect_rollout(
                run.policy, run.env, run.current, 2, SPEC, RolloutSettings(gamma=0.99),
                run.learner.normalizer, run.seeds,
            )  # fmt: skip
            run.episodes += len(info.episodes)
            run.metrics |= info.metrics() | run.learner.update(buffer)
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
