"""The rollouts of all ranks as one: its small figures, and which of its rows are this rank's.

Ranks play the columns of one [T, N] in their order. Rewards, values, flags and advantages of all are gathered, some 30
bytes a decision, so that every rank takes statistics from the same numbers; contexts and chains stay where they are. In
one process nothing is gathered, and every row is its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reinflow import distributed
from reinflow.credit import Advantages
from reinflow.rollout import RolloutBuffer

FIGURES = ("active", "value", "next_value", "reward", "discount", "terminated", "truncated")


class OwnRows:
    """Which of the B rows of all ranks are this rank's; it holds them in the same order.

    Args:
        count: B.
        mine: (B,) bool; None: all of them.
    """

    def __init__(self, count: int, mine: Tensor | None = None) -> None:
        self.count = count
        self.mine = None if mine is None else mine.cpu()
        self._places = None if self.mine is None else self.mine.cumsum(0) - 1

    def __len__(self) -> int:
        return self.count

    def places(self, rows: Tensor) -> Tensor:
        """Where this rank holds those of ``rows`` that are its own."""
        if self.mine is None or self._places is None:
            return rows
        return self._places[rows][self.mine[rows]]

    def among(self, rows: Tensor) -> OwnRows:
        """Which of ``rows``, taken as a batch of their own, are this rank's."""
        return OwnRows(len(rows), None if self.mine is None else self.mine[rows])

    def cut(self, rows: Tensor) -> Tensor:
        """(B, ...) of all ranks -> this rank's."""
        return rows if self.mine is None else rows[self.mine.to(rows.device)]

    @property
    def share(self) -> float:
        """Of the rows that are this rank's."""
        return 1.0 if self.mine is None else float(self.mine.sum()) / self.count


@dataclass(frozen=True)
class WholeRollout:
    """What is known of the rollout of all ranks, N environments; R rows for the critic."""

    figures: RolloutBuffer  # FIGURES of all; what is large is empty
    advantages: Advantages  # of all; the context is this rank's
    columns: Tensor | None = None  # (N,) bool, this rank's; None: all of them

    @classmethod
    def of(cls, buffer: RolloutBuffer, advantages: Advantages) -> WholeRollout:
        """Join this rank's rollout and advantages with the others'; one gather."""
        if distributed.size() == 1:
            return cls(buffer, advantages)
        own: dict[str, Tensor] = {name: getattr(buffer, name) for name in FIGURES}
        mask = critic_mask(buffer.active, advantages)
        own |= {
            "advantage": advantages.advantage,
            "critic_value": _on_grid(advantages.value, mask),
            "critic_target": _on_grid(advantages.target, mask),
        }
        parts = distributed.gather({name: tensor.cpu() for name, tensor in own.items()})
        joined: dict[str, Any] = {
            name: torch.cat([part[name] for part in parts], 1).to(own[name].device) for name in own
        }
        columns = torch.cat(
            [torch.full(part["value"].shape[1:], i == distributed.rank()) for i, part in enumerate(parts)]
        )
        mask = critic_mask(joined["active"], advantages)
        return cls(
            replace(
                buffer, context={}, chain=buffer.chain[:0], log_prob=buffer.log_prob[:0], noisy=None, head_inputs=None,
                states=None, step_reward=None, **{name: joined[name] for name in FIGURES},
            ),
            Advantages(
                joined["advantage"], advantages.context, joined["critic_value"][mask], joined["critic_target"][mask]
            ),
            columns,
        )  # fmt: skip

    def decisions(self) -> OwnRows:
        """Whose the decisions of sound episodes are, in the order of the flattened [T, N]."""
        return self._own(self.figures.valid, int(self.figures.valid.sum()))

    def critic_rows(self) -> OwnRows:
        """Whose the critic's rows are."""
        return self._own(critic_mask(self.figures.active, self.advantages), len(self.advantages.target))

    def _own(self, mask: Tensor, count: int) -> OwnRows:
        return OwnRows(count, None if self.columns is None else self.columns.expand(len(mask), -1)[mask.cpu()])


def critic_mask(active: Tensor, advantages: Advantages) -> Tensor:
    """Which decisions (T, N) or control steps (T * n, N) the critic's R rows are, those True in their order.

    Args:
        active: (T, N, n) executed control steps.
        advantages: by decision or by control step.
    """
    return active.any(-1) if advantages.advantage.dim() == 2 else active.transpose(1, 2).flatten(0, 1)


def _on_grid(rows: Tensor, mask: Tensor) -> Tensor:
    """(R,) -> the shape of ``mask``, 0 where it is False."""
    grid = rows.new_zeros(mask.shape)
    grid[mask.to(grid.device)] = rows
    return grid
