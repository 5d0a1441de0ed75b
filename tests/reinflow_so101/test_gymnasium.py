"""train_reinflow.py on a Gymnasium environment: the same loop, run, evaluation and files as on the arm."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reinflow import ConfigError
from reinflow.flow_mlp import FlowMLP
from reinflow.metrics import read_metrics
from reinflow_gym.config import GymConfig
from reinflow_so101.commands.evaluate import parse_args as parse_eval
from reinflow_so101.commands.evaluate import run_eval
from reinflow_so101.commands.export import ExportConfig, export
from reinflow_so101.opening import settle
from reinflow_so101.worlds import gym_world, write_world_card
from so101_mujoco_utils import model_dir
from train_reinflow import PRESETS, parse_args, train

WORLD = GymConfig("InvertedPendulum-v5", 40)
FLAGS = [
    "--preset", "paper-state", "--no-wandb", "--num-envs", "2", "--rollout-steps", "6", "--minibatch-size", "12",
    "--gradient-accumulation-steps", "1", "--total-timesteps", "120", "--eval-interval", "2", "--eval-episodes", "2",
    "--report-episodes", "2", "--save-interval", "1", "--num-threads", "1", "--sigma-min", ".3", "--sigma-max", ".6",
]  # fmt: skip


@pytest.fixture
def policy_dir(tmp_path) -> Path:
    torch.manual_seed(0)
    policy = FlowMLP(4, 1, 4, num_denoising_steps=4, hidden_size=16)
    policy.state_mean += 0.25  # its statistics travel
    policy.save_pretrained(tmp_path / "start")
    write_world_card(tmp_path / "start", WORLD)
    return tmp_path / "start"


def config_of(policy_dir, out, *flags):
    return parse_args([*FLAGS, "--flow-mlp-pretrained-path", str(policy_dir), "--output-dir", str(out), *flags])


def test_it_trains_resumes_and_is_evaluated(policy_dir, tmp_path, capsys):
    config = config_of(policy_dir, tmp_path / "whole")
    assert (config.env_id, config.max_steps_per_episode) == ("InvertedPendulum-v5", 40)  # as its card says
    train(config)
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert rows[-1]["progress/timesteps"] >= 120 > rows[-2]["progress/timesteps"]
    assert all(row["ppo/ratio_error_before_update"] < 1e-4 for row in rows)
    assert "eval return" in capsys.readouterr().out and "eval/success_rate" not in rows[1]

    train(replace(config, output_dir=str(tmp_path / "cut"), max_minutes=1e-9))  # one iteration
    saved = parse_args(["--resume", "--output-dir", str(tmp_path / "cut"), "--max-minutes", "0"])
    train(saved)
    names = [f"{run}/checkpoints/{len(rows):06d}/pretrained_model/model.safetensors" for run in ("whole", "cut")]
    whole, cut = (load_file(tmp_path / name) for name in names)
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    start = load_file(policy_dir / "model.safetensors")
    assert torch.equal(whole["state_mean"], start["state_mean"]) and not torch.equal(
        whole["head.weight"], start["head.weight"]
    )
    out = tmp_path / "eval"
    flags = ["--policy-path", str(tmp_path / "whole"), "--episodes", "2", "--output-dir", str(out)]
    result = run_eval(parse_eval(flags))
    after = json.loads((tmp_path / "whole" / "eval_after.json").read_text())
    assert result.objective == "return" and result.return_mean == after["overall"]["avg_sum_reward"]


def test_what_does_not_fit_is_named_at_once(policy_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"Hopper-v5 has states of 11 and actions of 3 numbers.*takes 4 and gives 1"):
        train(replace(config_of(policy_dir, tmp_path / "run"), env_id="Hopper-v5"))
    path, sizes = (
        str(policy_dir),
        {"chunk_size": 4, "n_action_steps": 4, "chunks_per_episode": 0, "num_noise_coefficients": 4},
    )
    on_the_arm = replace(PRESETS["flow_mlp"], output_dir=str(tmp_path / "run"), flow_mlp_pretrained_path=path, **sizes)
    with pytest.raises(ConfigError, match=r"InvertedPendulum-v5.*--env-id"):
        train(on_the_arm)
    with pytest.raises(ConfigError, match="model_type=flow_mlp"):
        parse_args(["--preset", "tiny", "--env-id", "Hopper-v5"])
    with pytest.raises(ConfigError, match="render"):
        config_of(policy_dir, tmp_path / "run", "--render")
    with pytest.raises(ConfigError, match=r"task=lift is of the arm"):
        run_eval(parse_eval(["--policy-path", str(policy_dir), "--output-dir", str(tmp_path / "e"), "--task", "lift"]))
    assert not (tmp_path / "run").exists() and gym_world(policy_dir) == WORLD


def test_another_environment_of_the_same_sizes_is_said_and_its_time_limit_kept(policy_dir, tmp_path, capsys):
    config = replace(config_of(policy_dir, tmp_path / "run"), env_id="MountainCarContinuous-v0")
    with pytest.raises(ConfigError, match="states of 2"):
        settle(config, policy_dir)
    settled = settle(replace(config, env_id="InvertedPendulum-v4", max_steps_per_episode=42), policy_dir)
    assert "made for InvertedPendulum-v5, InvertedPendulum-v4 is played" in capsys.readouterr().out
    assert (settled.max_steps_per_episode, settled.chunks_per_episode) == (42, 11)  # the last chunk is cut off


def test_an_export_leaves_behind_what_a_stage_wrote(policy_dir, tmp_path):
    for name in ("stage.json", "metrics.jsonl", "run.lock"):
        (policy_dir / name).write_text("{}")
    target = export(ExportConfig(str(policy_dir), tmp_path / "export"))
    left = {path.name for path in target.iterdir()}
    assert left == {"config.json", "model.safetensors", "reinflow.json", "README.md", "checksums.json"}
    assert "InvertedPendulum-v5" in (target / "README.md").read_text()


def test_a_presets_chunk_yields_to_the_policys(tmp_path, capsys):
    config = parse_args(["--preset", "three-stage", "--no-wandb"])
    assert (config.chunk_size, config.n_action_steps) == (16, 8)
    settled = settle(config, model_dir() / "flow_mlp")
    assert (settled.chunk_size, settled.n_action_steps, settled.max_steps_per_episode) == (50, 50, 150)
    assert "chunk_size 50, as the policy predicts" in capsys.readouterr().out


def test_episodes_given_as_a_flag_count_instead_of_the_presets_timesteps():
    assert parse_args(["--preset", "three-stage", "--episodes", "320"]).total_timesteps == 0
    assert parse_args(["--preset", "three-stage"]).total_timesteps == 1_000_000
