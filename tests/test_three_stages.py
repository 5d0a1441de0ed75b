"""README's three commands, as a newcomer runs them: from nothing to a policy of three stages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"Three stages, three commands.*?```bash\n(.*?)```", text, re.DOTALL)
    return [line.split("#", maxsplit=1)[0].strip() for line in block.strip().splitlines()]


@pytest.mark.slow
def test_the_readmes_three_commands(tmp_path):
    """Each gains on the stage before: half an hour on two quiet cores."""
    assert len(commands()) == 3
    for command in commands():
        program, *flags = command.split()
        words = [sys.executable, str(ROOT / flags.pop(0))] if program == "python" else [str(BIN / program)]
        subprocess.run([*words, *flags], cwd=tmp_path, check=True)
    policies = json.loads((tmp_path / "runs/aw/stage.json").read_text())["record"]
    before, after = (
        json.loads((tmp_path / f"runs/rl/eval_{when}.json").read_text())["overall"]["pc_success"]
        for when in ("before", "after")
    )
    assert policies["after"]["success"] > policies["before"]["success"]
    assert after >= 80.0 and after > before
