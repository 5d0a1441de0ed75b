"""The flattened rollout that an update takes its minibatches from. Shapes follow the legend in reinflow/flow.py."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reinflow.flow import ChainScore, ChainSpec, chain_log_prob
from reinflow.policy import Context, FlowPolicy
from reinflow.whole_rollout import OwnRows


@dataclass
class RolloutBatch:
    """A flattened rollout or some rows of it: B decisions of all ranks, of which the tensors hold this rank's b.

    In one process b is B. Length and indices are those of all ranks, so that a shuffle means the same rows everywhere.
    """

    context: Context
    chain: Tensor  # (b, K+1, C, D)
    log_prob: Tensor  # (b, G)
    mask: Tensor  # (b, G) bool
    advantage: Tensor  # (b,) or (b, G), normalised over the rollout
    anchor: Tensor  # (b, K', C, A) denoising steps of the starting policy; (b, 0) without an anchor
    groups: Tensor  # (B,) active ratio groups of every decision, in host memory
    own: OwnRows
    noisy: Tensor | None = None  # (b, K') denoising steps that drew noise
    head_inputs: Tensor | None = None  # (b, K', C, F) in them: an update then runs the heads alone

    def __len__(self) -> int:
        return len(self.own)

    def __getitem__(self, rows: Tensor) -> RolloutBatch:
        own, groups, rows = self.own.among(rows), self.groups[rows], self.own.places(rows)
        context = {name: tensor[rows] for name, tensor in self.context.items()}
        rest = (self.chain, self.log_prob, self.mask, self.advantage, self.anchor)
        noisy = None if self.noisy is None else self.noisy[rows]
        inputs = None if self.head_inputs is None else self.head_inputs[rows]
        chain, log_prob, mask, advantage, anchor = (tensor[rows] for tensor in rest)
        return RolloutBatch(context, chain, log_prob, mask, advantage, anchor, groups, own, noisy, inputs)

    @property
    def empty(self) -> bool:
        """Whether all of it is with other ranks."""
        return len(self.advantage) == 0

    @property
    def share(self) -> float:
        """Of the decisions that are this rank's."""
        return self.own.share

    @property
    def group_share(self) -> float:
        """Of the active ratio groups that are this rank's."""
        return 1.0 if self.own.mine is None else float(self.groups[self.own.mine].sum() / self.groups.sum())

    def score(self, policy: FlowPolicy, spec: ChainSpec) -> ChainScore:
        """Of these chains under the current weights, with gradient."""
        return chain_log_prob(policy, self.context, self.chain, spec, self.noisy, self.head_inputs)
