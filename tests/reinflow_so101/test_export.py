"""What an export carries besides weights, and what it refuses to hand on; the copy for plain LeRobot."""

import json
import shutil

import pytest
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file

from reinflow import UserError
from reinflow_so101.commands import export as export_command
from reinflow_so101.commands.export import ExportConfig, export
from reinflow_so101.commands.materialize import materialize
from reinflow_so101.policy_card import stored_env, write_card
from reinflow_vla.directory import brings_its_backbone, store_tokenizer
from so101_sim.tasks.registry import nearest_task, task_env
from tests.foreign import clone


def test_an_export_carries_its_task_or_says_that_nothing_does(tmp_path, capsys):
    policy, data = clone(tmp_path / "p"), tmp_path / "data"
    export_command.run(ExportConfig(str(policy), tmp_path / "unknown"))
    assert "nothing says which task it is for" in capsys.readouterr().out
    assert "- Task: it says of none" in (tmp_path / "unknown/README.md").read_text()
    assert not (tmp_path / "unknown/reinflow.json").exists()
    (data / "meta").mkdir(parents=True)
    write_card(data / "meta", task_env("lift_wide"))
    (policy / "train_config.json").write_text(json.dumps({"dataset": {"root": str(data)}}))
    out = export(ExportConfig(str(policy), tmp_path / "known"))
    assert "- Task: lift_wide (" in (out / "README.md").read_text()
    assert not (out / "train_config.json").exists()  # somebody's own paths
    shutil.rmtree(data)
    assert nearest_task(stored_env(out)) == "lift_wide"  # it travels
    copy = materialize(out, tmp_path / "copy")
    assert nearest_task(stored_env(copy)) == "lift_wide"  # its sums are its own


def test_a_tokenizer_that_is_gone_is_named_by_who_needs_it(tmp_path):
    folder = clone(tmp_path / "p", "tiny_pi0")
    store_tokenizer(folder, "/gone/tokenizer")
    assert not brings_its_backbone(folder)  # not a word here: --pi0-tokenizer-path may stand for it
    store_tokenizer(folder, "./tokenizer")
    assert brings_its_backbone(folder)


def test_an_export_is_sound_and_elsewhere(tmp_path):
    policy = clone(tmp_path / "p")
    for command in (lambda: export(ExportConfig(str(policy), policy / "x")), lambda: materialize(policy, policy / "x")):
        with pytest.raises(UserError, match="lies inside"):
            command()
    weights = load_file(policy / "model.safetensors")
    weights["model.action_out_proj.weight"][0, 0] = float("nan")
    save_arrays({name: tensor.numpy() for name, tensor in weights.items()}, policy / "model.safetensors")
    with pytest.raises(UserError, match=r"NaN or infinity in model\.action_out_proj"):
        export(ExportConfig(str(policy), tmp_path / "out"))
    assert not (tmp_path / "out").exists()
