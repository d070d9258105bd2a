"""What a precompute tells of itself while it runs: the group's ``progress.json``, written every few seconds.

A thread writes, so that a store that does not answer never holds the driver up, and that the file's age is a sign of life
even where a unit takes minutes.
"""

import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from cache import (
    NAMED_FAILURES,
    FailedRow,
    Lease,
    MtpdError,
    Plan,
    RunProgress,
    State,
    Storage,
    write_progress,
)
from services.metrics import COMMITTED_ROWS, FAILED_ROWS, PLANNED_ROWS, RETRIED_UNITS, publish
from trainer import Failure

# object storage takes one PUT in each; a local file costs nothing
PERIOD_SECONDS = 10.0


class Journal:
    """The record of one run on one group, kept while the context is open; on leaving it says how the run ended.

    Args:
        lease: of the run: one that lost it does not write over what another run tells.
        actors: how many were asked for.
    """

    def __init__(self, storage: Storage, plan: Plan, lease: Lease, actors: int, period: float = PERIOD_SECONDS) -> None:
        self._storage, self._plan, self._lease, self._period = storage, plan, lease, period
        self._actors = actors
        self._offset = time.time() - time.monotonic()
        self._started, self._begun = time.time(), None
        self._rows, self._bytes, self._failed, self._retried = 0, 0, 0, 0
        self._failures: list[FailedRow] = []
        self._stop = threading.Event()

    def __enter__(self) -> "Journal":
        self._write("running")
        self._thread = threading.Thread(target=self._keep_writing, daemon=True, name="journal")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is None:
            self._write("done")
        elif isinstance(error, Exception):
            self._write("failed", str(error) or repr(error))
        else:
            self._write("interrupted")

    def update(self, begun: float | None, retried: int) -> None:
        """When the first unit was handed out (``time.monotonic``), and how many units went back to the queue."""
        self._begun = None if begun is None else begun + self._offset
        publish(RETRIED_UNITS, retried - self._retried, teacher=self._plan.info.teacher)
        self._retried = retried

    def count(self, rows: int, written_bytes: int, failures: Sequence[Failure]) -> None:
        """Take in what became of a unit."""
        self._rows += rows
        teacher = self._plan.info.teacher
        publish(FAILED_ROWS, len(failures), teacher=teacher)
        publish(PLANNED_ROWS, self._plan.total, teacher=teacher)
        publish(COMMITTED_ROWS, self._plan.total - self._plan.todo + self._rows, teacher=teacher)
        self._bytes += written_bytes
        self._failed += len(failures)
        room = NAMED_FAILURES - len(self._failures)
        self._failures += [FailedRow(f.image_id, f.view, f.file_name, f.reason) for f in failures[:room]]

    def _keep_writing(self) -> None:
        while not self._stop.wait(self._period):
            self._write("running")

    def _write(self, state: State, message: str = "") -> None:
        record = RunProgress(
            run=self._lease.run,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=state,
            message=message[:2000],
            started=self._started,
            begun=self._begun,
            written=time.time(),
            planned=self._plan.total,
            before=self._plan.total - self._plan.todo,
            rows=self._rows,
            written_bytes=self._bytes,
            failed=self._failed,
            failures=tuple(self._failures),
            actors=self._actors,
            retried=self._retried,
        )
        with suppress(MtpdError, OSError):  # it tells; it must not end a run, nor hide why one ended
            self._lease.check()
            write_progress(self._storage, self._plan.info.name, record)
