"""reinflow-export: a trained policy as a stock LeRobot directory with a model card, ready to be moved or uploaded.

reinflow-export outputs/train/2026-11-26/10-00-00_tiny --output-dir my_policy
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from reinflow import ConfigError, run_command
from reinflow.checkpoint import CHECKPOINTS
from reinflow.checksums import SUMS_FILE, check_sums, write_sums
from reinflow_gym.config import GymConfig
from reinflow_so101.command_line import PATH_FIELDS
from reinflow_so101.commands.evaluate import find_policy
from reinflow_so101.policy_card import TRAIN_CONFIG_FILE, known_env, stored_env, write_card
from reinflow_so101.worlds import gym_world
from reinflow_vla.directory import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    brings_its_backbone,
    check_trusted,
    read_json,
    refuse_existing,
    refuse_inside,
    resolve_folder,
    weights_file,
    write_json,
)
from reinflow_vla.smolvla_directory import VLM_FOLDER, write_references
from so101_sim.tasks.registry import describe, how_to_choose

CARD = "README.md"
FLAGS = {"preset": "preset", "seed": "seed", "episodes": "num_episodes"}


STAGES_OWN = (
    "stage.json",
    "sft.json",
    "metrics.jsonl",
    "findings.jsonl",
    "run.lock",
    "progress",
    "data",
    "eval_info.json",
)


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained policy for others."""

    policy: tyro.conf.Positional[str]
    """Run directory (its best checkpoint is taken), checkpoint, or policy directory."""
    output_dir: Path
    """Where it goes; refused if it exists."""
    fp32_backbone: bool = False
    """A copy that plain LeRobot computes in fp32, bit for bit as it was trained; it holds absolute paths and must stay
    where it is."""


def export(config: ExportConfig) -> Path:
    """Copy the policy, write its card; with ``fp32_backbone`` as a SmolVLA that must not be moved."""
    source = find_policy(config.policy)
    check_sums(source, "take another checkpoint")
    check_trusted(source)
    _refuse_links(source)
    if config.fp32_backbone and read_json(source / CONFIG_FILE).get("type") != "smolvla":
        raise ConfigError("fp32_backbone is of SmolVLA alone: leave it out")
    target = config.output_dir.resolve()
    refuse_existing(target)
    refuse_inside(target, source)
    check_finite(source)
    elsewhere = gym_world(source)
    card = gym_card(source, elsewhere) if elsewhere else model_card(source, config.fp32_backbone)
    known = None if elsewhere else known_env(source)
    # Somebody's own paths, and what a stage leaves beside its policy.
    left = (SUMS_FILE, TRAIN_CONFIG_FILE, ".git", ".cache", *STAGES_OWN)
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*left))
    if known:
        write_card(target, known[0])
    if config.fp32_backbone:
        _widen(source, target)
    (target / CARD).write_text(card, encoding="utf-8")
    write_sums(target)
    return target


def check_finite(directory: Path) -> None:
    """Refuse weights that no policy has: a damaged one must not be handed on. Raises CheckpointError."""
    from safetensors import safe_open

    from reinflow.training_state import refuse_not_finite

    file = weights_file(directory)
    with safe_open(file, "pt") as tensors:  # one at a time: they may be large
        refuse_not_finite(((name, tensors.get_tensor(name)) for name in tensors.keys()), str(file))  # noqa: SIM118


def _refuse_links(source: Path) -> None:
    """Nothing from elsewhere goes along; a hub cache's own links lead to its blobs."""
    inside = source.resolve()
    for path in source.rglob("*"):
        if path.is_symlink() and not path.resolve().is_relative_to(inside) and path.resolve().parent.name != "blobs":
            raise ConfigError(f"{path} leads to {path.resolve()}: an export holds no files from elsewhere, remove it")


def _widen(source: Path, target: Path) -> None:
    """Weights in fp32, and a backbone folder that asks for fp32, by its absolute path."""
    from huggingface_hub import snapshot_download
    from safetensors.torch import load_file, save_file

    stored = read_json(target / CONFIG_FILE)
    folder = Path(resolve_folder(source, stored["vlm_model_name"]))
    if not folder.is_dir():
        folder = Path(snapshot_download(str(folder), ignore_patterns=["*.safetensors", "*.bin"]))
    shutil.copytree(folder, target / VLM_FOLDER, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    backbone = target / VLM_FOLDER / CONFIG_FILE
    content = read_json(backbone)
    for part in (content, content.get("text_config", {}), content.get("vision_config", {})):
        part["dtype"] = "float32"
        part.pop("torch_dtype", None)
    write_json(backbone, content)
    weights = {name: tensor.float() for name, tensor in load_file(target / WEIGHTS_FILE).items()}
    save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})
    write_references(target, str(target / VLM_FOLDER))


