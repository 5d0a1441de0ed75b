"""Shared fixtures. Thread and hub settings must come before torch is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ["TERM"] = "xterm"  # bars are tested on consoles of ours, whatever this one can do

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

THREADS = int(os.environ["OMP_NUM_THREADS"])


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """A training gives torch the number of threads that its preset asks for; it is no other test's.

    Sums are rounded by how they are spread over threads, and two threads take several times as long as one for the
    small products of most tests.
    """
    _set_threads()
    yield
    _set_threads()


def _set_threads() -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SmolVLA with random weights, written once."""
    from reinflow_so101.stages.build_smolvla import TinyConfig, build_policy

    directory = tmp_path_factory.mktemp("policy") / "tiny"
    build_policy(TinyConfig(output_dir=directory))
    return directory


@pytest.fixture(scope="session")
def policy_dirs(tiny_policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small policy of every family, by its name; those that are not embedded are built once."""
    from reinflow_so101.stages.build_pi0 import TinyPi0Config, build_policy
    from so101_mujoco_utils import model_dir

    pi05 = tmp_path_factory.mktemp("pi05") / "tiny"
    build_policy(TinyPi0Config(output_dir=pi05, kind="pi05"))
    return {
        "smolvla": tiny_policy_dir,
        "pi0": model_dir() / "tiny_pi0",
        "pi05": pi05,
        "flow_mlp": model_dir() / "flow_mlp",
    }
