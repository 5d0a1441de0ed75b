"""How many bytes a policy's passes need, without its weights: the real code runs on tensors that have only a shape.

A policy of any size is built on torch's meta device in seconds, and every pass of a training (encode a rollout step,
score and differentiate a minibatch) runs on it. ``MemoryTrace`` adds up the storages that come and go.

Not seen are a kernel's own work space and the allocator's rounding. Attention that PyTorch fuses is taken as fused,
which holds on CUDA and on the CPU: the matrix of attention weights is then never written.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reinflow.flow import chain_log_prob
from reinflow.natural import NaturalGradient
from reinflow_so101.checks import FlatConfig
from reinflow_so101.skeletons import skeleton
from reinflow_vla.base import OBS_IMAGES_PREFIX, ReinFlowVLA
from reinflow_vla.pi0_directory import replaced
from reinflow_vla.prefix_cache import HEADS, KEEPS, Keep, PrefixCache, prefix_bytes
from so101_mujoco_utils import ENVIRONMENT_STATE_NAMES, NUM_JOINTS

TOKENS_OF_AN_INSTRUCTION = 8  # "pick up the block" and a newline in SmolVLM2's vocabulary, rounded up


class MemoryTrace(TorchDispatchMode):
    """Bytes of the tensors that are made inside the context: ``live`` now, ``peak`` at most.

    Args:
        known: tensors from outside; what shares their storage is not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        size = storage.nbytes()
        self._seen.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.live -= size


@dataclass(frozen=True)
class Linear:
    """Bytes of a pass over B rows: ``fixed + per_row * B``."""

    fixed: float
    per_row: float

    def __call__(self, rows: int) -> float:
        return self.fixed + self.per_row * rows

    @classmethod
    def through(cls, peak: Callable[[int], int]) -> Linear:
        """Through the peaks of 2 and 4 rows; one row alone may take other paths."""
        two, four = peak(2), peak(4)
        return cls(2 * two - four, (four - two) / 2)


@dataclass(frozen=True)
class PassBytes:
    """Everything about a policy that the plan of a training needs; bytes."""

    scalars: int  # of all weights and buffers
    frozen: int  # weights and buffers
    policy: int  # trainable weights of velocity and noise
    critic: int  # trainable weights of the critic
    natural: int  # running means of the natural gradient's covariances and gradients
    kept: dict[Keep, int]  # per decision, by what the buffer keeps
    rest: int  # per decision, what the buffer keeps besides
    encode: Linear  # peak of encoding B observations
    # Peak of a backward pass over B decisions, beside weights and gradients; with the natural gradient's sums.
    update: Callable[[Keep], Linear]


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let the library run on tensors without content.

    It asks whether a mask of all patches masks anything: no. And PyTorch takes its fused attention apart on meta
    tensors: give its result at once.
    """
    from transformers.models.smolvlm import modeling_smolvlm

    def attention(query: Tensor, _key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    with (
        torch.device("meta"),
        replaced(nn.functional, {"scaled_dot_product_attention": attention}),
        replaced(modeling_smolvlm, {"create_bidirectional_mask": lambda **_: None}),
    ):
        yield


# --- Passes -----------------------------------------------------------------------------------------------------------


def blank_batch(policy: ReinFlowVLA, config: FlatConfig, rows: int) -> dict[str, Any]:
    """What the preprocessor would give for ``rows`` observations of the config's environment."""
    settings, size = policy.vla.config, config.image_size
    padded = getattr(settings, "pad_language_to", "max_length") == "max_length"
    tokens = settings.tokenizer_max_length if padded else prompt_length(policy, config)
    batch: dict[str, Any] = {OBS_IMAGES_PREFIX + name: torch.zeros(rows, 3, size, size) for name in policy.cameras}
    batch["observation.state"] = torch.zeros(rows, NUM_JOINTS)
    batch["observation.language.tokens"] = torch.zeros(rows, tokens, dtype=torch.long)
    batch["observation.language.attention_mask"] = torch.ones(rows, tokens, dtype=torch.bool)
    if config.critic_input == "state":
        batch["environment_state"] = torch.zeros(rows, len(ENVIRONMENT_STATE_NAMES))
    return batch


