"""Several learners of one run on torch.distributed; in one process every function gives back what it was given.

Launched by torchrun or accelerate launch, each process (rank) plays its share of the run's environments and adds its
part to every gradient; whatever decides something is taken over all ranks, so that all decide the same. Settings count
over all ranks together: more ranks make a run faster, not another one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reinflow import UserError
from reinflow.launch import launched

BUCKET = 8 * 2**20  # numbers that travel together: a small tensor costs as much as its message
TIMEOUT_S = 1_800.0  # a rank may evaluate, save or compile for long; one that dies is noticed at once
NEEDED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE, to find the other ranks
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # to read numbers as, by their size


@dataclass
class Traffic:
    """What this rank exchanged with the others so far."""

    messages: int = 0  # collectives
    summed: int = 0  # bytes of the tensors that ``add_up`` took
    seconds: float = 0.0  # in them, the wait for the slowest rank included; NCCL's go on beside Python


TRAFFIC = Traffic()


@contextmanager
def _counted() -> Iterator[None]:
    start = time.perf_counter()
    yield
    TRAFFIC.messages += 1
    TRAFFIC.seconds += time.perf_counter() - start


@contextmanager
def joined() -> Iterator[None]:
    """Within it the ranks of a launch know each other; nothing in a process of its own.

    Raises:
        UserError: no launcher has said who and where the others are.
    """
    if not launched():
        yield
        return
    if missing := [name for name in NEEDED if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} says that this is one of several processes, but {missing[0]} is "
            "not set: start with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    yield
    dist.destroy_process_group()  # not after an error: it waits for ranks that may be gone


def size() -> int:
    """Ranks W."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_writer() -> bool:
    """Whether this rank writes files and speaks; one does."""
    return rank() == 0


def share(count: int) -> range:
    """Which of ``count`` things (environments, seeds) are this rank's: a contiguous part, even within one."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


@torch.no_grad()
def add_up(tensors: Sequence[Tensor]) -> None:
    """Every tensor becomes its sum over the ranks, in place; the same bits on all of them."""
    if size() == 1:
        return
    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and (
            (tensor.dtype, tensor.device) != (waiting[0].dtype, waiting[0].device)
            or sum(t.numel() for t in waiting) + tensor.numel() > BUCKET
        ):
            _add_up_together(waiting)
            waiting = []
        waiting.append(tensor)
    if waiting:
        _add_up_together(waiting)


def _add_up_together(tensors: list[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with _counted():
        dist.all_reduce(flat)
    TRAFFIC.summed += flat.numel() * flat.element_size()
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def total(*values: float) -> list[float]:
    """Sums of numbers over the ranks, in float64."""
    if size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    with _counted():
        dist.all_reduce(sums)
    return sums.tolist()


def part(mean: Tensor | float, share: float) -> float:
    """Of a mean over all ranks' rows, what this rank adds: its own mean by its share of the rows; 0 without any."""
    return share * float(mean) if share else 0.0


def largest(*values: float) -> list[float]:
    """The largest over the ranks of each number; NaN where one is."""
    if size() == 1:
        return list(values)
    return torch.tensor(gather(values), dtype=torch.float64).amax(0).tolist()


@torch.no_grad()
def add_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Gradients become their sums over the ranks; where no rank has one, none has one afterwards."""
    if size() == 1:
        return
    learns = total(*(float(parameter.grad is not None) for parameter in parameters))
    gradients = []
    for parameter, ranks in zip(parameters, learns, strict=True):
        if ranks:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
    add_up(gradients)


def mean_and_var(rows: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number, mean (F,) and biased variance (F,) of the rows (n, F) of all ranks."""
    if size() == 1:
        var, mean = torch.var_mean(rows, dim=0, correction=0)
        return len(rows), mean, var
    var, mean = torch.var_mean(rows, dim=0, correction=0) if len(rows) else (rows.sum(0), rows.sum(0))
    parts = [(n, m.double(), v.double()) for n, m, v in gather((len(rows), mean.cpu(), var.cpu()))]
    count = sum(n for n, _, _ in parts)
    middle = torch.stack([m * (n / count) for n, m, _ in parts]).sum(0)
    spread = torch.stack([(v + (m - middle) ** 2) * (n / count) for n, m, v in parts]).sum(0)
    return count, middle.to(rows), spread.to(rows)


@torch.no_grad()
def refuse_other_weights(weights: Mapping[str, Tensor]) -> None:
    """Whether all ranks hold the same ``weights``, to the bit, by a sum over the bits of each tensor.

    Raises:
        UserError: they do not; on all ranks.
    """
    if size() == 1:
        return
    sums = [tensor.detach().contiguous().view(_BITS[tensor.element_size()]).sum() for tensor in weights.values()]
    first, *others = gather(torch.stack(sums).tolist())
    differ = {number: sums for number, sums in enumerate(others, 1) if sums != first}
    if differ:
        sums = next(iter(differ.values()))
        name = next(name for name, a, b in zip(weights, first, sums, strict=True) if a != b)
        raise UserError(
            f"ranks {[*differ]} do not hold the weights of rank 0 ({name} differs): start all ranks with the same "
            "settings on machines of one kind (CPU or GPU model, torch, --num-threads), with --resume from the last "
            "checkpoint"
        )


def wait_for_all() -> None:
    """Go on when every rank is here."""
    total(0.0)


def gather[T](value: T) -> list[T]:
    """Every rank's value, in their order."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _counted():
        dist.all_gather_object(values, value)
    return values


def join_rows(tensor: Tensor, dim: int = 0) -> Tensor:
    """Every rank's tensor, joined along ``dim``, on the device of this one; for small ones."""
    if size() == 1:
        return tensor
    return torch.cat(gather(tensor.detach().cpu()), dim).to(tensor.device)


def from_writer[T](make: Callable[[], T]) -> T:
    """What ``make`` gives on the writing rank, on all of them; an exception there is raised on all."""
    if size() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_writer():
        try:
            box = [make(), None]
        except Exception as error:  # the others wait for it: they must end too
            box = [None, error]
    with _counted():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
