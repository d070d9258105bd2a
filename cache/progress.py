"""How far the last run of a precompute came: one small file in the group, which tells and guards nothing.

A row exists if the manifest has it, whatever is said here; a file that is lost or damaged is written anew.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from cache.layout import PROGRESS
from cache.storage import Storage

State = Literal["running", "done", "interrupted", "failed"]
# of what failed so many rows are named, the rest is counted: the file stays a few kilobytes
NAMED_FAILURES = 50


@dataclass(frozen=True)
class FailedRow:
    """A row without targets, and why."""

    image_id: int
    view: int
    file_name: str
    reason: str


@dataclass(frozen=True)
class RunProgress:
    """What a run says of itself every few seconds. Times are seconds since the epoch, by its clock.

    Attributes:
        run, host, pid: of the run, as in the lease.
        state: ``running`` as long as it is not over; so it stays where a run was killed.
        message: of the error that it ended with.
        started: when it began, loading the teacher included.
        begun: when the first unit was handed out; None before.
        written: when this was written.
        planned: rows that the group is to have in the end.
        before: rows that were committed when the run began.
        rows, written_bytes: committed by it.
        failed: rows without targets.
        failures: the first of them.
        actors: how many were asked for.
        retried: units that went back to the queue.
    """

    run: str
    host: str
    pid: int
    state: State
    message: str
    started: float
    begun: float | None
    written: float
    planned: int
    before: int
    rows: int
    written_bytes: int
    failed: int
    failures: tuple[FailedRow, ...]
    actors: int
    retried: int

    @property
    def rate(self) -> float | None:
        """Rows a second since the first unit was handed out; None while nothing is known of it."""
        seconds = 0.0 if self.begun is None else self.written - self.begun
        done = self.rows + self.failed
        return done / seconds if done and seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Until all that is planned is done, at that rate; None while there is none."""
        return None if self.rate is None else max(0, self.planned - self.before - self.rows - self.failed) / self.rate


def write_progress(storage: Storage, group: str, progress: RunProgress) -> None:
    """Put the record in place of the one that is there."""
    storage.write(f"{group}/{PROGRESS}", [json.dumps(asdict(progress), indent=1).encode()], durable=False)


def read_progress(storage: Storage, group: str) -> RunProgress | None:
    """The record of the group's last run; None if there is none, or if it is no such record."""
    try:
        content: Any = json.loads(storage.read(f"{group}/{PROGRESS}"))
        failures = tuple(
            FailedRow(int(f["image_id"]), int(f["view"]), str(f["file_name"]), str(f["reason"]))
            for f in content["failures"][:NAMED_FAILURES]
        )
        known = {field.name: field.type for field in fields(RunProgress) if field.name != "failures"}
        values = {name: _typed(content[name], kind) for name, kind in known.items()}
        return RunProgress(**values, failures=failures) if values["state"] in get_args(State) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _typed(value: Any, kind: Any) -> Any:
    """A value as its field's type says.

    Raises:
        ValueError, TypeError: it is no such value.
    """
    if kind in (str, State):
        return str(value)
    if value is None:
        if kind == float | None:
            return None
        raise ValueError("no value")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no number")
    return int(number) if kind is int else number
