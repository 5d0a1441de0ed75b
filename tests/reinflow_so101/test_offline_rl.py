"""Advantage-weighted offline RL as a stage: what it reads, writes, resumes, refuses, and what its doctor says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reinflow import ConfigError, UserError
from reinflow.flow_mlp import FlowMLP
from reinflow_so101.stages.demonstrations import DemoConfig, record
from reinflow_so101.stages.offline_doctor import RULES, Watch
from reinflow_so101.stages.offline_rl import (
    OfflineRlConfig,
    discounted,
    make_transitions,
    split_episodes,
    train_offline,
)
from reinflow_so101.stages.sft_flow_mlp import FlowMlpSftConfig, finetune
from reinflow_so101.stages.shortcut import ShortcutConfig, train_shortcut
from reinflow_so101.stages.state_data import StateDataError, StateEpisodes, write_state_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data: four episodes, half of them noisy; policy: a small one that was trained on them for a moment."""
    home = tmp_path_factory.mktemp("offline")
    demos = DemoConfig(home / "data", episodes=4, noisy_share=0.5, rewards=True, environment_state=True, images=False)
    record(demos)
    finetune(FlowMlpSftConfig(
        home / "policy", dataset_root=str(home / "data"), chunk_size=10, n_action_steps=8, num_denoising_steps=2,
        hidden_size=16, steps=3, one_step_share=0.0, eval_episodes=0,
    ))  # fmt: skip
    return home


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the process that is killed: sums are rounded by how they are spread over threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(home: Path, name: str, **changes: object) -> OfflineRlConfig:
    config = OfflineRlConfig(
        home / "policy", home / name, dataset_root=str(home / "data"), critic_steps=20, steps=60, batch_size=16,
        hidden_size=16, held_out=0.25, eval_episodes=0, save_every=10, log_every=5,
    )  # fmt: skip
    return replace(config, **changes)


