"""What Weights & Biases really wrote to the disk, read back from its own log of records."""

import json
import time
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record
from wandb.sdk.internal.datastore import DataStore


def sessions(run_dir: Path) -> list[Path]:
    """The logs of a run directory, oldest first; a resumed run has several."""
    return sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)


def records(log: Path, wait_s: float = 20.0) -> list[Record]:
    """Everything in the log of a run that was finished; its writer, another process, may be a moment late."""
    end = time.monotonic() + wait_s
    while not (found := _whole_records(log)) or found[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, f"{log} has no end"
        time.sleep(0.05)
    return found


def _whole_records(log: Path) -> list[Record]:
    store, found = DataStore(), []
    try:
        store.open_for_scan(str(log))
        while (data := store.scan_data()) is not None:
            found.append(Record())
            found[-1].ParseFromString(bytes(data))
    except AssertionError:  # a record of which a part is there
        return []
    return found


def of_kind(log: Path, kind: str) -> list:
    """The contents of the records of one kind: run, metric, history, summary, alert, artifact."""
    return [getattr(record, kind) for record in records(log) if record.WhichOneof("record_type") == kind]


def items(entries) -> dict:
    """Name -> value of a history's items or a summary's updates."""
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}


def history(log: Path) -> list[dict]:
    """The rows, without Weights & Biases' own columns."""
    rows = (items(entry.item) for entry in of_kind(log, "history"))
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]


def summary(log: Path) -> dict:
    """The last summary, as far as it was written."""
    found = {}
    for entry in of_kind(log, "summary"):
        found |= items(entry.update)
    return found
