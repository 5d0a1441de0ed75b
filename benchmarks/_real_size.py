"""A SmolVLA of the real size (450 M parameters) with random weights, written without the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from memory_trace import published_smolvla
from smolvla_tiny import VLM_FOLDER, export_policy, identity_stats, quiet
from so101_mujoco_utils import CAMERA_NAMES
from train_reinflow import TrainingConfig


def write_real_smolvla(directory: Path, cameras: tuple[str, ...] = CAMERA_NAMES) -> None:
    """Write a policy directory; VLM and expert are bf16, as the library loads them."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    folder = (directory / VLM_FOLDER).resolve()
    smolvla = published_smolvla(replace(TrainingConfig(), cameras=cameras), folder)
    torch.manual_seed(0)
    with quiet():
        policy = SmolVLAPolicy(smolvla)
    policy.model.vlm_with_expert.to(torch.bfloat16)
    preprocessor, postprocessor = make_pre_post_processors(smolvla, dataset_stats=identity_stats())
    export_policy(policy, preprocessor, postprocessor, directory)
