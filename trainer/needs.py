"""What a recipe's mechanisms want of a teacher: that is stored, and no more."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from cache import Level
from trainer.annotations import read_annotations
from trainer.capture import measure_levels
from trainer.config import build_detector, load_config, set_classes
from trainer.mechanisms import MECHANISMS
from trainer.mechanisms.base import pair
from trainer.recipe import Recipe
from trainer.specs import StudentSpec, TeacherSpec
from trainer.teacher import build_model, measured


@dataclass(frozen=True)
class Needs:
    """What is wanted of one teacher.

    Attributes:
        levels: whose maps, in the order in which the teacher gives them.
        top_k: positions a level of the dense head's outputs; 0 for none.
        detections: whether what it detects is.
        head: its dense head's weights.
    """

    levels: tuple[str, ...]
    top_k: int
    detections: bool
    head: bool


def needs_of(recipe: Recipe, teacher: str, stage: int | None = None) -> Needs:
    """What a recipe's stages, or one of them (numbered from 1), want of a teacher.

    A teacher that no stage names is wanted whole. What a recipe says by ``teachers.NAME.levels`` and ``teachers.NAME.detections``
    is stored as it says; what one stage reads follows from its mechanisms alone.

    Raises:
        RecipeError: a mechanism finds no level that student and teacher have in common.
    """
    spec = recipe.teachers[teacher]
    stages = recipe.possible_stages if stage is None else recipe.stages[stage - 1 : stage]
    wanted = [mechanism for one in stages if teacher in one.teachers for mechanism in one.mechanisms]
    needs = {need for mechanism in wanted for need in MECHANISMS.get(mechanism["type"]).needs}
    if not wanted or (stage is None and spec.levels is not None):
        levels = spec.levels or tuple(level.name for level in measured(spec, teacher)[0])
    else:
        levels = _levels(recipe, teacher, wanted)
    detections = "detections" in needs or not wanted
    if stage is None and spec.detections is not None:
        detections = spec.detections
    return Needs(tuple(levels), spec.top_k if "dense" in needs else 0, detections, "head" in needs)


def on_heads(recipe: Recipe, teacher: str) -> list[Mapping[str, Any]]:
    """The mechanisms of a teacher's stages that want more of it than features."""
    stages = [stage for stage in recipe.possible_stages if teacher in stage.teachers]
    return [
        one
        for stage in stages
        for one in stage.mechanisms
        if MECHANISMS.get(one["type"]).needs & {"dense", "detections", "head"}
    ]


def refuse_unfit(recipe: Recipe, teacher: str) -> None:
    """Refuse a teacher whose head or detections the student cannot learn from by the mechanisms of its stages.

    Both detectors are built with random weights: a recipe is refused before any teacher is run.

    Raises:
        RecipeError: see `Mechanism.refuse_unfit` of the mechanisms.
    """
    mechanisms = on_heads(recipe, teacher)
    if not mechanisms:
        return
    classes = len(read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").classes)
    given = (recipe.student, recipe.teachers[teacher])
    _refuse_unfit(*(json.dumps(one.model_dump(mode="json")) for one in given), teacher, json.dumps(mechanisms), classes)


# building two detectors takes seconds; a command asks several times
@lru_cache(maxsize=32)
def _refuse_unfit(student: str, teacher: str, name: str, mechanisms: str, classes: int) -> None:
    spec, theirs = StudentSpec.model_validate_json(student), TeacherSpec.model_validate_json(teacher)
    config = load_config(spec.config, spec.cfg_options, "student.config")
    set_classes(config.model, classes)
    ours, master = build_detector(config.model, "student.config"), build_model(theirs, name)
    levels = [
        replace(level, stride=round(level.stride / spec.input_scale))
        for level in measure_levels(ours, spec.capture, "student.capture")
    ]
    known = [level for level in measured(theirs, name)[0] if theirs.levels is None or level.name in theirs.levels]
    pooled = [replace(level, pool=theirs.pool.get(level.name, 1)) for level in known]
    for one in json.loads(mechanisms):
        arguments = {key: value for key, value in one.items() if key != "type"}
        MECHANISMS.get(one["type"])(levels, pooled, **arguments).refuse_unfit(ours, master, theirs.capture)


def _levels(recipe: Recipe, teacher: str, mechanisms: Iterable[Mapping[str, Any]]) -> list[str]:
    """The levels that mechanisms match, in the teacher's order."""
    spec = recipe.teachers[teacher]
    known = measured(spec, teacher)[0]
    theirs = [level for level in known if spec.levels is None or level.name in spec.levels]
    found: set[str] = set()
    for mechanism in mechanisms:
        if "features" not in MECHANISMS.get(mechanism["type"]).needs:
            continue
        found |= set(pair(_student_levels(recipe), theirs, mechanism.get("levels"), mechanism["type"]))
    return [level.name for level in known if level.name in found]


def _student_levels(recipe: Recipe) -> tuple[Level, ...]:
    student = recipe.student
    return _measured_student(student.config, json.dumps(student.cfg_options, sort_keys=True), student.capture)


# building a detector takes seconds; a command asks for the same ones several times
@lru_cache(maxsize=32)
def _measured_student(config: str, options: str, capture: tuple[str, ...]) -> tuple[Level, ...]:
    model = load_config(config, json.loads(options), "student.config").model
    return measure_levels(build_detector(model, "student.config"), capture, "student.capture")
