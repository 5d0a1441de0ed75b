"""reinflow-shortcut on both families: the stage, its export for any number of steps, resuming, refusals."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reinflow import ConfigError
from reinflow.flow_mlp import FlowMLP
from reinflow.step_size import STEP_SIZE_FILE
from reinflow_so101.policies import FAMILIES, ActingSettings
from reinflow_so101.stages import demonstrations
from reinflow_so101.stages.shortcut import (
    Shortcut,
    ShortcutConfig,
    flow_mlp_student,
    smolvla_student,
    train_shortcut,
)
from reinflow_so101.stages.state_data import StateEpisodes, write_state_dataset
from reinflow_vla.base import cache_from
from reinflow_vla.smolvla_directory import load_smolvla
from so101_mujoco_utils import CAMERA_NAMES, model_dir

SMALL = {"episodes": 2, "steps": 6, "batch_size": 8, "hidden_size": 16, "finest_steps": 4, "num_steps": (1, 4)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """What the command writes with a tiny budget."""
    out = tmp_path_factory.mktemp("shortcut") / "policy"
    return out, train_shortcut(ShortcutConfig(out, **SMALL, eval_episodes=2))


@pytest.fixture(scope="module")
def vla(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny SmolVLA and a data set of one episode."""
    demos = tmp_path_factory.mktemp("vla") / "demos"
    demonstrations.record(demonstrations.DemoConfig(output_dir=demos, episodes=1))
    return tiny_policy_dir, demos


def of_vla(vla: tuple[Path, Path], out: Path, **settings) -> ShortcutConfig:
    small = {"steps": 2, "batch_size": 4, "num_steps": (1, 4), "eval_episodes": 0}
    return ShortcutConfig(out, policy_dir=str(vla[0]), dataset_root=str(vla[1]), **(small | settings))


# --- The state-based policy -----------------------------------------------------------------------------------------


def test_the_stage_writes_a_stock_policy_with_its_figures(made: tuple[Path, dict]) -> None:
    out, record = made
    assert record.keys() >= {"K1", "K4"} and 0 <= record["K1"]["success"] <= 1
    stage = json.loads((out / "stage.json").read_text())
    assert stage["record"]["K4"] == record["K4"] and stage["finest_steps"] == 4
    assert json.loads((out / "config.json").read_text())["num_denoising_steps"] == 1
    assert json.loads((out / "reinflow.json").read_text())["env"]["task"] == "lift"
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and all(math.isfinite(value) for value in rows[-1].values())
    assert not (out / "progress").exists() and (out / STEP_SIZE_FILE).is_file()


def test_the_export_is_the_network_at_each_number_of_steps(tmp_path: Path) -> None:
    config = ShortcutConfig(tmp_path / "out", **(SMALL | {"num_steps": (2, 4)}))
    shortcut = Shortcut(config, flow_mlp_student(config, None))
    torch.nn.init.normal_(shortcut.embedding.project.weight)
    shortcut.average.update()
    batch = shortcut.student.batch()
    x_t, flow_time = torch.randn(batch.action.shape), torch.full((8,), 0.75)
    shortcut.write(tmp_path / "policy")
    for steps in (1, 2, 4):
        loaded = FlowMLP.from_pretrained(tmp_path / "policy", num_denoising_steps=steps)
        told = shortcut.averaged_velocity(batch.context, x_t, flow_time, torch.full((8,), 1 / steps))
        assert torch.allclose(loaded.velocity(batch.context, x_t, flow_time)[0], told, atol=1e-5)
    acting = FAMILIES["flow_mlp"].load(tmp_path / "policy", ActingSettings(num_denoising_steps=4))
    assert torch.equal(acting.step_size_layer.bias, loaded.step_size_layer.bias)


