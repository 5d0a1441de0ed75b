"""One small policy of every family, loaded alike, and observations for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reinflow.flow import ChainSpec
from reinflow.flow_mlp import FlowMLP
from reinflow_vla.base import TrainableGroups
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES

ALL = TrainableGroups(True, True, True, True, True)
VLAS = ("smolvla", "pi0", "pi05")
FAMILIES = (*VLAS, "flow_mlp")
MLP_GROUPS = {"head": "action_head", "trunk": "full_expert", "noise_mlp": "noise_head", "critic": "critic"}


def only(flag: str) -> TrainableGroups:
    """Groups of which one learns."""
    return TrainableGroups(*(name == flag for name in TrainableGroups.__dataclass_fields__))


def load(family: str, directory: Path, k: int = 3, groups: TrainableGroups = ALL, **options: Any) -> Any:
    """The family's policy behind the FlowPolicy interface; new heads from seed 0."""
    torch.manual_seed(0)
    settings = {"num_denoising_steps": k, "sigma_min": 0.1, "sigma_max": 0.2, "critic_hidden_size": 64}
    if family == "flow_mlp":
        policy = FlowMLP.from_pretrained(directory, **settings)
        policy.train_only([module for module, group in MLP_GROUPS.items() if getattr(groups, f"train_{group}")])
        return policy
    if family == "smolvla":
        from reinflow_smolvla import ReinFlowSmolVLA as Family
    else:
        from pi0_adapter import ReinFlowPi0 as Family
    return Family.from_pretrained(directory, "cpu", **({"n_action_steps": 50, "groups": groups} | settings | options))


def observe(policy: Any, batch: int = 3, seed: int = 0) -> dict[str, Any]:
    """What the environment would hand out: random images, joints and simulator states."""
    rng = np.random.default_rng(seed)
    return {
        "pixels": {c: rng.integers(0, 255, (batch, 96, 96, 3), dtype=np.uint8) for c in getattr(policy, "cameras", ())},
        "agent_pos": rng.normal(0, 1, (batch, 6)).astype(np.float32),
        "environment_state": rng.normal(0, 1, (batch, len(ENVIRONMENT_STATE_NAMES))).astype(np.float32),
        "task": ["pick up the block"] * batch,
    }


def noise_for(policy: Any, batch: int = 3) -> torch.Tensor:
    """x_0 (B, n, D), the same every time."""
    shape = (batch, policy.n_action_steps, policy.padded_action_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def explore(policy: Any, spec: ChainSpec, batch: int = 3) -> torch.Tensor:
    """Exploration noise (B, K', M, A), the same every time."""
    shape = spec.noise_shape(policy.n_action_steps, policy.action_dim)
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(2))


def saved_bytes(run: Callable[[], Any]) -> int:
    """Memory that the graph of ``run``'s result keeps for the backward pass, parameters it uses included."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _result = run()  # alive until the sum is taken, so that no address is used twice
        return sum(sizes.values())
