"""The one supervised loop: AdamW, a linear warm-up and then a cosine to zero; and what a killed one goes on from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reinflow import UserError, checkpoint
from reinflow.progress import progress_bar
from reinflow.schedules import warmup_cosine
from reinflow.training_state import load_optimizer, rng_state, set_rng_state, strict_load


class FitError(UserError, RuntimeError):
    """A supervised stage cannot go on; the message holds the remedy."""


@dataclass(frozen=True)
class FitSettings:
    """How a supervised stage descends."""

    steps: int
    lr: float  # the peak
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.99)
    warmup_steps: int = 50
    grad_clip_norm: float = 1.0  # 0 is off


class Progress:
    """What a killed stage goes on from, in a directory of its own: the weights that move, optimiser, random states.

    A checkpoint as in reinflow/checkpoint.py, without a policy: whole or not there, with checksums.
    """

    def __init__(
        self,
        directory: Path,
        modules: Mapping[str, nn.Module],
        generators: Mapping[str, torch.Generator | np.random.Generator] | None = None,
        every: int = 250,
    ) -> None:
        """Load what is there: modules and generators are then as after ``done`` steps.

        Args:
            directory: where it is kept.
            modules: everything whose tensors change: the policy, averages of it, critics; by names for files.
            generators: that batches and noise are drawn from; torch's own is kept too.
            every: steps between savings.

        Raises:
            CheckpointError: what is there does not fit, or is damaged.
        """
        self.directory, self.modules, self.generators, self.every = directory, modules, generators or {}, every
        self.done = 0  # steps
        self._state: Mapping[str, Any] | None = None
        if checkpoint.list_checkpoints(directory):
            tensors, self._state = checkpoint.load_training_state(directory)
            for name, module in modules.items():
                strict_load(module.state_dict(), tensors[name], f"{name} in {directory}")
            for name, generator in self.generators.items():
                _set_generator(generator, self._state["generators"][name])
            self.done = int(self._state["done"])

    def restore(self, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
        """Set the optimiser, its schedule and the random states to those after ``done`` steps."""
        if self._state is None:
            return
        load_optimizer(optimizer, self._state["optimizer"], f"the optimiser in {self.directory}")
        schedule.last_epoch = self.done
        set_rng_state(self._state["rng"])
        self._state = None

    def save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state after ``step`` steps, and only that."""
        state = {
            "done": step,
            "optimizer": optimizer.state_dict(),
            "generators": {name: _generator_state(generator) for name, generator in self.generators.items()},
            "rng": rng_state(),
        }
        tensors = {name: module.state_dict() for name, module in self.modules.items()}
        checkpoint.save_checkpoint(self.directory, step, lambda _: None, tensors, state)
        checkpoint.prune_checkpoints(self.directory, keep=1)
        self.done = step


def _generator_state(generator: torch.Generator | np.random.Generator) -> Any:
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.bit_generator.state


def _set_generator(generator: torch.Generator | np.random.Generator, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    else:
        generator.bit_generator.state = state


def fit(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[], tuple[Tensor, Mapping[str, float]]],
    settings: FitSettings,
    progress: Progress | None = None,
    label: str = "training",
) -> Iterator[tuple[int, dict[str, float]]]:
    """Descend, with a bar; the loop's body averages, evaluates and saves between the steps.

    Args:
        parameters: what learns.
        loss: draws a batch; its loss with a graph, and figures to report.
        settings: of the descent.
        progress: what to go on from, and where to keep it: every so many steps after the loop's body.
        label: of the bar.

    Yields:
        After every optimiser step its number, from 1 or from the one after ``progress.done``, and the figures with
        "loss", "grad_norm" (before clipping) and "lr" among them.

    Raises:
        FitError: a loss or its gradient is not finite; the weights are those before its step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, settings.warmup_steps, settings.steps)
    )
    if progress:
        progress.restore(optimizer, schedule)
    done = progress.done if progress else 0
    with progress_bar(f"{label}, steps", settings.steps, done=done) as advance:
        for step in range(done + 1, settings.steps + 1):
            value, info = loss()
            if not bool(torch.isfinite(value.detach())):
                raise FitError(f"the loss is not finite at step {step}: lower lr={settings.lr}")
            optimizer.zero_grad()
            value.backward()
            limit = settings.grad_clip_norm if settings.grad_clip_norm > 0 else math.inf
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
            if not bool(torch.isfinite(norm)):
                raise FitError(f"the gradient is not finite at step {step}: lower lr={settings.lr}")
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            schedule.step()
            figures = {**info, "loss": float(value.detach()), "grad_norm": float(norm), "lr": lr}
            yield step, figures
            if progress and step % progress.every == 0 and step < settings.steps:
                progress.save(step, optimizer)
            advance(1, f"loss {figures['loss']:.4g}")
