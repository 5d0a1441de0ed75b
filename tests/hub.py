"""A stand-in of the hub's lerobot/smolvla_base in a Hugging Face cache, from the embedded policy: its camera names, its
backbone by hub id, its statistics by data set, of actions only and in the older frame."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from so101_mujoco_utils import SMOLVLA_STATE_MEAN, SMOLVLA_STATE_STD
from tests.foreign import add_camera, bf16_backbone, clone, edit, rename_cameras

BACKBONE, POLICY = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct", "lerobot/smolvla_base"


def snapshot(home: Path, repo: str) -> Path:
    """Where the files of a repository lie in a cache."""
    root = home / "hub" / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("1" * 40)
    return root / "snapshots" / ("1" * 40)


def smolvla_base(home: Path, bf16: bool = False) -> Path:
    """Lay both repositories into ``home``; returns the policy's snapshot."""
    directory = clone(snapshot(home, POLICY))
    rename_cameras(directory, {"camera_up": "camera1", "wrist_camera": "camera2"})
    add_camera(directory, "camera3")
    file = directory / "policy_preprocessor.json"
    content = json.loads(file.read_text())
    for step in content["steps"]:
        if step["registry_name"] == "normalizer_processor":
            step["config"]["features"]["observation.images.camera3"] = {"type": "VISUAL", "shape": [3, 256, 256]}
    file.write_text(json.dumps(content))
    if bf16:
        bf16_backbone(directory)
    backbone = snapshot(home, BACKBONE)
    backbone.parent.mkdir(parents=True)
    (directory / "vlm").rename(backbone)
    edit(directory, "config.json", lambda c: c.update(vlm_model_name=BACKBONE, load_vlm_weights=True, num_steps=10))
    file.write_text(file.read_text().replace("./vlm", BACKBONE))
    mean, std = np.float32(SMOLVLA_STATE_MEAN), np.float32(SMOLVLA_STATE_STD)
    grouped = {}
    for i, group in enumerate(("so100", "so100-red")):
        grouped |= {f"{group}.buffer.action.mean": mean + i, f"{group}.buffer.action.std": std + i}
    for state in directory.glob("policy_*.safetensors"):
        save_file(grouped, state)
    return directory
