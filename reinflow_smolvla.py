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
from pathlib import Path
from typing import Any, Self

import torch
from lerobot.policies.common.vla_utils import make_att_2d_masks
from lerobot.utils.constants import OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from reinflow.policy import Context
from reinflow.step_size import refold
from reinflow_vla.base import Prefix, ReinFlowVLA
from reinflow_vla.directory import locate_policy
from reinflow_vla.smolvla_directory import export_policy, load_smolvla


class ReinFlowSmolVLA(ReinFlowVLA):
    """A stock SmolVLAPolicy with ReinFlow's noise head and critic."""

    num_steps_field = "num_steps"

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str, **settings: Any) -> Self:
        """Load a policy directory or hub id strictly; see ``load_smolvla`` for the errors.

        A shortcut policy that is stored for another number of denoising steps becomes one for those in ``settings``.
        """
        directory = Path(path) if Path(path).is_dir() else locate_policy(path)
        stock, preprocessor, postprocessor = load_smolvla(directory, device)
        stored = stock.config.num_steps
        policy = cls(stock, preprocessor, postprocessor, **settings)
        refold(directory, policy.step_size_layer, policy.num_denoising_steps, stored)
        return policy

    @property
    def step_size_layer(self) -> nn.Linear:
        """Where action tokens and flow time are joined."""
        return self.vla.model.action_time_mlp_in

    def expert(self) -> nn.Module:
        return self.vla.model.vlm_with_expert.lm_expert

    def prefix_feature_dim(self) -> int:
        return self.vla.model.vlm_with_expert.config.text_config.hidden_size

    def policy_modules(self) -> dict[str, list[nn.Module]]:
        flow = self.vla.model
        return {
            "action_head": [flow.action_out_proj],
            "time_mlp": [flow.action_time_mlp_in, flow.action_time_mlp_out],
            "full_expert": [self.expert(), flow.action_in_proj],
        }

    def embed_prefix(self, batch: dict[str, Any]) -> Prefix:
        images, masks = self.vla.prepare_images(batch)
        return Prefix(*self.vla.model.embed_prefix(
            images, masks, batch[OBS_LANGUAGE_TOKENS], batch[OBS_LANGUAGE_ATTENTION_MASK],
            state=self.vla.prepare_state(batch),
        ))  # fmt: skip

    def run_prefix(self, prefix: Prefix) -> tuple[DynamicCache, Tensor]:
        (hidden, _), cache = self.vla.model.vlm_with_expert.forward(
            attention_mask=make_att_2d_masks(prefix.pad, prefix.attention),
            position_ids=torch.cumsum(prefix.pad, dim=1) - 1,
            past_key_values=None,
            inputs_embeds=[prefix.embeddings, None],
            use_cache=True,
        )
        # The state token is the only one with attention mask 1: it alone sees images, language and state.
        state_token = prefix.attention[0].int().argmax()  # stays on the device: reading it out would wait for it
        return cache, hidden.index_select(1, state_token[None])[:, 0].float()

    @contextmanager
    def _only_executed_tokens(self) -> Iterator[None]:
        """The library builds its suffix mask for ``config.chunk_size`` tokens; make that the executed ones."""
        config = self.vla.config
        config.chunk_size = self.n_action_steps
        try:
            yield
        finally:
            config.chunk_size = self.chunk_size

    def denoise(self, context: Context, cache: DynamicCache, x_t: Tensor, time: Tensor) -> Tensor:
        with self._only_executed_tokens():
            return self._library_step(context["pad"], cache, x_t, time)

    def save_pretrained(self, directory: Path) -> None:
        """Write a stock LeRobot policy directory: no noise head, no critic, the full chunk_size."""
        with self.as_exported():
            export_policy(self.vla, self.preprocessor, self.postprocessor, directory)
