"""Foreign policy directories made from the embedded ones: what people bring, in small."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from so101_mujoco_utils import FRAMES, JointFrame, model_dir


def clone(folder: Path, source: str = "tiny_smolvla") -> Path:
    """A copy without reinflow.json, which a directory made by LeRobot does not have."""
    shutil.copytree(model_dir() / source, folder)
    (folder / "reinflow.json").unlink(missing_ok=True)
    return folder


def edit(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    """Change one JSON file of a policy directory in place."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content, indent=2))


def insert_step(folder: Path, step: dict, name: str = "policy_preprocessor.json") -> Path:
    """Put a step first into a processor file."""
    edit(folder, name, lambda content: content["steps"].insert(0, step))
    return folder


def hostile(folder: Path, made: Path, source: str = "tiny_smolvla", name: str = "policy_preprocessor.json") -> Path:
    """A policy whose processor runs a (harmless) command when LeRobot builds it."""
    step = {"class": "subprocess.Popen", "config": {"args": ["touch", str(made)]}}
    return insert_step(clone(folder, source), step, name)


def rename_cameras(folder: Path, names: dict[str, str]) -> Path:
    """observation.images.OLD -> observation.images.NEW in the policy's config and its normaliser."""

    def renamed(features: dict) -> dict:
        prefix = "observation.images."
        return {prefix + names.get(k.removeprefix(prefix), k.removeprefix(prefix)) if prefix in k else k: v
                for k, v in features.items()}  # fmt: skip

    def normaliser(content: dict) -> None:
        for step in content["steps"]:
            if step["registry_name"] == "normalizer_processor":
                step["config"]["features"] = renamed(step["config"]["features"])

    edit(folder, "config.json", lambda c: c.update(input_features=renamed(c["input_features"])))
    edit(folder, "policy_preprocessor.json", normaliser)
    return folder


def add_camera(folder: Path, name: str, shape: tuple[int, int, int] = (3, 256, 256)) -> Path:
    """Declare one more camera, as fine-tuning from a three-camera base on two cameras leaves it."""
    feature = {"type": "VISUAL", "shape": list(shape)}
    edit(folder, "config.json", lambda c: c["input_features"].update({f"observation.images.{name}": feature}))
    return folder


def bf16_backbone(folder: Path) -> Path:
    """Declare the backbone bfloat16, as the published one does."""
    edit(folder, "vlm/config.json", lambda c: c["text_config"].update(dtype="bfloat16"))
    return folder


def convert_statistics(folder: Path, frame: JointFrame) -> Path:
    """Put the statistics, which are in LeRobot's degrees, into another joint frame."""
    degrees = FRAMES["lerobot"]
    factor = np.array(frame.scale) / np.array(degrees.scale)
    for file in folder.glob("policy_*.safetensors"):
        old = load_file(file)
        new = {k: v * factor if k.endswith("std") else frame.from_rad(degrees.to_rad(v)) for k, v in old.items()}
        save_file({k: np.asarray(v, dtype=np.float32) for k, v in new.items()}, file)
    return folder
