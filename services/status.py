"""`mtpd status`: how far the precomputes and the training of a job are, from what they left in the store alone.

Nothing is asked of Ray: it works while a run is under way and after it, from any machine that sees the cache (and, for the
stages, the work_dir).
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cache import (
    LEASE_SECONDS,
    CorruptShardError,
    FailedRow,
    GroupInfo,
    Holder,
    RunProgress,
    Storage,
    lease_holder,
    list_groups,
    load_index,
    planned_rows,
    read_group,
    read_progress,
)
from services.maintain import Target
from services.order import decided_if_known
from services.precompute import used_teachers
from services.present import ago, complain, duration, say, table
from services.records import read_json
from services.train import ap
from trainer import Recipe, read_annotations, read_pulse, stage_dir, teacher_info

# a run that was silent for so long, and does not renew its lease, is taken for dead
_SILENCE_SECONDS = 3 * LEASE_SECONDS
_SHOWN_FAILURES = 10
GroupState = Literal["empty", "running", "stopped", "failed", "interrupted", "incomplete", "complete"]
StageState = Literal["not begun", "training", "stopped", "done"]


@dataclass(frozen=True)
class GroupStatus:
    """One teacher's group.

    Attributes:
        state: ``running``; ``stopped``: its run was killed, or its machine is gone; ``failed``, ``interrupted``: its run says
            so; ``complete`` and ``incomplete``: no run is under way, and rows are missing or not.
        rows: committed; None where the manifest is damaged.
        planned: rows in the end; None where it is not known.
        rate: rows a second of the run, or of the last one.
        seconds_left: at that rate; None unless it is running.
        failed, failures: rows without targets of the run or the last one, and the first of them.
        holder: who holds the lease.
        last_sign: the last that was heard of a run, in seconds since the epoch; None without any.
        retried: units that went back to the queue.
        message: of the error that the run ended with, or of what is damaged.
    """

    teacher: str
    group: str
    state: GroupState
    rows: int | None
    planned: int | None
    rate: float | None
    seconds_left: float | None
    failed: int
    failures: tuple[FailedRow, ...]
    actors: int | None
    retried: int
    holder: Holder | None
    last_sign: float | None
    message: str


@dataclass(frozen=True)
class StageStatus:
    """One stage of a recipe.

    Attributes:
        epoch: begun, or all when it is done; 0 before.
        losses: means over the last iterations.
        metrics: COCO metrics at its end, in [0, 1]; empty before.
        seconds_left: of training, without the evaluations; None unless it is training.
        last_sign: the last that was heard of it, in seconds since the epoch.
    """

    stage: int
    teachers: tuple[str, ...]
    state: StageState
    epoch: int
    epochs: int
    losses: dict[str, float]
    metrics: dict[str, float]
    seconds_left: float | None
    last_sign: float | None


@dataclass(frozen=True)
class Status:
    """A cache, and the stages of the recipe if one was given."""

    groups: tuple[GroupStatus, ...]
    stages: tuple[StageStatus, ...] = ()


def status(target: Target) -> Status:
    """How far everything is.

    Raises:
        CorruptShardError: a group's attributes were changed.
        StorageError: the object storage does not answer.
    """
    storage, recipe = target.storage, target.recipe
    if recipe is None:
        groups = list_groups(storage, unreadable=lambda error: complain(str(error)))
        return Status(tuple(group_status(storage, info) for info in groups))
    images = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images
    wanted = Wanted(images.ids, len(recipe.policy))
    groups = [group_status(storage, teacher_info(recipe, name), wanted) for name in used_teachers(recipe)]
    stages = [_stage_status(recipe, number) for number in range(1, len(recipe.stages) + 1)]
    return Status(tuple(groups), tuple(stages))


@dataclass(frozen=True)
class Wanted:
    """What a recipe asks for: (n,) int64 image ids, each in so many views. A group may hold rows of other data sets too."""

    ids: npt.NDArray[np.int64]
    views: int

    @property
    def rows(self) -> int:
        """How many that are."""
        return self.ids.size * self.views


def group_status(storage: Storage, info: GroupInfo, wanted: Wanted | None = None) -> GroupStatus:
    """How far one group is.

    Args:
        wanted: by a recipe; without it what the last run planned counts, or the cache's own attributes.
    """
    progress, holder = read_progress(storage, info.name), lease_holder(storage, info.name)
    signs = [sign for sign in (progress and progress.written, holder and holder.renewed) if sign]
    alive = holder is not None and not holder.gone and time.time() - max(signs) < _SILENCE_SECONDS
    # a lease of another run than the record's is of one that has just begun
    current = progress if progress is not None and (holder is None or holder.run == progress.run) else None
    running = alive and (current is None or current.state == "running")
    # a run may be another recipe's, and counts its own rows
    rows, damage = _rows(storage, info, current if running and wanted is None else None, wanted)
    if wanted is not None:
        planned: int | None = wanted.rows
    else:
        planned = progress.planned if progress is not None else planned_rows(storage, info)
    last = current or (None if running else progress)
    return GroupStatus(
        teacher=info.teacher,
        group=info.name,
        state=_state(running, last, rows, planned, damage),
        rows=rows,
        planned=planned,
        rate=last and last.rate,
        seconds_left=current.seconds_left if running and current is not None else None,
        failed=last.failed if last else 0,
        failures=last.failures if last else (),
        actors=last and last.actors,
        retried=last.retried if last else 0,
        holder=holder if alive else None,
        last_sign=max(signs, default=None),
        message=damage or (last.message if last else ""),
    )


def _rows(
    storage: Storage, info: GroupInfo, running: RunProgress | None, wanted: Wanted | None
) -> tuple[int | None, str]:
    """Committed rows, of those that are wanted, and what is wrong with the manifest."""
    if running is not None:  # it counts them itself: a manifest in many parts is long to read
        return running.before + running.rows, ""
    if read_group(storage, info.name) is None:
        return 0, ""
    try:
        index = load_index(storage, info)
        return len(index) if wanted is None else int(index.committed(wanted.ids, wanted.views).sum()), ""
    except CorruptShardError as error:
        return None, str(error)


def _state(running: bool, last: RunProgress | None, rows: int | None, planned: int | None, damage: str) -> GroupState:
    if running:
        return "running"
    if rows is not None and planned is not None and rows >= planned:
        return "complete"
    if last is not None and last.state in ("running", "failed", "interrupted"):
        return "stopped" if last.state == "running" else last.state
    return "empty" if rows == 0 and not damage else "incomplete"


def _stage_status(recipe: Recipe, stage: int) -> StageStatus:
    folder, spec = stage_dir(recipe, stage), recipe.stages[stage - 1]
    result: Any = read_json(folder / "result.json")
    pulse = read_pulse(folder)
    last_sign = pulse.written if pulse else _modified(folder / "stage.json")
    if isinstance(result, dict):
        state: StageState = "done"
    elif last_sign is None:
        state = "not begun"
    else:
        # an evaluation has no pulse, and may be long: it is taken for a stop
        state = "training" if _is_recent(last_sign) else "stopped"
    done = state == "done"
    return StageStatus(
        stage=stage,
        teachers=tuple(spec.teachers),
        state=state,
        epoch=spec.epochs if done else pulse.epoch if pulse else 0,
        epochs=spec.epochs,
        losses={} if pulse is None else pulse.losses,
        metrics=result.get("metrics", {}) if done else {},
        seconds_left=pulse.seconds_left if pulse and state == "training" else None,
        last_sign=last_sign,
    )


def _is_recent(moment: float | None) -> bool:
    return moment is not None and time.time() - moment < _SILENCE_SECONDS


def _modified(file: Path) -> float | None:
    try:
        return file.stat().st_mtime
    except OSError:
        return None


def show(found: Status) -> None:
    """Tables for people, and below them what went wrong."""
    rows = [
        [
            one.group,
            one.state,
            f"{'?' if one.rows is None else f'{one.rows:,}'} of {'?' if one.planned is None else f'{one.planned:,}'}",
            "-" if one.rate is None else f"{one.rate:.1f}",
            "-" if one.seconds_left is None else duration(one.seconds_left),
            f"{one.failed:,}",
            f"{one.retried:,}",
            _who(one),
        ]
        for one in found.groups
    ]
    table("precompute", ["group", "state", "rows", "rows/s", "left", "failed", "retried units", "run"], rows)
    for group in found.groups:
        if group.message:
            complain(f"{group.group}: {group.message}")
        for failure in group.failures[:_SHOWN_FAILURES]:
            complain(f"  image {failure.image_id} ({failure.file_name}), view {failure.view}: {failure.reason}")
        if group.failed > _SHOWN_FAILURES:
            complain(f"  and {group.failed - _SHOWN_FAILURES:,} more rows")
    if not found.stages:
        return
    columns = ["stage", "teachers", "state", "epoch", "loss", "val", "left", "last sign of life"]
    table("training", columns, [_stage_row(one) for one in found.stages])


def _who(group: GroupStatus) -> str:
    if group.holder is not None:
        return f"process {group.holder.pid} on {group.holder.host}, since {ago(group.holder.since)}"
    return "-" if group.last_sign is None else f"last sign of life {ago(group.last_sign)} ago"


def _stage_row(stage: StageStatus) -> list[object]:
    return [
        stage.stage,
        " + ".join(stage.teachers) or "-",
        stage.state,
        f"{stage.epoch} of {stage.epochs}",
        f"{stage.losses['loss']:.4g}" if "loss" in stage.losses else "-",
        ap(stage.metrics) or "-",
        "-" if stage.seconds_left is None else duration(stage.seconds_left),
        "-" if stage.last_sign is None else f"{ago(stage.last_sign)} ago",
    ]


def watch(target: Target, seconds: float) -> None:
    """Show it again every few seconds, until it is over (see `is_over`) or interrupted."""
    while True:
        if target.recipe is not None:  # an order that was not known at first
            target = replace(target, recipe=decided_if_known(target.recipe))
        found = status(target)
        say(time.strftime("%H:%M:%S"))
        show(found)
        if is_over(found):
            return
        time.sleep(seconds)


def is_over(found: Status) -> bool:
    """Whether nothing more is to come: every stage is done, or, of a cache alone, every group is complete; or one of them
    failed or was interrupted, and no other is under way.

    A stage that is done needs its rows no more: they may be gone, or have been computed only where it read them. Neither a job
    that has not begun nor one between two of its parts is over.
    """
    groups, stages = {group.state for group in found.groups}, {stage.state for stage in found.stages}
    if "running" in groups or "training" in stages:
        return False
    if groups & {"failed", "interrupted"}:
        return True
    return stages == {"done"} if stages else groups == {"complete"}
