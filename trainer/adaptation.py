"""How well one detector's features predict another's: the adaptation cost, from cached features alone.

A directed adaptation cost C(A -> B) is an idea of the MTPD paper; what is computed here is this project's own reconstruction,
for the paper's loss and split are not published as code.

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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F

from cache import Precision, RecipeError, Targets, TeacherCache, decode, pool
from trainer.order import OrderRows

FloatArray = npt.NDArray[np.float64]
# half of the distance of two neighbouring values, as a share of them: what is all the same is stored as one of two neighbours, at
# the largest number of int8 (127) and int4 (7), and then deviates by no more than that
_RESOLUTION: dict[Precision, float] = {"float16": 2**-11, "int8": 1 / (2 * 126), "int4": 1 / (2 * 6)}


@dataclass(frozen=True)
class Cost:
    """The adaptation cost of one ordered pair of models.

    Attributes:
        value: 0 perfect, 1 no better than the mean.
        levels: the same of each common level on its own, but for levels on which B is constant: where none of its channels
            varies by more than its precision resolves.
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
    return {(a, b): _cost(a, b, caches, fit, score, ridge) for a, b in pairs}


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

    def spread(self, name: str, precision: Precision) -> float:
        """Sum of squares around the means, of all channels; 0 where no channel varies by more than the precision resolves."""
        own, mean = self.columns[name], self.mean(name)
        each = np.diagonal(self.total)[own] - self.positions * np.square(mean)
        # beside which the rounding of these sums, a constant's 1e-16 or so of its square, is nothing
        unresolved = self.positions * np.square(mean * _RESOLUTION[precision])
        return float(each.sum()) if (each > unresolved).any() else 0.0

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
    a: str,
    b: str,
    caches: Mapping[str, TeacherCache],
    fit: Sequence[_Moments],
    score: Sequence[_Moments],
    ridge: float,
) -> Cost:
    windows = {level.name: level.pool for level in caches[b].info.levels}
    splits = [
        (before, after)
        for before, after in zip(fit, score, strict=True)
        if {a, b} <= before.columns.keys() and before.window == windows[before.level]
    ]
    if not splits:
        raise RecipeError(f"order: {a} and {b} have no level of equal stride. Capture other modules, or leave one out.")
    wholes = {after.level: after.spread(b, caches[b].info.precision) for _, after in splits}
    known = [(before, after) for before, after in splits if wholes[after.level]]
    if not known:
        raise RecipeError(
            f"order: the features of {b} are the same everywhere: its checkpoint is not a trained detector's."
        )
    costs = {
        after.level: _residual(before, after, a, b, ridge, caches[a].info.precision) / wholes[after.level]
        for before, after in known
    }
    values = [caches[b].levels[after.level][0] * after.positions for _, after in known]
    total = sum(wholes.values())
    return Cost(
        float(np.average(list(costs.values()), weights=values)),
        costs,
        {level: wholes[level] / total for level in costs},
    )


def _residual(fit: _Moments, score: _Moments, a: str, b: str, ridge: float, precision: Precision) -> float:
    """Squared error of B's prediction from A, which is stored in that precision, on the score split."""
    xx = fit.centred(a, a)
    weights = np.zeros((len(xx), len(fit.mean(b))))
    if spread := fit.spread(a, precision):
        weights = np.linalg.solve(xx + ridge * spread / len(xx) * np.eye(len(xx)), fit.centred(a, b))
    whole = float(np.trace(score.centred(b, b)))
    shift = (score.mean(b) - fit.mean(b)) - (score.mean(a) - fit.mean(a)) @ weights
    left = whole - 2 * np.sum(weights * score.centred(a, b)) + np.sum(weights * (score.centred(a, a) @ weights))
    return max(0.0, float(left + score.positions * shift @ shift))
