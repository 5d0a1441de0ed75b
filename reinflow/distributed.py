"""Several learners of one run on torch.distributed; in one process every function gives back what it was given.

Launched by torchrun or accelerate launch, each process (rank) plays its share of the run's environments and adds its
part to every gradient; whatever decides something is taken over all ranks, so that all decide the same. Settings count
over all ranks together: more ranks make a run faster, not another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 8 * 2**20  # numbers that travel together: a small tensor costs as much as its message
TIMEOUT_S = 1_800.0  # a rank may evaluate, save or compile for long; one that dies is noticed at once


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def joined() -> Iterator[None]:
    """Within it the ranks of a launch know each other; nothing in a process of its own."""
    if not launched():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_S))
    try:
        yield
    finally:
        dist.destroy_process_group()


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
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def total(*values: float) -> list[float]:
    """Sums of numbers over the ranks, in float64."""
    if size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    return sums.tolist()


def gather[T](value: T) -> list[T]:
    """Every rank's value, in their order."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
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
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
