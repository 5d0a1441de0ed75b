"""What the algorithm asks of a policy (FlowPolicy), the parts every policy shares, and a small state-based one."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reinflow import UserError

Context = dict[str, Tensor]
"""Encoded observations: every tensor's first dim is the batch. It must hold all that ``velocity`` and ``value`` need,
so that an update need not encode anything again."""

Observation = dict[str, Any]
"""What a ChunkVectorEnv hands out: pixels, agent_pos, task, optionally environment_state."""


class PolicyError(UserError, ValueError):
    """A policy cannot be loaded or fed as asked; the message names what does not fit."""


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

    def to_buffer(self, context: Context) -> Context:
        """What the rollout buffer keeps of an acting context: enough for ``value``, and for ``from_buffer``."""
        ...

    def from_buffer(self, context: Context) -> Context:
        """Rows of the buffer -> a context for ``velocity``; nothing to do where ``to_buffer`` keeps everything."""
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

    def state_context(self, states: Tensor) -> Context:
        """Privileged simulator states (..., S) -> enough of a context for ``value``; the critic must read them."""
        ...

    def observe(self, context: Context) -> None:
        """See the critic's rows of a new rollout, for running statistics of its input."""
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


def linear_action_guess(x_t: Tensor, time: Tensor) -> Tensor:
    """E[action x_t] / E[x_t^2] x_t of x_t = t noise + (1 - t) action with unit variances: what x_t alone says of the
    action. Exactly 0 at t = 1, where x_t is pure noise."""
    t = time[:, None, None]
    return (1 - t) / (t**2 + (1 - t) ** 2) * x_t


