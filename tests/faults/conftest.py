"""One process that forks trainings, and runs that nobody disturbed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.trainer import FAST, Trainer


@pytest.fixture(scope="session")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Runs trainings in processes of their own."""
    server = Trainer(tmp_path_factory.mktemp("printed"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a run of FAST and further flags that ended as it should; each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*flags: str) -> Path:
        if flags not in made:
            directory = tmp_path_factory.mktemp("undisturbed") / "run"
            ended = trainer.run([*FAST, *flags, "--output-dir", str(directory)], directory)
            assert ended.code == 0, ended.err
            made[flags] = directory
        return made[flags]

    return run
