"""A student's own schedule, stretched to the length of a stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from mmengine.config import Config

from cache import RecipeError
from trainer.config import kind

_WARM_UP_SHARE = 0.1
# schedulers that begin below the base rate and may rise to it
_RISING = ("Linear", "Constant", "QuadraticWarmup")


def set_schedule(cfg: Config, epochs: int, steps: int, images: int) -> None:
    """Give a student's config the length of a stage, and stretch its schedulers to it.

    What is counted in epochs is stretched by the ratio of the stage's epochs to the config's own. Of what is counted in
    iterations (``by_epoch: False``) a warm-up stays as long as it is, or is cut to a tenth of the stage, and left out where
    that is less than two steps; all else is stretched by the ratio of the stage's steps to the iterations of the config's
    training: its ``train_cfg.max_iters``, or else where the last such scheduler ends. A scheduler without an end lasts as
    long as the stage. Milestones stay apart: of two that fall on one epoch the later one moves to the next, or is left out
    where it would be behind the stage's end.

    Args:
        cfg: the student's config, which is changed; ``train_dataloader.batch_size`` is that of a stage's step.
        epochs: of the stage.
        steps: of an epoch.
        images: in the annotation file.

    Raises:
        RecipeError: how long the config's own training is cannot be known; the message names the scheduler and the key.
    """
    own = cfg.train_cfg
    long, iterations = own.get("max_epochs"), own.get("max_iters")
    if long is None and iterations is None:
        raise RecipeError(
            "student.config: train_cfg has neither max_epochs nor max_iters, so its schedule cannot be stretched to a stage. "
            "Say for how many epochs it is made: student.cfg_options: {train_cfg.max_epochs: 12}"
        )
    interval = own.get("val_interval", 1)
    if iterations is not None:
        interval = max(1, round(interval * epochs / iterations))
        if cfg.get("log_processor"):
            cfg.log_processor.by_epoch = True
    cfg.train_cfg = dict(type="ResumableEpochLoop", max_epochs=epochs, val_interval=interval)
    given = cfg.get("param_scheduler")
    schedulers = [given] if isinstance(given, dict) else list(given or ())
    warm_up = _warm_up(schedulers)
    # of all images, also those that are left out, and whole batches: a tenth need not be exact
    share = int(epochs * max(1, images // cfg.train_dataloader.batch_size) * _WARM_UP_SHARE)
    by_epoch = _Clock(long, epochs)
    by_step = _Clock(iterations or _last_end(schedulers), epochs * steps, warm_up, min(warm_up, share))
    for number, one in enumerate(schedulers):
        in_epochs = one.get("by_epoch", True)
        try:
            _stretch(one, by_epoch if in_epochs else by_step)
        except _UnknownLengthError:
            key = "param_scheduler" if one is given else f"param_scheduler.{number}"
            unit, other, unknown = (
                ("epochs", "its training in iterations", "train_cfg.max_epochs: 12")
                if in_epochs
                else ("iterations", "of how many its training is made is not known", f"{key}.end: 90000")
            )
            raise RecipeError(
                f"student.config: {key} ({kind(one.type)}) is counted in {unit}, and {other}, so it cannot be stretched to a "
                f"stage. Say how long it is, as in student.cfg_options: {{{unknown}}}"
            ) from None
    # of a long training a part may last no epoch of a short one
    cfg.param_scheduler = [one for one in schedulers if one.get("end", math.inf) >= one.get("begin", 0) + _least(one)]


class _UnknownLengthError(Exception):
    """How long the config's own training is was not said."""


@dataclass(frozen=True)
class _Clock:
    """Moments of the config's training as those of a stage, in epochs or in iterations.

    Attributes:
        own: length of the config's training; None if it is not known.
        stage: length of the stage.
        warm_up: where the config's warm-up ends.
        cut: where the stage's does.
    """

    own: int | None
    stage: int
    warm_up: int = 0
    cut: int = 0

    @property
    def ratio(self) -> float:
        if self.own is None:
            raise _UnknownLengthError
        return self.stage / self.own

    def at(self, moment: int) -> int:
        if moment <= self.warm_up:
            return round(moment * self.cut / max(1, self.warm_up))
        return max(self.cut, round(moment * self.ratio))


def _least(one: dict[str, Any]) -> int:
    """How long a scheduler must be. mmengine's warm-ups do not rise before their second step: one alone would be for ever."""
    return 2 if _rises(one) and one.get("begin", 0) == 0 and not one.get("convert_to_iter_based") else 1


def _rises(one: dict[str, Any]) -> bool:
    return kind(one["type"]).startswith(_RISING) and one.get("end_factor", 1) == 1


def _warm_up(schedulers: Sequence[dict[str, Any]]) -> int:
    """The iteration at which the base rate is reached: the end of those that rise to it, one behind the other."""
    end = 0
    for one in schedulers:
        if _rises(one) and not one.get("by_epoch", True) and one.get("begin", 0) <= end:
            end = max(end, one.get("end", 0))
    return end


def _last_end(schedulers: Sequence[dict[str, Any]]) -> int | None:
    """The iteration at which the last of those ends that are more than a warm-up; None where none says it."""
    warm_up = _warm_up(schedulers)
    ends = [
        one.get("end")
        or one.get("begin", 0) + (one.get("T_max") or one.get("total_steps") or sum(one.get("periods", ())))
        for one in schedulers
        if not one.get("by_epoch", True)
    ]
    last = max(ends, default=0)
    return last if last > warm_up else None


def _stretch(one: dict[str, Any], clock: _Clock) -> None:
    begin = one.get("begin", 0)
    start = clock.at(begin)
    # these count from the scheduler's own beginning
    for key in ("T_max", "total_steps"):
        if one.get(key):
            one[key] = max(1, clock.at(begin + one[key]) - start)
    if "periods" in one:
        ends = [start, *(clock.at(begin + end) for end in accumulate(one["periods"]))]
        one["periods"] = [after - before for before, after in pairwise(ends)]
    if "milestones" in one:
        # in a short stage the last decay must not fall behind its end
        last = max(1, clock.stage - 1) - start
        one["milestones"] = _apart([clock.at(begin + moment) - start for moment in one["milestones"]], last)
    if "step_size" in one:
        one["step_size"] = max(1, round(one["step_size"] * clock.ratio))
    if kind(one["type"]).startswith("Exponential"):
        one["gamma"] **= 1 / clock.ratio
    for key in ("begin", "end"):
        if key in one:
            one[key] = clock.at(one[key])


def _apart(milestones: Sequence[int], last: int) -> list[int]:
    kept = [0]
    for moment in milestones:
        kept.append(max(min(moment, last), kept[-1] + 1))
    return [moment for moment in kept[1:] if moment <= last]
