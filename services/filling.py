"""Filling one teacher's group: lease and plan first, then the pool of actors, at last the folded manifest."""

import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import numpy.typing as npt

from cache import (
    BudgetError,
    GroupInfo,
    Lease,
    MtpdError,
    Plan,
    Storage,
    compact,
    load_index,
    make_plan,
    open_storage,
    prepare,
    write_head,
)
from services import cluster, logs
from services.actor import ActorJob, TeacherActor
from services.driver import Tally, drive
from services.journal import Journal
from services.pool import Pool
from services.present import Progress, complain, say, size
from services.records import keep_recipe, record_fill, record_use
from services.trace import Trace
from trainer import Failure, OrderRows, Recipe, first_epoch, head_file, read_annotations, teacher_info


@dataclass(frozen=True)
class FillResult:
    """What a precompute of one teacher did.

    Attributes:
        total: rows that the recipe asks for.
        computed: rows computed and committed now; as many teacher forwards.
        failures: (image, view)s without targets, and why.
        written_bytes: bytes written now.
        stored_bytes: bytes of all shards of the teacher's group.
        seconds: planning and, from when its actors were asked for, computing.
        device_share: share of the actors' time in which their device was busy.
    """

    teacher: str
    group: str
    total: int
    computed: int
    failures: tuple[Failure, ...]
    written_bytes: int
    stored_bytes: int
    seconds: float
    device_share: float


