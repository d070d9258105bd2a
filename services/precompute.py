"""The driver of a precompute: plan, lease, pool of teacher actors, manifest."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

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
from services.present import Progress, complain, duration, say, size
from services.records import keep_recipe, record_fill, record_use
from services.trace import Trace
from trainer import Failure, OrderRows, Recipe, head_file, read_annotations, teacher_info


@dataclass(frozen=True)
class FillResult:
    """What a precompute of one teacher did.

    Attributes:
        total: rows that the recipe asks for.
        computed: rows computed and committed now; as many teacher forwards.
        failures: (image, view)s without targets, and why.
        written_bytes: bytes written now.
        stored_bytes: bytes of all shards of the teacher's group.
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


def used_teachers(recipe: Recipe) -> list[str]:
    """The teachers of the recipe's stages, each once, in order; all where the stages are not known yet."""
    return list(dict.fromkeys(name for stage in recipe.possible_stages for name in stage.teachers))


def plan_teacher(recipe: Recipe, teacher: str) -> Plan:
    """The plan of one teacher over what is committed. Nothing is written."""
    return _plan(recipe, open_storage(recipe.cache.uri), teacher_info(recipe, teacher))


def fill(
    recipe: Recipe, teacher: str, *, force: bool = False, rows: OrderRows | None = None, trace: Trace | None = None
) -> FillResult:
    """Compute and commit every row of one teacher that is not committed yet.

    Args:
        force: begin even if the plan does not fit the disk.
        rows: only these; a later call for all goes on from them.
        trace: takes in what the actors did when.

    Raises:
        LeaseHeldError: another run writes this teacher's targets.
        BudgetError: the plan does not fit the disk.
        TeacherLoadError, StaleCacheError, CorruptShardError: see there.
    """
    started = time.monotonic()
    cluster.refuse_temporary_paths(recipe)
    info = teacher_info(recipe, teacher)
    storage = open_storage(recipe.cache.uri)
    if rows is None:  # else it is the order's recipe, in which the student is among the teachers
        keep_recipe(recipe)
        record_use(recipe, info)
    with Lease(storage, info.name) as lease:
        compact(storage, info)
        plan = _plan(recipe, storage, info, rows)
        if not force:
            refuse_too_large(storage, [plan])
        # also where every row is there: what was damaged of attributes and head is written anew
        prepare(storage, plan)
        if info.head is not None:
            write_head(storage, info, head_file(recipe.teachers[teacher], teacher))
        if plan.todo == 0:
            say(f"teacher {teacher}: all {plan.total:,} rows are in the cache")
            return FillResult(teacher, info.name, plan.total, 0, (), 0, plan.stored_bytes, 0.0, 0.0)
        result = _run(recipe, storage, plan, lease, started, trace)
        lease.check()
        compact(storage, info)
    return result


def _plan(recipe: Recipe, storage: Storage, info: GroupInfo, rows: OrderRows | None = None) -> Plan:
    images = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images
    return make_plan(
        images,
        recipe.policy,
        info,
        committed=load_index(storage, info),
        unit_rows=recipe.cache.unit_rows,
        wanted=None if rows is None else rows.wanted(images.ids, len(recipe.policy)),
    )


def _run(recipe: Recipe, storage: Storage, plan: Plan, lease: Lease, started: float, trace: Trace | None) -> FillResult:
    teacher = plan.info.teacher
    spec, split = recipe.teachers[teacher], recipe.dataset.train
    job = ActorJob(recipe.cache.uri, lease.run, plan.info, spec, recipe.policy, split, logs.style(), trace is not None)
    cluster.connect()
    actors = min(recipe.actors.max, plan.todo_units)
    cpus, gpus = (cluster.share(getattr(recipe.actors, f"{r.lower()}s"), r, actors) for r in ("CPU", "GPU"))
    create = lambda: TeacherActor.options(num_cpus=cpus, num_gpus=gpus).remote(job)  # noqa: E731
    tally = Tally()
    with (
        Progress(f"teacher {teacher}", plan.total, plan.total - plan.todo) as progress,
        Journal(storage, plan, lease, actors) as journal,
    ):
        pool = Pool(create, actors, min(recipe.actors.min, actors), progress.notice)
        try:
            drive(pool, plan, storage, lease, journal, progress, tally, trace)
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
                time.monotonic() - started,
                tally.device_seconds / max(1e-9, pool.up_seconds),
            )
            try:
                record_fill(recipe, result)  # of a run that was interrupted too: what it committed stays
            except (MtpdError, OSError) as error:  # the record is for reports; it must not hide why the run ended
                complain(f"what this precompute did is not recorded: {error}")
    return result


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


def show_fill(result: FillResult) -> None:
    """One line on what was computed, and the images that could not be."""
    if result.computed:
        rate = result.computed / max(result.seconds, 1e-9)
        say(
            f"teacher {result.teacher}: {result.computed:,} rows in {duration(result.seconds)} ({rate:.1f} images/s, device busy "
            f"{result.device_share:.0%}), {size(result.written_bytes)} written to {result.group}"
        )
    show_failures(result)


def show_failures(result: FillResult) -> None:
    """The images without targets, and why."""
    if not result.failures:
        return
    images = {failure.image_id: failure for failure in result.failures}
    complain(
        f"teacher {result.teacher}: {len(result.failures)} rows of {len(images)} images have no targets; all other rows are "
        "committed. Mend or remove these images, then run the same command again:"
    )
    for failure in list(images.values())[:20]:
        complain(f"  image {failure.image_id} ({failure.file_name}) {failure.reason}")
    if len(images) > 20:
        complain(f"  and {len(images) - 20} more")
