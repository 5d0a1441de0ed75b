"""A small flow-matching MLP on the simulator's state: the policy for quick science, tests and state-based tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reinflow.checksums import check_sums
from reinflow.env import Observation
from reinflow.heads import NoiseHead, ReinFlowCritic
from reinflow.policy import Context, FlowPolicy, PolicyError
from reinflow.step_size import refold
from reinflow.training_state import refuse_not_finite, strict_load


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


class FlowMLP(FlowPolicy):
    """A small flow-matching MLP on the simulator state, for quick science and tests.

    The whole chunk is one vector, so all H actions are denoised together, of which the first n are executed. The
    observation enters raw (normalised by ``state_mean``/``state_std``): ``encode`` has nothing to freeze and the
    context is just the normalised state.

    The network predicts the action, and the velocity points away from it: ``v = (x_t - action) / t``. A hidden layer
    narrower than the chunk could not carry the noise through to the output, as predicting v itself would ask.
    """

    GROUPS = ("trunk", "head", "noise_mlp", "critic")
    critic_input = "state"

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
        n_action_steps: int = 0,
    ):
        """``num_denoising_steps`` is what ``save_pretrained`` writes down: the K that the policy is meant for;
        ``n_action_steps`` 0 executes the whole chunk. Raises PolicyError for more."""
        super().__init__()
        if n_action_steps > chunk_size:
            raise PolicyError(f"n_action_steps={n_action_steps} exceeds the policy's chunk_size={chunk_size}; lower it")
        self.state_dim, self.action_dim, self.padded_action_dim = state_dim, action_dim, action_dim
        self.chunk_size, self.n_action_steps = chunk_size, n_action_steps or chunk_size
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

    @property
    def denoised_steps(self) -> int:
        """The whole chunk."""
        return self.chunk_size

    @property
    def step_size_layer(self) -> nn.Linear:
        """Where the embedding of flow time enters."""
        layer = self.trunk[0]
        assert isinstance(layer, nn.Linear)
        return layer

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

    def velocity(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        action, hidden = self._predict_action(context, x_t, time)
        return (x_t - action) / time[:, None, None], hidden[:, None, :].expand(-1, self.chunk_size, -1)

    def _predict_action(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The chunk (B, n, A) that x_t is on its way to, normalised, and the hidden layer (B, F)."""
        guess = linear_action_guess(x_t, time).flatten(1)
        hidden = self.trunk(torch.cat([guess, context["state"], sinusoidal_embedding(time, self.time_dim)], dim=1))
        return self.head(hidden).view_as(x_t), hidden

    def state_context(self, states: Tensor) -> Context:
        return {"state": (states - self.state_mean) / self.state_std}

    def postprocess(self, actions: Tensor) -> np.ndarray:
        return (actions * self.action_std + self.action_mean).cpu().double().numpy()

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for m in (self.trunk, self.head, self.noise_mlp) for p in m.parameters() if p.requires_grad]

    def trainable_state(self) -> dict[str, Tensor]:
        return dict(self.state_dict())

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
        if self.n_action_steps != self.chunk_size:
            config["n_action_steps"] = self.n_action_steps
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file({k: v.contiguous() for k, v in self._deployable_state().items()}, directory / "model.safetensors")

    @classmethod
    def from_pretrained(cls, directory: Path, device: str = "cpu", **settings: Any) -> FlowMLP:
        """Load what ``save_pretrained`` wrote; strict. ``settings`` go to the constructor over the stored ones.

        Raises:
            PolicyError: the directory holds no flow_mlp policy.
        """
        check_sums(directory, "take another export (after a change on purpose remove checksums.json)")
        config, file = read_sizes(directory), directory / "model.safetensors"
        try:
            weights = load_file(file)
        except (SafetensorError, OSError) as error:
            raise PolicyError(f"{file} cannot be read ({error}): take another export") from error
        with torch.device("meta"):  # before memory is taken for what a damaged config asks for
            _refuse_other_shapes(cls(**config)._deployable_state(), weights, directory)
        refuse_not_finite(weights.items(), str(file))
        policy = cls(**(config | settings))
        strict_load(policy._deployable_state(), weights, str(directory))
        refold(directory, policy.step_size_layer, policy.num_denoising_steps, config["num_denoising_steps"])
        if not bool((policy.state_std > 0).all() and (policy.action_std > 0).all()):
            raise PolicyError(f"{file}: a std in its statistics is not above 0: use data in which everything moves")
        return policy.to(device).eval()

    def flow_matching_loss(
        self, states: Tensor, actions: Tensor, generator: torch.Generator | None = None, one_step_share: float = 0.0
    ) -> Tensor:
        """Supervised loss t^2 |v(x_t, t) - (noise - action)|^2 on raw states (B, S) and actions (B, n, A).

        The weight t^2 makes it the error of the predicted action; it moves no minimum, and small t does not dominate.
        ``one_step_share`` of the batch is at flow time 1, pure noise: the one place where a sampler of one step looks.
        """
        target = (actions - self.action_mean) / self.action_std
        context = self.state_context(states.float())
        noise = torch.randn(target.shape, generator=generator)
        time = torch.rand(len(target), generator=generator)
        if one_step_share > 0:
            time = time.masked_fill(torch.rand(len(target), generator=generator) < one_step_share, 1.0)
        x_t = time[:, None, None] * noise + (1 - time[:, None, None]) * target
        return ((self._predict_action(context, x_t, time)[0] - target) ** 2).mean()


STORED = {
    "state_dim": 10_000, "action_dim": 1_000, "chunk_size": 1_000, "num_denoising_steps": 1_000, "hidden_size": 65_536,
}  # fmt: skip
"""What config.json holds besides the type, and the largest value of each."""
MAY_BE_STORED = {"n_action_steps": 1_000}
"""Executed actions, where they are fewer than the chunk."""


def read_sizes(directory: Path) -> dict[str, Any]:
    """The sizes in a directory's config.json; raises PolicyError."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise PolicyError(f"{path} cannot be read ({error}): take another export") from error
    if not isinstance(config, dict) or config.pop("type", "") != "flow_mlp":
        raise PolicyError(f"{directory} holds no flow_mlp policy (config.json of that type)")
    ranges = STORED | {name: most for name, most in MAY_BE_STORED.items() if name in config}
    wrong = [name for name, most in ranges.items() if type(config.get(name)) is not int or not 0 < config[name] <= most]
    if wrong or config.keys() - ranges.keys():
        unknown = sorted(config.keys() - ranges.keys())
        raise PolicyError(f"{path}: {wrong or unknown} is missing, out of range or unknown: take another export")
    return config


def _refuse_other_shapes(expected: dict[str, Tensor], found: dict[str, Tensor], directory: Path) -> None:
    shapes = [{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} for tensors in (expected, found)]
    if shapes[0] != shapes[1]:
        names = sorted(name for name in expected.keys() | found.keys() if shapes[0].get(name) != shapes[1].get(name))
        raise PolicyError(
            f"{directory}: other shape or type of {names[:4]} in model.safetensors than in config.json: take one export"
        )
