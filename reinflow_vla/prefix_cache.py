"""What a rollout keeps of an encoded observation, so that an update never encodes it again, and whether it fits.

| keeps        | the update then runs, besides the action expert | a decision of SmolVLA, 3 cameras, bf16 |
|--------------|--------------------------------------------------|----------------------------------------|
| `heads`      | not even that: the heads alone                   | .14 MB for every denoising step        |
| `kv`         | nothing                                          | 4.2 MB                                 |
| `embeddings` | the language model over the stored embeddings    | .4 MB                                  |
| `none`       | vision tower and language model over the images  | the images                             |

``heads`` is for a policy of which only the heads learn: what they read at every stored denoising state was computed
when the policy acted, and is a constant of the rollout. The other three give the same velocities to rounding: 1e-5 in
fp32. A bf16 language model may round a recomputed prefix more coarsely, as its batch is another one; the ratio guard
then says so, and `kv` is the remedy. Only what an update would read goes into the buffer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from reinflow.policy import Context, PolicyError

Keep = Literal["heads", "kv", "embeddings", "none"]
HEADS: Keep = "heads"
KEEPS: tuple[Keep, ...] = ("kv", "embeddings", "none")  # ways of keeping the prefix, fastest first
BATCH_PREFIX = "batch."  # names of preprocessed inputs inside a context
STORED_BY: dict[Keep, tuple[str, ...]] = {
    "heads": (),  # it lies beside the context
    "kv": ("kv",),
    "embeddings": ("embeddings", "attention"),
    "none": (BATCH_PREFIX,),
}
SHARE_OF_FREE_MEMORY = 0.5  # the rest is for gradients, optimiser moments and activations
GIB = 2**30


@dataclass(frozen=True)
class PrefixCache:
    """How the prefix of a decision is kept in the rollout buffer."""

    keep: Keep
    offload: bool = False
    """Keep it in host memory while the policy is on an accelerator."""
    bytes_per_decision: int = 0

    def stored(self, name: str) -> bool:
        """Whether the context's tensor ``name`` goes into the buffer."""
        others = [key for keep in KEEPS if keep != self.keep for key in STORED_BY[keep]]
        return not name.startswith(tuple(others))

    def is_bulk(self, name: str) -> bool:
        """Whether ``name`` is part of the kept prefix (and offloaded with it)."""
        return name.startswith(STORED_BY[self.keep])

    def describe(self, decisions: int) -> str:
        """One line for the start of a run."""
        size, place = self.bytes_per_decision / 2**20, "in host memory" if self.offload else "on the policy's device"
        what = "inputs of the heads, all that an update runs" if self.keep == HEADS else self.keep
        return f"prefix cache: {what}, {size:.2f} MiB a decision, {decisions * size:.0f} MiB a rollout {place}"


def prefix_bytes(context: Context) -> dict[Keep, int]:
    """Bytes per decision that each way of keeping would store, from a context that holds them all."""
    rows = len(context["pad"])
    sizes = {name: tensor.numel() * tensor.element_size() // rows for name, tensor in context.items()}
    return {k: sum(size for name, size in sizes.items() if name.startswith(STORED_BY[k])) for k in KEEPS}


def free_memory(device: str) -> float:
    """Free bytes of a CUDA device, or of the host."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def plan_prefix_cache(
    wanted: Literal["auto", "heads", "kv", "embeddings", "none"],
    sizes: dict[Keep, int],
    decisions: int,
    device: str,
    budget_gb: float = 0.0,
    free: Callable[[str], float] = free_memory,
) -> PrefixCache:
    """The fastest way of keeping that fits, or the wanted one.

    Args:
        wanted: "auto" to choose.
        sizes: bytes per decision, of ``prefix_bytes``; with "heads" among them where only the heads learn.
        decisions: per rollout.
        device: of the policy.
        budget_gb: memory for the cache in GiB; 0 takes half of what is free.
        free: bytes of a device, or of the host ("cpu"), once the policy is loaded.

    Raises:
        PolicyError: nothing (or not the wanted one) fits, with the remedy.
    """
    places = [(False, budget_gb * GIB or SHARE_OF_FREE_MEMORY * free(device))]
    if device.startswith("cuda"):
        places.append((True, SHARE_OF_FREE_MEMORY * free("cpu")))
    if wanted not in ("auto", *sizes):
        raise PolicyError(
            f"prefix_cache={wanted} needs all but the heads frozen: add --no-train-time-mlp --no-train-full-expert, or "
            "set prefix_cache=auto"
        )
    ways: tuple[Keep, ...] = (HEADS, *KEEPS) if HEADS in sizes else KEEPS
    for keep in ways if wanted == "auto" else (wanted,):
        for offload, budget in places[:1] if keep == HEADS else places:
            if decisions * sizes[keep] <= budget:
                return PrefixCache(keep, offload, sizes[keep])
    least = min(decisions * sizes[keep] for keep in (ways if wanted == "auto" else (wanted,)))
    raise PolicyError(
        f"prefix_cache={wanted} needs {least / GIB:.1f} GiB for {decisions} decisions, the budget is "
        f"{places[0][1] / GIB:.1f} GiB: lower episodes_per_iteration, raise prefix_cache_gb, or set prefix_cache=auto"
    )
