"""One training with a fault built in, and the evaluation of its last weights; a helper of benchmarks/nulls.py.

    python benchmarks/_null_training.py FAULT EVAL_EPISODES --preset flow_mlp ... --output-dir RUN

FAULT is a name of _null_faults.py or "". The loop is that of train_reinflow.py, whose verbs it calls.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _null_faults import EVERY, FAULTS, Fault, FewScenes  # noqa: E402, the checkout is not installed

from reinflow.checkpoint import CHECKPOINTS, LAST, PRETRAINED  # noqa: E402
from reinflow.evaluate import EvalResult, evaluate, evaluate_seeds, write_eval_info  # noqa: E402
from reinflow.flow import ChainSpec  # noqa: E402
from reinflow.flow_mlp import FlowMLP  # noqa: E402
from reinflow.rollout import noise_free_actor  # noqa: E402
from reinflow.run import Run  # noqa: E402
from reinflow_so101.worlds import make_world  # noqa: E402
from train_reinflow import TrainingConfig, open_run, parse_args, rollout, update  # noqa: E402

FIRST_SEED, ENVIRONMENTS = 10_000, 64


def train(config: TrainingConfig, fault: Fault) -> TrainingConfig:
    """The loop, with the fault."""
    config, run = open_run(config)
    with run:
        fault.enter(run)
        for iteration in run.iterations():
            fault.before_rollout(run)
            update(run, config, rollout(run, config))
            if fault.scenes and iteration % EVERY == 0:
                evaluate_on_training(run, config, fault.scenes)
            run.log()
            run.save_if_due()
        run.finish()
    return config


def evaluate_on_training(run: Run, config: TrainingConfig, scenes: int) -> None:
    """What the run would show of itself: success on the scenes that it trains on."""
    with FewScenes(make_world(config.world(), scenes), scenes) as env:
        result = evaluate(noise_free_actor(run.policy, config.chain()), env, range(scenes))
    run.metrics |= result.metrics()
    run.keep_if_best(result)


def judge(run_dir: Path, config: TrainingConfig, episodes: int, scenes: int) -> None:
    """The last weights, as they were exported, on reporting seeds, and with ``scenes`` on those trained on too."""
    policy = FlowMLP.from_pretrained(run_dir / CHECKPOINTS / LAST / PRETRAINED)
    act = noise_free_actor(policy, ChainSpec(policy.num_denoising_steps))
    make = partial(make_world, config.world())
    write(run_dir / "eval_info.json", evaluate_seeds(act, make, FIRST_SEED, episodes, ENVIRONMENTS))
    if scenes:
        trained = lambda num_envs: FewScenes(make(num_envs), scenes, keep_seeds=True)  # noqa: E731
        write(run_dir / "eval_trained.json", evaluate_seeds(act, trained, 0, episodes, ENVIRONMENTS))


def write(path: Path, result: EvalResult) -> None:
    """eval_info.json, and its line."""
    write_eval_info(path, result.to_lerobot_info("nulls"))
    print(f"{path.name}: {result.summary()}")


def main() -> None:
    """Train, judge."""
    name, episodes, config = sys.argv[1], int(sys.argv[2]), parse_args(sys.argv[3:])
    fault = FAULTS[name]()
    config = train(config, fault)
    judge(Path(config.output_dir), config, episodes, fault.scenes)


if __name__ == "__main__":
    main()