def prompt_length(policy: ReinFlowVLA, config: FlatConfig) -> int:
    """Tokens of the instruction: one per byte with the embedded policies' tokenizer."""
    small = policy.vla.model.vlm_with_expert.config.text_config.vocab_size < 1000
    return len(config.instruction.encode()) + 1 if small else TOKENS_OF_AN_INSTRUCTION


def trace_passes(config: FlatConfig) -> PassBytes:
    """Trace every pass of a training with ``config``'s policy; seconds, whatever its size."""
    policy, spec = skeleton(config.policy(), config.env()), config.chain()
    weights = {id(t): t for t in (*policy.parameters(), *policy.buffers())}
    learning, critic = policy.policy_parameters(), policy.critic_parameters()
    trained = {id(t) for t in (*learning, *critic)}
    natural = None
    if config.policy_optimizer == "natural":  # its hooks keep the layers' inputs
        natural = NaturalGradient(policy, learning, config.natural_damping, config.natural_momentum)

    def encode_peak(rows: int) -> int:
        with shapes_only(), MemoryTrace(weights.values()) as trace:
            policy.encode(blank_batch(policy, config, rows))
            return trace.peak

    @cache
    def update(keep: Keep) -> Linear:
        policy.prefix_cache = PrefixCache(keep)
        with shapes_only():
            context = policy.to_buffer(policy.encode(blank_batch(policy, config, 4)))
            chain = torch.zeros(4, spec.num_denoising_steps + 1, policy.n_action_steps, policy.padded_action_dim)
            width = policy.vla.model.action_out_proj.in_features
            read = torch.zeros(4, spec.num_noisy_steps, policy.n_action_steps, width) if keep == HEADS else None

            def score_and_differentiate(rows: int) -> None:
                inputs = {name: tensor[:rows].clone() for name, tensor in context.items()}  # taken from the buffer
                noisy = torch.zeros(rows, spec.num_noisy_steps, dtype=torch.int64)
                head_inputs = None if read is None else read[:rows].clone()
                score = chain_log_prob(policy, inputs, chain[:rows].clone(), spec, noisy, head_inputs)
                score.log_prob.sum().backward()

            def update_peak(rows: int) -> int:
                (natural or policy).zero_grad()
                with MemoryTrace(weights.values()) as trace:
                    for _ in range(2):  # the second beside gradients and covariances of the first
                        score_and_differentiate(rows)
                return trace.peak - sum(p.grad.nbytes for p in learning if p.grad is not None)

            return Linear.through(update_peak)

    with shapes_only(), torch.no_grad():
        everything = policy.encode_everything(blank_batch(policy, config, 2))
    kept = prefix_bytes(everything) | ({HEADS: policy.head_input_bytes} if policy.trains_heads_alone else {})
    others = {n: t for n, t in everything.items() if not any(PrefixCache(keep).is_bulk(n) for keep in KEEPS)}
    chain_bytes = (spec.num_denoising_steps + 1) * policy.n_action_steps * policy.padded_action_dim * 4
    return PassBytes(
        scalars=sum(t.numel() for t in weights.values()),
        frozen=sum(t.nbytes for key, t in weights.items() if key not in trained),
        policy=sum(p.nbytes for p in learning),
        critic=sum(p.nbytes for p in critic),
        natural=_natural_bytes(natural) if natural else 0,
        kept=kept,
        rest=sum(t.nbytes for t in others.values()) // 2 + chain_bytes + _control_step_bytes(config),
        encode=Linear.through(encode_peak),
        update=update,
    )


def _control_step_bytes(config: FlatConfig) -> int:
    """What a decision adds to the buffer for credit at control steps: states around every step, and rewards."""
    if config.credit == "decision":
        return 0
    return 4 * ((config.n_action_steps + 1) * len(ENVIRONMENT_STATE_NAMES) + config.n_action_steps)


def _natural_bytes(optimizer: NaturalGradient) -> int:
    """Running means of covariances and gradients."""
    shapes = [shape for layer in optimizer.layers for shape in optimizer.state_shapes(layer.weight).values()]
    return 4 * sum(math.prod(shape) for shape in shapes)
