"""Waiting for rows that a precompute is about to commit, as long as there is one that may."""

import time
from collections.abc import Callable
from typing import Any

from cache.errors import MissingRowsError, StaleCacheError
from cache.layout import fingerprint, group_name
from cache.lease import LEASE_SECONDS, lease_holder
from cache.progress import RunProgress, read_progress
from cache.reader import TeacherCache
from cache.storage import Storage, open_storage

# how long one waits for a precompute that is not there: for it to begin, or to be started again after it was killed
PATIENCE_SECONDS = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
_NOTICE_SECONDS = 30.0
_SILENT = 3 * LEASE_SECONDS
Notice = Callable[[str], None]


class PrecomputeWatch:
    """Tells whether rows of a group may still come.

    They may while a run holds the group's lease and renews it. No clock is compared with another machine's.

    Args:
        group: name of the teacher's group, which need not exist.
        patience: seconds for which nobody need hold the lease.
    """

    def __init__(self, storage: Storage, group: str, patience: float = PATIENCE_SECONDS) -> None:
        self._storage, self._group, self._patience = storage, group, patience
        self._seen: set[str] = set()  # runs that held the lease
        self._renewed: tuple[str, float] | None = None
        self._renewed_at = 0.0
        self.begin()

    def begin(self) -> None:
        """Somebody begins to wait."""
        self._alone_since: float | None = None

    def verdict(self, image_id: int | None = None, view: int | None = None) -> str | None:
        """Why a row will not come; None if it may. Without a row: why none will.

        What was committed before a verdict is there when it is given: look for the row after it.
        """
        progress, holder = read_progress(self._storage, self._group), lease_holder(self._storage, self._group)
        reason = _failure(progress, image_id, view)
        if holder is not None and not holder.gone and self._is_renewed(holder.run, holder.renewed):
            self._seen.add(holder.run)
            self._alone_since = None
            current = progress is not None and progress.run == holder.run
            return f"its precompute could not compute it: {reason}" if reason and current else None
        if self._alone_since is None:
            self._alone_since = time.monotonic()
        if progress is not None and progress.state != "running" and (reason or progress.run in self._seen):
            return f"its precompute {_ended(progress, reason)}"
        if time.monotonic() - self._alone_since < self._patience:
            return None
        if progress is not None and progress.state == "running":
            return f"its precompute (process {progress.pid} on {progress.host}) was killed, and none was started again"
        last = "" if progress is None else f"; the last one {_ended(progress, reason)}"
        return f"no precompute of it is running{last}"

    def _is_renewed(self, run: str, renewed: float) -> bool:
        now = time.monotonic()
        if self._renewed != (run, renewed):
            self._renewed, self._renewed_at = (run, renewed), now
        return now - self._renewed_at < _SILENT


class RowWaiter:
    """Waits for rows of a cache. As the cache, not to be shared between threads.

    Args:
        notice: called with a line now and then while it waits.
    """

    def __init__(self, cache: TeacherCache, notice: Notice, patience: float = PATIENCE_SECONDS) -> None:
        self._cache, self._notice = cache, notice
        self._watch = PrecomputeWatch(cache.storage, cache.info.name, patience)

    def wait(self, image_id: int, view: int) -> None:
        """Until the row is committed; afterwards the cache has it.

        Raises:
            MissingRowsError: it will not come: its precompute failed on it, ended, or is not running.
            CorruptShardError, StorageError: see `TeacherCache.refresh`.
        """
        self._watch.begin()
        pause, noticed = _FIRST_PAUSE, time.monotonic()
        while True:
            verdict = self._watch.verdict(image_id, view)
            self._cache.refresh()
            if (image_id, view) in self._cache:
                return
            what = f"the row of image {image_id}, view {view}"
            if verdict is not None:
                raise _missing(self._cache.storage.where(), self._cache.info.teacher, what, verdict)
            if time.monotonic() - noticed > _NOTICE_SECONDS:
                noticed = time.monotonic()
                self._notice(
                    f"waiting for {what} of teacher {self._cache.info.teacher}; {len(self._cache):,} are there"
                )
            time.sleep(pause)
            pause = min(_LONGEST_PAUSE, 1.5 * pause)


def await_first_row(
    uri: str, teacher: str, record: dict[str, Any], notice: Notice, patience: float = PATIENCE_SECONDS
) -> None:
    """Until a teacher's group has a row.

    Args:
        record: the fingerprint record of the targets that are wanted.

    Raises:
        MissingRowsError: no precompute of it is running, or it ended without a row.
        CorruptShardError, StorageError: see `TeacherCache.open`.
    """
    storage, group = open_storage(uri), group_name(teacher, fingerprint(record))
    watch, noticed = PrecomputeWatch(storage, group, patience), time.monotonic()
    while True:
        verdict = watch.verdict()
        try:
            if len(TeacherCache.open(uri, teacher, fingerprint=record)):
                return
        except (MissingRowsError, StaleCacheError) as error:
            if verdict is not None and isinstance(error, StaleCacheError):
                raise  # what differs says more
        if verdict is not None:
            raise _missing(storage.where(), teacher, "any row", verdict)
        if time.monotonic() - noticed > _NOTICE_SECONDS:
            noticed = time.monotonic()
            notice(f"waiting for the first rows of teacher {teacher}")
        time.sleep(_LONGEST_PAUSE / 4)


def _missing(where: str, teacher: str, what: str, verdict: str) -> MissingRowsError:
    return MissingRowsError(
        f"{where}: waited for {what} of teacher {teacher!r}, which will not come: {verdict}. Run `mtpd precompute RECIPE "
        f"--teacher {teacher}`, then the same command again."
    )


def _failure(progress: RunProgress | None, image_id: int | None, view: int | None) -> str:
    """Why a run gave no targets for a row; empty if it says nothing of it."""
    failures = () if progress is None else progress.failures
    found = (f for f in failures if (f.image_id, f.view) == (image_id, view))
    return next((f"{f.file_name}: {f.reason}" for f in found), "")


def _ended(progress: RunProgress, reason: str) -> str:
    if reason:
        return f"could not compute it: {reason}"
    if progress.state == "failed":
        return f"failed: {progress.message}"
    return "was interrupted" if progress.state == "interrupted" else "ended without it"
