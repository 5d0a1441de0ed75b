"""A network that is told the size of its step (a shortcut model), and that forgets it again where K is fixed.

What it needs while it learns stands here too: the moving average of its weights, which sets the targets of its steps.

With K denoising steps every step has the size 1 / K. What the embedding then adds to a layer is a constant, and goes
into that layer's bias: the exported policy has the stock's weights and needs nothing of this page. The embedding is
kept beside it (``step_size.safetensors``), so that the same policy can be had for another K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reinflow.policy import PolicyError
from reinflow.training_state import refuse_not_finite, strict_load

STEP_SIZE_FILE = "step_size.safetensors"
DIM = 32


class StepSizeEmbedding(nn.Module):
    """Adds an embedding of the step size to the output of a linear layer; zero at first, so that a policy that knows
    of no step sizes starts as it was."""

    finest: Tensor

    def __init__(self, width: int, finest: int = 128):
        """``width``: outputs of the layer; ``finest``: the most denoising steps that it is to learn."""
        super().__init__()
        self.register_buffer("finest", torch.tensor(finest))
        self.project = nn.Linear(DIM, width)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        self._added: Tensor | None = None

    def forward(self, step_size: Tensor) -> Tensor:
        """(B,) step sizes in (0, 1] -> (B, width). It sees log2 of them: halves are equally far apart."""
        place = -torch.log2(step_size.float())[:, None]  # 0 for one step, 7 for 128
        angle = place * math.pi / 8 * torch.arange(1, DIM // 2 + 1, device=step_size.device)
        return self.project(torch.cat([angle.sin(), angle.cos()], dim=1))

    def attach(self, layer: nn.Linear) -> None:
        """Let ``layer`` (its input (B, ..., F)) take what ``of`` says."""
        layer.register_forward_hook(self._add)

    def _add(self, _layer: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        if self._added is None:
            return output
        return output + self._added.to(output.dtype).view(len(self._added), *(1,) * (output.dim() - 2), -1)

    @contextmanager
    def of(self, step_size: Tensor) -> Iterator[None]:
        """Within it the layer's rows take steps of these sizes, (B,)."""
        self._added = self(step_size)
        try:
            yield
        finally:
            self._added = None

    @torch.no_grad()
    def constant(self, num_denoising_steps: int) -> Tensor:
        """What it adds with K steps, (width,). Raises PolicyError for more than it has learned."""
        if num_denoising_steps > self.finest:
            raise PolicyError(
                f"num_denoising_steps={num_denoising_steps}, but this shortcut policy has learned {int(self.finest)} "
                "at most: lower it, or train one with a larger finest_steps"
            )
        weight = self.project.weight
        return self(torch.full((1,), 1.0 / num_denoising_steps, device=weight.device))[0]

    @torch.no_grad()
    def fold(self, layer: nn.Linear, to: int, was: int = 0) -> None:
        """Put what it adds with ``to`` steps into the layer's bias, in place of what it adds with ``was`` (0: none)."""
        change = self.constant(to) - (self.constant(was) if was else 0.0)
        layer.bias.add_(change.to(layer.bias.dtype))

    @contextmanager
    def folded(self, layer: nn.Linear, to: int) -> Iterator[None]:
        """Within it ``layer`` needs no embedding for ``to`` steps; behind it the layer is what it was, bit for bit."""
        kept = layer.bias.detach().clone()
        self.fold(layer, to)
        try:
            yield
        finally:
            with torch.no_grad():
                layer.bias.copy_(kept)

    def save(self, policy_dir: Path) -> None:
        """Beside a policy that it was folded into."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, policy_dir / STEP_SIZE_FILE)


def load_step_size(policy_dir: Path, layer: nn.Linear) -> StepSizeEmbedding | None:
    """The embedding that is kept beside a policy; None where there is none.

    Raises:
        PolicyError: it cannot be read, or is of another policy.
    """
    file = policy_dir / STEP_SIZE_FILE
    if not file.is_file():
        return None
    embedding = StepSizeEmbedding(layer.out_features).to(layer.weight.device)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise PolicyError(f"{file} cannot be read ({error}): take another export") from error
    refuse_not_finite(tensors.items(), str(file))
    strict_load(embedding.state_dict(), tensors, str(file))
    return embedding


def refold(policy_dir: Path, layer: nn.Linear, to: int, was: int) -> None:
    """Make a policy that was written for ``was`` denoising steps one for ``to``, if it is a shortcut model."""
    if to != was and (embedding := load_step_size(policy_dir, layer)):
        embedding.fold(layer, to, was)


class MovingAverage(nn.Module):
    """An exponential moving average of parameters; its buffers are saved and resumed as any module's.

    The first updates forget faster (after n of them at most (1 + n) / (10 + n) is kept), so that a short training's
    average does not remember the weights it began with.
    """

    count: Tensor

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        """``decay``: what an update keeps of the average, in [0, 1)."""
        super().__init__()
        self.parameters_of, self.decay = list(parameters), decay
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        for number, parameter in enumerate(self.parameters_of):
            self.register_buffer(f"average{number}", parameter.detach().clone())

    @property
    def averages(self) -> list[Tensor]:
        """In the order of the parameters."""
        return [self.get_buffer(f"average{number}") for number in range(len(self.parameters_of))]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser step."""
        self.count += 1
        n = int(self.count)
        keep = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters_of], 1 - keep)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the parameters are the averages; a graph that was built before is not touched."""
        own = [parameter.data for parameter in self.parameters_of]
        try:
            for parameter, average in zip(self.parameters_of, self.averages, strict=True):
                parameter.data = average
            yield
        finally:
            for parameter, data in zip(self.parameters_of, own, strict=True):
                parameter.data = data
