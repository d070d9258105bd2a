"""Time a recipe's parts where its teachers and students would run: in a Ray task with the share of an actor or a worker."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import ray
from ray.exceptions import RayTaskError

from cache import MtpdError, Plan
from services import cluster
from services.device import given_device
from services.precompute import used_teachers
from services.serving import service, starts_here
from services.train import fit_stage
from trainer import (
    Job,
    Measured,
    Place,
    Recipe,
    SplitSpec,
    StageCost,
    TeacherCost,
    TeacherSeconds,
    measure,
    open_stage,
    read_annotations,
    shortest_trial,
)


@dataclass(frozen=True)
class Share:
    """What the cluster gives one teacher actor or one training worker."""

    cpus: float
    gpus: float
    threads: int

    @property
    def lanes(self) -> int:
        """Threads that decode in an actor that has it."""
        return max(1, int(self.cpus))

    @property
    def place(self) -> Place:
        """Where it runs."""
        return Place("cuda" if self.gpus else "cpu", self.lanes, self.threads)


def measure_job(recipe: Recipe, plans: Sequence[Plan], rounds: int = 3) -> Job:
    """The recipe's job in numbers.

    The parts are timed on one node of the cluster of ``RAY_ADDRESS`` or of this machine, else on this machine, in a temporary
    folder there: neither the cache nor work_dir is touched. While the order of teachers is not known, all are stages.

    Args:
        plans: of each teacher that a stage names.
        rounds: batches of each part that are timed.

    Raises:
        RecipeError, TeacherLoadError: see `measure`.
    """
    recipe = recipe.with_sequence(list(recipe.teachers)) if recipe.auto else recipe
    cluster.connect(quiet=True)
    workers = recipe.training.max_workers
    actors = max(1, min([recipe.actors.max, *(plan.todo_units for plan in plans if plan.todo)]))
    teacher = _share(recipe.actors.cpus, recipe.actors.gpus, actors)
    student = _share(recipe.training.cpus, recipe.training.gpus, workers)
    task = _measure.options(num_cpus=max(teacher.cpus, student.cpus), num_gpus=max(teacher.gpus, student.gpus))
    begin = time.time()
    try:
        up, at, measured = ray.get(task.remote(recipe, teacher, student, rounds))
    except RayTaskError as error:
        if isinstance(error.cause, MtpdError):
            raise error.cause from None
        raise
    process = max(0.0, up - begin)
    timed = measured.teachers
    job = Job(
        images=round(_images(recipe.dataset.train, "train") * measured.kept),
        val_images=_images(recipe.dataset.val, "val"),
        student=at[1],
        teacher=at[0],
        evaluate=measured.evaluate,
        start=process + measured.start,
        actor_start=process,
        teachers={plan.info.teacher: _teacher_cost(plan, timed[plan.info.teacher]) for plan in plans},
        stages=tuple(
            StageCost(
                spec.teachers, spec.epochs, of.evaluations, of.plain, of.cached, of.online, of.read, of.read_bytes
            )
            for spec, of in zip(recipe.stages, measured.stages, strict=True)
        ),
        workers=workers,
        loaders=measured.loaders,
        actors=actors,
        decoders=teacher.lanes,
        batch=measured.batch_size,
    )
    job = replace(job, service=_time_service(recipe))
    shortest = _time_shortest(recipe)
    if shortest is None:
        return job
    seconds, evaluated = shortest
    step = job.batch * job.pace(job.stages[0].plain)
    return replace(job, start=max(0.0, seconds - step - evaluated * job.pace(job.evaluate)))


def _time_shortest(recipe: Recipe) -> tuple[float, int] | None:
    """Seconds of a stage of one step and one evaluation, as `train` runs it, and the images of that evaluation.

    None where the cluster has several nodes: all of them would have to see the temporary folder.
    """
    if len(ray.nodes()) > 1:
        return None
    with TemporaryDirectory(prefix="mtpd-measure-") as folder:
        short, evaluated = shortest_trial(recipe, Path(folder))
        begin = time.perf_counter()
        open_stage(short, 1)
        fit_stage(short, 1, "cache", "the stage of one step that is measured")
        open_stage(short, 1)
        return time.perf_counter() - begin, evaluated


def _time_service(recipe: Recipe) -> float | None:
    """Seconds to start the teacher service and to end it, when nobody asks it; None where training starts none."""
    if recipe.cache.on_missing != "compute" or not starts_here(recipe) or len(ray.nodes()) > 1:
        return None
    with TemporaryDirectory(prefix="mtpd-measure-") as folder:
        short = shortest_trial(recipe, Path(folder))[0].model_copy(update={"stages": recipe.stages})
        begin = time.perf_counter()
        with service(short, used_teachers(recipe), quiet=True):
            pass
        return time.perf_counter() - begin


def _teacher_cost(plan: Plan, of: TeacherSeconds) -> TeacherCost:
    row_bytes = plan.stored_bytes / max(1, plan.total)
    return TeacherCost(plan.total, plan.todo, row_bytes, of.start, of.decode, of.compute, of.write)


def _images(split: SplitSpec, name: str) -> int:
    return int(read_annotations(split.ann_file, f"dataset.{name}.ann_file").images.ids.size)


def _share(cpus: float | None, gpus: float | None, count: int) -> Share:
    wanted = cluster.demand(cpus, gpus, count)
    # Ray gives a process as many threads as processors, unless the user says otherwise
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # a list is for nested regions
    threads = (int(named) if named.isdigit() else 0) or max(1, int(wanted.cpus))
    return Share(wanted.cpus, wanted.gpus, threads)


@ray.remote(max_retries=0)
def _measure(
    recipe: Recipe, teacher: Share, student: Share, rounds: int
) -> tuple[float, tuple[Place, Place], Measured]:
    """When this process was up, where teachers and students run, and what was measured."""
    up = time.time()
    asked = {"actors.gpus": teacher.gpus, "training.gpus": student.gpus}
    given_device(", ".join(key for key, gpus in asked.items() if gpus), "the process that measures")
    places = teacher.place, student.place
    return up, places, measure(recipe, *places, rounds=rounds)
