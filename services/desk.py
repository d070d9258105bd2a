"""The desk of the teacher service: who asks for a row that is not committed has its unit computed, once, however many ask.

Nothing but words goes through here: a unit's rows are written by the replica that computes them, and read from the store by
whoever asked. The unit is the batch: all of its rows that are missing are computed together.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException

from cache import (
    Follower,
    GroupInfo,
    Images,
    Lease,
    LeaseHeldError,
    MtpdError,
    Plan,
    PrecomputeWatch,
    Unit,
    compact,
    make_plan,
    open_storage,
    prepare,
    write_head,
)
from services.outcome import UnitRecord
from trainer import Answer, Recipe, first_epoch, head_file, read_annotations

Key = tuple[int, int]
# a question is answered within this time, be it that its row is pending
_ANSWER_SECONDS = 20.0
_LOOK_SECONDS = 0.5
# the lease is kept so long after the last computation, for the next question
_LINGER_SECONDS = 5.0
_MAX_TRIES = 3
# the manifest's parts are folded when so many are new
_PARTS = 256


@dataclass
class Counts:
    """What a desk did since it was opened.

    Attributes:
        asked: questions for a row.
        hits: of them, those whose row was committed.
        units, computed: units and rows computed and committed.
        failed: rows that have no targets.
        retried: computations that were begun again.
    """

    asked: int = 0
    hits: int = 0
    units: int = 0
    computed: int = 0
    failed: int = 0
    retried: int = 0


@dataclass
class _Books:
    """What the desk may do while it holds the lease."""

    lease: Lease
    plan: Plan
    units: dict[Key, Unit] = field(default_factory=dict)


class GroupDesk:
    """Answers for one teacher's group. All methods run on one event loop; what blocks is done in one thread.

    Args:
        compute: has a replica of the teacher compute and commit a unit for a run.
    """

    def __init__(self, recipe: Recipe, info: GroupInfo, compute: Callable[[Unit, str], Awaitable[UnitRecord]]) -> None:
        self._recipe, self.info, self._compute = recipe, info, compute
        self._storage = open_storage(recipe.cache.uri)
        self._follower = Follower(self._storage, info)
        self._committed: set[Key] = set()  # by this desk, since the follower looked
        self._failed: dict[Key, str] = {}
        self._flights: dict[str, asyncio.Task[None]] = {}
        self._books: _Books | None = None
        self._opening: asyncio.Task[None] | None = None
        self._held: LeaseHeldError | None = None  # and until when nobody looks again whether it still is
        self._held_until = 0.0
        self._lock = asyncio.Lock()  # of the books
        self._looked = 0.0
        self._watch = PrecomputeWatch(self._storage, info.name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="desk")  # one: a follower is nobody else's meanwhile
        self._closing: asyncio.Task[None] | None = None
        self._images: Images | None = None
        self._seen: tuple[int, int] | None = None  # the annotation file, when they were read
        self._first: npt.NDArray[np.int64] | None = None
        self.counts = Counts()

    async def ask(self, image_id: int, view: int, *, look: bool = False) -> Answer:
        """Where a row stands; if it is missing, after it was computed, or after a while.

        Args:
            look: the one who asks was told that it is committed, and does not find it: it was taken out since.
        """
        self.counts.asked += 1
        key = image_id, view
        if look:
            await self._look()
        if self._is_committed(key):
            self.counts.hits += 1
            return Answer("committed")
        deadline = time.monotonic() + _ANSWER_SECONDS
        while True:
            if key in self._failed:
                return Answer("failed", self._failed[key])
            try:
                flight = await self._flight(key)
            except LeaseHeldError as error:
                answer = await self._of_another_run(key, error, deadline)
                if answer is not None:
                    return answer
                continue
            except MtpdError as error:
                return Answer("failed", str(error))
            if flight is not None:
                try:
                    await asyncio.wait_for(asyncio.shield(flight), max(0.0, deadline - time.monotonic()))
                except TimeoutError:
                    return Answer("pending", "it is being computed")
                except LeaseHeldError as error:  # another run took the lease over
                    return Answer("pending", str(error))
                except MtpdError as error:
                    return Answer("failed", str(error))
            if self._is_committed(key):
                return Answer("committed", computed=flight is not None)
            if flight is None:
                return Answer("refused", f"the data set has no image {image_id} with a view {view}")

    async def open(self) -> Answer:
        """Have the group exist."""
        if len(self._follower.index):
            return Answer("committed")
        try:
            async with self._lock:
                await self._open_books()
        except LeaseHeldError as error:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._look()
            return Answer("committed") if len(self._follower.index) else Answer("pending", str(error))
        except MtpdError as error:
            return Answer("failed", str(error))
        return Answer("committed")

    async def close(self) -> None:
        """Give the lease back; what is being computed is waited for."""
        await asyncio.gather(*self._flights.values(), return_exceptions=True)
        async with self._lock:
            if self._opening is not None:
                await asyncio.wait([self._opening])
            await self._close_books()

    def _is_committed(self, key: Key) -> bool:
        return key in self._committed or key in self._follower.index

    async def _flight(self, key: Key) -> asyncio.Task[None] | None:
        """The computation that will commit a row, begun if it is not under way; None if there is no such row to compute.

        For an image that is new in the annotation file it may be what has to end before there is another plan.

        Raises:
            LeaseHeldError: another run writes this group.
        """
        async with self._lock:
            if self._is_committed(key):
                return None
            books = await self._open_books()
            if self._is_committed(key):
                return None
            if key not in books.units:
                unit = books.plan.unit_of(*key)
                if unit is None and await self._in_thread(self._seen_before_change):
                    if self._flights:  # their rows have places that another plan might give to others
                        return asyncio.create_task(_ended(list(self._flights.values())))
                    await self._close_books()
                    books = await self._open_books()
                    unit = books.plan.unit_of(*key)
                if unit is None:
                    return None
                books.units |= {(row.image_id, row.view): unit for row in unit.rows}
            unit = books.units[key]
            if unit.name not in self._flights:
                self._flights[unit.name] = asyncio.create_task(self._fly(unit, books))
                # whoever asked may be gone when it fails
                self._flights[unit.name].add_done_callback(lambda flight: flight.cancelled() or flight.exception())
            return self._flights[unit.name]

    async def _fly(self, unit: Unit, books: _Books) -> None:
        """Compute and commit a unit."""
        try:
            record = await self._computed(unit, books)
            failures = {(f.image_id, f.view): f"{f.file_name}: {f.reason}" for f in record.failures}
            keys = {(row.image_id, row.view) for row in unit.rows}
            self._failed |= failures
            self._committed |= keys - failures.keys()
            self.counts.units += 1
            self.counts.computed += record.rows
            self.counts.failed += len(failures)
            if self.counts.units % _PARTS == 0:
                books.lease.check()
                await self._in_thread(compact, self._storage, self.info)
        except LeaseHeldError:
            async with self._lock:
                await self._close_books()
            raise
        finally:
            del self._flights[unit.name]
            self._close_later()

    async def _computed(self, unit: Unit, books: _Books) -> UnitRecord:
        reason = ""
        for attempt in range(_MAX_TRIES):
            self.counts.retried += attempt > 0
            try:
                return await self._compute(unit, books.lease.run)
            except (RayActorError, OutOfMemoryError, RayServeException):
                reason = "the replica that computed it died"
            except RayTaskError as error:
                if isinstance(error.cause, MtpdError):
                    raise error.cause from None
                reason = str(error.cause or error).strip().splitlines()[-1][:300]
        failed = f"{reason} ({_MAX_TRIES} tries)"
        self._failed |= {(row.image_id, row.view): f"{row.file_name}: {failed}" for row in unit.rows}
        raise MtpdError(f"unit {unit.name}: {failed}")

    async def _of_another_run(self, key: Key, error: LeaseHeldError, deadline: float) -> Answer | None:
        """While another run writes the group: what it says of a row, None if it may have ended."""
        while True:
            verdict = await self._in_thread(self._watch.verdict, *key)
            await self._look()
            if self._is_committed(key):
                return Answer("committed")
            if verdict is not None and "could not compute it" in verdict:
                return Answer("failed", verdict)
            if time.monotonic() > deadline:
                return Answer("pending", str(error))
            await asyncio.sleep(_LOOK_SECONDS)
            async with self._lock:
                try:
                    await self._open_books()
                except LeaseHeldError:
                    continue
                return None

    async def _look(self) -> None:
        """Take in what other runs committed, and took out."""
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            known = set(self._committed)
            await self._in_thread(self._follower.refresh)
            self._committed -= known  # the index has them, unless they were taken out

    async def _open_books(self) -> _Books:
        """Take the lease and plan, if that is not done; they are given back when nothing is done with them. Under the lock.

        Raises:
            LeaseHeldError: another run writes this group.
        """
        self._close_later()
        while self._books is None:
            if self._held is not None and time.monotonic() < self._held_until:
                raise self._held
            # who asks may go meanwhile, and with them what they wait in; the lease that is being taken must not be forgotten
            if self._opening is None:
                self._opening = asyncio.create_task(self._take_books())
                self._opening.add_done_callback(lambda taken: taken.cancelled() or taken.exception())
            await asyncio.shield(self._opening)
        return self._books

    async def _take_books(self) -> None:
        begun = time.monotonic()
        try:
            self._books, self._held = await self._in_thread(self._take_over), None
        except LeaseHeldError as error:
            # a lease of another machine is watched for seconds, which all who ask meanwhile would have to do in turn
            self._held, took = error, time.monotonic() - begun
            self._held_until = time.monotonic() + max(took, _LOOK_SECONDS)
            raise
        finally:
            self._opening = None
            self._close_later()

    def _take_over(self) -> _Books:
        lease = Lease(self._storage, self.info.name)
        lease.__enter__()
        try:
            compact(self._storage, self.info)
            if self._images is None or self._seen_before_change():
                file = self._recipe.dataset.train.ann_file
                self._seen = _stamp(file)
                self._images = read_annotations(file, "dataset.train.ann_file").images
                self._first = first_epoch(self._recipe)
            self._follower.refresh()
            plan = make_plan(
                self._images,
                self._recipe.policy,
                self.info,
                committed=self._follower.index,
                unit_rows=self._recipe.cache.unit_rows,
                first=self._first,
            )
            prepare(self._storage, plan)
            if self.info.head is not None:
                teacher = self.info.teacher
                write_head(self._storage, self.info, head_file(self._recipe.teachers[teacher], teacher))
        except BaseException:
            lease.__exit__(None, None, None)
            raise
        self._committed.clear()
        return _Books(lease, plan)

    def _seen_before_change(self) -> bool:
        """Whether the annotation file was written anew since it was read: it may have new images."""
        return _stamp(self._recipe.dataset.train.ann_file) != self._seen

    def _close_later(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
        self._closing = asyncio.create_task(self._close_when_idle())

    async def _close_when_idle(self) -> None:
        await asyncio.sleep(_LINGER_SECONDS)
        async with self._lock:
            self._closing = None
            if not self._flights:
                await self._close_books()

    async def _close_books(self) -> None:
        books, self._books = self._books, None
        if books is not None:
            known = set(self._committed)
            await self._in_thread(self._give_back, books)
            self._committed -= known

    def _give_back(self, books: _Books) -> None:
        try:
            books.lease.check()
            compact(self._storage, self.info)
        except LeaseHeldError:
            pass  # it is another's already
        finally:
            books.lease.__exit__(None, None, None)
        self._follower.refresh()

    async def _in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _stamp(file: str) -> tuple[int, int] | None:
    """What changes when a file is written; None while it is not there."""
    try:
        status = Path(file).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


async def _ended(flights: Sequence[asyncio.Task[None]]) -> None:
    """Until they ended, however."""
    await asyncio.wait(flights)
