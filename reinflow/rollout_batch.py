"""The flattened rollout that an update takes its minibatches from. Shapes follow the legend in reinflow/flow.py."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reinflow.flow import ChainScore, ChainSpec, chain_log_prob
from reinflow.policy import Context, FlowPolicy


@dataclass
class RolloutBatch:
    """A flattened rollout, B = T * N decisions."""

    context: Context
    chain: Tensor  # (B, K+1, C, D)
    log_prob: Tensor  # (B, G)
    mask: Tensor  # (B, G) bool
    advantage: Tensor  # (B,) or (B, G), normalised over the rollout
    anchor: Tensor  # (B, K', C, A) denoising steps of the starting policy; (B, 0) without an anchor
    noisy: Tensor | None = None  # (B, K') denoising steps that drew noise
    head_inputs: Tensor | None = None  # (B, K', C, F) in them: an update then runs the heads alone

    def __len__(self) -> int:
        return len(self.advantage)

    def __getitem__(self, rows: Tensor) -> RolloutBatch:
        context = {name: tensor[rows] for name, tensor in self.context.items()}
        rest = (self.chain, self.log_prob, self.mask, self.advantage, self.anchor)
        noisy = None if self.noisy is None else self.noisy[rows]
        inputs = None if self.head_inputs is None else self.head_inputs[rows]
        chain, log_prob, mask, advantage, anchor = (tensor[rows] for tensor in rest)
        return RolloutBatch(context, chain, log_prob, mask, advantage, anchor, noisy, inputs)

    def score(self, policy: FlowPolicy, spec: ChainSpec) -> ChainScore:
        """Of these chains under the current weights, with gradient."""
        return chain_log_prob(policy, self.context, self.chain, spec, self.noisy, self.head_inputs)
