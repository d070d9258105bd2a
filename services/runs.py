"""What trained runs left on disk, read back: stages, their results and scalars, precomputes, the order of teachers.

Everything here is read for people to look at: what is not there, or cannot be read, is None or
empty; a record of another shape ends in one message that names the folder.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from cache import RecipeError, fingerprint, group_name
from services.records import RECIPE, read_json

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class ValSet:
    """What a student was evaluated on.

    Attributes:
        ann_file: its annotation file, as the config or the recipe names it.
        classes: their names, in the order of labels; empty where only the recipe is there.
        scale: the size that images were resized into, as mmdet's `Resize` takes it; empty where that is not known.
    """

    ann_file: str
    classes: tuple[str, ...] = ()
    scale: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One stage of a run, trained or not.

    Attributes:
        number: from 1.
        teachers: their names; empty for a student that is trained alone.
        mechanisms: their types, numbered as their losses are where one occurs twice.
        epochs: as planned.
        first_epoch: epochs of the stages before it.
        begun: it has a folder.
        result: the record of its `StageResult`; None if it is not done.
        curves: per training scalar its values over the epochs of the stage, as logged: ``loss``, ``loss_cls``, ``lr``, ...
        evaluations: per COCO metric (``bbox_mAP``) its values over the epochs of the stage, in [0, 1].
        not_finite: per scalar how many of its values were NaN or Inf, which the curves leave out.
        groups: names of the cache's groups that it reads.
        val: what it is evaluated on; None where it was not begun.
    """

    number: int
    folder: Path
    teachers: tuple[str, ...]
    mechanisms: tuple[str, ...]
    epochs: int
    first_epoch: int
    begun: bool
    result: dict[str, Any] | None
    curves: dict[str, Points]
    evaluations: dict[str, Points]
    not_finite: dict[str, int]
    groups: tuple[str, ...] = ()
    val: ValSet | None = None

    @property
    def label(self) -> str:
        """Its teachers for people."""
        return " + ".join(self.teachers) or "student alone"

    def metric(self, name: str) -> float | None:
        """A COCO metric at its end, in [0, 1]; None where it is not known, or not defined (COCO's -1)."""
        value = (self.result or {}).get("metrics", {}).get(name)
        return None if value is None or value < 0 else float(value)

    @property
    def targets(self) -> int:
        """(teacher, image, view)s that the student was trained on: the forwards of teachers run beside it."""
        return 0 if self.result is None else self.result["images"] * len(self.teachers)

    @property
    def live_forwards(self) -> int:
        """Forwards that teachers made beside the student; 0 when trained from the cache."""
        return 0 if self.result is None else self.result["teacher_forwards"]