class FlowMLP(nn.Module):
    """A small flow-matching MLP on the simulator state, for quick science and tests. Implements FlowPolicy.

    The whole chunk is one vector, so a policy executes all that it predicts: n = H, fixed when it is built. The
    observation enters raw (normalised by ``state_mean``/``state_std``): ``encode`` has nothing to freeze and the
    context is just the normalised state.

    The network predicts the action, and the velocity points away from it: ``v = (x_t - action) / t``. A hidden layer
    narrower than the chunk could not carry the noise through to the output, as predicting v itself would ask.
    """

    GROUPS = ("trunk", "head", "noise_mlp", "critic")

    state_mean: Tensor
    state_std: Tensor
    action_mean: Tensor
    action_std: Tensor

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        chunk_size: int,
        num_denoising_steps: int = 1,
        hidden_size: int = 256,
        critic_hidden_size: int = 256,
        sigma_min: float = 0.05,
        sigma_max: float = 0.15,
    ):
        """``num_denoising_steps`` is what ``save_pretrained`` writes down: the K that the policy is meant for."""
        super().__init__()
        self.state_dim, self.action_dim, self.padded_action_dim = state_dim, action_dim, action_dim
        self.chunk_size = self.n_action_steps = chunk_size
        self.num_denoising_steps = num_denoising_steps
        self.hidden_size, self.time_dim = hidden_size, 32
        width = chunk_size * action_dim
        self.trunk = nn.Sequential(
            nn.Linear(width + state_dim + self.time_dim, hidden_size), nn.SiLU(),
            nn.Linear(hidden_size, hidden_size), nn.SiLU(),
            nn.Linear(hidden_size, hidden_size), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(hidden_size, width)
        self.noise_mlp = NoiseHead(hidden_size, action_dim, sigma_min, sigma_max)
        self.critic = ReinFlowCritic(state_dim, critic_hidden_size)
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        self.register_buffer("action_mean", torch.zeros(action_dim))
        self.register_buffer("action_std", torch.ones(action_dim))

    def train_only(self, groups: Collection[str]) -> None:
        """Let the modules of these GROUPS learn and freeze the others; raises ValueError on an unknown name."""
        unknown = sorted(set(groups) - set(self.GROUPS))
        if unknown:
            raise ValueError(f"unknown groups {unknown}: choose from {self.GROUPS}")
        for name in self.GROUPS:
            self.get_submodule(name).requires_grad_(name in groups)

    def set_statistics(self, states: Tensor, actions: Tensor, least_state_std: Tensor) -> None:
        """Normalise by the mean and std of states (M, S) and actions (M, n, A).

        ``least_state_std`` (S,) bounds the state's std from below: what the demonstrations hardly vary must not become
        huge as soon as it does vary. Raises PolicyError for an action that never moves.
        """
        self.state_mean.copy_(states.mean(0))
        self.state_std.copy_(states.std(0).maximum(least_state_std))
        self.action_mean.copy_(actions.mean((0, 1)))
        self.action_std.copy_(actions.std((0, 1)))
        if not (self.action_std > 0).all():
            raise PolicyError(f"an action dim is constant in the data (std {self.action_std.tolist()})")

    def preprocess(self, observation: Observation) -> dict[str, Any]:
        if "environment_state" not in observation:
            raise PolicyError("the policy sees environment_state: build the environment with environment_state=True")
        state = torch.as_tensor(observation["environment_state"], dtype=torch.float32, device=self.state_mean.device)
        if state.shape[-1] != self.state_dim:
            raise PolicyError(
                f"environment_state has {state.shape[-1]} entries, the policy was made for {self.state_dim}"
            )
        return self.state_context(state)

    def encode(self, batch: dict[str, Any]) -> Context:
        return {"state": batch["state"]}

    def to_buffer(self, context: Context) -> Context:
        return context

    def from_buffer(self, context: Context) -> Context:
        return context

    def velocity(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        action, hidden = self._predict_action(context, x_t, time)
        return (x_t - action) / time[:, None, None], hidden[:, None, :].expand(-1, self.n_action_steps, -1)

    def _predict_action(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The chunk (B, n, A) that x_t is on its way to, normalised, and the hidden layer (B, F)."""
        guess = linear_action_guess(x_t, time).flatten(1)
        hidden = self.trunk(torch.cat([guess, context["state"], sinusoidal_embedding(time, self.time_dim)], dim=1))
        return self.head(hidden).view_as(x_t), hidden

    def noise_std(self, features: Tensor) -> Tensor:
        return self.noise_mlp(features.detach())

    def value(self, context: Context) -> Tensor:
        return self.critic(context["state"])

    def state_context(self, states: Tensor) -> Context:
        return {"state": (states - self.state_mean) / self.state_std}

    def observe(self, context: Context) -> None:
        self.critic.observe(context["state"])

    def postprocess(self, actions: Tensor) -> np.ndarray:
        return (actions * self.action_std + self.action_mean).double().cpu().numpy()

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for m in (self.trunk, self.head, self.noise_mlp) for p in m.parameters() if p.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.critic.parameters() if p.requires_grad]

    def set_noise_bounds(self, sigma_min: float, sigma_max: float) -> None:
        self.noise_mlp.set_bounds(sigma_min, sigma_max)

    def trainable_state(self) -> dict[str, Tensor]:
        return dict(self.state_dict())

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        strict_load(self.trainable_state(), state, "the checkpoint")

    def _deployable_state(self) -> dict[str, Tensor]:
        """Velocity and statistics: all that acting without noise needs."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(("noise_mlp.", "critic."))}

    def save_pretrained(self, directory: Path) -> None:
        """Write config.json and model.safetensors; no noise head, no critic."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "type": "flow_mlp", "state_dim": self.state_dim, "action_dim": self.action_dim,
            "chunk_size": self.chunk_size, "num_denoising_steps": self.num_denoising_steps,
            "hidden_size": self.hidden_size,
        }  # fmt: skip
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self._deployable_state().items()}, directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, directory: Path, device: str = "cpu", **settings: Any) -> FlowMLP:
        """Load what ``save_pretrained`` wrote; strict. ``settings`` go to the constructor over the stored ones.

        Raises:
            PolicyError: the directory holds no flow_mlp policy.
        """
        path = directory / "config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        if config.pop("type", "") != "flow_mlp":
            raise PolicyError(f"{directory} holds no flow_mlp policy (config.json of that type): see reinflow-sft-mlp")
        policy = cls(**(config | settings))
        strict_load(policy._deployable_state(), load_file(directory / "model.safetensors"), str(directory))
        return policy.to(device).eval()

    def flow_matching_loss(
        self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None, one_step_share: float = 0.0
    ) -> Tensor:
        """Supervised loss t^2 |v(x_t, t) - (noise - action)|^2 on raw states (B, S) and actions (B, n, A).

        The weight t^2 makes it the error of the predicted action; it moves no minimum, and small t does not dominate.
        ``one_step_share`` of the batch is at flow time 1, pure noise: the one place where a sampler of one step looks.
        """
        target = (actions - self.action_mean) / self.action_std
        context = self.encode(self.preprocess({"environment_state": states}))
        noise = torch.randn(target.shape, generator=generator)
        time = torch.rand(len(target), generator=generator)
        if one_step_share > 0:
            time = time.masked_fill(torch.rand(len(target), generator=generator) < one_step_share, 1.0)
        x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * target
        return ((self._predict_action(context, x_t, time)[0] - target) ** 2).mean()


def count_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Number of scalars."""
    return sum(p.numel() for p in parameters)