def gym_card(policy_dir: Path, world: GymConfig) -> str:
    """A README of a policy that acts in a Gymnasium environment."""
    stored = read_json(policy_dir / CONFIG_FILE)
    return (
        f"# flow_mlp fine-tuned by ReinFlow for {world.env_id}\n\n- Observation statistics are in its weights; "
        f"{stored.get('chunk_size')} actions predicted, {stored.get('num_denoising_steps')} denoising steps\n"
        "- Evaluate it with `reinflow-eval --policy-path THIS --output-dir D`\n"
    )


def model_card(policy_dir: Path, absolute: bool = False) -> str:
    """A README with LeRobot's header: base, task, success and seeds, command. Local paths stay out of it.

    `absolute`: the export names its backbone's folder by an absolute path, as LeRobot needs it.
    """
    run = next((p for p in policy_dir.resolve().parents if (p / CHECKPOINTS).is_dir()), None)
    settings = _read(run / CONFIG_FILE) if run else {}
    known, stored = known_env(policy_dir), read_json(policy_dir / CONFIG_FILE)
    env = known[0] if known else stored_env(policy_dir)
    task = f'{describe(env)}, told "{env.instruction}", with an SO-101 in MuJoCo' if known else "it says of none"
    base = str(settings.get(PATH_FIELDS.get(str(settings.get("model_type")), ""), "") or "unknown")
    is_hub = base.count("/") == 1 and not base.startswith((".", "/")) and not Path(base).exists()
    base = base if is_hub else Path(base).name
    lines = [
        "---", "library_name: lerobot", "pipeline_tag: robotics", f"base_model: {base}", "license: other",
        "license_name: that-of-the-base-model", "tags: [robotics, lerobot, reinflow, so101]", "---", "",
        f"# {stored.get('type')} fine-tuned by ReinFlow in simulation", "",
        f"- Base: {base}; its licence holds for this policy too",
        f"- Task: {task}",
        f"- Joints: LeRobot's {'degrees' if env.joint_frame == 'lerobot' else env.joint_frame}; cameras: "
        f"{', '.join(env.cameras)}; {env.control_hz or 50:g} control steps a second",
        f"- Actions: {stored.get('n_action_steps', stored.get('chunk_size'))} executed of "
        f"{stored.get('chunk_size')}; {stored.get('num_steps', stored.get('num_inference_steps', 1))} denoising steps",
    ]  # fmt: skip
    for when in ("before", "after"):
        info = _read(run / f"eval_{when}.json") if run else {}
        if overall := info.get("overall"):
            low, high = overall["pc_success_ci95"]
            seeds = [row["seed"] for row in info["per_episode"]]
            lines.append(
                f"- Success {when} training: {overall['pc_success']:.1f} % [{low:.1f}, {high:.1f}] of "
                f"{overall['n_episodes']} episodes, seeds {min(seeds)} to {max(seeds)}"
            )
    if brings_its_backbone(policy_dir) and not absolute:
        lines.append(
            "- For LeRobot's own commands: `reinflow-materialize --policy-dir THIS --output-dir DIR` writes a copy "
            "with the absolute path of its backbone's folder"
        )
    if settings:
        flags = (
            f"--preset {settings.get('preset')} --seed {settings.get('seed')} --episodes {settings.get('num_episodes')}"
        )
        lines.append(f"- Trained by `python train_reinflow.py {flags}` and the settings in the run's config.json")
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def parse_args(argv: Sequence[str]) -> ExportConfig:
    """Which policy, and where to."""
    return tyro.cli(ExportConfig, args=list(argv), description=__doc__, prog="reinflow-export")


def main() -> None:
    """reinflow-export."""
    run_command("reinflow-export", lambda: run(parse_args(sys.argv[1:])))


def run(config: ExportConfig) -> None:
    """Export, and say what plain LeRobot needs of it."""
    target = export(config)
    print(f"wrote {target}")
    if gym_world(target) is None and known_env(target) is None:
        print(f"nothing says which task it is for; who evaluates it must: {how_to_choose()}")
    if brings_its_backbone(target) and not config.fp32_backbone:
        print(
            f"it brings its backbone's folder along, so it can be moved; for LeRobot's own commands write a copy with "
            f"absolute paths: reinflow-materialize --policy-dir {target} --output-dir DIR"
        )


if __name__ == "__main__":
    main()
