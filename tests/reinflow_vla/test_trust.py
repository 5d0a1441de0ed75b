"""No file of a policy runs code, in any command that opens one; LeRobot never sees a file that would."""

import json
from pathlib import Path

import pytest

from reinflow_so101.commands import evaluate, materialize
from reinflow_so101.policies import EMBEDDED, FAMILIES, ActingSettings
from reinflow_vla.directory import PolicyDirectoryError, check_trusted, locate_policy
from reinflow_vla.trust import STEPS, UntrustedPolicyError
from tests.foreign import clone, edit, hostile, insert_step
from train_reinflow import parse_args, train

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"


def start_training(preset: str, flag: str, policy: str, out: str) -> None:
    train(parse_args(["--preset", preset, flag, policy, "--no-wandb", "--output-dir", out]))


def evaluate_policy(policy: str, out: str) -> None:
    flags = ["--policy-path", policy, "--output-dir", out, "--episodes", "1"]
    evaluate.run_eval(evaluate.parse_args(flags))


COMMANDS = {
    "train": lambda policy, out: start_training("tiny", "--pretrained-path", policy, out),
    "pi0": lambda policy, out: start_training("tiny-pi0", "--pi0-pretrained-path", policy, out),
    "materialize": materialize.materialize,
    "eval": evaluate_policy,
    "stock eval": evaluate_policy,
}


@pytest.mark.parametrize("file", [PREPROCESSOR, POSTPROCESSOR])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_step_is_refused_before_it_runs(tmp_path, command, file):
    made = tmp_path / "made"
    policy = hostile(tmp_path / "policy", made, "tiny_pi0" if command == "pi0" else "tiny_smolvla", file)
    out = str(tmp_path / "out")
    if command == "stock eval":  # a type that only LeRobot itself loads
        edit(policy, "config.json", lambda content: content.update(type="act"))
    with pytest.raises(UntrustedPolicyError, match=rf"{file}, step 0 names the class 'subprocess\.Popen'"):
        COMMANDS[command](str(policy), out)
    assert not made.exists() and not Path(out).exists()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"registry_name": "action_tokenizer_processor", "config": {"trust_remote_code": True}}, "action_tokenizer"),
        ({"registry_name": "groot_n1_7_vlm_encode_v1"}, "groot"),
        ({"registry_name": "device_processor", "class": "os.system"}, "names the class 'os.system'"),
        ({"registry_name": "device_processor", "overrides": {}}, "overrides"),
        ({"registry_name": "normalizer_processor", "state_file": "../elsewhere.safetensors"}, "only a file beside it"),
        ({"registry_name": "normalizer_processor", "state_file": "/etc/passwd"}, "only a file beside it"),
        ({"registry_name": ["device_processor"]}, "which no SmolVLA"),
        ({}, "which no SmolVLA"),
        ("device_processor", "no processor step"),
        ({"registry_name": "device_processor", "config": []}, "no processor step"),
    ],
)
def test_steps_are_known_ones_with_data_in_them(tmp_path, step, message):
    policy = insert_step(clone(tmp_path / "policy"), step)
    with pytest.raises(UntrustedPolicyError, match=message):
        locate_policy(policy)


def test_code_beside_a_policy_or_its_tokenizer_is_refused(tmp_path):
    for number, (name, content) in enumerate([
        ("vlm/tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.T", None]}}),
        ("vlm/processor_config.json", {"image_processor": {"auto_map": {"AutoImageProcessor": "evil.P"}}}),
        ("vlm/evil.py", None),
        ("config.py", None),
    ]):  # fmt: skip
        policy = clone(tmp_path / str(number))
        (policy / name).write_text("raise SystemExit" if content is None else json.dumps(content))
        with pytest.raises(UntrustedPolicyError, match=Path(name).name):
            locate_policy(policy)


def test_a_tokenizer_folder_elsewhere_is_looked_through_too(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {}}))
    policy = clone(tmp_path / "policy")
    edit(policy, "config.json", lambda content: content.update(vlm_model_name=str(folder)))
    with pytest.raises(UntrustedPolicyError, match="auto_map"):
        FAMILIES["smolvla"].load(policy, ActingSettings())
    with pytest.raises(UntrustedPolicyError, match="auto_map"):
        FAMILIES["pi0"].load(clone(tmp_path / "pi0", "tiny_pi0"), ActingSettings(tokenizer=str(folder)))


def test_a_mistyped_path_is_never_taken_for_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(PolicyDirectoryError, match="runs/ is one"):
        locate_policy("runs/tny")


def test_what_we_ship_is_trusted_and_every_known_step_exists():
    from lerobot.policies.factory import make_pre_post_processors  # noqa: F401 - registers the steps
    from lerobot.processor import ProcessorStepRegistry

    for module in ("smolvla.processor_smolvla", "pi0.processor_pi0", "pi05.processor_pi05"):
        __import__(f"lerobot.policies.{module}")
    assert set(ProcessorStepRegistry.list()) >= STEPS
    for family in EMBEDDED.values():
        check_trusted(family.embedded)