@dataclass(frozen=True)
class Run:
    """A folder with stages.

    Attributes:
        recipe: what ``recipe.json`` holds; empty without one.
        fills: per teacher the records of its precomputes, the oldest first.
        order: what ``order.json`` holds; None without one, or where it holds measured accuracies alone.
    """

    name: str
    folder: Path
    recipe: dict[str, Any]
    stages: tuple[Stage, ...]
    fills: dict[str, list[dict[str, Any]]]
    order: dict[str, Any] | None

    @property
    def done(self) -> tuple[Stage, ...]:
        """The stages that have a result."""
        return tuple(stage for stage in self.stages if stage.result is not None)

    @property
    def seconds(self) -> float:
        """Training time of all stages that are done."""
        return sum(stage.result["seconds"] for stage in self.done if stage.result)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers of all stages, each once, in order."""
        return tuple(dict.fromkeys(name for stage in self.stages for name in stage.teachers))

    @property
    def val(self) -> ValSet | None:
        """What its latest stage is evaluated on, or else what the recipe says; None where neither is there."""
        if found := [stage.val for stage in self.stages if stage.val is not None]:
            return found[-1]
        ann_file = self.recipe.get("dataset", {}).get("val", {}).get("ann_file")
        return None if ann_file is None else ValSet(str(ann_file))

    @cached_property
    def student(self) -> str:
        """Its student for people: detector and backbone."""
        config = (read_json(self.stages[0].folder / "stage.json") or {}).get("model", {}).get("student", {})
        backbone = config.get("backbone", {})
        parts = [str(config.get("type", "")), f"{backbone.get('type', '')}{_dash(backbone.get('depth'))}"]
        return ", ".join(part for part in parts if part)

    def series(self, metric: str) -> Points:
        """A COCO metric over the epochs of all stages in sequence, in points."""
        return tuple(
            (stage.first_epoch + epoch, 100 * value)
            for stage in self.stages
            for epoch, value in stage.evaluations.get(metric, ())
        )

    def curve(self, scalar: str) -> tuple[Points, ...]:
        """A training scalar over the epochs of all stages, a piece for each stage that has it."""
        return tuple(
            tuple((stage.first_epoch + epoch, value) for epoch, value in stage.curves[scalar])
            for stage in self.stages
            if stage.curves.get(scalar)
        )


def find_runs(work_dir: Path) -> list[Run]:
    """The runs in a folder: itself if it holds stages, and those of its folders that do, by name.

    Raises:
        RecipeError: no stage anywhere.
    """
    if not work_dir.is_dir():
        raise RecipeError(f"{work_dir}: no such folder. Give the work_dir of a recipe, or a folder of several.")
    folders = [work_dir, *sorted(path for path in work_dir.iterdir() if path.is_dir())]
    found = [folder for folder in folders if _stage_folders(folder)]
    if not found:
        raise RecipeError(
            f"{work_dir}: holds no stage-N, nor do its folders. Give the work_dir of a recipe that `mtpd train` or `mtpd run` "
            "has begun."
        )
    return [_checked(folder) for folder in found]


def _require(record: Any, *keys: str) -> None:
    if not isinstance(record, dict) or (lacking := [key for key in keys if key not in record]):
        raise ValueError(f"lacks {', '.join(lacking)}" if isinstance(record, dict) else f"{record!r} is no record")


def _checked(folder: Path) -> Run:
    try:
        return read_run(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(
            f"{folder}: recipe.json, order.json, a precompute-*.json, stage.json or result.json in it is not what `mtpd` wrote "
            f"({error!r}). Delete the damaged file: the report says what is missing then."
        ) from error


def read_run(folder: Path) -> Run:
    """One run: the stages that its recipe names, and those that are there."""
    recipe = read_json(folder / RECIPE) or {}
    planned = recipe.get("stages")
    specs: list[dict[str, Any]] = planned if isinstance(planned, list) else []
    begun = _stage_folders(folder)
    stages: list[Stage] = []
    for number in range(1, max(len(specs), *begun, 0) + 1):
        spec = specs[number - 1] if number <= len(specs) else {}
        before = stages[-1].first_epoch + stages[-1].epochs if stages else 0
        stages.append(_read_stage(folder / f"stage-{number}", number, spec, before))
    fills = {}
    for file in sorted(folder.glob("precompute-*.json")):
        content = read_json(file)
        if isinstance(content, dict) and isinstance(content.get("runs"), list):
            fills[str(content["teacher"])] = content["runs"]
    order = read_json(folder / "order.json")
    if isinstance(order, dict) and order.keys() <= {"evaluated"}:
        order = None  # an order that was interrupted: the accuracies measured by then are kept for the next one
    _require(recipe.get("cache", {}))
    for record in (record for records in fills.values() for record in records):
        _require(record, "group", "computed", "failures", "seconds", "written_bytes", "device_share", "ended")
    for record in (stage.result for stage in stages if stage.result is not None):
        _require(record, "epochs", "images", "metrics", "seconds", "teacher_forwards")
    if order is not None:
        _require(order, "costs", "aps", "sequence", "reasons")
    return Run(folder.name, folder, recipe, tuple(stages), fills, order)


def _stage_folders(folder: Path) -> dict[int, Path]:
    """The folders of stages that were begun, by number."""
    named = {path.name.removeprefix("stage-"): path for path in folder.glob("stage-*") if path.is_dir()}
    return {int(number): path for number, path in named.items() if number.isdigit() and int(number) > 0}


def _read_stage(folder: Path, number: int, spec: dict[str, Any], before: int) -> Stage:
    # what the stage ran with counts, the recipe only for stages that were not begun
    config = read_json(folder / "stage.json") or {}
    result = read_json(folder / "result.json")
    model = config.get("model", {})
    teachers = list(model["teachers"]) if "teachers" in model else _names(spec.get("teacher"))
    mechanisms = model.get("mechanisms", spec.get("mechanisms", ()))
    epochs = int(
        config.get("train_cfg", spec).get("max_epochs", spec.get("epochs", 0)) or (result or {}).get("epochs", 0)
    )
    training, evaluations = _merge(sorted(folder.glob("*/vis_data/scalars.json")))
    per_epoch = _iterations(training, config, result)
    values = {
        key: [(step / per_epoch, float(line[key])) for step, line in training if isinstance(line.get(key), int | float)]
        for key in dict.fromkeys(key for _, line in training for key in line)
        if _is_shown(key)
    }
    metrics: dict[str, dict[float, float]] = {}
    for epoch, line in evaluations:
        for key, value in line.items():
            if "/" in key and isinstance(value, int | float):
                metrics.setdefault(key.rpartition("/")[2], {})[float(epoch)] = float(value)
    for key, value in ((result or {}).get("metrics") or {}).items():
        metrics.setdefault(key, {})[float(result["epochs"])] = float(value)  # type: ignore[index]
    for key in (key for key in metrics if key.endswith("_mAP")):
        for epoch, _ in evaluations:  # of a student that detects nothing mmdet gives no metrics
            metrics[key].setdefault(float(epoch), 0.0)
    return Stage(
        number=number,
        folder=folder,
        teachers=tuple(teachers),
        mechanisms=tuple(_numbered([str(m.get("type")) for m in mechanisms])),
        epochs=epochs,
        first_epoch=before,
        begun=folder.is_dir(),
        result=result,
        curves={key: tuple(p for p in points if math.isfinite(p[1])) for key, points in values.items()},
        evaluations={k: tuple(sorted(points.items())) for k, points in metrics.items() if max(points.values()) >= 0},
        not_finite={k: n for k, points in values.items() if (n := sum(not math.isfinite(v) for _, v in points))},
        groups=tuple(_groups(config)),
        val=_val_set(config),
    )


def _val_set(config: dict[str, Any]) -> ValSet | None:
    dataset = config.get("val_dataloader", {}).get("dataset", {})
    if "ann_file" not in dataset:
        return None
    scale = next((t["scale"] for t in dataset.get("pipeline", ()) if t["type"] == "Resize" and "scale" in t), ())
    return ValSet(dataset["ann_file"], tuple(dataset.get("metainfo", {}).get("classes", ())), tuple(scale))


def _groups(config: Any) -> Iterator[str]:
    """The groups that a stage's config reads, at any depth."""
    if isinstance(config, dict):
        if config.get("type") == "LoadTeacherTargets":
            yield group_name(config["teacher"], fingerprint(config["fingerprint"]))
        config = list(config.values())
    if isinstance(config, list):
        for inner in config:
            yield from _groups(inner)


