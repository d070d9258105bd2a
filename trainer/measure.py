"""Seconds of what a recipe's job is made of, from a few timed batches: teachers, steps in three kinds, reads. Runs without ray.

All of it happens in a temporary folder, on a part of the data set: images drawn at random, in the views and batches in which a
training meets them. The student's weights are random, for its config may download some; the teachers have their own.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner

from cache import (
    Plan,
    RecipeError,
    RowTargets,
    Unit,
    make_plan,
    open_storage,
    prepare,
    write_head,
    write_unit,
)
from trainer.annotations import read_annotations
from trainer.compute import UnitComputer
from trainer.cost import Place, Step
from trainer.groups import teacher_info
from trainer.recipe import Recipe
from trainer.specs import StageSpec
from trainer.stage_config import stage_config
from trainer.teacher import Teacher, head_file
from trainer.transforms import LoadTeacherTargets
from trainer.trial import draw_trial

_WRITES = 3


@dataclass(frozen=True)
class TeacherSeconds:
    """Of one teacher: see `TeacherCost`."""

    start: float
    decode: float
    compute: float
    write: float


@dataclass(frozen=True)
class StageSeconds:
    """Of one stage: see `StageCost`. ``plain`` are the same batches without any teacher, taken in turn with the others."""

    plain: Step
    cached: Step
    online: Step
    read: float
    read_bytes: float
    evaluations: int


@dataclass(frozen=True)
class Measured:
    """What was timed.

    Attributes:
        start: seconds to build a stage's data set and models.
        evaluate: an image of the val set.
        kept: share of the images that the student trains on: its config may leave out those without objects.
        loaders: loading processes of the student's config.
        batch_size: samples of the student's steps, of all workers together.
    """

    start: float
    evaluate: Step
    kept: float
    loaders: int
    batch_size: int
    teachers: Mapping[str, TeacherSeconds]
    stages: tuple[StageSeconds, ...]


def measure(recipe: Recipe, teacher: Place, student: Place, rounds: int = 3) -> Measured:
    """Time a few batches of every part of a recipe. Writes into a temporary folder only.

    Each time is the median of ``rounds`` batches, other ones in each, after one to warm up. Contenders take turns, so that what
    else runs on the machine meets all of them.

    Raises:
        RecipeError: there is nothing to measure on, or the student's config cannot be trained.
        TeacherLoadError: see `Teacher`.
    """
    threads = torch.get_num_threads(), cv2.getNumThreads()
    try:
        with TemporaryDirectory(prefix="mtpd-measure-") as folder:
            trial, drawn = draw_trial(recipe, Path(folder))
            batches = _TrainingBatches(trial, rounds + 1)
            names = dict.fromkeys(name for stage in trial.stages for name in stage.teachers)
            torch.set_num_threads(teacher.threads)
            teachers = {name: _time_teacher(trial, name, teacher, rounds, batches.rows) for name in names}
            torch.set_num_threads(student.threads)
            cv2.setNumThreads(0)  # as mmdet's configs have it in training
            stages = tuple(_time_stage(trial, number, student, batches) for number in range(len(trial.stages)))
            evaluate = _time_evaluation(batches.cfg, student, rounds)
            kept = batches.images / drawn
            return Measured(batches.start, evaluate, kept, batches.loaders, batches.size, teachers, stages)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


class _TrainingBatches:
    """The batches that a training begins with.

    Attributes:
        cfg: of a stage without a teacher.
        items: of each batch, a worker's share of a step.
        rows: the (image id, view)s in them.
        images: that the student trains on, of the part.
        start: seconds to build data set and runner, its student and its logs.
    """

    def __init__(self, trial: Recipe, count: int) -> None:
        begin = time.perf_counter()
        self.cfg = stage_config(trial.model_copy(update={"stages": (StageSpec(epochs=1),)}), 1)
        loader = _loader(self.cfg.train_dataloader)
        Runner.from_cfg(self.cfg)
        self.start = time.perf_counter() - begin
        self.loaders = self.cfg.train_dataloader.get("num_workers", 0)
        self.size = self.cfg.train_dataloader.batch_size
        share = -(-self.size // trial.training.max_workers)
        dataset = loader.dataset
        self.images = len(dataset.dataset)
        found = list(loader.batch_sampler)
        self.items = [found[number % len(found)][:share] for number in range(count)]
        self.rows = {
            (dataset.get_data_info(item)["img_id"], item % dataset.views) for batch in self.items for item in batch
        }


class _Contender:
    """A stage's data set, model and optimiser, to take one step after the other."""

    def __init__(self, cfg: Config, place: Place) -> None:
        self._cuda = place.device == "cuda"
        self.loader = _loader(cfg.train_dataloader)
        self.model = _model(cfg, place.device).train()
        self._optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper)

    def step(self, items: Sequence[int]) -> Step:
        """One step on these items, seconds an image."""
        batch, load = _timed(lambda: self.loader.collate_fn([self.loader.dataset[item] for item in items]))
        _, compute = _timed(lambda: self.model.train_step(batch, self._optimizer), self._cuda)
        return Step(load / len(items), compute / len(items))

    def read(self, items: Sequence[int]) -> tuple[float, float]:
        """Seconds and bytes an image of reading these items' targets."""
        dataset = self.loader.dataset
        rows = [(dataset.get_data_info(item)["img_id"], item % dataset.views) for item in items]
        caches = [t.cache for t in dataset.dataset.pipeline.transforms if isinstance(t, LoadTeacherTargets)]
        read, seconds = _timed(lambda: [cache[row].copy() for cache in caches for row in rows])
        return seconds / len(rows), sum(targets.buffer.nbytes for targets in read) / len(rows)