def test_a_killed_stage_goes_on_bit_for_bit(home: Path) -> None:
    whole, cut = small(home, "whole", eval_episodes=2), small(home, "cut", eval_episodes=2)
    done = train_offline(whole)
    flags = (
        "policy_dir", "dataset_root", "output_dir", "critic_steps", "steps", "batch_size", "hidden_size", "held_out",
        "eval_episodes", "save_every", "log_every",
    )  # fmt: skip
    argv = [text for name in flags for text in (f"--{name.replace('_', '-')}", str(getattr(cut, name)))]
    command = [sys.executable, "-m", "reinflow_so101.stages.offline_rl", *argv]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list(cut.output_dir.glob("progress/checkpoints/[0-9]*")):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cut.output_dir / "model.safetensors").exists()
    with pytest.raises(ConfigError, match="beta"):
        train_offline(replace(cut, resume=True, beta=3.0))
    record = train_offline(replace(cut, resume=True))
    one, other = (load_file(c.output_dir / "model.safetensors") for c in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = [(c.output_dir / "metrics.jsonl").read_text() for c in (whole, cut)]
    assert lines[0] == lines[1] and '"q_growth"' in lines[0]
    assert done["after"] == record["after"] and 0 <= done["before"]["success"] <= 1
    with pytest.raises(ConfigError, match="finished"):
        train_offline(replace(cut, resume=True))


def test_critics_learn_alone_first_and_the_result_is_a_policy(home: Path) -> None:
    train_offline(small(home, "aw"))
    rows = [json.loads(line) for line in (home / "aw/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(5, 81, 5))
    assert [row["step"] for row in rows if "flow_loss" in row] == list(range(25, 81, 5))
    policy = FlowMLP.from_pretrained(home / "aw")
    start = FlowMLP.from_pretrained(home / "policy")
    assert (policy.n_action_steps, policy.num_denoising_steps) == (8, 2)
    assert not torch.equal(policy.head.weight, start.head.weight)
    assert torch.equal(policy.state_mean, start.state_mean)  # what Q and the noise are measured in stays
    assert (home / "aw/reinflow.json").read_text() == (home / "policy/reinflow.json").read_text()


def test_the_average_is_the_start_while_nothing_is_learned(home: Path) -> None:
    """A shortcut policy's step sizes are told while it learns and folded in when it is written; that alone changes
    nothing."""
    train_shortcut(ShortcutConfig(
        home / "shortcut", dataset_root=str(home / "data"), chunk_size=10, n_action_steps=8, hidden_size=16, steps=4,
        batch_size=16, num_steps=(2,), finest_steps=4, eval_episodes=0, lr=0.05,
    ))  # fmt: skip
    config = small(home, "aw_shortcut", policy_dir=home / "shortcut", lr=1e-9, steps=10, weight_decay=0.0)
    train_offline(config)
    row = json.loads((home / "aw_shortcut/metrics.jsonl").read_text().splitlines()[-1])
    assert {"flow_loss", "consistency_loss", "weight_entropy"} <= row.keys()
    for name in ("model.safetensors", "step_size.safetensors"):
        one, other = (load_file(home / d / name) for d in ("shortcut", "aw_shortcut"))
        assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one), name
    told = load_file(home / "shortcut/step_size.safetensors")
    assert max(float(tensor.abs().max()) for tensor in told.values()) > 1e-3  # there was something to fold
    train_offline(replace(config, policy_dir=home / "aw_shortcut", output_dir=home / "again"))


# --- The data -----------------------------------------------------------------------------------------------------


def test_transitions_by_hand() -> None:
    """Two episodes of 5 steps, chunks of 2: one ends by itself after 3 steps, one at its limit."""
    policy = FlowMLP(1, 1, 3, hidden_size=8, n_action_steps=2)
    rows = [np.arange(5, dtype=np.float32)[:, None] + 10 * number for number in range(2)]
    paid = [np.array([1, 2, 4, 0, 0], np.float32), np.array([1, 1, 1, 1, 1], np.float32)]
    data = StateEpisodes(rows, [r / 10 for r in rows], paid, [True, False], [3, 5])
    config = OfflineRlConfig(Path("p"), Path("o"), "d", gamma=0.5, reward_scale=1.0)
    starts = [(0, 0), (0, 2), (1, 2), (1, 4)]
    over = make_transitions(data, starts, policy, config, limit_ends=True)
    assert over.states[:, 0].tolist() == [0, 2, 12, 14] and over.actions.shape == (4, 3, 1)
    assert over.rewards.tolist() == [2.0, 4.0, 1.5, 1.0] and over.steps.tolist() == [2, 1, 2, 1]
    assert over.terminated.tolist() == [0, 1, 0, 1] and over.next_states[:, 0].tolist()[::2] == [2, 14]
    assert over.returns.tolist() == [3.0, 4.0, 1.75, 1.0]
    assert over.next_actions[0].flatten().tolist() == pytest.approx([0.2, 0.3])
    on = make_transitions(data, starts, policy, config, limit_ends=False)  # the last state stands for what comes
    assert len(on) == 3 and on.terminated.tolist() == [0, 1, 0]
    assert on.steps.tolist() == [2, 1, 2] and on.next_states[2, 0] == 14
    assert discounted(np.array([0.0, 0.0, 8.0]), 0.5).tolist() == [2.0, 4.0, 8.0]


def test_held_out_episodes_are_others_and_always_the_same() -> None:
    learn, judge = split_episodes(40, 0.1)
    assert len(judge) == 4 and not learn & judge and learn | judge == set(range(40))
    assert split_episodes(40, 0.1) == (learn, judge) and split_episodes(3, 0.0)[1] == set()


def test_what_does_not_fit_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    rows = [np.zeros((4, 3), np.float32)]
    write_state_dataset(tmp_path / "other", StateEpisodes(rows, rows, [rows[0][:, 0]], [True]), 50, "t", {})
    with pytest.raises(ConfigError, match="has 3 and 3"):
        train_offline(small(home, "x", dataset_root=str(tmp_path / "other")))
    write_state_dataset(tmp_path / "unpaid", StateEpisodes(rows, rows, None, [True]), 50, "t", {})
    with pytest.raises(StateDataError, match="--rewards"):
        train_offline(small(home, "x", dataset_root=str(tmp_path / "unpaid")))
    with pytest.raises(UserError, match="flow_mlp"):
        train_offline(small(home, "x", policy_dir=home / "data"))
    assert not (home / "x").exists()
    for changes in (
        {"beta": -1.0},
        {"w_max": 0.5},
        {"eval_seed": 10_000, "eval_episodes": 2},
        {"reward_scale": 0.0},
        {"held_out": 0.9},
    ):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            small(home, "x", **changes)


# --- The doctor ---------------------------------------------------------------------------------------------------

HEALTHY = {
    "q_top": 0.6, "top_return": 0.61, "return_spread": 0.2, "q_correlation": 0.86, "weight_effective_share": 0.35,
    "weight_entropy": 0.8, "weight_clipped": 0.0,
}  # fmt: skip
SICK = {
    "q_above_returns": {"q_top": 1.5},
    "q_blind": {"q_correlation": 0.1},
    "weights_collapse": {"weight_effective_share": 0.03, "weight_entropy": 0.4},
    "weights_clipped": {"weight_clipped": 0.2},
}


def watch(directory: Path, lines: list[dict[str, float]] | None = None) -> Watch:
    config = OfflineRlConfig(Path("p"), directory, "d")
    return Watch(directory, vars(config), lines or [])


def test_a_healthy_training_has_no_finding(tmp_path: Path) -> None:
    doctor = watch(tmp_path)
    assert not any(doctor.examine(step, HEALTHY) for step in range(20))
    assert {rule.name for rule in RULES} == SICK.keys()


@pytest.mark.parametrize("rule", SICK)
def test_each_trouble_is_found_once_and_kept(rule: str, tmp_path: Path) -> None:
    doctor = watch(tmp_path)
    found = [finding for step in range(12) for finding in doctor.examine(step, HEALTHY | SICK[rule])]
    assert [finding.rule for finding in found] == [rule]
    kept = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert [line["rule"] for line in kept] == [rule] and "{" not in kept[0]["remedy"]
    resumed = watch(tmp_path, doctor.lines)
    assert not resumed.examine(12, HEALTHY | SICK[rule])
    before = watch(tmp_path, doctor.lines[:2])  # it was found later than where this one goes on from
    assert before.shown == set()


def test_the_stage_prints_what_its_doctor_finds(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_offline(small(home, "steep", reward_scale=100.0, beta=1_000.0))
    assert "warning: weights_clipped" in capsys.readouterr().out
    assert "weights_clipped" in json.loads((home / "steep/stage.json").read_text())["record"]["findings"]


def test_flags_are_read_fast() -> None:
    assert not {"torch", "lerobot", "mujoco"} & set(
        subprocess.run(
            [sys.executable, "-c", "import sys, reinflow_so101.stages.offline_rl; print(*sys.modules)"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.split()
    )  # fmt: skip
