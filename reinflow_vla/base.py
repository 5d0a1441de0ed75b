"""What every vision-language-action policy of LeRobot shares behind the FlowPolicy interface.

A VLA is a frozen *prefix* (images, language) and an action expert that denoises the *suffix* while it attends to the
prefix's keys and values. ``encode`` runs the prefix once per decision; its result goes into the rollout buffer (all of
it or a part: prefix_cache.py), and an update runs only the expert on it. A family (SmolVLA, Pi0) says how it embeds its
prefix, how its language model runs over that, and how its expert denoises; all else is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from lerobot.utils.constants import OBS_STATE
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from reinflow.env import Observation
from reinflow.heads import NoiseHead, ReinFlowCritic
from reinflow.policy import Context, FlowPolicy, PolicyError
from reinflow.rounding import act_rounded
from reinflow_vla.directory import OBS_IMAGES_PREFIX
from reinflow_vla.prefix_cache import BATCH_PREFIX, HEADS, PrefixCache, plan_prefix_cache, prefix_bytes


@dataclass(frozen=True)
class TrainableGroups:
    """Which parts learn; the names and defaults are those of TrainingConfig."""

    train_action_head: bool
    train_time_mlp: bool
    train_full_expert: bool
    train_noise_head: bool
    train_critic: bool


class Prefix(NamedTuple):
    """Embedded observation before the language model."""

    embeddings: Tensor  # (B, P, width)
    pad: Tensor  # (B, P) bool, tokens that count
    attention: Tensor  # (B, P) bool, where a new attention block starts


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


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Rows from host memory, through a pinned copy: only that is transferred while the host goes on."""
    return tensor.pin_memory().to(device, non_blocking=True)


def unit_images(images: Tensor) -> Tensor:
    """uint8 images -> float in [0, 1], as LeRobot takes them."""
    return images.float() / 255.0


def lerobot_batch(observation: Observation, cameras: Iterable[str]) -> dict[str, Any]:
    """What LeRobot's preprocessors take: state, the ``cameras``' images and the instruction, by LeRobot's names."""
    batch: dict[str, Any] = {OBS_STATE: torch.as_tensor(observation["agent_pos"], dtype=torch.float32)}
    for name in cameras:
        images = observation["pixels"][name]  # (B, h, w, 3)
        if not isinstance(images, Tensor):
            images = torch.from_numpy(np.ascontiguousarray(images))
        batch[OBS_IMAGES_PREFIX + name] = unit_images(images.permute(0, 3, 1, 2))
    batch["task"] = observation["task"]
    return batch


