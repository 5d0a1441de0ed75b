"""What the algorithm asks of a policy (FlowPolicy), the parts every policy shares, and a small state-based one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Context = dict[str, Tensor]
"""Encoded observations: every tensor's first dim is the batch. It must hold all that ``velocity`` and ``value`` need,
so that an update never encodes anything again."""

Observation = dict[str, Any]
"""What a ChunkVectorEnv hands out: pixels, agent_pos, task, optionally environment_state."""


class FlowPolicy(Protocol):
    """A flow-matching policy that ReinFlow can fine-tune. Shapes follow the legend in reinflow/flow.py."""

    chunk_size: int  # H, what the policy predicts
    n_action_steps: int  # n, what is executed
    action_dim: int  # A
    padded_action_dim: int  # D >= A

    def preprocess(self, observation: Observation) -> dict[str, Any]:
        """Environment observation -> model batch. The only place that normalises."""
        ...

    def encode(self, batch: dict[str, Any]) -> Context:
        """One frozen pass over the observation; no gradient."""
        ...

    def velocity(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D) noised actions at (B,) flow times -> velocity (B, n, D) and noise features (B, n, F)."""
        ...

    def noise_std(self, features: Tensor) -> Tensor:
        """(B, n, F) noise features -> std of the exploration noise (B, n, A)."""
        ...

    def value(self, context: Context) -> Tensor:
        """State value in normalised return units, (B,)."""
        ...

    def observe(self, context: Context) -> None:
        """See the decisions of a new rollout, for running statistics of the critic's input."""
        ...

    def postprocess(self, actions: Tensor) -> np.ndarray:
        """(B, n, A) model actions -> environment actions, float64. The only place that un-normalises."""
        ...

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of velocity and noise."""
        ...

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the value function."""
        ...

    def set_noise_bounds(self, sigma_min: float, sigma_max: float) -> None:
        """New bounds of ``noise_std``."""
        ...

    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name, for the checkpoint."""
        ...

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``trainable_state``; raises on any missing, unexpected or misshapen tensor."""
        ...

    def save_pretrained(self, directory: Path) -> None:
        """Write the deployable policy: no noise, no critic."""
        ...


class NoiseHead(nn.Module):
    """Std of the exploration noise per action dim, bounded to [sigma_min, sigma_max] (seeds' noise_mlp).

    ``std = sigma_min + (sigma_max - sigma_min) * (tanh(mlp(features)) + 1) / 2``. The last layer starts at zero
    weight, so that training begins at the middle of the range for every observation. Equal bounds mean fixed noise.
    """

    sigma_min: Tensor
    sigma_max: Tensor

    def __init__(self, feature_dim: int, action_dim: int, sigma_min: float, sigma_max: float):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(feature_dim, 256), nn.SiLU(), nn.Linear(256, 128), nn.SiLU(), nn.Linear(128, action_dim)
        )
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[-1].bias)  # type: ignore[arg-type]
        self.register_buffer("sigma_min", torch.tensor(float(sigma_min)))
        self.register_buffer("sigma_max", torch.tensor(float(sigma_max)))

    def set_bounds(self, sigma_min: float, sigma_max: float) -> None:
        """Set both bounds; raises ValueError unless 0 < sigma_min <= sigma_max."""
        if not 0 < sigma_min <= sigma_max:
            raise ValueError(f"noise bounds need 0 < sigma_min <= sigma_max, got [{sigma_min}, {sigma_max}]")
        self.sigma_min.fill_(sigma_min)
        self.sigma_max.fill_(sigma_max)

    def forward(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., A), fp32."""
        squashed = (torch.tanh(self.mlp(features.float())) + 1) / 2
        return self.sigma_min + (self.sigma_max - self.sigma_min) * squashed


class RunningNorm(nn.Module):
    """Each dim to zero mean and unit variance over everything seen by ``update``; the identity before that."""

    count: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Add rows (..., dim) (Chan et al.'s parallel update)."""
        rows = rows.detach().flatten(0, -2).float()
        var, mean = torch.var_mean(rows, dim=0, correction=0)
        old, total = self.count, self.count + len(rows)
        delta, share = mean - self.mean, len(rows) / total
        self.var.copy_((1 - share) * self.var * (old > 0) + share * var + share * (1 - share) * delta**2 * (old > 0))
        self.mean.add_(share * delta)
        self.count.copy_(total)

    def forward(self, rows: Tensor) -> Tensor:
        # A dim that never moved (a force before any contact) may start to: its scale is unknown, not zero.
        return ((rows - self.mean) / (self.var.sqrt() + 1e-2)).clamp(-10, 10)


