"""Apple GPUs have no float64: nothing computes in it but what is known to come to the host first."""

import sys
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reinflow_so101.opening import open_run
from train_reinflow import TrainingConfig, evaluate, parse_args, rollout, update

HOST = {  # call .cpu() before (tests/reinflow/test_ppo.py, the policy contract), start on the host, or ask the device
    "explained_variance", "postprocess", "dct_basis", "create_sinusoidal_pos_embedding", "save_checkpoint",
    "load_training_state",
}  # fmt: skip


class RefuseFloat64(TorchDispatchMode):
    """Raises where an operation gives float64 outside of the known places."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:
            return result  # numpy's, on the host
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            frame, seen = sys._getframe(1), []
            while frame:
                seen.append(frame.f_code.co_qualname)
                frame = frame.f_back
            known = any(name.split(".")[-1] in HOST or name == "ReturnNormalizer.update" for name in seen)
            assert known, f"{func} gives float64 in {' < '.join(seen[:6])}"
        return result


@pytest.mark.parametrize("preset", ["tiny", "tiny-pi0", "flow_mlp"])
def test_a_training_its_evaluation_and_its_resume_compute_without_float64(tmp_path, preset):
    config: TrainingConfig = replace(
        parse_args(["--preset", preset, "--smoke"]), output_dir=str(tmp_path / "run"), wandb_enabled=False,
        device="cpu", num_threads=1,
    )  # fmt: skip
    with RefuseFloat64():
        for resume in (False, True):
            config, run = open_run(replace(config, resume=resume, checkpoint_path=""))
            with run:
                for _ in range(2):
                    run.iteration += 1
                    update(run, config, rollout(run, config))
                evaluate(run, config)
                run.save()
