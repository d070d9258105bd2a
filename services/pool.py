"""A pool of Ray actors that pull units: elastic, and what a dead actor held goes back to the queue."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cache import MtpdError, Unit

# one unit decodes while the one before is on the device and the one before that is written
PIPELINE_DEPTH = 3
_MAX_TRIES = 3
_PLACEMENT_NOTICE_SECONDS = 30.0


@dataclass(frozen=True)
class SetAside:
    """A unit that failed on every try."""

    unit: Unit
    reason: str


@dataclass
class _Worker:
    actor: Any
    loading: Any
    held: dict[Any, Unit] = field(default_factory=dict)
    ready: bool = False


class Pool:
    """Runs units on actors.

    All actors are requested at once. Those that the cluster cannot place yet are the demand that makes an autoscaler add
    nodes; they begin to pull units when they come up.

    Args:
        create: makes an actor with the methods ``load()`` and ``run(unit)``.
        actors: how many.
        at_least: how many must be up before the first unit is handed out.
        notice: called with a line for the user.

    Attributes:
        begun: when the first unit was handed out, by ``time.monotonic``; None before.
        retried: units that went back to the queue.
    """

    def __init__(self, create: Callable[[], Any], actors: int, at_least: int, notice: Callable[[str], None]) -> None:
        self._create, self._at_least, self._notice = create, at_least, notice
        self._workers = [self._start() for _ in range(actors)]
        self.begun: float | None = None
        self.retried = 0
        self._tries: Counter[str] = Counter()
        self._suspects: set[str] = set()
        self._fruitless_deaths = 0
        self._finished = 0
        self._set_aside = 0

    def run(self, units: Iterable[Unit]) -> Iterator[Any]:
        """Hand out the units and yield each one's outcome as it comes: what ``run`` returned, or `SetAside`.

        Raises:
            MtpdError: an actor met an error of the user's; the rest is not tried.
        """
        # millions of units are handed out from their generator, never held at once
        source, queue = iter(units), deque[Unit]()
        started = time.monotonic()
        noticed = False
        while self._refill(source, queue) or any(worker.held for worker in self._workers):
            self._hand_out(queue)
            waiting = self._references()
            done, _ = ray.wait(waiting, num_returns=1, timeout=1.0)
            for reference in done:
                outcome = self._collect(reference, queue)
                if outcome is not None:
                    yield outcome
            if not noticed and self.begun is None and time.monotonic() - started > _PLACEMENT_NOTICE_SECONDS:
                noticed = True
                self._notice(
                    "no teacher actor is up yet: the cluster has no room for what `actors` asks for (gpus, cpus), or the "
                    "teacher is still loading; waiting"
                )

    def close(self) -> None:
        """Stop every actor, placed or not."""
        for worker in self._workers:
            ray.kill(worker.actor)
        self._workers = []

    def _start(self) -> _Worker:
        actor = self._create()
        return _Worker(actor, actor.load.remote())

    def _refill(self, source: Iterator[Unit], queue: deque[Unit]) -> bool:
        """Keep as many units queued as all workers could take at once. Returns whether there are any."""
        queue.extend(islice(source, max(0, PIPELINE_DEPTH * len(self._workers) - len(queue))))
        return bool(queue)

    def _references(self) -> list[Any]:
        return [ref for w in self._workers for ref in ([w.loading] if not w.ready else w.held)]

    def _hand_out(self, queue: deque[Unit]) -> None:
        ready = [worker for worker in self._workers if worker.ready]
        if self.begun is None and len(ready) >= self._at_least:
            self.begun = time.monotonic()
        if self.begun is None:
            return
        # one unit to each before a second to any: the last units of a run are spread over all actors
        for depth in range(1, PIPELINE_DEPTH + 1):
            for worker in ready:
                if queue and len(worker.held) < depth and self._may_hold(worker, queue[0]):
                    unit = queue.popleft()
                    worker.held[worker.actor.run.remote(unit)] = unit

    def _may_hold(self, worker: _Worker, unit: Unit) -> bool:
        """A unit that was held by an actor that died is tried alone: if that dies too, it is known who did it."""
        return not worker.held or not (self._suspects & {unit.name, *(held.name for held in worker.held.values())})

    def _collect(self, reference: Any, queue: deque[Unit]) -> Any:
        worker = next((w for w in self._workers if reference is w.loading or reference in w.held), None)
        if worker is None:
            return None  # of an actor that died in this same round
        try:
            result = ray.get(reference)
        except RayActorError as error:
            return self._replace(worker, queue, error)
        except RayTaskError as error:
            if isinstance(error.cause, MtpdError):
                raise error.cause from None
            if reference is worker.loading:
                raise
            return self._try_again(worker.held.pop(reference), queue, _last_line(error))
        if reference is worker.loading:
            worker.ready = True
            return None
        self._fruitless_deaths = 0
        self._finished += 1
        self._suspects.discard(worker.held.pop(reference).name)
        return result

    def _replace(self, worker: _Worker, queue: deque[Unit], error: RayActorError) -> SetAside | None:
        self._fruitless_deaths += 1
        if self._fruitless_deaths > (_MAX_TRIES + 1) * len(self._workers):
            raise MtpdError(
                f"teacher actors keep dying before they finish a unit; the last time: {_last_line(error)}. Often this is "
                "memory: lower teachers.NAME.batch_size or actors.max, and run `mtpd precompute` again; what was "
                "committed stays."
            ) from error
        held = list(worker.held.values())
        self._notice(f"a teacher actor died; {len(held)} units go back to the queue")
        self._workers[self._workers.index(worker)] = self._start()
        if len(held) == 1:
            return self._try_again(held[0], queue, "the actor that computed it died")
        self.retried += len(held)
        self._suspects |= {unit.name for unit in held}
        queue.extend(held)
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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else repr(error))[:300]
