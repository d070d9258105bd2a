"""The live teacher against its cached targets, on a sample of rows; and the control that a mirrored view is no mirrored map."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mmdet.structures.bbox import bbox_overlaps
from torch import Tensor

from cache import MissingRowsError, Plan, TeacherCache, make_plan
from trainer.annotations import read_annotations
from trainer.compute import Failure, UnitComputer
from trainer.groups import teacher_info
from trainer.recipe import Recipe
from trainer.teacher import Teacher, TeacherOutput

BEST = 20  # what comes after may fall off the end of a list of detections by a rounding
SAME = 0.9


@dataclass(frozen=True)
class Agreement:
    """How one level of the cache agrees with the live teacher.

    Attributes:
        rows: compared.
        cosine: between the cached and the live map, mean and least over the rows.
        largest_error: largest absolute difference of a value, and that as a share of the live map's largest magnitude.
        recorded_snr, measured_snr: median signal-to-noise ratios in dB, as written with the rows and as seen now.
        flipped_cosine: between the cached map of a mirrored view and the mirrored cached map of the view itself, mean; None
            where the sample has no such pair. Near 1 only for a teacher that does not see left and right differently.
    """

    level: str
    rows: int
    cosine: float
    least_cosine: float
    largest_error: float
    largest_share: float
    recorded_snr: float
    measured_snr: float
    flipped_cosine: float | None


@dataclass(frozen=True)
class Found:
    """How what is stored of a teacher's head's outputs agrees: its detections, or a level's dense outputs.

    Attributes:
        what: ``detections``, or the level.
        compared: live detections, the `BEST` of each image, or live positions.
        found: share of them that the cache has: a detection of the same class with an IoU of at least `SAME`, or the position.
        largest_error: largest absolute difference of a score, or of a class logit, of what is found.
    """

    what: str
    compared: int
    found: float
    largest_error: float


@dataclass(frozen=True)
class SampleReport:
    """What a comparison found: per level, of the heads' outputs, and the images that could not be read any more."""

    levels: tuple[Agreement, ...]
    heads: tuple[Found, ...]
    failures: tuple[Failure, ...]

    @property
    def agrees(self) -> bool:
        """Whether the cached targets are what this teacher gives, up to their own quantisation.

        Noise of more than twice the recorded amplitude (6 dB), above what another device's arithmetic does (40 dB), is not; nor
        is more than a twentieth of what a head puts out that is not there: equal scores may change places.
        """
        return all(a.measured_snr >= min(a.recorded_snr - 6, 40) for a in self.levels) and all(
            one.found >= 0.95 for one in self.heads
        )


