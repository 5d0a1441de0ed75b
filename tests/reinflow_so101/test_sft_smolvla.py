"""Supervised fine-tuning in memory: batches, frozen vision, checkpoints, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch

from reinflow import ConfigError
from reinflow.checkpoint import CheckpointError
from reinflow_so101.stages import demonstrations, sft_smolvla
from reinflow_so101.stages.build_smolvla import TinyConfig, build_policy
from reinflow_so101.stages.datasets import check_dataset
from reinflow_vla.directory import PolicyDirectoryError
from reinflow_vla.smolvla_directory import load_smolvla
from so101_sim.tasks.registry import nearest_task
from tests.foreign import rename_cameras


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny policy and a dataset of two episodes."""
    base = tmp_path_factory.mktemp("sft")
    small = {"vision_hidden_size": 32, "vision_layers": 1, "text_hidden_size": 48, "text_layers": 2}
    build_policy(TinyConfig(output_dir=base / "policy", **small))
    demonstrations.record(demonstrations.DemoConfig(output_dir=base / "demos", episodes=2))
    return base / "policy", base / "demos"


@pytest.mark.parametrize(("train_vision", "train_prefix"), [(False, False), (False, True), (True, False)])
def test_three_steps(start: tuple[Path, Path], tmp_path: Path, train_vision: bool, train_prefix: bool) -> None:
    config = sft_smolvla.SftConfig(
        policy_dir=start[0],
        dataset_root=start[1],
        output_dir=tmp_path / "out",
        held_out=1,
        steps=3,
        batch_size=4,
        save_every=2,
        eval_episodes=0 if train_vision else 2,
        num_steps=(1,),
        train_vision=train_vision,
        train_prefix=train_prefix,
    )
    record = sft_smolvla.finetune(config)
    assert np.isfinite(record["loss"])
    assert record["action_error"].keys() == {"t0", "t50", "t100"}
    lines = (config.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3]
    checkpoint = config.output_dir / "checkpoints" / "000003"
    after = load_smolvla(checkpoint)[0]
    before = load_smolvla(start[0])[0].state_dict()
    changed = {key for key, value in after.state_dict().items() if not torch.equal(value, before[key])}
    assert any("lm_expert" in key for key in changed)
    assert any("vision_model" in key for key in changed) == train_vision
    assert any("text_model" in key for key in changed) == train_prefix
    assert any("state_proj" in key for key in changed) == train_prefix
    assert json.loads((checkpoint / "reinflow.json").read_text())["env"]["randomize_block"] is True
    with pytest.raises(PolicyDirectoryError, match="exists"):
        sft_smolvla.finetune(config)


def test_a_killed_fine_tuning_goes_on_to_the_same_weights(start, tmp_path, monkeypatch, capsys) -> None:
    config = sft_smolvla.SftConfig(
        policy_dir=start[0], dataset_root=start[1], output_dir=tmp_path / "whole", held_out=1, steps=4, batch_size=4,
        save_every=2, eval_episodes=0,
    )  # fmt: skip
    sft_smolvla.finetune(config)
    cut, save = dataclasses.replace(config, output_dir=tmp_path / "cut"), sft_smolvla.save

    def save_until_killed(*args: object) -> None:
        save(*args)
        if args[4]["step"] == 4:  # its last checkpoint is there, what was done is not yet noted
            raise KeyboardInterrupt

    monkeypatch.setattr(sft_smolvla, "save", save_until_killed)
    with pytest.raises(KeyboardInterrupt):
        sft_smolvla.finetune(cut)
    assert "--resume goes on" in capsys.readouterr().out
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"lr \(0.001 -> 0.5\)"):
        sft_smolvla.finetune(dataclasses.replace(cut, resume=True, lr=0.5))
    sft_smolvla.finetune(dataclasses.replace(cut, resume=True))
    one, other = (load_smolvla(tmp_path / run / "checkpoints" / "000004")[0].state_dict() for run in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4] and not (tmp_path / "cut" / "progress").exists()


