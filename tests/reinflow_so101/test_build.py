"""reinflow-build: every stage in small, a stop in the middle, and what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reinflow import ConfigError
from reinflow_so101.stages import build
from reinflow_vla.directory import PolicyDirectoryError
from reinflow_vla.smolvla_directory import load_smolvla
from so101_mujoco_utils import model_dir

BASE_FLAGS = {"train_expert_only": True, "freeze_vision_encoder": True, "train_state_proj": False}


def test_every_stage_in_small_and_on_after_a_stop(tmp_path: Path, capsys, monkeypatch) -> None:
    config = build.BuildConfig(tmp_path / "build", num_threads=1, smoke=True)

    def stopped(_config: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("reinflow_so101.stages.demonstrations.record", stopped)
        with pytest.raises(KeyboardInterrupt):
            build.build(config)
    assert not (config.output_dir / "demonstrations").exists()
    capsys.readouterr()
    base, policy = build.build(config)
    said = capsys.readouterr().out
    assert f"{build.BASE}: done before" in said and "supervised: " in said
    assert {name: json.loads((base / "config.json").read_text())[name] for name in BASE_FLAGS} == BASE_FLAGS
    assert json.loads((policy / "reinflow.json").read_text())["env"]["task"] == "lift"
    before, after = (load_smolvla(folder)[0].state_dict() for folder in (base, policy))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed and all("lm_expert" in name or "action_" in name for name in changed)  # hands, not eyes
    assert not list(config.output_dir.glob("*.part"))


@pytest.mark.slow
def test_two_builds_have_the_same_bits(tmp_path: Path) -> None:
    pairs = [build.build(build.BuildConfig(tmp_path / name, num_threads=2, smoke=True)) for name in "ab"]
    for one, other in zip(*pairs, strict=True):
        for file in ("model.safetensors", "policy_preprocessor_step_5_normalizer_processor.safetensors"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), (one.name, file)


def test_a_folder_of_another_build_is_refused(tmp_path: Path) -> None:
    build.same_build(build.BuildConfig(tmp_path / "build", smoke=True))
    build.same_build(build.BuildConfig(tmp_path / "build", smoke=True))
    with pytest.raises(ConfigError, match="holds a build with"):
        build.build(build.BuildConfig(tmp_path / "build"))
    with pytest.raises(PolicyDirectoryError, match="exists"):
        build.build(build.BuildConfig(tmp_path))


def test_bad_threads() -> None:
    with pytest.raises(ConfigError, match="num_threads"):
        build.BuildConfig(Path("x"), num_threads=0)


def test_the_shipped_base_is_small_and_trains_its_hands_alone() -> None:
    shipped = model_dir() / build.BASE
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < 5e6
    policy, *_ = load_smolvla(shipped)
    learns = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert learns and all("lm_expert" in name or "action_" in name for name in learns)
    assert {name: getattr(policy.config, name) for name in BASE_FLAGS} == BASE_FLAGS


def test_the_shipped_policy_has_the_eyes_of_the_shipped_base() -> None:
    base, policy = (load_smolvla(model_dir() / name)[0].state_dict() for name in (build.BASE, build.POLICY))
    differing = {name for name, value in base.items() if not torch.equal(value, policy[name])}
    assert differing and all("lm_expert" in name or "action_" in name for name in differing)
