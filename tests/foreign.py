"""Foreign policy directories made from the embedded ones: what people bring, in small."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from so101_mujoco_utils import model_dir


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
