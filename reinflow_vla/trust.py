"""What a stranger's policy directory may ask for, checked before LeRobot or transformers read it (notes/security.md).

LeRobot imports and calls whatever class a processor file names, and some of its steps load tokenizers with remote code.
So the steps are named here; everything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reinflow import UserError

STEPS = {  # of SmolVLA, Pi0 and Pi0.5; LeRobot's other chunk policies (ACT, diffusion, VQ-BeT) need none beside these
    "rename_observations_processor", "to_batch_processor", "smolvla_new_line_processor", "pi0_new_line_processor",
    "pi05_prepare_state_tokenizer_processor_step", "tokenizer_processor", "device_processor", "normalizer_processor",
    "unnormalizer_processor", "relative_actions_processor", "absolute_actions_processor",
}  # fmt: skip
STEP_KEYS = {"registry_name", "config", "state_file", "enabled"}
CODE = {".py", ".pyc", ".pyd", ".so"}
NOT_CONFIGURATION = {"tokenizer.json", "vocab.json", "added_tokens.json"}  # large, and no place for an auto_map


class UntrustedPolicyError(UserError, ValueError):
    """A file asks for code, or for files elsewhere; the message names it and the step."""


def check_steps(file: Path, content: dict[str, Any]) -> None:
    """Refuse a processor file whose steps are not the known ones with data in them.

    Args:
        file: for messages.
        content: of the file.

    Raises:
        UntrustedPolicyError: naming file and step.
    """
    steps = content.get("steps")
    if not isinstance(steps, list):
        raise UntrustedPolicyError(f"{file} has no list of steps: restore it, or export the policy again")
    for number, step in enumerate(steps):
        where = f"{file}, step {number}"
        if not isinstance(step, dict) or not isinstance(step.get("config", {}), dict):
            raise UntrustedPolicyError(f"{where} is no processor step: restore it, or export the policy again")
        _check_step(where, step)


def _check_step(where: str, step: dict[str, Any]) -> None:
    if "class" in step:
        raise UntrustedPolicyError(
            f"{where} names the class {step['class']!r}, which LeRobot would import and call: refused. A policy that "
            "LeRobot 0.6 exports has registered steps only; do not open this directory with LeRobot"
        )
    name = step.get("registry_name")
    if not isinstance(name, str) or name not in STEPS:
        raise UntrustedPolicyError(
            f"{where} is {name!r}, which no SmolVLA, Pi0, Pi0.5 or other chunk policy needs: refused. Known are "
            f"{', '.join(sorted(STEPS))}"
        )
    unknown = step.keys() - STEP_KEYS
    if unknown:
        raise UntrustedPolicyError(f"{where} has {sorted(unknown)} beside {sorted(STEP_KEYS)}: refused")
    state = step.get("state_file")
    if state is not None and (not isinstance(state, str) or Path(state).name != state):
        raise UntrustedPolicyError(f"{where} reads its state from {state!r}: only a file beside it is read")


def check_data_only(folder: Path) -> None:
    """Refuse a folder (a policy, tokenizer or model configuration) that brings code, or names some.

    Raises:
        UntrustedPolicyError: it holds Python or a library, or a JSON file with an ``auto_map``.
    """
    for path in sorted(folder.rglob("*")):
        if path.suffix in CODE:
            raise UntrustedPolicyError(f"{path} is code: refused, a policy is data alone")
        if path.suffix == ".json" and path.name not in NOT_CONFIGURATION and path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue  # no JSON names no code; whoever needs the file says what is wrong with it
            if _has_key(content, "auto_map"):
                raise UntrustedPolicyError(f"{path} has an auto_map, which names code to load: refused")


def _has_key(content: Any, name: str) -> bool:
    """Whether some object inside has the key."""
    waiting = [content]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if name in node:
                return True
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    return False


@contextmanager
def no_remote_code() -> Iterator[None]:
    """Within it transformers refuses remote code at once, where it would otherwise ask the user on the terminal."""
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds
