"""The tiny SmolVLA: built offline, loaded strictly, moved, exported and materialised; its perception pre-training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reinflow_so101.commands.materialize import materialize
from reinflow_so101.stages import pretrain
from reinflow_so101.stages.build_smolvla import TINY_CAMERAS, TinyConfig, build_policy
from reinflow_vla.directory import POLICY_FILES, PolicyDirectoryError
from reinflow_vla.smolvla_directory import export_policy, load_smolvla
from so101_mujoco_utils import model_dir

SMALL = {"vision_hidden_size": 32, "vision_layers": 1, "text_hidden_size": 48, "text_layers": 2}


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "policy"
    build_policy(TinyConfig(output_dir=directory, num_steps=2, **SMALL))
    return directory


@pytest.fixture
def copy(policy_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(policy_dir, tmp_path / "copy"))


def observation(count: int = 2, size: int = 96) -> dict[str, object]:
    images = {f"observation.images.{name}": torch.rand(count, 3, size, size) for name in TINY_CAMERAS}
    return {**images, "observation.state": torch.zeros(count, 6), "task": ["pick up the block"] * count}


def predict(parts: tuple, batch: dict[str, object]) -> torch.Tensor:
    torch.manual_seed(3)
    return parts[2](parts[0].predict_action_chunk(parts[1](batch)))


def test_forward_and_predict(policy_dir: Path) -> None:
    policy, preprocessor, postprocessor = load_smolvla(policy_dir)
    assert not policy.training
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    loss, _ = policy.forward(preprocessor({**observation(), "action": torch.zeros(2, 50, 6)}))
    assert torch.isfinite(loss)
    assert predict((policy, preprocessor, postprocessor), observation()).shape == (2, 50, 6)


def test_directory_holds_no_absolute_path_and_can_be_moved(policy_dir: Path, copy: Path) -> None:
    for file in copy.rglob("*.json"):
        assert str(policy_dir.parent) not in file.read_text(), file
    batch = observation()
    expected = predict(load_smolvla(policy_dir), batch)
    assert torch.equal(predict(load_smolvla(copy), batch), expected)


def test_export_gives_back_the_same_policy(policy_dir: Path, tmp_path: Path) -> None:
    parts = load_smolvla(policy_dir, num_steps=3)
    export_policy(*parts, tmp_path / "out")
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (tmp_path / "out").glob("*.safetensors"))
    again = load_smolvla(tmp_path / "out")
    batch = observation()
    assert again[0].config.num_steps == 3
    assert torch.equal(predict(parts, batch), predict(again, batch))


def test_materialised_directory_loads_with_lerobot_alone(
    policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    target = materialize(policy_dir, tmp_path / "absolute")
    monkeypatch.chdir(tmp_path)
    policy = SmolVLAPolicy.from_pretrained(target, strict=True)
    processors = make_pre_post_processors(policy.config, pretrained_path=str(target))
    batch = observation()
    expected = predict(load_smolvla(policy_dir), batch)
    assert torch.equal(predict((policy, *processors), batch), expected)
    with pytest.raises(PolicyDirectoryError, match="exists"):
        materialize(policy_dir, target)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_must_fit(copy: Path, change: str) -> None:
    weights = load_file(copy / "model.safetensors")
    if change == "missing":
        del weights["model.action_out_proj.weight"]
    elif change == "unexpected":
        weights["model.other"] = torch.zeros(1)
    else:
        weights["model.action_out_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(PolicyDirectoryError, match=r"model\.safetensors does not fit"):
        load_smolvla(copy)


@pytest.mark.parametrize("name", POLICY_FILES)
def test_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(PolicyDirectoryError, match=name):
        load_smolvla(copy)


def test_missing_vlm_folder_other_type_and_broken_json(copy: Path) -> None:
    shutil.rmtree(copy / "vlm")
    with pytest.raises(PolicyDirectoryError, match=r"'\./vlm', which does not exist"):
        load_smolvla(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "type": "act"}))
    with pytest.raises(PolicyDirectoryError, match="not 'smolvla'"):
        load_smolvla(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(PolicyDirectoryError, match=r"config\.json cannot be read"):
        load_smolvla(copy)


def test_hub_names_and_typos_get_a_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(PolicyDirectoryError, match="no such directory"):
        load_smolvla(tmp_path / "typo")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda _repo: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(PolicyDirectoryError, match="hf download lerobot/smolvla_base"):
        load_smolvla("lerobot/smolvla_base")


def test_build_refuses(policy_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyDirectoryError, match="exists"):
        build_policy(TinyConfig(output_dir=policy_dir))
    with pytest.raises(PolicyDirectoryError, match="multiple"):
        build_policy(TinyConfig(output_dir=tmp_path / "odd", image_size=100))


def test_pretraining_runs_and_reports(policy_dir: Path, tmp_path: Path) -> None:
    config = pretrain.PretrainConfig(
        policy_dir=policy_dir, output_dir=tmp_path / "out", samples=40, held_out=30, steps=3, batch_size=8
    )
    before = {k: v.clone() for k, v in load_smolvla(policy_dir)[0].state_dict().items()}
    errors = pretrain.pretrain(config)
    assert all(np.isfinite(value) for value in errors.values())
    assert {"camera_up_start_median_mm", "wrist_camera_median_mm"} <= errors.keys()
    after = load_smolvla(tmp_path / "out")[0].state_dict()
    changed = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert any("vision_model" in key for key in changed)
    assert not any("lm_expert" in key for key in changed)  # perception only: the action expert is left alone


def test_labels_point_at_the_block() -> None:
    config = pretrain.PretrainConfig(Path(), Path())
    scenes = pretrain.sample_scenes(config, TINY_CAMERAS, 96, 20, seed=1)
    checked = 0
    for row, camera in np.argwhere(scenes.visible == 1):
        column, line = scenes.pixel[row, camera]
        red, green, _ = scenes.images[TINY_CAMERAS[camera]][row][:, int(line), int(column)].astype(int)
        checked += red > 2 * green
    assert checked > 0.8 * (scenes.visible == 1).sum() > 5


def test_cells_and_offsets() -> None:
    cell, offset = pretrain.cell_of(torch.tensor([[0.0, 0.0], [95.9, 0.0], [36.0, 60.0]]), 96, 4)
    assert cell.tolist() == [0, 3, 9]
    assert torch.allclose(offset, torch.tensor([[-1.0, -1.0], [0.9917, -1.0], [0.0, 0.0]]), atol=1e-3)


def test_shipped_policy_loads_and_predicts() -> None:
    shipped = model_dir() / "tiny_smolvla"
    if not (shipped / "config.json").is_file():
        pytest.skip("no embedded policy in this checkout")
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < 20e6
    parts = load_smolvla(shipped)
    assert predict(parts, observation()).abs().max() < 360  # degrees and percent
