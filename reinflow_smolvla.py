"""SmolVLA behind the FlowPolicy interface: the stock LeRobot policy, unmodified, plus a noise head and a critic.

The prefix (images, language, state) is encoded once per decision into a key/value cache that goes into the rollout
buffer. An update runs only the action expert on that cache, so whatever lies in the prefix is frozen here:
``state_proj``, the vision tower and the language model.

SmolVLA's suffix is causal over the action tokens, so the first n tokens give the same first n actions whether 50 or n
tokens are computed. Only the executed ones are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from reinflow.policy import Context, NoiseHead, Observation, ReinFlowCritic, strict_load
from smolvla_tiny import export_policy, load_smolvla

OBS_IMAGES_PREFIX = "observation.images."


@dataclass(frozen=True)
class TrainableGroups:
    """Which parts learn; the names and defaults are those of TrainingConfig."""

    train_action_head: bool
    train_time_mlp: bool
    train_full_expert: bool
    train_noise_head: bool
    train_critic: bool


def cache_from(kv: Tensor) -> DynamicCache:
    """A fresh cache object over packed keys and values (B, layers, 2, heads, prefix, head_dim); nothing is copied.

    ``denoise_step`` appends to the cache object it is given, so every call needs its own.
    """
    cache = DynamicCache()
    for keys, values in kv.permute(1, 2, 0, 3, 4, 5):
        layer = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def pack_cache(cache: DynamicCache) -> Tensor:
    """Keys and values of all layers as one tensor with the batch in front, (B, layers, 2, heads, prefix, head_dim)."""
    return torch.stack([torch.stack([layer.keys, layer.values], dim=1) for layer in cache.layers], dim=1)


class ReinFlowSmolVLA(nn.Module):
    """A stock SmolVLAPolicy with ReinFlow's noise head and critic. Implements reinflow.policy.FlowPolicy."""

    def __init__(
        self,
        policy: SmolVLAPolicy,
        preprocessor: Any,
        postprocessor: Any,
        *,
        num_denoising_steps: int,
        n_action_steps: int,
        sigma_min: float,
        sigma_max: float,
        groups: TrainableGroups,
        critic_hidden_size: int,
        critic_state_dim: int = 0,
    ):
        """Wrap ``policy``; its config's ``num_steps`` and ``n_action_steps`` are set to the values trained with.

        The critic reads the prefix features, or, with ``critic_state_dim`` S > 0, the environment's privileged state.

        Raises:
            ValueError: n_action_steps exceeds the policy's chunk.
        """
        super().__init__()
        config = policy.config
        if n_action_steps > config.chunk_size:
            raise ValueError(
                f"n_action_steps={n_action_steps} exceeds the policy's chunk_size={config.chunk_size}; lower it"
            )
        self.vla, self.preprocessor, self.postprocessor = policy.eval(), preprocessor, postprocessor
        config.num_steps, config.n_action_steps = num_denoising_steps, n_action_steps
        self.chunk_size, self.n_action_steps = config.chunk_size, n_action_steps
        self.action_dim, self.padded_action_dim = config.action_feature.shape[0], config.max_action_dim
        flow = policy.model
        # bf16 weights do not move at fine-tuning learning rates; what learns is fp32.
        flow.vlm_with_expert.lm_expert.float()
        device = next(flow.parameters()).device
        self.noise_mlp = NoiseHead(flow.vlm_with_expert.expert_hidden_size, self.action_dim, sigma_min, sigma_max).to(
            device
        )
        self.critic_inputs = ("environment_state",) if critic_state_dim else ("features",)
        feature_dim = critic_state_dim or flow.vlm_with_expert.config.text_config.hidden_size
        self.critic = ReinFlowCritic(feature_dim, critic_hidden_size, running=bool(critic_state_dim)).to(device)
        self._expert_features: Tensor | None = None
        flow.action_out_proj.register_forward_pre_hook(self._keep_expert_features)
        self._trainable = self._freeze_all_but(groups)
        self.eval()  # acting and updating see the same modules

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str, **settings: Any) -> ReinFlowSmolVLA:
        """Load a policy directory or hub id strictly; see ``load_smolvla`` for the errors."""
        return cls(*load_smolvla(path, device), **settings)

    def _keep_expert_features(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._expert_features = inputs[0]

    def _freeze_all_but(self, groups: TrainableGroups) -> dict[str, list[nn.Parameter]]:
        """Set requires_grad by the flags; returns the trainable parameters by group."""
        flow = self.vla.model
        modules: dict[str, list[nn.Module]] = {
            "action_head": [flow.action_out_proj] if groups.train_action_head else [],
            "time_mlp": [flow.action_time_mlp_in, flow.action_time_mlp_out] if groups.train_time_mlp else [],
            "full_expert": [flow.vlm_with_expert.lm_expert, flow.action_in_proj] if groups.train_full_expert else [],
            "noise_head": [self.noise_mlp] if groups.train_noise_head else [],
            "critic": [self.critic] if groups.train_critic else [],
        }
        self.requires_grad_(False)
        trainable = {name: [p for m in parts for p in m.parameters()] for name, parts in modules.items()}
        for parameters in trainable.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        return trainable

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras that the policy looks through."""
        return tuple(key.removeprefix(OBS_IMAGES_PREFIX) for key in self.vla.config.image_features)

    def preprocess(self, observation: Observation) -> dict[str, Any]:
        """Environment observation (uint8 images, joint values in the policy's units) -> normalised, tokenised batch."""
        missing = [name for name in self.cameras if name not in observation["pixels"]]
        if missing:
            raise ValueError(
                f"the policy looks through cameras {missing}, the environment renders "
                f"{sorted(observation['pixels'])}: add them to `cameras`"
            )
        batch: dict[str, Any] = {OBS_STATE: torch.as_tensor(observation["agent_pos"], dtype=torch.float32)}
        for name in self.cameras:
            image = torch.from_numpy(np.ascontiguousarray(observation["pixels"][name]))  # (B, h, w, 3) uint8
            batch[OBS_IMAGES_PREFIX + name] = image.permute(0, 3, 1, 2).float() / 255.0
        batch["task"] = observation["task"]
        batch = self.preprocessor(batch)
        if "environment_state" in self.critic_inputs:
            batch["environment_state"] = torch.as_tensor(observation["environment_state"]).to(batch[OBS_STATE].device)
        return batch

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> Context:
        """The frozen prefix: kv (B, layers, 2, heads, prefix, head_dim), pad (B, prefix), features (B, F)."""
        flow = self.vla.model
        images, masks = self.vla.prepare_images(batch)
        embeddings, pad, attention = flow.embed_prefix(
            images, masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK],
            state=self.vla.prepare_state(batch),
        )  # fmt: skip
        (hidden, _), cache = flow.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(pad, attention),
            position_ids=torch.cumsum(pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[embeddings, None],
            use_cache=True,
        )
        # The state token is the only one with attention mask 1: it alone sees images, language and state.
        state_token = int(attention[0].int().argmax())
        context = {"kv": pack_cache(cache), "pad": pad, "features": hidden[:, state_token].float()}
        if "environment_state" in batch:
            context["environment_state"] = batch["environment_state"]
        return context

    @contextmanager
    def _only_executed_tokens(self) -> Iterator[None]:
        """The library builds its suffix mask for ``config.chunk_size`` tokens; make that the executed ones."""
        config = self.vla.config
        config.chunk_size = self.n_action_steps
        try:
            yield
        finally:
            config.chunk_size = self.chunk_size

    def velocity(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """One pass of the action expert: (B, n, D) at (B,) -> velocity (B, n, D), expert features (B, n, F)."""
        with self._only_executed_tokens():
            velocity = self.vla.model.denoise_step(context["pad"], cache_from(context["kv"]), x_t, time)
        features, self._expert_features = self._expert_features, None
        assert features is not None
        return velocity, features

    def noise_std(self, features: Tensor) -> Tensor:
        """(B, n, F) -> (B, n, A). Detached: exploration must not pull on the velocity's features."""
        return self.noise_mlp(features.detach())

    def value(self, context: Context) -> Tensor:
        """(B,) in normalised return units."""
        return self.critic(context[self.critic_inputs[0]])

    def observe(self, context: Context) -> None:
        """Running statistics of the critic's input, where it is the privileged state."""
        self.critic.observe(context[self.critic_inputs[0]])

    def postprocess(self, actions: Tensor) -> np.ndarray:
        """(B, n, A) normalised -> environment units, float64."""
        return self.postprocessor(actions).double().numpy()

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of velocity and noise."""
        return [p for name, group in self._trainable.items() if name != "critic" for p in group]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the critic."""
        return list(self._trainable["critic"])

    def parameter_counts(self) -> dict[str, int]:
        """Trainable scalars by group."""
        return {name: sum(p.numel() for p in group) for name, group in self._trainable.items()}

    def set_noise_bounds(self, sigma_min: float, sigma_max: float) -> None:
        """New bounds of the exploration noise."""
        self.noise_mlp.set_bounds(sigma_min, sigma_max)

    def trainable_state(self) -> dict[str, Tensor]:
        """Trainable parameters and the whole noise head and critic, by name; views, not copies."""
        always = ("noise_mlp.", "critic.")
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if k in trainable or k.startswith(always)}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Strict inverse of ``trainable_state``."""
        strict_load(self.trainable_state(), state, "the checkpoint")

    def save_pretrained(self, directory: Path) -> None:
        """Write a stock LeRobot policy directory: no noise head, no critic, the full chunk_size."""
        export_policy(self.vla, self.preprocessor, self.postprocessor, directory)


__all__ = ["ACTION", "ReinFlowCritic", "ReinFlowSmolVLA", "TrainableGroups", "cache_from", "pack_cache"]
