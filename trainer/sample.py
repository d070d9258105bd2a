"""The live teacher against its cached targets, on a sample of rows; and the control that a mirrored view is no mirrored map."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache import MissingRowsError, Plan, RecipeError, TeacherCache, make_plan
from trainer.annotations import read_annotations
from trainer.compute import Failure, UnitComputer
from trainer.groups import teacher_info
from trainer.recipe import Recipe
from trainer.teacher import Teacher


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
class SampleReport:
    """What a comparison found: per level, and the images that could not be read any more."""

    levels: tuple[Agreement, ...]
    failures: tuple[Failure, ...]

    @property
    def agrees(self) -> bool:
        """Whether the cached targets are what this teacher gives, up to their own quantisation.

        Noise of more than twice the recorded amplitude (6 dB), above what another device's arithmetic does (40 dB), is not.
        """
        return all(a.measured_snr >= min(a.recorded_snr - 6, 40) for a in self.levels)


def compare_sample(recipe: Recipe, name: str, count: int, device: str = "cpu", seed: int = 0) -> SampleReport:
    """Run a teacher on some committed rows and compare.

    Both flips of an image are taken where there are two, for the control.

    Args:
        count: rows; all if there are fewer.

    Raises:
        RecipeError: no maps of this teacher are stored.
        MissingRowsError: nothing is committed for this recipe.
        CorruptShardError: a row of the sample is damaged.
    """
    cache = TeacherCache.open(recipe.cache.uri, name, fingerprint=teacher_info(recipe, name).record)
    if not cache.levels:
        raise RecipeError(f"teachers.{name}: no feature maps are stored of it, and these are what --sample compares.")
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
    for key, maps, failed in _live_maps(computer, plan, members):
        failures += failed
        if maps is not None:
            live[key] = maps
    recorded = cache.fidelity()
    levels = tuple(_agreement(level, cache, live, recorded[level], views) for level in cache.levels) if live else ()
    return SampleReport(levels, tuple(failures))


def _live_maps(
    computer: UnitComputer, plan: Plan, members: Sequence[int]
) -> Iterator[tuple[tuple[int, int], dict[str, Tensor] | None, list[Failure]]]:
    for member in members:
        row = plan.row(int(member), 0)
        views, failures = computer.decode_rows([row])
        maps = computer.maps(views[0]) if views else None
        yield (row.image_id, row.view), maps, failures


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
