"""The order of teachers: how well one detector's features predict another's, and whom to learn from in which turn.

The directed adaptation cost C(A -> B) and backward greedy selection are ideas of the MTPD paper; what is computed here is this
project's own reconstruction of both, for the paper's loss, split and thresholds are not published as code.

C(A -> B): on every level that both have, a linear map with an offset (what a 1x1 convolution can do) is fitted by ridge
regression from A's features to B's, position by position, on one half of the images. On the other half, its squared error,
summed over channels and positions, is divided by the sum of squares of B's features around the mean of each channel: 0 is a
perfect prediction, 1 no better than the mean, more than 1 worse. The cost is the mean of this over levels, each weighing its
number of values; that is the error over all values of B when every level is scaled to the same variance.

Why so. Inside a level it is one ratio of sums: a channel that hardly varies has a ratio of its own without meaning, and weighs
nothing here. Between levels it is not: nothing scales the levels of a pyramid alike, and the coarsest can be so loud that a
plain sum is about them alone. The demo's Swin teacher has 65 % of its sum of squares in P7, which is less than 1 % of its
values and which a student that is hardly trained predicts to 1 %: by a plain sum everything seems easy.

Everything comes from second moments (float64, with a constant column), which are summed in one pass over the images: of all
models at once, for the moments of all pairs are blocks of the moments of the joined features. Memory is bounded by their
size, whatever the number of images.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

from cache import RecipeError, Targets, TeacherCache, decode, pool
from trainer.annotations import read_annotations
from trainer.config import class_options, load_config, plain_dict
from trainer.mechanisms import MECHANISMS
from trainer.recipe import Recipe
from trainer.specs import StageSpec, TeacherSpec

STUDENT = "student"  # its name among the candidates
_FEATURES = {"type": "FeatureMatchingLoss"}
FloatArray = npt.NDArray[np.float64]
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
class Cost:
    """The adaptation cost of one ordered pair of models.

    Attributes:
        value: 0 perfect, 1 no better than the mean.
        levels: the same of each common level on its own, but for levels on which B is constant.
        variance: of each of these levels its share of B's sum of squares, as it would weigh without being scaled.
    """

    value: float
    levels: dict[str, float]
    variance: dict[str, float]


def adaptation_costs(
    caches: Mapping[str, TeacherCache],
    rows: OrderRows,
    *,
    ridge: float = 1e-4,
    positions: int | None = 512,
    seed: int = 0,
    block: int = 2048,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> dict[tuple[str, str], Cost]:
    """C(A -> B) of every ordered pair of models, each row of each cache read once.

    Features are compared at the positions of B's stored map, inside every model's own map. Where A's level is stored with a
    larger window it is enlarged (bilinear, ``align_corners=False``), with a smaller one averaged as the cache averages.

    Args:
        caches: the models' features; every one must hold all of ``rows``.
        ridge: added to the diagonal of A's covariance, in units of the mean variance of A's channels. 1e-4 is about the
            noise of int8 features: directions that are weaker carry nothing.
        positions: drawn of each level of each image, without replacement; those drawn stand for the others, by weight.
            None takes all.
        seed: of that draw, with image and view.
        block: positions of one level that are multiplied at once; changes speed and memory, and the result in its last bits.
        progress: called with rows done and rows in all.

    Raises:
        RecipeError: two models have no common level, or a model's features are the same everywhere.
        MissingRowsError: a row is not committed.
        CorruptShardError: a row is damaged.
    """
    fit, score = (_moments(caches, block) for _ in range(2))
    done, total = 0, len(rows)
    for moments, keys in ((fit, rows.fit), (score, rows.score)):
        for key in keys:
            targets = {name: cache[key] for name, cache in caches.items()}
            for one in moments:
                one.add({name: targets[name] for name in one.columns}, positions, seed)
            done += 1
            progress(done, total)
        for one in moments:
            one.flush()
    pairs = [(a, b) for a in caches for b in caches if a != b]
    return {(a, b): _cost(a, b, caches[b], fit, score, ridge) for a, b in pairs}


class _Moments:
    """Sums of products of several models' features at equal positions: of one level, on one grid.

    Args:
        level: its name.
        window: each position of the grid is a window of ``window`` x ``window`` of the detectors' own map.
        channels, windows: of every model that has the level, as it is stored.
        block: positions that are multiplied at once.

    Attributes:
        total: (D, D), D the sum of all channels, and a constant column as the last.
    """

    def __init__(
        self, level: str, window: int, channels: Mapping[str, int], windows: Mapping[str, int], block: int
    ) -> None:
        self.level, self.window, self._windows, self._block = level, window, windows, block
        ends = np.cumsum(list(channels.values())).tolist()
        self.columns = {name: slice(end - channels[name], end) for name, end in zip(channels, ends, strict=True)}
        self.total = np.zeros((ends[-1] + 1, ends[-1] + 1))
        self._pending = np.empty((block, ends[-1] + 1))
        self._filled = 0

    def add(self, targets: Mapping[str, Targets], positions: int | None, seed: int) -> None:
        """Take in one (image, view), of all models that have the level."""
        # own maps differ where detectors pad to different multiples; all begin at the top left
        sizes = [one.layout.map_sizes[self.level] for one in targets.values()]
        own = min(h for h, _ in sizes), min(w for _, w in sizes)
        rows, columns = -(-own[0] // self.window), -(-own[1] // self.window)
        first = next(iter(targets.values()))
        at = _draw(rows * columns, positions, (seed, first.image_id % 2**64, first.view, int(self.level[1:])))
        weight = math.sqrt(rows * columns / at.size)
        maps = {name: self._on_grid(one, self._windows[name], own) for name, one in targets.items()}
        while at.size:
            if self._filled == self._block:
                self.flush()
            now, at = np.split(at, [self._block - self._filled])
            y, x = np.divmod(now, columns)
            block = self._pending[self._filled : self._filled + now.size]
            for name, (values, width, scale) in maps.items():
                # what is stored is made a float only where it was drawn
                np.multiply(np.take(values, y * width + x, axis=1).T, scale * weight, out=block[:, self.columns[name]])
            block[:, -1] = weight
            self._filled += now.size

    def flush(self) -> None:
        """Multiply what is waiting."""
        block = self._pending[: self._filled]
        self.total += block.T @ block  # numpy sees the symmetry and computes one half
        self._filled = 0

    @property
    def positions(self) -> float:
        """Positions taken in; one that was drawn counts for those it stands for."""
        return float(self.total[-1, -1])

    def mean(self, name: str) -> FloatArray:
        """(C,): a model's mean features."""
        return self.total[-1, self.columns[name]] / self.positions

    def centred(self, a: str, b: str) -> FloatArray:
        """(C_a, C_b): sums of products of deviations from the means."""
        return self.total[self.columns[a], self.columns[b]] - self.positions * np.outer(self.mean(a), self.mean(b))

    def _on_grid(
        self, targets: Targets, window: int, own: tuple[int, int]
    ) -> tuple[npt.NDArray[np.generic], int, FloatArray]:
        """A model's map as (C, positions), the columns of a row of it, and what to multiply each channel by."""
        stored, scale = targets.features[self.level], targets.scales.get(self.level)
        height, width = targets.layout.sizes[self.level]
        ones = np.ones(stored.shape[0])
        if window == self.window and stored.dim() == 3:
            scales = ones if scale is None else scale.numpy().astype(np.float64)
            return stored.numpy().reshape(len(ones), -1), width, scales
        maps = decode(stored, scale, (height, width))[None]
        common = math.gcd(window, self.window)
        if window > common:
            maps = F.interpolate(maps, scale_factor=window // common, mode="bilinear", align_corners=False)
        maps = pool(maps[..., : -(-own[0] // common), : -(-own[1] // common)], self.window // common)
        return maps.numpy().reshape(len(ones), -1), maps.shape[-1], ones


def _moments(caches: Mapping[str, TeacherCache], block: int) -> list[_Moments]:
    """Empty sums for every level that two models share, on the grid of each window with which a model stores it."""
    moments = []
    known = {name: {level.name: level for level in cache.info.levels} for name, cache in caches.items()}
    for level in dict.fromkeys(level for levels in known.values() for level in levels):
        members = {name: levels[level] for name, levels in known.items() if level in levels}
        if len(members) < 2:
            continue
        windows = {name: member.pool for name, member in members.items()}
        channels = {name: member.channels for name, member in members.items()}
        moments += [_Moments(level, window, channels, windows, block) for window in sorted(set(windows.values()))]
    return moments


def _draw(count: int, positions: int | None, seed: Sequence[int]) -> npt.NDArray[np.int64]:
    if positions is None or positions >= count:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, positions, replace=False))


def _cost(
    a: str, b: str, cache: TeacherCache, fit: Sequence[_Moments], score: Sequence[_Moments], ridge: float
) -> Cost:
    windows = {level.name: level.pool for level in cache.info.levels}
    splits = [
        (before, after)
        for before, after in zip(fit, score, strict=True)
        if {a, b} <= before.columns.keys() and before.window == windows[before.level]
    ]
    if not splits:
        raise RecipeError(f"order: {a} and {b} have no level of equal stride. Capture other modules, or leave one out.")
    found = {before.level: _residual(before, after, a, b, ridge) for before, after in splits}
    costs = {level: left / whole for level, (left, whole) in found.items() if whole}
    if not costs:
        raise RecipeError(
            f"order: the features of {b} are the same everywhere: its checkpoint is not a trained detector's."
        )
    channels = {level: cache.levels[level][0] for level in costs}
    values = [channels[after.level] * after.positions for _, after in splits if after.level in costs]
    total = sum(whole for _, whole in found.values())
    return Cost(
        float(np.average(list(costs.values()), weights=values)),
        costs,
        {level: found[level][1] / total for level in costs},
    )


def _residual(fit: _Moments, score: _Moments, a: str, b: str, ridge: float) -> tuple[float, float]:
    """Squared error of B's prediction from A on the score split, and the sum of squares of B around its mean there."""
    xx = fit.centred(a, a)
    penalty = ridge * np.trace(xx) / len(xx)
    weights = np.zeros((len(xx), len(fit.mean(b))))
    if penalty > 0:
        weights = np.linalg.solve(xx + penalty * np.eye(len(xx)), fit.centred(a, b))
    whole = float(np.trace(score.centred(b, b)))
    shift = (score.mean(b) - fit.mean(b)) - (score.mean(a) - fit.mean(a)) @ weights
    left = whole - 2 * np.sum(weights * score.centred(a, b)) + np.sum(weights * (score.centred(a, a) @ weights))
    return max(0.0, float(left + score.positions * shift @ shift)), whole


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
