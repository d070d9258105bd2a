"""The order of teachers: of which rows and models costs are computed, and whom to learn from in which turn.

Backward greedy selection is an idea of the MTPD paper; what is done here is this project's own reconstruction, for the paper's
thresholds are not published as code. `trainer.adaptation` has the costs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache import RecipeError
from trainer.annotations import read_annotations
from trainer.config import class_options, load_config, plain_dict
from trainer.mechanisms import MECHANISMS
from trainer.recipe import Recipe
from trainer.specs import StageSpec, TeacherSpec

STUDENT = "student"  # its name among the candidates
_FEATURES = {"type": "FeatureMatchingLoss"}
Key = tuple[int, int]  # image id, view


def trained_student(recipe: Recipe) -> str:
    """The checkpoint of the student whose features are compared.

    Raises:
        RecipeError: there is none, or the teachers cannot be put in order: there are no teachers, one has the student's name,
            or the student sees reduced views.
    """
    if not recipe.teachers:
        raise RecipeError("teachers: there are none to put in order.")
    if STUDENT in recipe.teachers:
        raise RecipeError(f"teachers.{STUDENT}: the order of teachers needs this name for the student; choose another.")
    if recipe.student.input_scale != 1:
        raise RecipeError(
            "student.input_scale: the order of teachers compares features of whole views, which this student does not see. "
            "Name the stages, or find the order with scale 1."
        )
    checkpoint = recipe.order.checkpoint or recipe.student.checkpoint
    if checkpoint is None:
        raise RecipeError(
            "order.checkpoint: the order of teachers compares the features of a trained student with theirs, and there is "
            "none, here or as student.checkpoint. Give one, or train the student alone first: a recipe with "
            "`stages: [{epochs: 12}]` leaves it in WORK_DIR/stage-1/student.pth."
        )
    return str(checkpoint)


def with_candidates(recipe: Recipe) -> Recipe:
    """The recipe with the student as a teacher too, named ``student``, and a stage for every teacher.

    So the student's features are precomputed and cached like any teacher's. It has the data set's classes, as in training.
    What a stage's mechanisms need decides what is stored of its teacher: a teacher without a stage gets one with the
    mechanisms of ``order``. Where these want no features, plain feature matching joins them.

    Raises:
        RecipeError: see `trained_student`.
    """
    checkpoint, spec = trained_student(recipe), recipe.student
    model = plain_dict(load_config(spec.config, spec.cfg_options, "student.config").model)
    classes = len(read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").classes)
    student = TeacherSpec(
        config=spec.config,
        checkpoint=checkpoint,
        cfg_options={**spec.cfg_options, **class_options(model, classes)},
        capture=spec.capture,
    )
    staged = {name for stage in recipe.stages for name in stage.teachers}
    wanted = [stage for stage in recipe.stages if stage.teachers]
    wanted += [
        StageSpec(teacher=name, mechanisms=recipe.order.mechanisms or (_FEATURES,))
        for name in recipe.teachers
        if name not in staged
    ]
    wanted = [stage.model_copy(update={"mechanisms": _with_features(stage.mechanisms)}) for stage in wanted]
    wanted.append(StageSpec(teacher=STUDENT, mechanisms=(_FEATURES,)))
    return recipe.model_copy(update={"teachers": {**recipe.teachers, STUDENT: student}, "stages": tuple(wanted)})


def _with_features(mechanisms: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    wanted = any("features" in MECHANISMS.get(mechanism["type"]).needs for mechanism in mechanisms)
    return tuple(mechanisms) if wanted else (*mechanisms, _FEATURES)


@dataclass(frozen=True)
class OrderRows:
    """The rows from which costs are computed: (image id, view) to fit on, and to score on; no image is in both."""

    fit: tuple[Key, ...]
    score: tuple[Key, ...]

    def __len__(self) -> int:
        return len(self.fit) + len(self.score)

    def wanted(self, image_ids: npt.NDArray[np.int64], views: int) -> npt.NDArray[np.bool_]:
        """The rows among all: (n, views) bool for n images."""
        chosen = dict(self.fit + self.score)
        return np.array([chosen.get(image_id, -1) for image_id in image_ids.tolist()])[:, None] == np.arange(views)


def choose_rows(image_ids: Sequence[int], views: int, count: int, seed: int = 0) -> OrderRows:
    """``count`` images (all if there are fewer), each in one view, split into halves.

    A hash of seed and id decides: those with the least are taken, in turn for fitting and for scoring, and what is left of it
    when divided by the number of views is the view. So the order of the images does not matter, and the rows of an image
    stay the same when others join the data set.
    """

    def digest(image_id: int) -> int:
        return int.from_bytes(hashlib.blake2b(f"{seed} {image_id}".encode(), digest_size=8).digest(), "little")

    chosen = sorted((digest(image_id), image_id) for image_id in image_ids)[:count]
    keys = [(image_id, hashed % views) for hashed, image_id in chosen]
    return OrderRows(tuple(keys[::2]), tuple(keys[1::2]))


@dataclass(frozen=True)
class Selection:
    """The teachers to learn from, the first first, and for every candidate one sentence on why it was taken or left."""

    sequence: tuple[str, ...]
    reasons: dict[str, str]


def select_teachers(
    student: Mapping[str, float],
    pairs: Mapping[tuple[str, str], float],
    accuracies: Mapping[str, float],
    max_teachers: int,
) -> Selection:
    """Backward greedy selection: the best teacher is the last; before it comes, again and again, the nearest that helps.

    A teacher T is put before the current first one, F, if it is easier for the student than F is, and nearer to F than the
    student is: C(S -> T) < C(S -> F) and C(T -> F) < C(S -> F). Of several the one with the least C(T -> F) is taken. It ends
    when there is none, or at ``max_teachers``.

    Args:
        student: C(student -> T) of each candidate.
        pairs: C(T -> U) of each ordered pair of candidates.
        accuracies: of each candidate, in points; of equal ones, and of equal costs, the candidate named first wins.
        max_teachers: the longest sequence, at least 1.
    """
    last = max(accuracies, key=lambda name: accuracies[name])
    reasons = {last: f"taken as the last: the most accurate, {accuracies[last]:.1f} AP"}
    sequence = [last]
    while len(sequence) < max_teachers:
        first = sequence[0]
        fitting = [t for t in accuracies if t not in sequence and _why_not(t, first, student, pairs) is None]
        if not fitting:
            break
        taken = min(fitting, key=lambda name: pairs[name, first])
        reasons[taken] = (
            f"taken before {first}: {_c(taken, first, pairs[taken, first])} is less than {_c(STUDENT, first, student[first])}"
            f", and {_c(STUDENT, taken, student[taken])} too"
            + (f"; the nearest to {first} of {len(fitting)} that fit" if len(fitting) > 1 else "")
        )
        sequence.insert(0, taken)
    for name in accuracies.keys() - reasons.keys():
        reasons[name] = "left: " + (
            _why_not(name, sequence[0], student, pairs)
            or f"the sequence has its {max_teachers} teachers (max_teachers)"
        )
    return Selection(tuple(sequence), {name: reasons[name] for name in accuracies})


def _why_not(name: str, first: str, student: Mapping[str, float], pairs: Mapping[tuple[str, str], float]) -> str | None:
    """Why a teacher cannot come before the first one, or None if it can."""
    bound = _c("student", first, student[first])
    if not student[name] < student[first]:
        return f"not easier for the student than {first} is: {_c(STUDENT, name, student[name])}, {bound}"
    if not pairs[name, first] < student[first]:
        return f"no nearer to {first} than the student is: {_c(name, first, pairs[name, first])}, {bound}"
    return None


def _c(a: str, b: str, cost: float) -> str:
    return f"C({a} -> {b}) {cost:.3f}"
