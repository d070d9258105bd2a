"""The recipe's schema. Everything that can be known to be wrong is refused here, before anything runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from cache import Policy, RecipeError
from trainer.mechanisms import MECHANISMS
from trainer.specs import (
    ActorsSpec,
    CacheSpec,
    DatasetSpec,
    OrderSpec,
    Spec,
    StageSpec,
    StudentSpec,
    TeacherSpec,
    TrainingSpec,
    ViewsSpec,
)


def _stages(value: Any) -> Any:
    if value == "auto":
        return ()
    if isinstance(value, list | tuple) and not value:
        raise ValueError("at least one stage, or auto")
    return value


class Recipe(Spec):
    """A whole job, from images to a trained student.

    Attributes:
        stages: ``auto`` leaves them to the order of teachers (`mtpd order`); they are empty here until it is known.
    """

    dataset: DatasetSpec
    views: ViewsSpec
    cache: CacheSpec
    actors: ActorsSpec = ActorsSpec()
    teachers: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], TeacherSpec] = Field(default_factory=dict)
    student: StudentSpec
    stages: Annotated[tuple[StageSpec, ...], BeforeValidator(_stages)]
    order: OrderSpec = OrderSpec()
    training: TrainingSpec = TrainingSpec()
    work_dir: str

    @model_validator(mode="after")
    def _stages_name_teachers(self) -> "Recipe":
        for number, stage in enumerate(self.stages, start=1):
            for name in stage.teachers:
                if name not in self.teachers:
                    known = ", ".join(self.teachers) or "none"
                    raise ValueError(f"stages.{number}.teacher: {name!r} is not in `teachers` ({known})")
        if self.auto and not (self.teachers and self.order.mechanisms):
            raise ValueError("stages: auto needs `teachers` to choose from, and `order.mechanisms` for its stages")
        mechanisms = (*self.order.mechanisms, *(m for stage in self.stages for m in stage.mechanisms))
        for kind in (m["type"] for m in mechanisms if MECHANISMS.get(m["type"]).needs & {"dense", "head"}):
            if self.student.input_scale != 1:
                raise ValueError(
                    f"student.input_scale: {kind} compares heads position by position, which needs scale 1"
                )
        if isinstance(self.student.inherit, str) and self.student.inherit not in self.teachers:
            raise ValueError(
                f"student.inherit: {self.student.inherit!r} is not in `teachers` ({', '.join(self.teachers)})"
            )
        if self.student.inherit is True and not self.auto and self.stages[0].teacher is None:
            raise ValueError("student.inherit: the first stage has no teacher to inherit from; name one")
        return self

    @model_validator(mode="after")
    def _detections_are_stored(self) -> "Recipe":
        for stage in self.possible_stages:
            kinds = (m["type"] for m in stage.mechanisms if "detections" in MECHANISMS.get(m["type"]).needs)
            for name in stage.teachers:
                if self.teachers[name].detections is False and (kind := next(kinds, None)):
                    raise ValueError(
                        f"teachers.{name}.detections: false, but {kind} learns from them. Leave the key out, or take other "
                        f"mechanisms for {name}"
                    )
        return self

    @property
    def inherit_from(self) -> str | None:
        """The teacher whose neck and heads the student begins with."""
        chosen = self.student.inherit
        return self.stages[0].teachers[0] if chosen is True else chosen or None

    @property
    def auto(self) -> bool:
        """Whether the stages are left to the order of teachers, which is not known yet."""
        return not self.stages

    def with_sequence(self, teachers: Sequence[str]) -> "Recipe":
        """The recipe with one stage for each of these teachers, as its ``order`` says."""
        order = self.order
        stages = tuple(StageSpec(teacher=t, mechanisms=order.mechanisms, epochs=order.epochs) for t in teachers)
        return self.model_copy(update={"stages": stages})

    @property
    def possible_stages(self) -> tuple[StageSpec, ...]:
        """Its stages; while they are left to the order of teachers, one for each teacher."""
        return self.with_sequence(list(self.teachers)).stages if self.auto else self.stages

    @property
    def policy(self) -> Policy:
        """The view policy."""
        return self.views.policy(self.dataset.train.ann_file)


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe. Relative paths in it are relative to the working directory.

    Raises:
        RecipeError: one line for each fault: file, key, what is wrong, and the value.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    return parse_recipe(content, str(path))


def parse_recipe(content: Any, where: str) -> Recipe:
    """Check a recipe's content; see `load_recipe`."""
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}.")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError("\n".join(_fault(where, fault) for fault in error.errors())) from None
    local = {
        name: value for name, value in (("work_dir", recipe.work_dir), ("uri", recipe.cache.uri)) if "://" not in value
    }
    absolute = {name: str(Path(value).expanduser().absolute()) for name, value in local.items()}
    return recipe.model_copy(
        update={
            "work_dir": absolute.get("work_dir", recipe.work_dir),
            "cache": recipe.cache.model_copy(update={"uri": absolute.get("uri", recipe.cache.uri)}),
        }
    )


def _fault(where: str, fault: Any) -> str:
    # stages and mechanisms are counted from 1 everywhere the user sees them
    first = 1 if fault["loc"][:1] in (("stages",), ("order",)) else 0
    location = [part + first if isinstance(part, int) else str(part) for part in fault["loc"] if part != "[key]"]
    key = ".".join(str(part) for part in location)
    where = f"{where}: {key}" if key else where
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"{where}: required, but missing"
    if fault["type"] == "extra_forbidden":
        return f"{where}: no such key"
    value = "" if isinstance(fault["input"], Mapping) else f" (got {fault['input']!r})"
    return f"{where}: {message}{value}"
