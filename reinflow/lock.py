"""One process at a time in a run's directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from reinflow import ConfigError

LOCK_FILE = "run.lock"


class RunLock:
    """Held from opening a run to its end; the system frees it when the process dies, however that happens."""

    def __init__(self, run_dir: Path) -> None:
        """Take it.

        Raises:
            ConfigError: another process has it; the message says which.
        """
        self._file = (run_dir / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError(
                f"output_dir={run_dir} is in use by {owner}: wait for it, stop it, or choose another directory"
            ) from error
        except OSError as error:  # a network file system without locks must not keep everybody out
            print(f"{run_dir} lies where files cannot be locked ({error}): let no second process use this run")
        self._file.truncate(0)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": datetime.now().isoformat(timespec="seconds")}
        self._file.write(json.dumps(mine) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Give it back; nothing happens the second time."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()
