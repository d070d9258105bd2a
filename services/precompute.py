"""A precompute: the teachers of a recipe, one or several at once, on one cluster."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from cache import MtpdError, Plan, open_storage
from services import cluster
from services.filling import Filling, FillResult, Turn, plan_group, refuse_too_large
from services.present import complain, duration, say, size
from services.trace import Trace
from trainer import OrderRows, Recipe, stage_dir, teacher_info

__all__ = [
    "FillResult",
    "fill",
    "fill_all",
    "needed_teachers",
    "plan_teacher",
    "refuse_too_large",
    "show_failures",
    "show_fill",
    "used_teachers",
]


def used_teachers(recipe: Recipe) -> list[str]:
    """The teachers of the recipe's stages, each once, in order; all where the stages are not known yet."""
    return list(dict.fromkeys(name for stage in recipe.possible_stages for name in stage.teachers))


def needed_teachers(recipe: Recipe, stages: Iterable[int] | None = None) -> list[str]:
    """Of `used_teachers` those that a stage is still to be trained from: the others' rows may be gone for good.

    Args:
        stages: numbers of the stages that are looked at; all by default.
    """
    if recipe.auto:
        return used_teachers(recipe)
    numbers = range(1, len(recipe.stages) + 1) if stages is None else stages
    todo = [recipe.stages[n - 1] for n in numbers if not (stage_dir(recipe, n) / "result.json").exists()]
    return list(dict.fromkeys(name for stage in todo for name in stage.teachers))


def plan_teacher(recipe: Recipe, teacher: str) -> Plan:
    """The plan of one teacher over what is committed. Nothing is written."""
    return plan_group(recipe, open_storage(recipe.cache.uri), teacher_info(recipe, teacher))


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
    with Filling(recipe, teacher, force=force, rows=rows) as filling:
        if filling.plan.todo:
            cluster.connect()
        return filling.run(trace)


def fill_all(
    recipe: Recipe,
    teachers: Sequence[str],
    *,
    force: bool = False,
    rows: OrderRows | None = None,
    trace: Trace | None = None,
) -> list[FillResult]:
    """`fill` several teachers at once: the actors of all share the cluster.

    The first teacher's actors are asked for first, the next one's when that has begun, and so on: what the cluster has
    beyond the first is the second's, and each actor that one teacher has no unit left for makes room for another's. An error
    in one ends that one alone; the others are filled, and then it is raised.

    Returns:
        What was done, in the teachers' order.

    Raises:
        MtpdError: see `fill`; of several errors the first, the others are printed.
        KeyboardInterrupt: all were stopped; what was committed stays.
    """
    if len(teachers) == 1:
        return [fill(recipe, teachers[0], force=force, rows=rows, trace=trace)]
    errors: dict[str, BaseException] = {}
    results: dict[str, FillResult] = {}
    with ExitStack() as stack:
        fillings: dict[str, Filling] = {}
        for name in teachers:
            plans = [filling.plan for filling in fillings.values()]
            with _kept(name, errors, silent=True):
                filling = Filling(recipe, name, force=force, rows=rows, others=plans)
                fillings[name] = stack.enter_context(filling)
        if errors and not fillings:
            raise next(iter(errors.values()))
        for name, error in errors.items():
            _tell(name, error)
        if any(filling.plan.todo for filling in fillings.values()):
            cluster.connect()
        _run_together(fillings, trace, results, errors)
    if not errors:
        return [results[name] for name in teachers]
    for result in results.values():
        show_fill(result)
    raise next(iter(errors.values()))


def _run_together(
    fillings: dict[str, Filling],
    trace: Trace | None,
    results: dict[str, FillResult],
    errors: dict[str, BaseException],
) -> None:
    """Run each in a thread of its own; when this one is interrupted, stop all."""
    stop, before = threading.Event(), None
    threads = []

    def work(name: str, filling: Filling, turn: Turn) -> None:
        with _kept(name, errors), closing(filling):  # the others may take hours
            results[name] = filling.run(trace, turn)

    for name, filling in fillings.items():
        turn = Turn(stop, before)
        before = turn.done
        threads.append(threading.Thread(target=work, args=(name, filling, turn), name=f"fill {name}", daemon=True))
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def _kept(name: str, errors: dict[str, BaseException], *, silent: bool = False) -> Iterator[None]:
    """Keep an error of one teacher for later, and say so; in a thread also that it was told to stop."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again when the others are done
        errors[name] = error
        if not silent:
            _tell(name, error)
    except KeyboardInterrupt:
        if threading.current_thread() is threading.main_thread():
            raise


def _tell(name: str, error: BaseException) -> None:
    complain(f"teacher {name}: {error if isinstance(error, MtpdError) else repr(error)}")


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
    reasons = {failure.reason for failure in result.failures}
    if len(images) > 1 and len(reasons) == 1 and len(result.failures) == result.total:
        complain(
            f"teacher {result.teacher}: none of its {result.total:,} rows could be computed, each for the same reason: "
            f"{reasons.pop()}. No image is at fault: look at teachers.{result.teacher} (config, cfg_options) and at `views`."
        )
        return
    complain(
        f"teacher {result.teacher}: {len(result.failures)} rows of {len(images)} images have no targets; all other rows are "
        "committed. Mend or remove these images, then run the same command again:"
    )
    for failure in list(images.values())[:20]:
        complain(f"  image {failure.image_id} ({failure.file_name}) {failure.reason}")
    if len(images) > 20:
        complain(f"  and {len(images) - 20} more")