class ReinFlowVLA(FlowPolicy):
    """A stock LeRobot policy with ReinFlow's noise head and critic."""

    num_steps_field: ClassVar[str]
    """Name of the denoising steps in the library's config."""

    def __init__(
        self,
        policy: Any,
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
        """Wrap ``policy``; its config's denoising steps and ``n_action_steps`` are set to the values trained with.

        The critic reads the prefix features, or, with ``critic_state_dim`` S > 0, the environment's privileged state.

        Raises:
            PolicyError: n_action_steps does not fit the policy's chunk.
        """
        super().__init__()
        # A convolution in TF32 rounds by the layout of its images: an encoding must not depend on who asks for it.
        torch.backends.cudnn.allow_tf32 = False
        self.check_n_action_steps(n_action_steps, policy.config.chunk_size)
        self.vla, self.preprocessor, self.postprocessor = policy.eval(), preprocessor, postprocessor
        config = policy.config
        setattr(config, self.num_steps_field, num_denoising_steps)
        config.n_action_steps = n_action_steps
        self.num_denoising_steps = num_denoising_steps
        self.chunk_size, self.n_action_steps = config.chunk_size, n_action_steps
        self.action_dim, self.padded_action_dim = config.action_feature.shape[0], config.max_action_dim
        # What plain LeRobot holds in bf16 acts as that, over fp32 masters; what learns is fp32, and so is all that is
        # computed with it: a sum in bf16 depends on the batch, and the ratio on it.
        narrow = getattr(policy, "narrow", None)
        if narrow is None:
            narrow = {name for name, p in policy.named_parameters() if p.dtype == torch.bfloat16}
        self.expert().float()
        head = policy.model.action_out_proj
        device = head.weight.device
        self.noise_mlp = NoiseHead(head.in_features, self.action_dim, sigma_min, sigma_max).to(device)
        self.critic_input = "environment_state" if critic_state_dim else "features"
        feature_dim = critic_state_dim or self.prefix_feature_dim()
        self.critic = ReinFlowCritic(feature_dim, critic_hidden_size, running=bool(critic_state_dim)).to(device)
        self.prefix_cache = PrefixCache("kv")
        self._compiled_step: Callable[..., Tensor] | None = None
        self._expert_features: Tensor | None = None
        head.register_forward_pre_hook(self._keep_expert_features)
        self._trainable = self._freeze_all_but(groups)
        self._rounded = self._act_rounded(narrow)
        self.eval()  # acting and updating see the same modules

    # --- What a family supplies -------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path: str | Path, device: str, **settings: Any) -> Self:
        """Load a policy directory or hub id strictly; ``settings`` go to the constructor."""

    @abstractmethod
    def expert(self) -> nn.Module:
        """The action expert's transformer."""

    @abstractmethod
    def prefix_feature_dim(self) -> int:
        """F of the features that ``run_prefix`` gives the critic."""

    @abstractmethod
    def policy_modules(self) -> dict[str, list[nn.Module]]:
        """What the flags train_action_head, train_time_mlp and train_full_expert let learn, by the flag's group."""

    @abstractmethod
    def embed_prefix(self, batch: dict[str, Any]) -> Prefix:
        """Vision tower and token embeddings: everything before the language model."""

    @abstractmethod
    def run_prefix(self, prefix: Prefix) -> tuple[DynamicCache, Tensor]:
        """The language model over the prefix -> its keys and values, and features for the critic (B, F), fp32."""

    def suffix_inputs(self, _batch: dict[str, Any]) -> Context:
        """What the expert reads of the observation besides the prefix."""
        return {}

    @abstractmethod
    def denoise(self, context: Context, cache: DynamicCache, x_t: Tensor, time: Tensor) -> Tensor:
        """The library's denoising step: (B, n, D) at (B,) -> velocity (B, n, D)."""

    @abstractmethod
    def save_pretrained(self, directory: Path) -> None:
        """Write a stock LeRobot policy directory: no noise head, no critic, the full chunk_size."""

    def check_n_action_steps(self, n_action_steps: int, chunk_size: int) -> None:
        """Raise PolicyError for a number of executed actions that the family cannot denoise alone."""
        if n_action_steps > chunk_size:
            raise PolicyError(f"n_action_steps={n_action_steps} exceeds the policy's chunk_size={chunk_size}; lower it")

    def compile_expert(self, backend: str | None = "inductor") -> None:
        """Let gradients go through torch.compile; None goes back. Acting stays eager: it has its own batch sizes, and
        each would be compiled."""
        self._compiled_step = torch.compile(self.vla.model.denoise_step, backend=backend) if backend else None

    def _library_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The library's denoise_step, compiled where a gradient is wanted and ``compile_expert`` was called."""
        compiled = self._compiled_step if torch.is_grad_enabled() else None
        return (compiled or self.vla.model.denoise_step)(*args, **kwargs)

    # --- FlowPolicy -------------------------------------------------------------------------------------------------

    def _keep_expert_features(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._expert_features = inputs[0]

    def _freeze_all_but(self, groups: TrainableGroups) -> dict[str, list[nn.Parameter]]:
        """Set requires_grad by the flags; returns the trainable parameters by group."""
        modules = self.policy_modules() | {"noise_head": [self.noise_mlp], "critic": [self.critic]}
        self.requires_grad_(False)
        trainable = {
            name: [p for m in parts for p in m.parameters()] if getattr(groups, f"train_{name}") else []
            for name, parts in modules.items()
        }
        for parameters in trainable.values():
            for parameter in parameters:
                parameter.requires_grad_(True)
        return trainable

    def _act_rounded(self, narrow: set[str]) -> list[nn.Parameter]:
        """Let trainable weights of the names ``narrow`` act as the bf16 that plain LeRobot holds of them."""
        found = []
        for place, module in self.vla.named_modules():
            own = {f"{place}.{name}": p for name, p in module.named_parameters(recurse=False)}
            learns = [p for name, p in own.items() if name in narrow and p.requires_grad]
            if learns:
                act_rounded(module)
                found += learns
        return found

    @property
    def rounded(self) -> list[nn.Parameter]:
        return self._rounded

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        return self._trainable

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """Within it the library's policy holds what plain LeRobot will: rounded weights in bf16."""
        masters = [p.data for p in self.rounded]
        try:
            for parameter in self.rounded:
                parameter.data = parameter.data.bfloat16()
            yield
        finally:
            for parameter, master in zip(self.rounded, masters, strict=True):
                parameter.data = master

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the cameras that the policy looks through."""
        names = (key.removeprefix(OBS_IMAGES_PREFIX) for key in self.vla.config.image_features)
        return tuple(name for name in names if not name.startswith("empty_camera_"))  # the library fills those in

    def preprocess(self, observation: Observation) -> dict[str, Any]:
        """Environment observation (uint8 images, joint values in the policy's units) -> normalised, tokenised batch."""
        missing = [name for name in self.cameras if name not in observation.get("pixels", {})]
        if missing:
            raise PolicyError(
                f"the policy looks through cameras {missing}, the environment renders "
                f"{sorted(observation.get('pixels', {}))}: add them to `cameras`"
            )
        batch = lerobot_batch(observation, self.cameras)
        batch = self.preprocessor(batch)
        if self.critic_input == "environment_state":
            batch["environment_state"] = torch.as_tensor(observation["environment_state"]).to(batch[OBS_STATE].device)
        return batch

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> Context:
        """The frozen prefix: kv (B, layers, 2, heads, prefix, head_dim), pad (B, prefix), features (B, F), and what
        ``prefix_cache`` keeps instead of kv."""
        context = self.encode_everything(batch)
        kept = self.prefix_cache  # and not _kept: the first decision after heads_first was encoded within it
        return {name: tensor for name, tensor in context.items() if name == "kv" or kept.stored(name)}

    def encode_everything(self, batch: dict[str, Any]) -> Context:
        """Everything that any way of keeping the prefix needs; tensors of the batch by ``batch.<name>``."""
        prefix = self.embed_prefix(batch)
        cache, features = self.run_prefix(prefix)
        context = {"kv": pack_cache(cache), "features": features} | prefix._asdict() | self.suffix_inputs(batch)
        if "environment_state" in batch:
            context["environment_state"] = batch["environment_state"]
        inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor) and name not in context}
        return context | {BATCH_PREFIX + name: value for name, value in inputs.items()}

    def plan_prefix_cache(self, observation: Observation, wanted: Any, decisions: int, budget_gb: float) -> PrefixCache:
        """Choose what rollouts of ``decisions`` keep, measured on one ``observation``; see plan_prefix_cache."""
        with torch.no_grad():
            sizes = prefix_bytes(self.encode_everything(self.preprocess(observation)))
        if self.trains_heads_alone:
            sizes[HEADS] = self.head_input_bytes
        device = str(self.device)
        self.prefix_cache = plan_prefix_cache(wanted, sizes, decisions, device, budget_gb)
        return self.prefix_cache

    @property
    def trains_heads_alone(self) -> bool:
        """Whether everything before the velocity head is frozen."""
        return not (self._trainable["time_mlp"] or self._trainable["full_expert"])

    @property
    def head_input_bytes(self) -> int:
        """What the head reads in all denoising steps of a decision, fp32."""
        return 4 * self.num_denoising_steps * self.denoised_steps * self.vla.model.action_out_proj.in_features

    def learn_heads_alone(self, alone: bool) -> None:
        self.learns_heads_alone = alone

    @property
    def _kept(self) -> PrefixCache:
        """What rollouts keep now."""
        return replace(self.prefix_cache, keep=HEADS) if self.learns_heads_alone else self.prefix_cache

    @property
    def keeps_head_inputs(self) -> bool:
        return self._kept.keep == HEADS

    def head_velocity(self, features: Tensor) -> Tensor:
        """(B, n, F) expert features -> velocity (B, n, D)."""
        velocity: Tensor = self.vla.model.action_out_proj(features)
        self._expert_features = None
        return velocity

    def settled(self) -> dict[str, Any]:
        """What prefix_cache=auto came to: kv and recomputed prefixes agree to rounding only."""
        return {"prefix_cache": self.prefix_cache.keep}

    def to_buffer(self, context: Context) -> Context:
        """What the rollout buffer keeps of an acting context."""
        kept = {name: tensor for name, tensor in context.items() if self._kept.stored(name)}
        if not self.prefix_cache.offload:
            return kept
        return {name: t.cpu() if self._kept.is_bulk(name) else t for name, t in kept.items()}

    @torch.no_grad()
    def from_buffer(self, context: Context) -> Context:
        """Inverse of ``to_buffer`` for rows of the buffer: kv is copied back or computed again."""
        if self.prefix_cache.offload:
            device = self.device
            context = {k: t if t.device == device else _upload(t, device) for k, t in context.items()}
        if "kv" in context:
            return context
        if self.prefix_cache.keep == "embeddings":
            prefix = Prefix(**{name: context[name] for name in Prefix._fields})
        else:
            prefix = self.embed_prefix({k.removeprefix(BATCH_PREFIX): t for k, t in context.items()})
        rest = {name: tensor for name, tensor in context.items() if not self.prefix_cache.is_bulk(name)}
        return rest | {"kv": pack_cache(self.run_prefix(prefix)[0])}

    def velocity(self, context: Context, x_t: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """One pass of the action expert: (B, n, D) at (B,) -> velocity (B, n, D), expert features (B, n, F)."""
        velocity = self.denoise(context, cache_from(context["kv"]), x_t, time)
        features, self._expert_features = self._expert_features, None
        assert features is not None
        return velocity, features

    def state_context(self, states: Tensor) -> Context:
        """(..., S) -> what ``value`` reads, with a critic on the privileged state."""
        return {"environment_state": states}

    def postprocess(self, actions: Tensor) -> np.ndarray:
        """(B, n, A) normalised -> environment units, float64."""
        return self.postprocessor(actions).cpu().double().numpy()

    def policy_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of velocity and noise."""
        return [p for name, group in self._trainable.items() if name != "critic" for p in group]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the critic."""
        return list(self._trainable["critic"])

    def parameter_counts(self) -> dict[str, int]:
        """Trainable scalars by group."""
        return {name: sum(p.numel() for p in group) for name, group in self._trainable.items()}

    def trainable_state(self) -> dict[str, Tensor]:
        """Trainable parameters and the whole noise head and critic, by name; views, not copies."""
        always = ("noise_mlp.", "critic.")
        trainable = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in self.state_dict().items() if k in trainable or k.startswith(always)}
