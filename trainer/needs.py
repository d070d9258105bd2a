"""What a recipe's mechanisms want of a teacher: that is stored, and no more."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mmdet.registry import MODELS

from cache import Level
from trainer.capture import measure_levels
from trainer.config import load_config
from trainer.mechanisms import MECHANISMS
from trainer.mechanisms.base import pair
from trainer.recipe import Recipe
from trainer.teacher import measured


@dataclass(frozen=True)
class Needs:
    """What is wanted of one teacher.

    Attributes:
        levels: whose maps, in the order in which the teacher gives them.
        top_k: positions a level of the dense head's outputs; 0 for none.
        detections: what it detects.
        head: its dense head's weights.
    """

    levels: tuple[str, ...]
    top_k: int
    detections: bool
    head: bool


def needs_of(recipe: Recipe, teacher: str, stage: int | None = None) -> Needs:
    """What a recipe's stages, or one of them (numbered from 1), want of a teacher.

    A teacher that no stage names is wanted whole. A recipe that names ``teachers.NAME.levels`` stores these.

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
    return Needs(tuple(levels), spec.top_k if "dense" in needs else 0, "detections" in needs, "head" in needs)


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
    return measure_levels(MODELS.build(model), capture, "student.capture")