def test_cached_image_tokens_give_the_same_loss(start: tuple[Path, Path]) -> None:
    data = sft_smolvla.read_demonstrations(start[1], "local/so101_pick", jitter=6)
    policy, preprocessor, _ = load_smolvla(start[0])
    frames = np.array([0, 1, 1]), np.array([0, 52, 100])
    noise, flow_time = torch.randn(3, 50, 32), torch.full((3,), 0.5)
    losses = []
    for cache in (False, True):
        batches = sft_smolvla.TrainingBatches(data, policy, preprocessor, cache)
        with torch.no_grad(), batches.vision(policy, *frames):
            losses.append(float(policy.forward(batches.batch(*frames), noise=noise, time=flow_time)[0]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "embed_image" not in vars(policy.model.vlm_with_expert)


def test_batches_favour_decisions_and_mask_the_end(start: tuple[Path, Path]) -> None:
    data = sft_smolvla.read_demonstrations(start[1], "local/so101_pick", jitter=6)
    config = sft_smolvla.SftConfig(Path(), Path(), Path(), batch_size=2000)
    episode, frame = sft_smolvla.draw_frames(np.random.default_rng(0), config, data, episodes=2)
    assert set(episode) == {0, 1}
    assert (data.kept[episode, frame] >= 0).all()
    near = np.abs(frame[:, None] - np.array([0, 50, 100])).min(axis=1) <= 6
    assert 0.75 < near.mean() < 0.9
    action = torch.arange(10.0).reshape(1, 10, 1).expand(1, 10, 6)
    chunk, beyond = sft_smolvla.chunk_at(action, torch.tensor([0]), torch.tensor([7]), 5)
    assert chunk[0, :, 0].tolist() == [7, 8, 9, 9, 9]
    assert beyond.tolist() == [[False, False, False, True, True]]


class RecordingPolicy(torch.nn.Module):
    """Stands in for a SmolVLAPolicy in `batch_loss`; keeps the flow times of the last forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.model = SimpleNamespace(sample_time=lambda size, device: torch.full((size,), 0.25, device=device))
        self.flow_time = torch.empty(0)

    def forward(self, batch: dict[str, torch.Tensor], time: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        self.flow_time = time
        return self.weight * time.mean(), {}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_one_step_share_puts_that_part_of_a_batch_at_pure_noise(share: float) -> None:
    torch.manual_seed(0)
    policy = RecordingPolicy()
    batches = SimpleNamespace(vision=lambda *_: nullcontext(), batch=lambda *_: {}, state=torch.zeros(1))
    frames = np.zeros(400, dtype=np.int64), np.zeros(400, dtype=np.int64)
    loss, _ = sft_smolvla.batch_loss(policy, batches, frames, share)
    assert set(policy.flow_time.tolist()) <= {0.25, 1.0}
    assert float((policy.flow_time == 1.0).float().mean()) == pytest.approx(share, abs=0.1)
    loss.backward()
    assert (
        float(policy.weight.grad) == pytest.approx(float(loss.detach())) == pytest.approx(0.25 + 0.75 * share, abs=0.08)
    )


@pytest.mark.parametrize(("change", "problem"), [
    ({"codebase_version": "v2.1"}, r"format v2.1, this one reads v3.*convert_dataset_v21_to_v30.*--push-to-hub=false"),
    ({"total_episodes": 0}, "holds no whole episode"),
    ({"codebase_version": "v4.0"}, "record it with this LeRobot"),
    ({"fps": 30}, "--fps=50, or .*--control-hz 30"), ({"fps": None}, "--fps=50$"), ({"fps": "fifty"}, "--fps=50$"),
    ({"features": [1]}, "has no features"), ({"features": {"action": 5}}, "has no features"),
])  # fmt: skip
def test_data_that_cannot_be_learned_from_is_refused_by_what_it_says(start, tmp_path, change, problem) -> None:
    root = tmp_path / "data"
    shutil.copytree(start[1], root)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | change))
    if "codebase_version" in change:  # its files are others too
        shutil.move(root / "meta/tasks.parquet", root / "meta/tasks.jsonl")
    with pytest.raises(sft_smolvla.SftError, match=problem):
        sft_smolvla.finetune(sft_smolvla.SftConfig(start[0], root, tmp_path / "out"))
    (root / "meta/info.json").write_text(json.dumps(info))
    if "codebase_version" in change:
        shutil.move(root / "meta/tasks.jsonl", root / "meta/tasks.parquet")
    (file,) = root.glob("data/*/*.parquet")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(sft_smolvla.SftError, match="cannot be read by LeRobot"):
        sft_smolvla.finetune(sft_smolvla.SftConfig(start[0], root, tmp_path / "out"))


def test_other_cameras_are_named(start, tmp_path) -> None:
    other = tmp_path / "policy"
    shutil.copytree(start[0], other)
    rename_cameras(other, {"camera_up": "front"})
    with pytest.raises(sft_smolvla.SftError, match=r"lacks observation.images.front.* it has observation"):
        sft_smolvla.finetune(sft_smolvla.SftConfig(other, start[1], tmp_path / "out"))


@pytest.fixture(scope="module")
def teleoperated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Episodes of 40, 75 and 61 frames of two instructions, through cameras that the scene does not know."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("teleoperated") / "data"
    joints = {"dtype": "float32", "shape": (6,), "names": None}
    image = {"dtype": "image", "shape": (96, 96, 3), "names": ["height", "width", "channels"]}
    cameras = {f"observation.images.{name}": dict(image) for name in ("front", "gripper")}
    features = {"observation.state": joints, "action": dict(joints), **cameras}
    data = LeRobotDataset.create("local/mine", fps=50, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for length, task in ((40, "pick up the block"), (75, "push the block"), (61, "pick up the block")):
        for frame in range(length):
            pose = np.full(6, frame, dtype=np.float32)
            pictures = {key: rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for key in cameras}
            data.add_frame({"observation.state": pose, "action": pose + 1, **pictures, "task": task})
        data.save_episode()
    data.finalize()
    return root


TELEOPERATED = {"camera_up": "front", "wrist_camera": "gripper"}


def test_episodes_of_any_length(start, teleoperated, tmp_path, capsys) -> None:
    data = sft_smolvla.read_demonstrations(teleoperated, "local/mine", jitter=2)
    assert data.lengths.tolist() == [40, 75, 61] and data.instruction_of.tolist() == [0, 1, 0]
    assert (data.kept[0, 40:] == -1).all() and data.state[0, 60, 0] == 39  # its last frame is repeated
    config = sft_smolvla.SftConfig(Path(), Path(), Path(), batch_size=4_000, jitter=2)
    episode, frame = sft_smolvla.draw_frames(np.random.default_rng(0), config, data, episodes=3)
    assert (frame < data.lengths[episode]).all() and (data.kept[episode, frame] >= 0).all()
    assert {0, 50} <= set(frame[episode == 1]) and set(frame[episode == 0]) <= set(range(40))
    action, lengths = torch.from_numpy(data.action), torch.from_numpy(data.lengths)
    chunk, beyond = sft_smolvla.chunk_at(action, torch.tensor([0, 1]), torch.tensor([38, 38]), 4, lengths)
    assert chunk[..., 0].tolist() == [[39, 40, 40, 40], [39, 40, 41, 42]]
    assert beyond.tolist() == [[False, False, True, True], [False] * 4]


def test_data_of_ones_own_cameras_trains_and_is_not_evaluated_blindly(start, teleoperated, tmp_path, capsys) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(start[0], policy)
    rename_cameras(policy, TELEOPERATED)
    small = {"held_out": 1, "steps": 2, "batch_size": 4, "save_every": 2, "num_steps": (1,), "eval_episodes": 2}
    record = sft_smolvla.finetune(sft_smolvla.SftConfig(policy, teleoperated, tmp_path / "out", **small))
    assert record["success"] == {} and np.isfinite(record["loss"])
    said = capsys.readouterr().out
    assert "no evaluation: the policy looks through front, gripper" in said and "--rename-map" in said
    assert not (tmp_path / "out/checkpoints/000002/reinflow.json").exists()  # a guess is no fact
    # The scene's cameras under the names that the policy has for them:
    rename = {f"observation.images.{ours}": f"observation.images.{theirs}" for ours, theirs in TELEOPERATED.items()}
    record = sft_smolvla.finetune(
        sft_smolvla.SftConfig(policy, teleoperated, tmp_path / "seen", rename_map=json.dumps(rename), **small)
    )
    assert set(record["success"]) == {"K1"}


def test_recorded_cameras_by_a_rename_map(start, teleoperated, tmp_path) -> None:
    rename = {f"observation.images.{theirs}": f"observation.images.{ours}" for ours, theirs in TELEOPERATED.items()}
    small = {"held_out": 1, "steps": 1, "batch_size": 4, "save_every": 1, "num_steps": (1,), "eval_episodes": 2}
    record = sft_smolvla.finetune(
        sft_smolvla.SftConfig(start[0], teleoperated, tmp_path / "out", rename_map=json.dumps(rename), **small)
    )
    assert set(record["success"]) == {"K1"}  # the policy's own names are the scene's


def test_the_data_says_which_task_it_is_of(start, teleoperated, tmp_path) -> None:
    config = sft_smolvla.SftConfig(start[0], start[1], tmp_path / "out")
    game = sft_smolvla.played(config, start[0], 150, 50)
    assert nearest_task(game.env) == "lift" and "reinflow.json says" in game.why
    assert game.known and sft_smolvla.played(config, start[0], 320, 50).env.max_steps_per_episode == 150
    guess = sft_smolvla.played(dataclasses.replace(config, dataset_root=teleoperated), start[0], 320, 50)
    assert not guess.known and guess.env.max_steps_per_episode == 350 and "nothing says" in guess.why
    wide = dataclasses.replace(config, task="lift_wide")
    assert nearest_task(sft_smolvla.played(wide, start[0], 150, 50).env) == "lift_wide"
    with pytest.raises(ConfigError, match="task=lfit is unknown"):
        dataclasses.replace(config, task="lfit")


def test_data_of_another_rate_is_taken_when_said(start, tmp_path) -> None:
    root = tmp_path / "data"
    shutil.copytree(start[1], root)
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"fps": 30}))
    config = sft_smolvla.SftConfig(start[0], root, tmp_path / "out", control_hz=30.0)
    assert sft_smolvla.played(config, start[0], 150, 50).env.control_hz == 30.0
    check_dataset(root, control_hz=30.0)


@pytest.mark.parametrize(("rename", "problem"), [
    ({"frnt": "camera_up"}, "names frnt"), ({"front": "camera_upp"}, "names camera_upp"),
    ({"front": "camera_up", "gripper": "camera_up"}, "two cameras to one"),
])  # fmt: skip
def test_a_rename_map_that_matches_nothing_is_refused(start, teleoperated, tmp_path, rename, problem) -> None:
    config = sft_smolvla.SftConfig(start[0], teleoperated, tmp_path / "out", rename_map=json.dumps(rename))
    with pytest.raises(ConfigError, match=problem):
        sft_smolvla.finetune(config)


def test_large_images_are_kept_at_the_policys_size(start, teleoperated) -> None:
    small = sft_smolvla.read_demonstrations(teleoperated, "local/mine", 2, size=(48, 64))
    assert {images.shape[1:] for images in small.images.values()} == {(3, 48, 64)}
    large = sft_smolvla.read_demonstrations(teleoperated, "local/mine", 2, size=(512, 512))
    assert {images.shape[1:] for images in large.images.values()} == {(3, 96, 96)}


@pytest.mark.parametrize(("changes", "problem"), [
    ({"lr": float("nan")}, "lr must be positive"), ({"lr": -1.0}, "lr must"),
    ({"weight_decay": float("nan")}, "weight_decay must"),
    ({"jitter": -2}, "jitter must"), ({"held_out": -1}, "held_out must"), ({"eval_seed": -3}, "eval_seed must"),
    ({"seed": -1}, "seed must"), ({"control_hz": float("nan")}, "control_hz must"), ({"steps": 0}, "steps must"),
    ({"eval_seed": 10_000}, "are for reporting"),
])  # fmt: skip
def test_numbers_that_cannot_work_are_refused_by_name(changes, problem) -> None:
    with pytest.raises(ConfigError, match=problem):
        sft_smolvla.SftConfig(Path(), Path(), Path(), **changes)


def test_a_rate_that_breaks_the_policy_leaves_no_checkpoint(start, tmp_path) -> None:
    small = {"held_out": 1, "steps": 2, "batch_size": 4, "save_every": 1, "num_steps": (1,), "eval_episodes": 0}
    config = sft_smolvla.SftConfig(start[0], start[1], tmp_path / "out", **small)
    policy, *processors = load_smolvla(start[0])
    policy.model.action_out_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"the policy at step 1, with lr=0.001, is damaged"):
        sft_smolvla.save(config, policy, *processors, {"step": 1}, None)
    assert not config.output_dir.exists()


@pytest.mark.parametrize("part", ["meta/stats.json", "meta/tasks.parquet", "meta/episodes", "data"])
def test_what_a_data_set_lacks_is_named(start, tmp_path, part) -> None:
    root = tmp_path / "data"
    shutil.copytree(start[1], root)
    shutil.rmtree(root / part) if (root / part).is_dir() else (root / part).unlink()
    with pytest.raises(sft_smolvla.SftError, match=f"lacks {part}"):
        check_dataset(root)


def test_what_is_no_pose_is_named_by_episode(start, tmp_path) -> None:
    root = tmp_path / "data"
    shutil.copytree(start[1], root)
    (file,) = root.glob("data/*/*.parquet")
    table = pyarrow.parquet.read_table(file)
    actions = table["action"].to_pylist()
    actions[170][2] = 1e6
    at = table.schema.get_field_index("action")
    table = table.set_column(at, table.schema.field(at), pyarrow.array(actions, table.schema.field(at).type))
    pyarrow.parquet.write_table(table, file)
    with pytest.raises(sft_smolvla.SftError, match="action of row 170, in episode 1, is"):
        sft_smolvla.read_demonstrations(root, "local/so101_pick", 2)


def test_refusals(start: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(sft_smolvla.SftError, match="reinflow-demos"):
        sft_smolvla.read_demonstrations(tmp_path, "local/none", 6)
    config = sft_smolvla.SftConfig(start[0], start[1], tmp_path / "out", held_out=2)
    with pytest.raises(sft_smolvla.SftError, match="held_out"):
        sft_smolvla.finetune(config)
    with pytest.raises(ValueError, match="decision_share"):
        sft_smolvla.SftConfig(Path(), Path(), Path(), decision_share=2.0)
    with pytest.raises(ValueError, match="one_step_share"):
        sft_smolvla.SftConfig(Path(), Path(), Path(), one_step_share=-0.1)
    with pytest.raises(ValueError, match="num_steps"):
        sft_smolvla.SftConfig(Path(), Path(), Path(), num_steps=())
