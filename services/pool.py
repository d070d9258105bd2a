"""A pool of Ray actors that pull units: elastic, and what a dead actor held goes back to the queue.

Actors report by callbacks, so that an outcome costs the same however many actors there are: nothing here looks through all
of them but when they come and go.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from cache import MtpdError, Unit

# one unit decodes while the one before is on the device and the one before that is written
PIPELINE_DEPTH = 3
_MAX_TRIES = 3
# after so long without any actor the user is told what stands in the way, if something is known to
_OBSTACLE_NOTICE_SECONDS = 5.0
_PLACEMENT_NOTICE_SECONDS = 30.0
# how soon a run looks whether it was told to stop
_PATIENCE_SECONDS = 0.5
# how often it asks which nodes will go; the shortest notice of a spot node is 30 s
_DRAIN_SECONDS = 2.0


@dataclass(frozen=True)
class SetAside:
    """A unit that failed on every try."""

    unit: Unit
    reason: str


@dataclass(eq=False)
class _Worker:
    """An actor and what it holds.

    Attributes:
        since: when it came up, by ``time.monotonic``; None before.
        node: the node that it is on, once it is up.
        held: its units, by their names.
        alone: it holds a suspect, and gets nothing beside it.
    """

    actor: Any
    since: float | None = None
    node: str | None = None
    held: dict[str, Unit] = field(default_factory=dict)
    alone: bool = False


class Pool:
    """Runs units on actors.

    All actors are requested at once. Those that the cluster cannot place yet are the demand that makes an autoscaler add
    nodes; they begin to pull units when they come up. An actor for which no unit is left is stopped at once, so that what
    it holds of the cluster serves others. The actors of a node that will go soon finish what they hold and get nothing more;
    others are asked for in their place at once.

    Args:
        create: makes an actor with the methods ``load()``, which returns the id of its node, and ``run(unit)``.
        actors: how many at most.
        at_least: how many must be up before the first unit is handed out.
        notice: called with a line for the user.
        began: called when the first unit is handed out.
        draining: the ids of nodes that will go soon.
        obstacle: why no actor can ever be placed as the cluster is now; empty if one can.
        stop: when it is set, the run ends with KeyboardInterrupt.

    Attributes:
        begun: when the first unit was handed out, by ``time.monotonic``; None before.
        retried: units that went back to the queue.
    """

    def __init__(
        self,
        create: Callable[[], Any],
        actors: int,
        at_least: int,
        notice: Callable[[str], None],
        *,
        began: Callable[[], None] = lambda: None,
        draining: Callable[[], Collection[str]] = tuple,
        obstacle: Callable[[], str] = str,
        stop: threading.Event | None = None,
    ) -> None:
        self._create, self._actors, self._at_least, self._notice = create, actors, at_least, notice
        self._began, self._draining, self._obstacle = began, draining, obstacle
        self._stop = stop or threading.Event()
        self._events: SimpleQueue[tuple[_Worker, Unit | None, Any]] = SimpleQueue()
        self._workers: set[_Worker] = set()
        # those on nodes that will go: they finish what they hold
        self._leaving: set[_Worker] = set()
        self._going: Collection[str] = ()
        self._asked = 0.0
        # the workers that are up and may be given a unit, by how many they hold; dicts keep the order
        self._free: tuple[dict[_Worker, None], ...] = tuple({} for _ in range(PIPELINE_DEPTH))
        self._queue = deque[Unit]()
        # units that were held by an actor that died: each is tried alone, so that if another dies it is known who did it
        self._suspects = deque[Unit]()
        self._up = 0
        self._holding = 0
        self._up_seconds = 0.0
        self._tries: Counter[str] = Counter()
        self._fruitless_deaths = 0
        self._finished = 0
        self._set_aside = 0
        self.begun: float | None = None
        self.retried = 0

    def run(self, units: Iterable[Unit]) -> Iterator[Any]:
        """Hand out the units and yield each one's outcome as it comes: what ``run`` returned, or `SetAside`.

        Raises:
            MtpdError: an actor met an error of the user's; the rest is not tried.
            KeyboardInterrupt: the run was told to stop.
        """
        # millions of units are handed out from their generator, never held at once
        source = iter(units)
        notices = self._notices()
        while self._refill(source) or self._holding or self._leaving:
            if self._stop.is_set():
                raise KeyboardInterrupt
            self._look_at_nodes()
            self._hand_out()
            try:
                outcome = self._take(*self._events.get(timeout=_PATIENCE_SECONDS))
            except Empty:
                outcome = None
            if outcome is not None:
                yield outcome
            if self.begun is None:
                next(notices, None)

    def close(self) -> None:
        """Stop every actor, placed or not."""
        for worker in [*self._workers, *self._leaving]:
            self._give_back(worker)

    @property
    def up_seconds(self) -> float:
        """Seconds that actors were up, since the first unit was handed out, added over all of them."""
        now = time.monotonic()
        return self._up_seconds + sum(self._seconds(worker, now) for worker in (*self._workers, *self._leaving))

    def _seconds(self, worker: _Worker, now: float) -> float:
        return 0.0 if worker.since is None or self.begun is None else now - max(worker.since, self.begun)

    def _notices(self) -> Iterator[None]:
        """Says what stands in the way while no actor is up; advanced again and again until one is."""
        started = time.monotonic()
        while time.monotonic() - started < _OBSTACLE_NOTICE_SECONDS:
            yield
        if obstacle := self._obstacle():
            self._notice(obstacle)
            return
        while time.monotonic() - started < _PLACEMENT_NOTICE_SECONDS:
            yield
        self._notice(
            "no teacher actor is up yet: the cluster has no room for what `actors` asks for (gpus, cpus), other work holds "
            "it, or the teacher is still loading; waiting"
        )

    def _look_at_nodes(self) -> None:
        """Give no more units to the actors of nodes that will go soon, and ask for others in their place."""
        if time.monotonic() - self._asked < _DRAIN_SECONDS:
            return
        self._going, self._asked = self._draining(), time.monotonic()
        if not self._going:
            return
        leaving = [worker for worker in self._workers if worker.node in self._going]
        for worker in leaving:
            self._retire(worker)
        if leaving:
            units = sum(len(worker.held) for worker in leaving)
            self._notice(
                f"nodes will go soon: {len(leaving)} teacher actors there finish the {units} units that they hold, others "
                "are asked for in their place"
            )

    def _retire(self, worker: _Worker) -> None:
        self._forget(worker)
        self._leaving.add(worker)
        self._dismiss(worker)

    def _dismiss(self, worker: _Worker) -> None:
        """Stop a worker that is leaving, if it is done."""
        if not worker.held:
            self._give_back(worker)

    def _start(self) -> None:
        worker = _Worker(self._create())
        self._workers.add(worker)
        self._listen(worker, None, worker.actor.load.remote())

    def _listen(self, worker: _Worker, unit: Unit | None, reference: Any) -> None:
        # the future keeps the reference; it lives until it is answered
        reference.future().add_done_callback(lambda future: self._events.put((worker, unit, future)))

    def _refill(self, source: Iterator[Unit]) -> bool:
        """Keep as many units queued as all workers could take at once. Returns whether there are any.

        Where fewer are left than workers could take, workers that will get none are stopped.
        """
        room = PIPELINE_DEPTH * self._actors - len(self._queue)
        if room > 0:
            self._queue.extend(islice(source, room))
        queued = len(self._queue) + len(self._suspects)
        wanted = min(self._actors, self._holding + queued)
        if wanted != len(self._workers):
            self._resize(wanted)
        return queued > 0

    def _resize(self, wanted: int) -> None:
        """Have so many workers; those that hold units stay, and of the others those that are up are kept first."""
        for _ in range(len(self._workers), wanted):
            self._start()
        if len(self._workers) == wanted:
            return
        idle = sorted((w for w in self._workers if not w.held), key=lambda w: w.since is not None)
        for worker in idle[: len(self._workers) - wanted]:
            self._give_back(worker)

    def _give_back(self, worker: _Worker) -> None:
        self._forget(worker)
        self._up_seconds += self._seconds(worker, time.monotonic())
        ray.kill(worker.actor)

    def _forget(self, worker: _Worker) -> None:
        if worker in self._leaving:
            self._leaving.remove(worker)
            return
        self._workers.remove(worker)
        self._leave(worker)
        self._holding -= bool(worker.held)
        self._up -= worker.since is not None

    def _leave(self, worker: _Worker) -> None:
        """Take a worker out of those that may be given a unit."""
        if len(worker.held) < PIPELINE_DEPTH:
            self._free[len(worker.held)].pop(worker, None)

    def _enter(self, worker: _Worker) -> None:
        if not worker.alone and len(worker.held) < PIPELINE_DEPTH:
            self._free[len(worker.held)][worker] = None

    def _hand_out(self) -> None:
        if self.begun is None:
            if self._up < self._at_least:
                return
            self.begun = time.monotonic()
            self._began()
        idle = self._free[0]
        while self._suspects and idle:
            worker = next(iter(idle))
            self._give(worker, self._suspects.popleft(), alone=True)
        # one unit to each before a second to any: the last units of a run are spread over all actors
        for free in self._free:
            while self._queue and free:
                self._give(next(iter(free)), self._queue.popleft())

    def _give(self, worker: _Worker, unit: Unit, *, alone: bool = False) -> None:
        self._leave(worker)
        self._holding += not worker.held
        worker.held[unit.name] = unit
        worker.alone = alone
        self._enter(worker)
        self._listen(worker, unit, worker.actor.run.remote(unit))

    def _take(self, worker: _Worker, unit: Unit | None, future: Any) -> Any:
        """Take in what became of a unit, or of a worker's loading (no unit). Returns the outcome, if it is one."""
        if worker not in self._workers and worker not in self._leaving:
            return None  # of an actor that died or was given back before
        error = future.exception()
        if isinstance(error, RayActorError | OutOfMemoryError):  # the latter: Ray killed it before the kernel would
            return self._replace(worker, error)
        if isinstance(error, RayTaskError) and isinstance(error.cause, MtpdError):
            raise error.cause from None
        if error is not None and (unit is None or not isinstance(error, RayTaskError)):
            raise error
        if unit is None:
            self._welcome(worker, future.result())
            return None
        self._release(worker, unit)
        if error is not None:
            return self._try_again(unit, self._queue, _last_line(error))
        self._fruitless_deaths = 0
        self._finished += 1
        return future.result()

    def _welcome(self, worker: _Worker, node: str | None) -> None:
        worker.since, worker.node = time.monotonic(), node
        self._up += 1
        self._enter(worker)
        if node in self._going:
            self._retire(worker)

    def _release(self, worker: _Worker, unit: Unit) -> None:
        """A worker is done with a unit."""
        if worker in self._leaving:
            del worker.held[unit.name]
            self._dismiss(worker)
            return
        self._leave(worker)
        del worker.held[unit.name]
        self._holding -= not worker.held
        worker.alone = False
        self._enter(worker)

    def _replace(self, worker: _Worker, error: RayActorError | OutOfMemoryError) -> SetAside | None:
        """An actor died: what it held goes back to the queue, and another one takes its place (`_refill`)."""
        held = list(worker.held.values())
        # with its node: neither its fault nor that of what it held
        taken = worker in self._leaving or getattr(error, "preempted", False)
        self._give_back(worker)  # one that is only out of reach must not work on, nor keep its GPU
        if taken:
            self._notice(f"a teacher actor went with its node; {len(held)} units go back to the queue")
            self.retried += len(held)
            self._queue.extendleft(reversed(held))
            return None
        self._fruitless_deaths += 1
        if self._fruitless_deaths > (_MAX_TRIES + 1) * self._actors:
            raise MtpdError(
                f"teacher actors keep dying before they finish a unit; the last time: {_last_line(error)}. Often this is "
                "memory: lower teachers.NAME.batch_size or actors.max, and run `mtpd precompute` again; what was "
                "committed stays."
            ) from error
        self._notice(f"a teacher actor died; {len(held)} units go back to the queue")
        if len(held) == 1:
            return self._try_again(held[0], self._suspects, "the actor that computed it died")
        self.retried += len(held)
        self._suspects += held
        return None

    def _try_again(self, unit: Unit, queue: deque[Unit], reason: str) -> SetAside | None:
        self._tries[unit.name] += 1
        if self._tries[unit.name] >= _MAX_TRIES:
            self._set_aside += 1
            self._fruitless_deaths = 0
            if self._set_aside >= _MAX_TRIES and not self._finished:
                raise MtpdError(f"every unit fails, the first {self._set_aside} on all {_MAX_TRIES} tries: {reason}")
            return SetAside(unit, f"{reason} ({_MAX_TRIES} tries)")
        self.retried += 1
        queue.append(unit)
        return None


def _last_line(error: Exception) -> str:
    if isinstance(error, OutOfMemoryError):  # whose own words are a page, with a link in the end
        return "Ray killed one, for its node's memory was almost full"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else repr(error))[:300]
