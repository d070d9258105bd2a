"""The driver of a precompute: plan, lease, pool of teacher actors, manifest."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

from cache import (
    BudgetError,
    GroupInfo,
    Index,
    Lease,
    LocalStorage,
    Plan,
    compact,
    existing_slots,
    make_plan,
    open_storage,
    prepare,
    read_table,
)
from services import cluster
from services.actor import ActorJob, TeacherActor
from services.pool import Pool, SetAside
from services.present import Progress, say, size
from trainer import Failure, Recipe, read_annotations, teacher_info


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
    """The teachers of the recipe's stages, each once, in order."""
    return list(dict.fromkeys(stage.teacher for stage in recipe.stages if stage.teacher is not None))


def plan_teacher(recipe: Recipe, teacher: str) -> Plan:
    """The plan of one teacher over what is committed. Nothing is written."""
    info = teacher_info(recipe, teacher)
    storage = open_storage(recipe.cache.uri)
    return _plan(recipe, storage, info, Index(read_table(storage, info.name, info.levels)))


def fill(recipe: Recipe, teacher: str, *, force: bool = False) -> FillResult:
    """Compute and commit every row of one teacher that is not committed yet.

    Args:
        force: begin even if the plan does not fit the disk.

    Raises:
        LeaseHeldError: another run writes this teacher's targets.
        BudgetError: the plan does not fit the disk.
        TeacherLoadError, StaleCacheError, CorruptShardError: see there.
    """
    started = time.monotonic()
    cluster.refuse_temporary_paths(recipe)
    info = teacher_info(recipe, teacher)
    storage = open_storage(recipe.cache.uri)
    with Lease(storage, info.name) as lease:
        plan = _plan(recipe, storage, info, Index(compact(storage, info.name, info.levels)))
        if plan.todo == 0:
            say(f"teacher {teacher}: all {plan.total:,} rows are in the cache")
            return FillResult(teacher, info.name, plan.total, 0, (), 0, plan.stored_bytes, 0.0, 0.0)
        _refuse_too_large(storage, plan, force)
        prepare(storage, plan)
        result = _run(recipe, plan, lease.check, started)
        lease.check()
        compact(storage, info.name, info.levels)
    return result


def _plan(recipe: Recipe, storage: LocalStorage, info: GroupInfo, committed: Index) -> Plan:
    images = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images
    return make_plan(
        images,
        recipe.policy,
        info,
        committed=committed,
        existing_slots=existing_slots(storage, info),
        unit_rows=recipe.cache.unit_rows,
    )


def _run(recipe: Recipe, plan: Plan, check: Callable[[], None], started: float) -> FillResult:
    teacher = plan.info.teacher
    units = list(plan.units())
    job = ActorJob(recipe.cache.uri, plan.info, recipe.teachers[teacher], recipe.policy, recipe.dataset.train.img_dir)
    cluster.connect()
    actors = min(recipe.actors.max, len(units))
    cpus, gpus = (cluster.share(getattr(recipe.actors, f"{r.lower()}s"), r, actors) for r in ("CPU", "GPU"))
    create = lambda: TeacherActor.options(num_cpus=cpus, num_gpus=gpus).remote(job)  # noqa: E731
    failures: list[Failure] = []
    computed, written, device_seconds = 0, 0, 0.0
    with Progress(f"teacher {teacher}", plan.total, plan.total - plan.todo) as progress:
        pool = Pool(create, actors, min(recipe.actors.min, actors), progress.notice)
        try:
            for outcome in pool.run(units):
                check()
                progress.begin(pool.begun)
                if isinstance(outcome, SetAside):
                    failures += [Failure(r.image_id, r.view, r.file_name, outcome.reason) for r in outcome.unit.rows]
                    progress.advance(0, len(outcome.unit.rows))
                    continue
                failures += outcome.failures
                computed += outcome.rows
                written += outcome.written_bytes
                device_seconds += outcome.device_seconds
                progress.advance(outcome.rows, len(outcome.failures))
        finally:
            pool.close()
    now = time.monotonic()
    share = device_seconds / max(1e-9, actors * (now - (pool.begun or now)))
    return FillResult(
        teacher, plan.info.name, plan.total, computed, tuple(failures), written, plan.stored_bytes, now - started, share
    )


def _refuse_too_large(storage: LocalStorage, plan: Plan, force: bool) -> None:
    storage.root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(storage.root).free
    if plan.todo_bytes > free and not force:
        raise BudgetError(
            f"cache.uri: the plan needs {size(plan.todo_bytes)} more and {storage.root} has {size(free)} free. "
            "Free some, choose another disk, store fewer levels (teachers.NAME.levels) or views, or pass --force."
        )
