"""What a launcher (torchrun, accelerate launch) tells a process about itself and its siblings; free of torch."""

from __future__ import annotations

import os


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_ranks() -> int:
    """Processes of the launch on this machine; all of them where the launcher says no number."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
