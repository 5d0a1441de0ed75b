"""Batches of demonstrations in the form that `SmolVLAPolicy.forward` takes, from memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reinflow.progress import tracked
from reinflow_so101.stages.datasets import Demonstrations

if TYPE_CHECKING:
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy
    from lerobot.processor import PolicyProcessorPipeline
    from torch import Tensor


def chunk_at(
    action: Tensor, episode: Tensor, frame: Tensor, chunk_size: int, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Actions (E, L, 6) -> the chunks (B, chunk_size, 6) from these frames on, and which entries are beyond the end.

    `lengths`: (E,) frames of each episode; None where all have L.
    """
    import torch

    index = frame[:, None] + torch.arange(chunk_size)  # (B, chunk_size)
    length = lengths[episode, None] if lengths is not None else torch.tensor(action.shape[1])
    return action[episode[:, None], torch.minimum(index, length - 1)], index >= length


class TrainingBatches:
    """Normalised tensors of the demonstrations, and batches of them in the form `SmolVLAPolicy.forward` takes."""

    def __init__(
        self, data: Demonstrations, policy: SmolVLAPolicy, preprocessor: PolicyProcessorPipeline, cache: bool
    ) -> None:
        """`cache`: precompute image tokens, for a frozen vision tower."""
        import torch

        self.data, self.chunk_size = data, policy.config.chunk_size
        everything = preprocessor(
            {
                "observation.state": torch.from_numpy(data.state),
                "action": torch.from_numpy(data.action),
                "task": data.instructions,
            }
        )
        self.state, self.action = everything["observation.state"], everything["action"]
        self.lengths, self.instruction_of = torch.from_numpy(data.lengths), torch.from_numpy(data.instruction_of)
        self.prompts = {key: value for key, value in everything.items() if key.startswith("observation.language")}
        self.images = {key: torch.from_numpy(images) for key, images in data.images.items()}
        self.tokens = {key: image_tokens(policy, images) for key, images in self.images.items()} if cache else None

    def observations(self, episode: NDArray[np.int64], frame: NDArray[np.int64]) -> dict[str, Tensor]:
        """Model inputs of these frames; images (B, 3, h, w), or blank ones if their tokens are cached."""
        import torch

        from reinflow_vla.base import unit_images

        rows = torch.from_numpy(self.data.kept[episode, frame])
        batch = {key: value[self.instruction_of[torch.from_numpy(episode)]] for key, value in self.prompts.items()}
        batch["observation.state"] = self.state[torch.from_numpy(episode), torch.from_numpy(frame)]
        for key, images in self.images.items():
            blank = self.tokens is not None
            batch[key] = torch.zeros(()).expand(len(rows), *images.shape[1:]) if blank else unit_images(images[rows])
        return batch

    def batch(self, episode: NDArray[np.int64], frame: NDArray[np.int64]) -> dict[str, Tensor]:
        """`observations` with the action chunk and its padding mask."""
        import torch

        where = torch.from_numpy(episode), torch.from_numpy(frame)
        chunk, beyond = chunk_at(self.action, *where, self.chunk_size, self.lengths)
        return {**self.observations(episode, frame), "action": chunk, "action_is_pad": beyond}

    @contextmanager
    def vision(self, policy: SmolVLAPolicy, episode: NDArray[np.int64], frame: NDArray[np.int64]) -> Iterator[None]:
        """Within it the policy takes the cached image tokens of these frames instead of running its vision tower."""
        import torch

        if self.tokens is None:
            yield
            return
        rows = torch.from_numpy(self.data.kept[episode, frame])
        waiting = iter([self.tokens[key][rows] for key in policy.config.image_features])
        network = policy.model.vlm_with_expert
        network.embed_image = lambda _image: next(waiting)
        try:
            yield
        finally:
            del network.embed_image


def image_tokens(policy: SmolVLAPolicy, images: Tensor) -> Tensor:
    """Image tokens (M, P, W) of images (M, 3, h, w) uint8 of one camera."""
    import torch

    from reinflow_vla.base import unit_images

    key = next(iter(policy.config.image_features))
    parts = []
    with torch.no_grad():
        for start in tracked(range(0, len(images), 128), "encoding images, batches of 128"):
            pixels, _ = policy.prepare_images({key: unit_images(images[start : start + 128])})
            parts.append(policy.model.vlm_with_expert.embed_image(pixels[0]))
    return torch.cat(parts)
