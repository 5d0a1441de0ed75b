"""Shared fixtures. Thread and hub settings must come before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SmolVLA with random weights, written once."""
    from smolvla_tiny import TinyConfig, build_policy

    directory = tmp_path_factory.mktemp("policy") / "tiny"
    build_policy(TinyConfig(output_dir=directory))
    return directory
