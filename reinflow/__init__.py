"""ReinFlow's rooms: flow-matching policies, PPO over their denoising chain, runs, checkpoints, tracking and evaluation.

Nothing in this package knows a robot, a simulator or a vision-language model: it imports neither mujoco nor
lerobot. Someone with another robot takes it whole and writes one environment and one policy file (examples/).
"""

import errno
import gc
import os
import sys
from collections.abc import Callable

# Torch's worker threads (libgomp) spin for milliseconds after every operation. On a machine with anything else to do,
# that takes the core from whom they wait for: the tiny model then runs 2 to 9 times slower with 2 threads than with 1.
# Some 10 microseconds keep all of the gain on a quiet machine. libgomp reads this once, when torch is loaded: it has no
# effect in a program that imports torch before this package.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")


class UserError(Exception):
    """Something the user can mend; the message names it and the remedy. Front doors print it without a traceback."""


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names the field and the remedy."""


# What a disk, not a mistake of ours, does to a command: full, over quota, read-only, forbidden, broken, vanished.
DISK_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT, errno.ENOTDIR,
    errno.EEXIST, errno.EISDIR,
}  # fmt: skip


def run_command(name: str, command: Callable[[], object]) -> None:
    """Run a front door; a UserError or a disk ends it with a message and exit code 1 instead of a traceback."""
    gc.set_threshold(100_000)  # imports make a million objects that stay: searching them again and again costs a second
    try:
        command()
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        place = error.filename or "the output directory"
        sys.exit(
            f"{name}: {error.strerror}: {place}. Make room, or name another output directory; a training goes on with "
            "--resume"
        )
