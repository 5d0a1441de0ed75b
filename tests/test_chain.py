"""The whole chain, each step by its own command and on what the one before it left: demonstrations, LeRobot's training,
ours, the export, LeRobot's evaluation, and LeRobot's rollout on a simulated follower."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from reinflow_so101.commands import evaluate as reinflow_eval
from reinflow_so101.commands.export import ExportConfig, export
from reinflow_so101.commands.materialize import materialize
from reinflow_so101.policy_card import known_env
from reinflow_so101.stages import demonstrations
from reinflow_vla.directory import read_json
from so101_sim.tasks.registry import nearest_task
from tests.lerobot_commands import lerobot, plugin_folder
from train_reinflow import parse_args, train

ENV = ("--env.type=so101_reinflow", "--env.task=lift")


@dataclass(frozen=True)
class Numbers:
    """How much of everything."""

    demonstrations: int
    steps: int
    batch: int
    training: tuple[str, ...]
    episodes: int
    seconds: int


SHORT = Numbers(2, 2, 2, ("--smoke", "--num-threads", "1"), 2, 1)
LONG = Numbers(
    8, 60, 16,
    ("--episodes", "16", "--episodes-per-iteration", "8", "--num-envs", "4", "--minibatch-size", "8",
     "--gradient-accumulation-steps", "1", "--report-episodes", "8", "--eval-interval", "0"),
    10, 5,
)  # fmt: skip


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plugin_folder(tmp_path_factory.mktemp("plugins"))


def chain(folder: Path, plugins: Path, numbers: Numbers, *while_training: str) -> Path:
    """Every step; the exported policy, as plain LeRobot loads it."""
    data = folder / "data"
    demonstrations.record(demonstrations.DemoConfig(output_dir=data, episodes=numbers.demonstrations, video=True))
    assert read_json(data / "meta/reinflow.json")["env"]["task"] == "lift"
    base = materialize("tiny-base", folder / "base")
    lerobot(
        "train", plugins, f"--policy.path={base}", "--policy.push_to_hub=false", "--policy.device=cpu",
        "--dataset.repo_id=local/so101_pick", f"--dataset.root={data}", "--dataset.video_backend=pyav",
        f"--batch_size={numbers.batch}", "--num_workers=0", f"--steps={numbers.steps}", f"--save_freq={numbers.steps}",
        "--policy.optimizer_lr=1e-3", "--policy.scheduler_warmup_steps=20", f"--output_dir={folder / 'lerobot'}",
        "--wandb.enable=false", *(while_training or ("--env_eval_freq=0",)),
    )  # fmt: skip
    supervised = folder / "lerobot/checkpoints/last/pretrained_model"
    known = known_env(supervised)
    assert known and nearest_task(known[0]) == "lift"  # by the environment or the data that lerobot-train names
    run = folder / "run"
    flags = ["--preset", "finetune", "--pretrained-path", str(supervised), "--no-wandb", "--output-dir", str(run)]
    train(parse_args([*flags, *numbers.training]))
    assert json.loads((run / "config.json").read_text())["task"] == "lift"
    exported = export(ExportConfig(str(run), folder / "export"))
    assert "- Task: lift (" in (exported / "README.md").read_text()
    policy = materialize(exported, folder / "policy")
    assert reinflow_eval.parse_args(["--policy-path", str(policy), "--output-dir", "x"]).env.randomize_block  # ours too
    report = folder / "arm.json"
    with ThreadPoolExecutor() as at_once:  # neither needs the other
        ended = [
            at_once.submit(
                lerobot, "eval", plugins, f"--policy.path={policy}", *ENV, f"--eval.n_episodes={numbers.episodes}",
                f"--eval.batch_size={numbers.episodes}", "--eval.use_async_envs=false",
                f"--output_dir={folder / 'eval'}",
            ),
            at_once.submit(
                lerobot, "rollout", plugins, "--strategy.type=base", f"--policy.path={policy}",
                "--robot.type=so101_simulated", "--robot.id=arm", f"--robot.calibration_dir={folder / 'calibration'}",
                f"--robot.report={report}", "--task=pick up the block", "--fps=50", f"--duration={numbers.seconds}",
                "--play_sounds=false", "--device=cpu",
            ),
        ]  # fmt: skip
        for command in ended:
            command.result()
    overall = read_json(folder / "eval/eval_info.json")["overall"]
    assert overall["n_episodes"] == numbers.episodes and 0 <= overall["pc_success"] <= 100
    assert read_json(report)["actions"] > 10 * numbers.seconds
    return policy


def test_the_chain_in_small(tmp_path: Path, plugins: Path) -> None:
    chain(tmp_path, plugins, SHORT)


@pytest.mark.slow
def test_the_chain_with_evaluation_during_lerobots_training(tmp_path: Path, plugins: Path) -> None:
    policy = chain(
        tmp_path, plugins, LONG, *ENV, "--env_eval_freq=60", "--eval.n_episodes=4", "--eval.batch_size=2",
        "--eval.use_async_envs=true",
    )  # fmt: skip
    flags = ["--policy-path", str(policy), "--output-dir", str(tmp_path / "ours"), "--episodes", "8"]
    assert 0 <= reinflow_eval.run_eval(reinflow_eval.parse_args(flags)).success_rate <= 1