class ReinFlowCritic(nn.Module):
    """State value from observation features: Linear(F, 512) -> ReLU -> Linear(512, 256) -> ReLU -> Linear(256, 1).

    Network features are layer-normalised: a language model's hidden state has a few dims far larger than the rest.
    A simulator state mixes units, so its dims are normalised one by one (``running``).
    """

    def __init__(self, feature_dim: int, hidden_size: int = 512, running: bool = False):
        super().__init__()
        self.norm: RunningNorm | nn.LayerNorm = RunningNorm(feature_dim) if running else nn.LayerNorm(feature_dim)
        self.mlp = nn.Sequential(
            nn.Linear(feature_dim, hidden_size), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size // 2), nn.ReLU(),
            nn.Linear(hidden_size // 2, 1),
        )  # fmt: skip
        nn.init.zeros_(self.mlp[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.mlp[-1].bias)  # type: ignore[arg-type]

    def observe(self, features: Tensor) -> None:
        """Add (..., F) to the running statistics, if there are any."""
        if isinstance(self.norm, RunningNorm):
            self.norm.update(features)

    def forward(self, features: Tensor) -> Tensor:
        """(B, F) -> (B,), fp32."""
        return self.mlp(self.norm(features.float())).squeeze(-1)


def strict_load(target: dict[str, Tensor], source: dict[str, Tensor], what: str) -> None:
    """Copy ``source`` into ``target`` in place; any difference in names or shapes is a ValueError that lists it."""
    missing, unexpected = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    misshapen = [k for k in target.keys() & source.keys() if target[k].shape != source[k].shape]
    if missing or unexpected or misshapen:
        raise ValueError(
            f"{what} does not fit this policy: missing {missing[:8]}, unexpected {unexpected[:8]}, "
            f"other shape {sorted(misshapen)[:8]}. Use the settings the checkpoint was written with."
        )
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(source[name])


def sinusoidal_embedding(time: Tensor, dim: int) -> Tensor:
    """(B,) flow time -> (B, dim) sines and cosines with periods from 0.004 to 4."""
    half = dim // 2
    period = 0.004 * (4.0 / 0.004) ** (torch.arange(half, device=time.device) / max(half - 1, 1))
    angle = 2 * math.pi * time[:, None] / period
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class FlowMLP(nn.Module):
    """A small flow-matching MLP on the simulator state, for quick science and tests. Implements FlowPolicy.

    The whole chunk is one vector; the observation enters raw (normalised by ``state_mean``/``state_std``), so that
    ``encode`` has nothing to freeze and the context is just the normalised state.
    """

    state_mean: Tensor
    state_std: Tensor
    action_mean: Tensor
    action_std: Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        chunk_size: int,
        n_action_steps: int | None = None,
        hidden_size: int = 256,
        sigma_min: float = 0.05,
        sigma_max: float = 0.15,
    ):
        super().__init__()
        self.state_dim, self.action_dim, self.padded_action_dim = state_dim, action_dim, action_dim
        self.chunk_size, self.n_action_steps = chunk_size, n_action_steps or chunk_size
        self.hidden_size, self.time_dim = hidden_size, 32
        width = self.n_action_steps * action_dim
        self.trunk = nn.Sequential(
            nn.Linear(width + state_dim + self.time_dim, hidden_size), nn.SiLU(),
            nn.Linear(hidden_size, hidden_size), nn.SiLU(),
            nn.Linear(hidden_size, hidden_size), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(hidden_size, width)
        self.noise_mlp = NoiseHead(hidden_size, action_dim, sigma_min, sigma_max)
        self.critic = ReinFlowCritic(state_dim, 256)
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))

    def preprocess(self, observation: Observation) -> dict[str, Any]:
        state = torch.as_tensor(observation["environment_state"], dtype=torch.float32)
        return {"state": (state - self.state_mean) / self.state_std}

    def encode(self, batch: dict[str, Any]) -> Context:
        return {"state": batch["state"]}

    def velocity(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([x_t.flatten(1), context["state"], sinusoidal_embedding(time, self.time_dim)], dim=1)
        hidden = self.trunk(inputs)
        velocity = self.head(hidden).view_as(x_t)
        return velocity, hidden[:, None, :].expand(-1, self.n_action_steps, -1)

    def noise_std(self, features: Tensor) -> Tensor:
        return self.noise_mlp(features.detach())

    def value(self, context: Context) -> Tensor:
        return self.critic(context["state"])

    def observe(self, context: Context) -> None:
        self.critic.observe(context["state"])

    def postprocess(self, actions: Tensor) -> np.ndarray:
        return (actions * self.action_std + self.action_mean).double().cpu().numpy()

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for m in (self.trunk, self.head, self.noise_mlp) for p in m.parameters()]

    def critic_parameters(self) -> list[nn.Parameter]:
        return list(self.critic.parameters())

    def set_noise_bounds(self, sigma_min: float, sigma_max: float) -> None:
        self.noise_mlp.set_bounds(sigma_min, sigma_max)

    def trainable_state(self) -> dict[str, Tensor]:
        return dict(self.state_dict())

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        strict_load(self.trainable_state(), state, "the checkpoint")

    def save_pretrained(self, directory: Path) -> None:
        """Write config.json and model.safetensors."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "type": "flow_mlp", "state_dim": self.state_dim, "action_dim": self.action_dim,
            "chunk_size": self.chunk_size, "n_action_steps": self.n_action_steps, "hidden_size": self.hidden_size,
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config, indent=2))
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, directory: Path) -> FlowMLP:
        """Load what ``save_pretrained`` wrote; strict."""
        config = json.loads((directory / "config.json").read_text())
        if config.pop("type") != "flow_mlp":
            raise ValueError(f"{directory}/config.json is not a flow_mlp policy")
        policy = cls(**config)
        policy.load_trainable_state(load_file(directory / "model.safetensors"))
        return policy

    def flow_matching_loss(self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Supervised loss |v(x_t, t) - (noise - action)|^2 on raw states (B, S) and actions (B, n, A)."""
        target = (actions - self.action_mean) / self.action_std
        context = self.encode({"state": (states - self.state_mean) / self.state_std})
        noise = torch.randn(target.shape, generator=generator)
        time = torch.rand(len(target), generator=generator)
        x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * target
        velocity, _ = self.velocity(context, x_t, time)
        return ((velocity - (noise - target)) ** 2).mean()


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of scalars."""
    return sum(p.numel() for p in parameters)