def _time_teacher(trial: Recipe, name: str, place: Place, rounds: int, rows: set[tuple[int, int]]) -> TeacherSeconds:
    """Time a teacher as a precompute runs it, and fill the trial's cache with the rows that the student's batches ask for."""
    spec, info = trial.teachers[name], teacher_info(trial, name)
    images = read_annotations(trial.dataset.train.ann_file, "dataset.train.ann_file").images
    teacher, start = _timed(lambda: Teacher.of_group(spec, info, place.device))
    computer = UnitComputer(teacher, info, trial.policy, trial.dataset.train, spec.batch_size)
    # a precompute decodes an image once for all its views in a unit, and looks at so many views of one shape at once
    views = len(trial.policy)
    together = -(-spec.batch_size // views) * views
    units = list(make_plan(images, trial.policy, info, unit_rows=together).units())
    units = [unit for unit in units if len(unit.rows) == together] or units
    decoding, computing = [], []
    # shapes as often as they are in the data: units come bucket by bucket
    for place_in_list in np.linspace(0, len(units) - 1, rounds + 1):
        unit = units[int(place_in_list)]
        (decoded, unusable), seconds = _timed(lambda unit=unit: computer.decode(unit))
        if not decoded:
            raise RecipeError(f"dataset.train: {unusable[0].file_name} {unusable[0].reason}; mend or remove it.")
        decoding.append(seconds / len(decoded))
        batch = decoded[: spec.batch_size]
        (targets, refused), seconds = _timed(lambda batch=batch: computer.compute(batch))
        if not targets:
            raise RecipeError(f"teachers.{name}: {refused[0].file_name}: {refused[0].reason}.")
        computing.append(seconds / len(batch))
    writing = _time_write(trial, make_plan(images, trial.policy, info, unit_rows=trial.cache.unit_rows), unit, targets)
    _fill(trial, make_plan(images, trial.policy, info, wanted=_mask(images.ids, views, rows)), computer)
    return TeacherSeconds(start, statistics.median(decoding[1:]), statistics.median(computing[1:]), writing)


def _time_write(trial: Recipe, plan: Plan, like: Unit, targets: Sequence[RowTargets]) -> float:
    """Seconds a row of writing a unit of the recipe's size, filled with the targets that there are."""
    bucket = next(bucket for bucket in plan.buckets if bucket.name == like.bucket)
    numbers = range(min(bucket.slots, bucket.rows))
    filled = [replace(t, row=replace(t.row, row=n)) for n, t in zip(numbers, cycle(targets), strict=False)]
    unit = Unit(bucket.name, 0, bucket.slots, tuple(t.row for t in filled))
    storage = open_storage(f"{trial.cache.uri}-written")
    times = [_timed(lambda: write_unit(storage, plan.info, unit, filled))[1] for _ in range(_WRITES)]
    return statistics.median(times) / len(filled)


def _fill(trial: Recipe, plan: Plan, computer: UnitComputer) -> None:
    """A precompute of what is wanted."""
    storage, info = open_storage(trial.cache.uri), plan.info
    prepare(storage, plan)
    if info.head is not None:
        write_head(storage, info, head_file(trial.teachers[info.teacher], info.teacher))
    for unit in plan.units():
        targets, failures = computer.run(unit)
        if failures:
            raise RecipeError(f"dataset.train: {failures[0].file_name}: {failures[0].reason}; mend or remove it.")
        write_unit(storage, info, unit, targets)


def _mask(ids: np.ndarray, views: int, rows: set[tuple[int, int]]) -> np.ndarray:
    """(n, views) bool: whether a row is among these."""
    return np.array([[(image_id, view) in rows for view in range(views)] for image_id in ids.tolist()])


def _time_stage(trial: Recipe, number: int, place: Place, batches: _TrainingBatches) -> StageSeconds:
    """The three kinds of step of a stage, counted from 0, in turn."""
    spec = trial.stages[number]
    # a later stage begins with the student of the one before, which there is not: here each is the first
    first = trial.model_copy(update={"stages": (spec, *trial.stages[:number], *trial.stages[number + 1 :])})
    cfg = stage_config(first, 1)
    interval = cfg.train_cfg.val_interval
    evaluations = -(-spec.epochs // interval)  # and after the last epoch, where it does not divide
    contenders = {"plain": _Contender(batches.cfg, place)}
    if spec.teachers:
        contenders["cached"] = _Contender(cfg, place)
        contenders["online"] = _Contender(stage_config(first, 1, "online"), place)
    steps: dict[str, list[Step]] = {kind: [] for kind in contenders}
    reads = [(0.0, 0.0)]
    for items in batches.items:
        for kind, contender in contenders.items():
            steps[kind].append(contender.step(items))
        if spec.teachers:
            reads.append(contenders["cached"].read(items))
    middle = {kind: _middle(of[1:]) for kind, of in steps.items()}
    plain = middle["plain"]
    return StageSeconds(
        plain=plain,
        cached=middle.get("cached", plain),
        online=middle.get("online", plain),
        read=statistics.median(seconds for seconds, _ in reads[1:] or reads),
        read_bytes=statistics.mean(count for _, count in reads[1:] or reads),
        evaluations=evaluations,
    )


def _time_evaluation(cfg: Config, place: Place, rounds: int) -> Step:
    """An image of an evaluation."""
    loader, model = _loader(cfg.val_dataloader), _model(cfg, place.device).eval()
    steps = []
    for items in islice(cycle(loader.batch_sampler), rounds + 1):
        batch, load = _timed(lambda items=items: loader.collate_fn([loader.dataset[item] for item in items]))
        _, compute = _timed(lambda batch=batch: model.val_step(batch), place.device == "cuda")
        steps.append(Step(load / len(items), compute / len(items)))
    return _middle(steps[1:])


def _middle(steps: Sequence[Step]) -> Step:
    return Step(statistics.median(s.load for s in steps), statistics.median(s.compute for s in steps))


def _loader(config: Any) -> Any:
    """A loader of a config whose samples are made in this process."""
    alone = dict(num_workers=0, persistent_workers=False, pin_memory=False)
    kept = {key: value for key, value in config.items() if key not in ("multiprocessing_context", "prefetch_factor")}
    return Runner.build_dataloader(kept | alone, seed=0)


def _model(cfg: Config, device: str) -> Any:
    """A stage's model with initialised weights; none is downloaded."""
    model = MODELS.build(cfg.model)
    for module in model.modules():
        given = getattr(module, "init_cfg", None) or []
        if any(one["type"] == "Pretrained" for one in ([given] if isinstance(given, dict) else given)):
            module.init_cfg = None
    model.student.init_weights()
    return model.to(device)


def _timed(work: Callable[[], Any], cuda: bool = False) -> tuple[Any, float]:
    """What it returns, and its wall seconds, those of the GPU's queue included."""
    begin = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin
