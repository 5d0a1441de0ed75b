"""Pi0 and Pi0.5 behind the FlowPolicy interface: LeRobot's stock policies, unmodified, plus a noise head and a critic.

What differs from SmolVLA: Pi0 puts the state into the suffix, so the context carries it (Pi0.5 writes it into the
prompt). The action tokens see each other in both directions, so a velocity needs the whole chunk: a Pi0 executes all
that it predicts. And the expert is large enough to ask for recomputed activations or for adapters of low rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks, prepare_attention_masks_4d
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from reinflow.policy import Context, PolicyError
from reinflow_vla.base import Prefix, ReinFlowVLA
from reinflow_vla.lora import adapters, add_adapters, merged_adapters
from reinflow_vla.pi0_directory import export_pi0, load_pi0
from reinflow_vla.recompute import recompute_layers


class ReinFlowPi0(ReinFlowVLA):
    """A stock PI0Policy or PI05Policy with ReinFlow's noise head and critic."""

    num_steps_field = "num_inference_steps"

    def __init__(
        self,
        policy: Any,
        preprocessor: Any,
        postprocessor: Any,
        *,
        gradient_checkpointing: bool = False,
        peft_rank: int = 0,
        **settings: Any,
    ):
        """Wrap what ``load_pi0`` gives; ``settings`` and errors are those of ReinFlowVLA.

        Args:
            policy: a PI0Policy or PI05Policy.
            preprocessor: its preprocessor.
            postprocessor: its postprocessor.
            gradient_checkpointing: keep only the input of every expert layer for the backward pass.
            peft_rank: R > 0 trains adapters of that rank beside the expert's linear layers, and not the layers.
            settings: of ReinFlowVLA.
        """
        language_model = policy.model.paligemma_with_expert.paligemma.model.language_model
        expert = policy.model.paligemma_with_expert.gemma_expert.model
        for transformer in (language_model, expert):
            transformer.config._attn_implementation = "eager"  # as the library's sampler sets it
        self.peft_rank = peft_rank
        if peft_rank:
            add_adapters(expert, peft_rank)
        if gradient_checkpointing:
            recompute_layers(expert)
        super().__init__(policy, preprocessor, postprocessor, **settings)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, device: str, *, dtype: str | None = None, tokenizer: str = "", **settings: Any
    ) -> Self:
        """Load a policy directory or hub id strictly; see ``load_pi0`` for the errors."""
        return cls(*load_pi0(path, device, dtype=dtype, tokenizer=tokenizer), **settings)

    def check_n_action_steps(self, n_action_steps: int, chunk_size: int) -> None:
        if n_action_steps != chunk_size:
            raise PolicyError(
                f"n_action_steps={n_action_steps} is not the policy's chunk_size={chunk_size}: Pi0's action tokens see "
                "each other in both directions, so it executes all that it predicts; set n_action_steps to it"
            )

    def expert(self) -> nn.Module:
        """Without the causal model's lm_head around it (263 M parameters in Pi0), which is never used."""
        return self.vla.model.paligemma_with_expert.gemma_expert.model

    def prefix_feature_dim(self) -> int:
        width = self.vla.model.paligemma_with_expert.paligemma.config.text_config.hidden_size
        return width + (self.vla.config.max_state_dim if self._state_in_suffix else 0)

    @property
    def _state_in_suffix(self) -> bool:
        return self.vla.config.type == "pi0"

    def policy_modules(self) -> dict[str, list[nn.Module]]:
        flow = self.vla.model
        prefix = "action_time_mlp" if self._state_in_suffix else "time_mlp"
        inputs = [flow.action_in_proj, *([flow.state_proj] if self._state_in_suffix else [])]
        return {
            "action_head": [flow.action_out_proj],
            "time_mlp": [getattr(flow, f"{prefix}_in"), getattr(flow, f"{prefix}_out")],
            "full_expert": [*(adapters(self.expert()) if self.peft_rank else [self.expert()]), *inputs],
        }

    def encode(self, batch: dict[str, Any]) -> Context:
        """As ReinFlowVLA's; Pi0's features (B, F) end with the padded state (B, 32), which its prefix does not see."""
        context = super().encode(batch)
        if self._state_in_suffix:
            context["features"] = torch.cat([context["features"], context["state"]], dim=1)
        return context

    def embed_prefix(self, batch: dict[str, Any]) -> Prefix:
        images, masks = self.vla._preprocess_images(batch)
        tokens, language_mask = batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK]
        return Prefix(*self.vla.model.embed_prefix(images, masks, tokens, language_mask))

    def run_prefix(self, prefix: Prefix) -> tuple[DynamicCache, Tensor]:
        """Keys and values, and the mean (B, width) of the last hidden states of all tokens that count, fp32."""
        (hidden, _), cache = self.vla.model.paligemma_with_expert.forward(
            attention_mask=prepare_attention_masks_4d(make_att_2d_masks(prefix.pad, prefix.attention)),
            position_ids=torch.cumsum(prefix.pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[prefix.embeddings, None],
            use_cache=True,
        )
        # All prefix tokens see each other and none stands for the whole: their mean does.
        weights = (prefix.pad / prefix.pad.sum(dim=1, keepdim=True))[..., None]
        return cache, (hidden.float() * weights).sum(dim=1)

    def suffix_inputs(self, batch: dict[str, Any]) -> Context:
        """Pi0: the padded state (B, 32). Pi0.5 has it in the prompt."""
        return {"state": self.vla.prepare_state(batch)} if self._state_in_suffix else {}

    def denoise(self, context: Context, cache: DynamicCache, x_t: Tensor, time: Tensor) -> Tensor:
        """The library's step over the whole chunk; it copies the cache once more."""
        state = {"state": context["state"]} if self._state_in_suffix else {}
        return self._library_step(
            **state, prefix_pad_masks=context["pad"], past_key_values=cache, x_t=x_t, timestep=time
        )

    def save_pretrained(self, directory: Path) -> None:
        """Write a stock LeRobot policy directory: no noise head, no critic, adapters merged into the layers."""
        with merged_adapters(self.expert()), self.as_exported():
            export_pi0(self.vla, self.preprocessor, self.postprocessor, directory)