def _merge(files: Iterable[Path]) -> tuple[list[tuple[int, dict[str, Any]]], list[tuple[int, dict[str, Any]]]]:
    """mmengine's scalars of a stage, oldest file first: training by iteration, evaluations by epoch.

    A stage that was resumed has several files, and the later one does again what was done after the last checkpoint.
    """
    merged: tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]] = ({}, {})
    for file in files:
        here: tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]] = ({}, {})
        for text in file.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
                here["lr" not in line][int(line["step"])] = line
            except (ValueError, KeyError, TypeError):
                continue  # a line that a kill cut off
        for known, new in zip(merged, here, strict=True):
            for step in [step for step in known if new and step >= min(new)]:
                del known[step]
            known.update(new)
    training, evaluations = (sorted(lines.items()) for lines in merged)
    return training, evaluations


def _iterations(
    training: list[tuple[int, dict[str, Any]]], config: dict[str, Any], result: dict[str, Any] | None
) -> float:
    """Iterations of an epoch. An epoch's first line comes after equally many iterations in each."""
    first: dict[int, int] = {}
    for step, line in training:
        first.setdefault(int(line.get("epoch", 1)), step)
    if len(first) > 1:
        start, end = min(first), max(first)
        return (first[end] - first[start]) / (end - start)
    batch = config.get("train_dataloader", {}).get("batch_size")
    if result is not None and batch:
        return max(1, math.ceil(result["images"] / result["epochs"] / batch), *(step for step, _ in training))
    return max((step for step, _ in training), default=1)


def _is_shown(key: str) -> bool:
    return "loss" in key or key in ("lr", "grad_norm")


def _names(teacher: Any) -> list[str]:
    return [] if teacher is None else [teacher] if isinstance(teacher, str) else [str(name) for name in teacher]


def _numbered(types: list[str]) -> list[str]:
    return [t if types.count(t) == 1 else f"{t}_{types[: n + 1].count(t)}" for n, t in enumerate(types)]


def _dash(value: Any) -> str:
    return "" if value is None else f"-{value}"
