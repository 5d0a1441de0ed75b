"""Reflow: a straighter student of one step, stock exports, a stage that goes on after a kill, what it warns of."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reinflow import ConfigError
from reinflow.flow import ChainSpec
from reinflow.flow_mlp import FlowMLP
from reinflow.stage import StageDirectory, read_stage
from reinflow_so101.commands.materialize import materialize
from reinflow_so101.policy_card import stored_env, write_card
from reinflow_so101.stages import demonstrations
from reinflow_so101.stages.observations import ObservationsError, Pairs, _decided, make_pairs
from reinflow_so101.stages.reflow import (
    SIZES,
    ReflowConfig,
    Source,
    check_config,
    load_teacher,
    parse_args,
    prepare_pairs,
    reflow,
    train,
)
from reinflow_so101.stages.straightness import measure, reflow_loss, trouble
from so101_sim.tasks.registry import task_env
from tests.foreign import clone

ROOT = Path(__file__).parents[2]


def small(policy_dir: str | Path, output_dir: Path, **changes) -> ReflowConfig:
    """Seconds long, everything real."""
    settings = {
        "steps": 8, "batch_size": 8, "warmup_steps": 2, "episodes": 2, "num_pairs": 24, "num_held_out": 4,
        "measure_every": 4, "save_every": 4, "eval_steps_k": (1, 2), "eval_episodes": 0, "num_parallel_envs": 2,
        "teacher_steps": 3,
    }  # fmt: skip
    return ReflowConfig(str(policy_dir), output_dir, **(SIZES["tiny"] | settings | changes))


def rows_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# --- What it does -----------------------------------------------------------------------------------------------------


def test_a_curved_flow_becomes_straight(tmp_path):
    """A teacher with random weights, whose action turns with time: its student's does not."""
    torch.manual_seed(0)
    teacher = FlowMLP(4, 2, 8, hidden_size=64)
    with torch.no_grad():
        next(teacher.trunk.parameters()).mul_(3)
        teacher.head.weight.mul_(4)
    teacher.train_only(["trunk", "head"])
    pairs = make_pairs(teacher, {"state": torch.randn(200, 4)}, 2_000, 64, ChainSpec(10), seed=0)
    config = small("", tmp_path / "out", steps=240, batch_size=64, measure_every=240, eval_steps_k=(1, 10), lr=3e-3)
    with StageDirectory.open(config.output_dir, {}, False, "test") as stage:
        before = measure(teacher, pairs, config.eval_steps_k)
        stage.log(0, before)
        after = train(config, teacher, pairs, stage)
    assert before["action_error_K10"] < 1e-5 < before["action_error_K1"]
    assert after["straightness"] < 0.5 * before["straightness"]
    assert after["held_out_loss"] < 0.5 * after["teacher_loss"] == 0.5 * before["held_out_loss"]
    assert after["action_error_K1"] < 0.6 * before["action_error_K1"]


@pytest.mark.parametrize("name", ["tiny", "tiny-pi0"])
def test_the_student_is_stock_and_learned(name, tmp_path, monkeypatch):
    from lerobot.policies.factory import get_policy_class

    from reinflow_vla.pi0_directory import reduced_sizes, stored_sizes

    source = clone(tmp_path / "teacher", "tiny_smolvla" if name == "tiny" else "tiny_pi0")
    write_card(source, task_env("lift"))
    out = tmp_path / "student"
    record = reflow(small(source, out, num_denoising_steps=2, steps=4, round=2))
    assert record["lr"] == 2.5e-4
    assert record["student"]["step"] == 4 and record["student"]["grad_norm"] > 0
    assert stored_env(out) == stored_env(source)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {key for key in after if not torch.equal(after[key].float(), before[key].float())}
    assert before.keys() == after.keys()
    assert any("action_out_proj" in key for key in changed)
    assert any("time_mlp" in key for key in changed)
    assert any("expert" in key for key in changed)
    assert not any("vision" in key or "text_model" in key for key in changed)
    target = materialize(out, tmp_path / "absolute")
    monkeypatch.chdir(tmp_path)
    kind = json.loads((out / "config.json").read_text())["type"]
    with reduced_sizes(stored_sizes(target) if kind == "pi0" else None):
        stock = get_policy_class(kind).from_pretrained(target, strict=True)
    assert (stock.config.num_steps if kind == "smolvla" else stock.config.num_inference_steps) == 2
    loaded = stock.state_dict()
    assert all(torch.equal(loaded[key].float(), after[key].float()) for key in changed)


def test_a_smolvla_learns_its_whole_chunk_and_executes_what_it_did(tmp_path):
    source = clone(tmp_path / "teacher")
    write_card(source, task_env("lift"))
    stored = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stored | {"n_action_steps": 25}))
    config = small(source, tmp_path / "out", steps=2)
    teacher_source = Source.of(config)
    policy = load_teacher(config, teacher_source, 12)
    pairs = prepare_pairs(config, teacher_source, policy, tmp_path / "pairs.safetensors")
    assert 6 < len(pairs.contexts["kv"]) <= 12  # decisions every 25 steps
    assert pairs.x_1.shape == (28, 50, 32)
    context, x_0, x_1 = pairs.batch(policy, torch.arange(4))
    loss, off = reflow_loss(policy, context, x_0, x_1, torch.full((4,), 0.5))
    real, padded = (off[..., :6] ** 2).mean(), (off[..., 6:] ** 2).mean()
    assert float(loss.detach()) == pytest.approx(float(real + padded), rel=1e-5)
    again = Pairs.load(tmp_path / "pairs.safetensors")
    assert torch.equal(again.x_1, pairs.x_1) and torch.equal(again.contexts["kv"], pairs.contexts["kv"])
    reflow(config)
    assert json.loads((tmp_path / "out/config.json").read_text()) == stored | {"n_action_steps": 25, "num_steps": 1}