def test_a_killed_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    config = ShortcutConfig(tmp_path / "straight", **(SMALL | {"steps": 30}), save_every=10, eval_episodes=0)
    train_shortcut(config)
    killed = replace(config, output_dir=tmp_path / "killed")
    code = (
        "import sys, os, signal; from pathlib import Path; from reinflow.step_size import MovingAverage\n"
        "from reinflow_so101.stages.shortcut import ShortcutConfig, train_shortcut\n"
        "update = MovingAverage.update\n"
        "def dies(self):\n"
        "    update(self)\n"
        "    if int(self.count) == 27: os.kill(os.getpid(), signal.SIGKILL)\n"
        "MovingAverage.update = dies\n"
        f"settings = {SMALL | {'steps': 30, 'save_every': 10, 'eval_episodes': 0}!r}\n"
        "train_shortcut(ShortcutConfig(Path(sys.argv[1]), **settings))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(killed.output_dir)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    with pytest.raises(ConfigError, match="steps"):
        train_shortcut(replace(killed, steps=70, resume=True))
    train_shortcut(replace(killed, resume=True))
    for name in ("model.safetensors", STEP_SIZE_FILE):
        straight, resumed = (load_file(c.output_dir / name) for c in (config, killed))
        assert all(torch.equal(tensor, resumed[key]) for key, tensor in straight.items())
    lines = [(c.output_dir / "metrics.jsonl").read_text() for c in (config, killed)]
    assert lines[0] == lines[1]


def test_a_finished_policy_is_no_start_but_a_plain_one_is(made: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a shortcut policy already"):
        train_shortcut(ShortcutConfig(tmp_path / "again", policy_dir=str(made[0])))
    config = ShortcutConfig(tmp_path / "on", policy_dir="flow_mlp", episodes=2, steps=2, eval_episodes=0)
    student = flow_mlp_student(config, model_dir() / "flow_mlp")
    plain = FlowMLP.from_pretrained(model_dir() / "flow_mlp")
    shortcut, batch = Shortcut(config, student), student.batch()
    told = shortcut.velocity(batch.context, batch.action, torch.ones(128), torch.full((128,), 0.5))
    assert torch.equal(told, plain.velocity(batch.context, batch.action, torch.ones(128))[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finest_steps": 6}, "finest_steps is 6: use a power of two"),
        ({"num_steps": (1, 16)}, "num_steps is .*finest_steps=8"),
        ({"consistency_share": 0.0}, "consistency_share=0.0"),
        ({"eval_seed": 9_990}, "tuning seeds"),
        ({"policy_dir": "flow_mlp", "hidden_size": 64}, "hidden_size=64 is of a new policy"),
        ({"dataset_root": "x", "first_seed": 5}, "first_seed=5 is of scripted demonstrations"),
        ({"rename_map": "{}"}, "rename_map=.* is of a SmolVLA"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"task": "no such task"}, "no such task"),
    ],
)
def test_contradictions_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShortcutConfig(Path("out"), **settings)


def test_starts_that_cannot_learn_step_sizes_are_refused(tmp_path: Path) -> None:
    for start, message in (("tiny-base", "needs --dataset-root"), ("tiny-pi0", "flow_mlp or a SmolVLA")):
        with pytest.raises(ConfigError, match=message):
            train_shortcut(ShortcutConfig(tmp_path / "out", policy_dir=start))
    assert not (tmp_path / "out").exists()


def test_it_learns_from_a_data_set_of_states_and_executes_a_part_of_a_chunk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    states, actions = ([rng.normal(size=(20, d)).astype(np.float32) for _ in range(3)] for d in (5, 2))
    write_state_dataset(tmp_path / "data", StateEpisodes(states, actions, None, [False] * 3), 50, "walk", {})
    small = SMALL | {"chunk_size": 8, "n_action_steps": 4, "num_steps": (2,), "eval_episodes": 5}
    config = ShortcutConfig(tmp_path / "out", dataset_root=str(tmp_path / "data"), **small)
    assert train_shortcut(config)["K2"] == {}  # nothing says what could be played
    policy = FlowMLP.from_pretrained(config.output_dir)
    assert (policy.chunk_size, policy.n_action_steps, policy.num_denoising_steps) == (8, 4, 2)
    assert (policy.state_dim, policy.action_dim) == (5, 2)
    starts = np.concatenate([episode[[0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 16, 17, 18]] for episode in states[:2]])
    assert torch.allclose(policy.state_mean, torch.from_numpy(starts).mean(0), atol=1e-5)  # of the first 2 episodes


# --- SmolVLA --------------------------------------------------------------------------------------------------------


def test_a_smolvla_learns_and_its_export_is_the_network(vla: tuple[Path, Path], tmp_path: Path) -> None:
    config = of_vla(vla, tmp_path / "out", eval_episodes=2, num_steps=(2,))
    record = train_shortcut(config)
    assert record["K2"].keys() == {"success", "success_ci95"}
    before, after = (load_smolvla(path)[0] for path in (vla[0], config.output_dir))
    changed = {key for key, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
    assert any("lm_expert" in key for key in changed) and not any("vlm.model" in key for key in changed)
    assert (after.config.num_steps, after.config.n_action_steps) == (2, 50)

    shortcut = Shortcut(config, smolvla_student(config, vla[0]))
    torch.nn.init.normal_(shortcut.embedding.project.weight)
    shortcut.average.update()
    batch = shortcut.student.batch()
    x_t, flow_time = torch.randn(batch.action.shape), torch.full((4,), 0.75)
    shortcut.write(tmp_path / "policy")
    told = {k: shortcut.averaged_velocity(batch.context, x_t, flow_time, torch.full((4,), 1 / k)) for k in (2, 4)}
    assert (told[2] - told[4]).abs().max() > 1e-3
    stock = load_smolvla(tmp_path / "policy")[0].model  # what plain LeRobot holds
    with torch.no_grad():
        plain = stock.denoise_step(batch.context["pad"], cache_from(batch.context["kv"]), x_t, flow_time)
    assert (plain - told[2]).abs().max() < 1e-5
    # through the door, as reinflow-eval and train_reinflow.py load it
    acting = ActingSettings(num_denoising_steps=4, cameras=CAMERA_NAMES)
    other = FAMILIES["smolvla"].load(tmp_path / "policy", acting)
    with torch.no_grad():
        assert (other.velocity(batch.context, x_t, flow_time)[0] - told[4]).abs().max() < 1e-5
    other.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "trained" / STEP_SIZE_FILE).exists()


def test_only_the_step_size_can_explain_a_smolvlas_target(vla: tuple[Path, Path], tmp_path: Path) -> None:
    """Same observation, x_t and flow time, velocities of +1 and -1 by step size: deaf to it, 1 is the least error."""
    config = of_vla(vla, tmp_path, batch_size=2, consistency_share=0.5)
    shortcut = Shortcut(config, smolvla_student(config, vla[0]))
    context = {
        name: tensor[:1].expand(2, *tensor.shape[1:]) for name, tensor in shortcut.student.batch().context.items()
    }
    x_t, flow_time, step = torch.ones(2, 50, 32), torch.ones(2), torch.tensor([1.0, 0.125])
    target = torch.tensor([1.0, -1.0])[:, None, None]
    optimizer = torch.optim.Adam(shortcut.parameters, lr=3e-3)
    for _ in range(60):
        loss = ((shortcut.velocity(context, x_t, flow_time, step)[..., :6] - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
