"""LeRobot's own commands as processes of their own, with this project's plugins where LeRobot finds them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGINS = (ROOT / "lerobot_env_so101_reinflow", ROOT / "tests" / "plugins" / "lerobot_robot_so101_simulated")


def plugin_folder(folder: Path) -> Path:
    """A folder for PYTHONPATH with the plugins as installed distributions: a package and its .dist-info each."""
    for source in PLUGINS:
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.toml"))
        info = folder / f"{source.name}-0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {source.name}\nVersion: 0\n")
    return folder


def lerobot(command: str, plugins: Path, *flags: str, cwd: Path | None = None, timeout: int = 600) -> str:
    """Run lerobot-<command> to its end, offline; its output. Raises AssertionError with the output's end."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(plugins / "hf"),
        "PYTHONPATH": os.pathsep.join((str(plugins), str(ROOT))), "SVT_LOG": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", f"lerobot.scripts.lerobot_{command}", *flags],
        env=environment, cwd=cwd or plugins, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"lerobot-{command} {' '.join(flags)}\n{output[-4000:]}"
    return output
