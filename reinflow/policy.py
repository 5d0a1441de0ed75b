"""What the algorithm asks of a policy, in the order in which the loop asks it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reinflow import UserError
from reinflow.env import Observation
from reinflow.heads import NoiseHead, ReinFlowCritic
from reinflow.training_state import refuse_not_finite, strict_load

Context = dict[str, Tensor]
"""Encoded observations: every tensor's first dim is the batch. It must hold all that ``velocity`` and ``value`` need,
so that an update need not encode anything again."""


class PolicyError(UserError, ValueError):
    """A policy cannot be loaded or fed as asked; the message names what does not fit."""


class FlowPolicy(nn.Module, ABC):
    """A flow-matching policy that ReinFlow can fine-tune. Shapes follow the legend in reinflow/flow.py."""

    chunk_size: int  # H, what the policy predicts
    n_action_steps: int  # n, what is executed
    num_denoising_steps: int  # K, what is stored with the policy and exported
    action_dim: int  # A
    padded_action_dim: int  # D >= A
    critic_input: str  # the context's tensor that the critic reads
    noise_mlp: NoiseHead
    critic: ReinFlowCritic

    @property
    def denoised_steps(self) -> int:
        """C, the actions that are denoised: the executed ones, or more where these depend on the rest."""
        return self.n_action_steps

    @property
    def step_size_layer(self) -> nn.Linear:
        """The layer that the size of a denoising step is told to, for shortcut models (reinflow/step_size.py)."""
        raise PolicyError(f"{type(self).__name__} has no place for a step size: use a flow_mlp or a SmolVLA")

    @property
    def device(self) -> torch.device:
        """Where the policy runs."""
        return self.noise_mlp.sigma_min.device

    @property
    def keeps_head_inputs(self) -> bool:
        """Whether rollouts keep what ``head_velocity`` reads, so that an update runs the heads alone: everything before
        them is frozen, which makes their inputs at the stored denoising states constants."""
        return False

    learns_heads_alone: bool = False
    """What ``learn_heads_alone`` was told."""

    def learn_heads_alone(self, alone: bool) -> None:
        """Whether updates of the next rollouts leave everything before the heads as it is, so that they run the heads
        alone, though more of the policy learns otherwise. Raises PolicyError where a policy has no such update."""
        if alone:
            raise PolicyError(f"{type(self).__name__} has no update of its heads alone: set heads_first to 0")

    @property
    def rounded(self) -> list[nn.Parameter]:
        """Trainable parameters that act as bf16, over fp32 masters, because that is what an export's reader holds."""
        return []

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """What learns, by names for people."""
        return {"policy": self.policy_parameters(), "critic": self.critic_parameters()}

    def settled(self) -> dict[str, Any]:
        """Settings that were left to the policy, as it chose them; a resumed run must keep them."""
        return {}

    # --- Rollout ----------------------------------------------------------------------------------------------------

    def set_noise_bounds(self, sigma_min: float, sigma_max: float) -> None:
        """New bounds of ``noise_std``, before a rollout."""
        self.noise_mlp.set_bounds(sigma_min, sigma_max)

    @abstractmethod
    def preprocess(self, observation: Observation) -> dict[str, Any]:
        """Environment observation -> model batch. The only place that normalises."""

    @abstractmethod
    def encode(self, batch: dict[str, Any]) -> Context:
        """One frozen pass over the observation; no gradient."""

    @abstractmethod
    def velocity(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """(B, n, D) noised actions at (B,) flow times -> velocity (B, n, D) and noise features (B, n, F)."""

    def head_velocity(self, features: Tensor) -> Tensor:
        """The last step of ``velocity``: its noise features (B, C, F) -> velocity (B, C, D)."""
        raise PolicyError(f"{type(self).__name__} does not keep the inputs of its head")

    def noise_std(self, features: Tensor) -> Tensor:
        """(B, n, F) noise features -> std of the exploration noise (B, n, A).

        Detached: exploration must not pull on the velocity's features.
        """
        return self.noise_mlp(features.detach())

    @abstractmethod
    def postprocess(self, actions: Tensor) -> np.ndarray:
        """(B, n, A) model actions -> environment actions, float64. The only place that un-normalises."""

    def value(self, context: Context) -> Tensor:
        """State value in normalised return units, (B,)."""
        return self.critic(context[self.critic_input])

    def to_buffer(self, context: Context) -> Context:
        """What the rollout buffer keeps of an acting context: enough for ``value``, and for ``from_buffer``."""
        return context

    # --- Update -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def state_context(self, states: Tensor) -> Context:
        """Privileged simulator states (..., S) -> enough of a context for ``value``; the critic must read them."""

    def from_buffer(self, context: Context) -> Context:
        """Rows of the buffer -> a context for ``velocity``; nothing to do where ``to_buffer`` keeps everything."""
        return context

    @abstractmethod
    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of velocity and noise."""

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the value function."""
        return [p for p in self.critic.parameters() if p.requires_grad]

    def observe(self, context: Context) -> None:
        """See the critic's rows of a new rollout, for running statistics of its input."""
        self.critic.observe(context[self.critic_input])

    # --- Checkpoint -------------------------------------------------------------------------------------------------

    @abstractmethod
    def trainable_state(self) -> dict[str, Tensor]:
        """Everything that training changes, by name; views, not copies."""

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``trainable_state``; CheckpointError lists every missing, unexpected or misshapen tensor."""
        refuse_not_finite(state.items(), "the checkpoint")
        strict_load(self.trainable_state(), state, "the checkpoint")

    @abstractmethod
    def save_pretrained(self, directory: Path) -> None:
        """Write the deployable policy: no noise, no critic."""