@dataclass
class Turn:
    """A teacher's place among those that are filled at once.

    Attributes:
        stop: set when all of them are to end.
        mine: set when its actors may be asked for.
        done: to be set when the next one's may be.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    mine: threading.Event | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> None:
        """Wait for the turn.

        Raises:
            KeyboardInterrupt: all are to end.
        """
        while self.mine is not None and not self.mine.wait(0.2):
            if self.stop.is_set():
                raise KeyboardInterrupt


class Filling:
    """Holds the lease and the plan of a teacher's group while the context is open. Entering needs no Ray.

    Args:
        force: begin even if the plan does not fit the disk.
        rows: only these; a later filling of all goes on from them.
        others: plans that go to the same disk at the same time.
        room: for its actors; by default that of ``actors`` in the recipe.
        first: see `make_plan`; by default what the recipe's students wait for.

    Raises:
        LeaseHeldError: another run writes this teacher's targets.
        BudgetError: the plan does not fit the disk.
        TeacherLoadError, StaleCacheError, CorruptShardError: see there.

    Attributes:
        plan: what is left to compute.
    """

    plan: Plan

    def __init__(
        self,
        recipe: Recipe,
        teacher: str,
        *,
        force: bool = False,
        rows: OrderRows | None = None,
        others: Sequence[Plan] = (),
        room: cluster.Room | None = None,
        first: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._room, self._first = room, first
        self._recipe, self._teacher, self._force, self._rows, self._others = recipe, teacher, force, rows, others
        self._stack = ExitStack()

    def __enter__(self) -> "Filling":
        started = time.monotonic()
        recipe, teacher = self._recipe, self._teacher
        cluster.refuse_temporary_paths(recipe)
        info = teacher_info(recipe, teacher)
        self._storage = storage = open_storage(recipe.cache.uri)
        if self._rows is None:  # else it is the order's recipe, in which the student is among the teachers
            keep_recipe(recipe)
            record_use(recipe, info)
        with ExitStack() as stack:
            self._lease = stack.enter_context(Lease(storage, info.name))
            compact(storage, info)
            if self._first is None and recipe.cache.on_missing != "error":
                self._first = first_epoch(recipe)
            self.plan = plan_group(recipe, storage, info, self._rows, self._first)
            if not self._force:
                refuse_too_large(storage, [*self._others, self.plan])
            # also where every row is there: what was damaged of attributes and head is written anew
            prepare(storage, self.plan)
            if info.head is not None:
                write_head(storage, info, head_file(recipe.teachers[teacher], teacher))
            self._stack = stack.pop_all()
        self._planning = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease back. Again it does nothing."""
        self._stack.close()

    def run(self, trace: Trace | None = None, turn: Turn | None = None) -> FillResult:
        """Compute and commit what is left, on the cluster that is connected.

        Args:
            trace: takes in what the actors did when.
        """
        plan, turn = self.plan, turn or Turn()
        if plan.todo == 0:
            turn.done.set()
            say(f"teacher {self._teacher}: all {plan.total:,} rows are in the cache")
            return FillResult(self._teacher, plan.info.name, plan.total, 0, (), 0, plan.stored_bytes, 0.0, 0.0)
        turn.wait()
        try:
            result = self._compute(trace, turn)
        finally:
            turn.done.set()
        self._lease.check()
        compact(self._storage, plan.info)
        return result

    def _compute(self, trace: Trace | None, turn: Turn) -> FillResult:
        recipe, teacher, plan, started = self._recipe, self._teacher, self.plan, time.monotonic()
        spec, split, run = recipe.teachers[teacher], recipe.dataset.train, self._lease.run
        job = ActorJob(recipe.cache.uri, run, plan.info, spec, recipe.policy, split, logs.style(), trace is not None)
        actors = min(recipe.actors.max if self._room is None else self._room.actors, plan.todo_units)
        # what there is room for is what was reckoned with: fewer actors must not ask for more each
        wanted = self._room.each if self._room else cluster.demand(recipe.actors.cpus, recipe.actors.gpus, actors)
        tally = Tally()
        with (
            Progress(f"teacher {teacher}", plan.total, plan.total - plan.todo) as progress,
            Journal(self._storage, plan, self._lease, actors) as journal,
        ):
            pool = Pool(
                lambda: TeacherActor.options(num_cpus=wanted.cpus, num_gpus=wanted.gpus).remote(job),
                actors,
                min(recipe.actors.min, actors),
                progress.notice,
                began=turn.done.set,
                draining=cluster.draining,
                obstacle=lambda: cluster.obstacle(wanted),
                stop=turn.stop,
            )
            try:
                drive(pool, plan, self._storage, self._lease, journal, progress, tally, trace)
            finally:
                pool.close()
                result = FillResult(
                    teacher,
                    plan.info.name,
                    plan.total,
                    tally.computed,
                    tuple(tally.failures),
                    tally.written_bytes,
                    plan.stored_bytes,
                    self._planning + time.monotonic() - started,
                    tally.device_seconds / max(1e-9, pool.up_seconds),
                )
                try:
                    record_fill(recipe, result)  # of a run that was interrupted too: what it committed stays
                except (MtpdError, OSError) as error:  # the record is for reports; it must not hide why the run ended
                    complain(f"what this precompute did is not recorded: {error}")
        return result


def plan_group(
    recipe: Recipe,
    storage: Storage,
    info: GroupInfo,
    rows: OrderRows | None = None,
    first: npt.NDArray[np.int64] | None = None,
) -> Plan:
    """The plan of one teacher's group over what is committed. Nothing is written."""
    images = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images
    return make_plan(
        images,
        recipe.policy,
        info,
        committed=load_index(storage, info),
        unit_rows=recipe.cache.unit_rows,
        wanted=None if rows is None else rows.wanted(images.ids, len(recipe.policy)),
        first=first,
    )


def refuse_too_large(storage: Storage, plans: Sequence[Plan]) -> None:
    """Stop before a disk is filled that cannot hold what is left to write.

    Raises:
        BudgetError: it does not fit; object storage always does.
    """
    free, needed = storage.free_bytes(), sum(plan.todo_bytes for plan in plans)
    if free is not None and needed > free:
        raise BudgetError(
            f"cache.uri: the plan needs {size(needed)} more and {storage.where()} has {size(free)} free. Free some, choose "
            "another disk, store fewer levels (teachers.NAME.levels), pool the finest (teachers.NAME.pool), use int4 or fewer "
            "views, or pass --force."
        )