def test_observations_of_a_dataset(tmp_path):
    demonstrations.record(demonstrations.DemoConfig(output_dir=tmp_path / "demos", episodes=1))
    config = small("tiny", tmp_path / "out", dataset_root=str(tmp_path / "demos"), jitter=1)
    source = Source.of(config)
    policy = load_teacher(config, source, 8)
    pairs = prepare_pairs(config, source, policy, tmp_path / "pairs.safetensors")
    assert len(pairs.contexts["kv"]) == 8  # 0 1, 49 50 51, 99 100 101
    with pytest.raises(ConfigError, match="cameras"):
        Source.of(replace(config, policy_dir="flow_mlp"))


# --- Killed, resumed, refused -----------------------------------------------------------------------------------------


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path):
    changes = {"steps": 240, "measure_every": 60, "save_every": 24}
    straight, killed = (small("flow_mlp", tmp_path / name, **changes) for name in ("straight", "killed"))
    flags = [
        f"--{name.replace('_', '-')}={getattr(killed, name)}"
        for name in ("policy_dir", "output_dir", "steps", "batch_size", "warmup_steps", "episodes", "num_pairs",
                     "num_held_out", "measure_every", "save_every", "num_parallel_envs", "teacher_steps", "preset")
    ] + ["--eval-episodes=0", "--eval-steps-k", "1", "2"]  # fmt: skip
    command = [sys.executable, "-m", "reinflow_so101.stages.reflow", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    saved, deadline = killed.output_dir / "progress/checkpoints/last", time.monotonic() + 60
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pairs = (killed.output_dir / "progress/pairs.safetensors").stat().st_mtime_ns
    with pytest.raises(ConfigError, match=r"keeps its settings.*seed"):
        reflow(replace(killed, resume=True, seed=1))
    assert (killed.output_dir / "progress/pairs.safetensors").stat().st_mtime_ns == pairs
    reflow(replace(killed, resume=True))
    reflow(straight)
    weights = [load_file(config.output_dir / "model.safetensors") for config in (straight, killed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    steps = [[row["step"] for row in rows_of(config.output_dir)] for config in (straight, killed)]
    assert steps[0] == steps[1] == [0, 60, 120, 180, 240]
    assert not (killed.output_dir / "progress").exists()
    assert read_stage(killed.output_dir)["record"]["student"]["step"] == 240


def test_refusals(tmp_path):
    config = ReflowConfig("tiny", tmp_path / "out")
    assert [replace(config, round=number).rate for number in (1, 2, 3, 4)] == [5e-5, 2.5e-5, 1e-5, 1e-5]
    with pytest.raises(ConfigError, match=r"lr=0.0001 .*would forget.*--allow-large-lr"):
        check_config(replace(config, lr=1e-4))
    check_config(replace(config, lr=1e-4, allow_large_lr=True))
    with pytest.raises(ConfigError, match="eval_seed"):
        check_config(replace(config, eval_seed=10_000))
    with pytest.raises(ConfigError, match="episodes is 5001"):
        check_config(replace(config, episodes=5_001))
    with pytest.raises(ConfigError, match="eval_steps_k"):
        check_config(replace(config, eval_steps_k=()))
    with pytest.raises(ObservationsError, match="cannot be read"):
        Pairs.load(tmp_path / "none.safetensors")
    parsed = parse_args(["--policy-dir", "tiny", "--output-dir", "x", "--preset", "tiny", "--steps", "7"])
    assert (parsed.steps, parsed.rate, parsed.num_threads) == (7, 5e-4, 1)


def test_decisions_after_an_end_and_repeated_ones_are_left_out():
    made = [(3, 0), (1, 0), (3, 0), (3, 1), (1, 1), (3, 2), (1, 2)]
    assert _decided(made, {1: 60, 3: 150}, executed=50) == [1, 4, 0, 3, 5]


# --- What it warns of -------------------------------------------------------------------------------------------------


def history(*losses: float, training: float = 1.0) -> list[dict]:
    return [
        {"step": 100 * number, "held_out_loss": loss, "loss": training / (number + 1)}
        for number, loss in enumerate(losses)
    ]


def test_a_loss_that_rises_or_oscillates_is_said_with_figures():
    assert trouble(history(5, 4, 3, 2.5, 2.4, 2.41, 2.39), 1e-3) == ""
    rising = [row | {"loss": 1.0} for row in history(5, 4, 5, 6)]
    assert "rose from 4 at step 100 to 6 at step 300: rate too high, lower --lr (it is 0.001)" in trouble(rising, 1e-3)
    assert trouble(rising[:3], 1e-3) == ""  # once may be chance
    assert "raise --episodes" in trouble(history(5, 4, 5, 6), 1e-3)
    said = trouble(history(5, 3, 4, 2.9, 3.9, 2.8, 3.8), 1e-3)
    assert "oscillates by" in said and "steps 100 to 600" in said and "--lr" in said


def test_the_sweep_recommends_and_writes_no_policy(tmp_path, capsys):
    config = small("flow_mlp", tmp_path / "out", sweep_lr=True, sweep_steps=5)
    record = reflow(config)
    rates = [row["lr"] for row in rows_of(config.output_dir)]
    assert rates == pytest.approx([1e-4, 2e-4, 5e-4, 7e-4, 1e-3])
    assert record["recommended_lr"] in rates
    assert f"recommended: --lr {record['recommended_lr']:g}" in capsys.readouterr().out
    assert not (config.output_dir / "config.json").exists()