def compare_sample(recipe: Recipe, name: str, count: int, device: str = "cpu", seed: int = 0) -> SampleReport:
    """Run a teacher on some committed rows and compare.

    Both flips of an image are taken where there are two, for the control.

    Args:
        count: rows; all if there are fewer.

    Raises:
        MissingRowsError: nothing is committed for this recipe.
        CorruptShardError: a row of the sample is damaged.
    """
    cache = TeacherCache.open(recipe.cache.uri, name, fingerprint=teacher_info(recipe, name).record)
    images = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images
    plan = make_plan(images, recipe.policy, cache.info)
    committed = np.flatnonzero(cache.index.committed(images.ids, len(recipe.policy)))
    if not committed.size:
        raise MissingRowsError(
            f"{recipe.cache.uri}: nothing of teacher {name!r} is committed. Run `mtpd precompute RECIPE`."
        )
    views = 2 if recipe.policy.mirrors else 1
    pairs = np.random.default_rng(seed).permutation(np.unique(committed // views))[: -(-count // views)]
    members = [member for member in committed if member // views in set(pairs.tolist())][:count]
    spec = recipe.teachers[name]
    computer = UnitComputer(
        Teacher.of_group(spec, cache.info, device), cache.info, recipe.policy, recipe.dataset.train, batch_size=1
    )
    live, failures = {}, []
    for key, output, failed in _live(computer, plan, members):
        failures += failed
        if output is not None:
            live[key] = output
    if not live:
        return SampleReport((), (), tuple(failures))
    recorded = cache.fidelity()
    maps = {key: {level: m[0].float().cpu() for level, m in output.features.items()} for key, output in live.items()}
    levels = tuple(_agreement(level, cache, maps, recorded[level], views) for level in cache.levels)
    detected = [_detected(cache, live)] if cache.info.detections else []
    return SampleReport(levels, (*detected, *_dense(cache, live)), tuple(failures))


def _live(
    computer: UnitComputer, plan: Plan, members: Sequence[int]
) -> Iterator[tuple[tuple[int, int], TeacherOutput | None, list[Failure]]]:
    for member in members:
        row = plan.row(int(member), 0)
        views, failures = computer.decode_rows([row])
        yield (row.image_id, row.view), computer.look(views[0]) if views else None, failures


def _detected(cache: TeacherCache, live: Mapping[tuple[int, int], TeacherOutput]) -> Found:
    compared, found, error = 0, 0, 0.0
    for key, output in live.items():
        now, stored = output.detections[0], cache[key].detections
        for n in np.argsort(-now.scores)[:BEST]:
            box, score, label = now.boxes[n], now.scores[n], now.labels[n]
            compared += 1
            same = np.flatnonzero(stored.labels == label)
            overlaps = bbox_overlaps(torch.tensor(box)[None], torch.tensor(stored.boxes[same]))[0]
            if len(same) and overlaps.max() >= SAME:
                found += 1
                error = max(error, float(abs(stored.scores[same[int(overlaps.argmax())]] - score)))
    return Found("detections", compared, found / compared if compared else 1.0, error)


def _dense(cache: TeacherCache, live: Mapping[tuple[int, int], TeacherOutput]) -> Iterator[Found]:
    for spec in cache.info.dense:
        compared, found, error = 0, 0, 0.0
        for key, output in live.items():
            now, stored = output.dense[0][spec.name], cache[key].dense[spec.name]
            place = {index: k for k, index in enumerate(stored.indices.tolist())}
            pairs = [(n, place[index]) for n, index in enumerate(now.indices.tolist()) if index in place]
            compared += len(now.indices)
            found += len(pairs)
            if pairs:
                ours, theirs = (torch.tensor(of) for of in zip(*pairs, strict=True))
                error = max(error, float((now.logits.cpu()[ours] - stored.logits[theirs]).abs().max()))
        yield Found(spec.name, compared, found / compared, error)


def _agreement(
    level: str, cache: TeacherCache, live: dict[tuple[int, int], dict[str, Tensor]], recorded: float, views: int
) -> Agreement:
    cosines, errors, shares, snrs, flipped = [], [], [], [], []
    for (image_id, view), maps in live.items():
        ours, theirs = cache[image_id, view].dequantize()[level].double(), maps[level].double()
        error = (ours - theirs).abs().max()
        cosines.append(_cosine(ours, theirs))
        errors.append(float(error))
        shares.append(float(error / theirs.abs().max().clamp(min=1e-12)))
        noise = (ours - theirs).square().sum().clamp(min=1e-30)
        snrs.append(float(10 * torch.log10(theirs.square().sum() / noise)))
        if views == 2 and view % 2 and (image_id, view - 1) in live:
            mirrored = cache[image_id, view - 1].dequantize()[level].double().flip(-1)
            flipped.append(_cosine(ours, mirrored))
    return Agreement(
        level=level,
        rows=len(live),
        cosine=float(np.mean(cosines)),
        least_cosine=min(cosines),
        largest_error=max(errors),
        largest_share=max(shares),
        recorded_snr=recorded,
        measured_snr=float(np.median(snrs)),
        flipped_cosine=float(np.mean(flipped)) if flipped else None,
    )


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0))
