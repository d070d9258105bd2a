"""What keeps a cache sound: `verify`, its repair, and `gc`. Works on a cache alone, and on a recipe for what needs one."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cache import (
    CorruptShardError,
    Garbage,
    GroupInfo,
    LeaseHeldError,
    MtpdError,
    RecipeError,
    Reference,
    Report,
    StaleCacheError,
    Storage,
    find_garbage,
    fingerprint,
    forget,
    list_groups,
    needed_by,
    open_storage,
    references,
    remove,
    repair,
    verify,
    whole_group,
)
from services.order import decided_if_known
from services.precompute import FillResult, fill, used_teachers
from services.present import ago, complain, say, size, table
from trainer import (
    STUDENT,
    Recipe,
    SampleReport,
    compare_sample,
    load_recipe,
    stage_dir,
    teacher_info,
    trained_student,
    wanted_record,
    with_candidates,
)

_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Target:
    """What a command was pointed at: a cache, or the cache of a recipe.

    Attributes:
        recipe: None for a cache alone.
    """

    storage: Storage
    recipe: Recipe | None

    def groups(self, unreadable: Callable[[MtpdError], None] | None = None) -> list[GroupInfo]:
        """The groups that the command is about: of the recipe's teachers, or all; see `list_groups`."""
        if self.recipe is None:
            return list_groups(self.storage, unreadable=unreadable)
        # not read from the cache alone: attributes that are damaged can then be written anew
        return [teacher_info(self.recipe, name) for name in used_teachers(self.recipe)]


def open_target(target: str) -> Target:
    """A recipe if it is a YAML file, else a cache.

    Raises:
        RecipeError: neither.
    """
    if target.endswith((".yaml", ".yml")):
        recipe = decided_if_known(load_recipe(target))
        return Target(open_storage(recipe.cache.uri), recipe)
    if "://" not in target and not Path(target).is_dir():
        raise RecipeError(f"{target}: neither a recipe (.yaml) nor a cache: there is no such folder.")
    return Target(open_storage(target), None)


def check(target: Target) -> tuple[list[Report], list[MtpdError]]:
    """Verify every byte of the target's groups, and say what was found.

    Returns:
        The reports, and the errors of groups whose attributes cannot be read.
    """
    reports: list[Report] = []
    unreadable: list[MtpdError] = []
    for info in target.groups(unreadable.append):
        try:
            reports.append(verify(target.storage, info, _every_few_seconds(f"verifying {info.name}")))
        except StaleCacheError as error:
            complain(str(error))
        else:
            _show_report(reports[-1])
    return reports, unreadable


def mend(target: Target, reports: list[Report]) -> list[FillResult]:
    """Repair what is damaged; with a recipe, compute the damaged units again at once."""
    damaged = [report for report in reports if report.damages]
    for report in damaged:
        repair(target.storage, report)
        say(f"{report.info.name}: {_count(len(report.damaged_units), 'damaged unit')} taken out of the manifest")
    if target.recipe is None:
        if damaged:
            teachers = " ".join(sorted({report.info.teacher for report in damaged}))
            say(
                f"now run `mtpd precompute RECIPE` with the recipe of {teachers}: it computes these units and no others"
            )
        return []
    return [fill(target.recipe, report.info.teacher) for report in damaged]


def sample(target: Target, count: int) -> list[SampleReport]:
    """Compare the live teachers with the cache on ``count`` rows each, and say what was found.

    Raises:
        RecipeError: the target is a cache alone: which teacher is live, only a recipe says.
    """
    if target.recipe is None:
        raise RecipeError("--sample: needs the recipe (mtpd verify RECIPE.yaml --sample N): the teacher is run again.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reports = []
    for name in used_teachers(target.recipe):
        reports.append(compare_sample(target.recipe, name, count, device))
        _show_sample(name, reports[-1])
    return reports


def garbage(
    target: Target, *, superseded: bool, finished: bool, forgotten: str | None = None, force: bool = False
) -> list[Garbage]:
    """What nothing needs any more. Whole groups that another recipe needs are not among it.

    Args:
        superseded: also groups of the recipe's teachers under other fingerprints than the recipe's.
        finished: also groups of teachers of which every stage of the recipe is trained.
        forgotten: name of a recipe that needs nothing any more.
        force: whatever other recipes need.

    Raises:
        CorruptShardError: a recipe's record cannot be read, so that it is not known what that recipe needs.
    """
    if (superseded or finished) and target.recipe is None:
        raise RecipeError(
            "--superseded, --finished: need a recipe (mtpd gc RECIPE.yaml): it says which groups are in use."
        )
    found: list[Garbage] = []
    others = _others(target, forgotten) if (superseded or finished) and not force else []
    for info in list_groups(target.storage, unreadable=lambda error: complain(f"a group is left alone: {error}")):
        reason = _why(target.recipe, info, superseded, finished) if target.recipe is not None else None
        if reason is not None and (needed := needed_by(info.name, others)):
            users = ", ".join(f"{one.name} (last {ago(one.used)} ago)" for one in needed)
            say(f"{info.name} is kept ({reason} here): needed by {users}; --forget NAME if that is over, or --force")
            reason = None
        if reason is not None:
            found.append(whole_group(target.storage, info, reason))
            continue
        try:
            found += find_garbage(target.storage, info)
        except (CorruptShardError, StaleCacheError) as error:
            complain(f"{info.name} is left alone: {error}")
    return found


def show_garbage(found: list[Garbage]) -> None:
    """One line for each kind of garbage in each group."""
    if not found:
        say("nothing to remove")
        return
    rows = [
        [g.info.name, g.reason, f"{len(g.names):,}", size(g.size), "by a run: left alone" if g.held else ""]
        for g in found
    ]
    table("garbage", ["group", "why", "files", "bytes", "held"], rows)


def delete(target: Target, found: list[Garbage], *, forgotten: str | None = None, force: bool = False) -> None:
    """Remove garbage, but for groups that a run is writing, or that another recipe has begun to need meanwhile."""
    if forgotten is not None:
        forget(target.storage, forgotten)
        say(f"{forgotten}: forgotten")
    for one in found:
        if one.whole and not force and needed_by(one.info.name, _others(target, None)):
            say(f"{one.info.name} is kept: another recipe has begun to need it")
            continue
        try:
            remove(target.storage, one)
        except LeaseHeldError as error:
            complain(f"{one.info.name} is left alone: {error}")
        else:
            say(f"{one.info.name}: {len(one.names):,} files removed ({one.reason}, {size(one.size)})")


def _others(target: Target, forgotten: str | None) -> list[Reference]:
    """What other recipes than the target's need."""
    own = None if target.recipe is None else target.recipe.work_dir
    # a record that is to be forgotten need not be readable
    return [one for one in references(target.storage, but=forgotten) if one.work_dir != own]


def _why(
    recipe: Recipe, info: GroupInfo, superseded: bool, finished: bool
) -> Literal["superseded", "stage is done"] | None:
    if info.teacher == STUDENT and STUDENT not in recipe.teachers:  # whose features an order of teachers was found from
        try:
            trained_student(recipe)
        except RecipeError:  # as the recipe is now, there is no order to find
            return "superseded" if superseded else None
        recipe = with_candidates(recipe)
    if info.teacher not in recipe.teachers:
        return None
    if info.digest != teacher_info(recipe, info.teacher).digest:
        return "superseded" if superseded else None
    if info.digest != fingerprint(wanted_record(recipe, info.teacher)):
        return None  # it serves this recipe, but was filled for another one
    stages = [n for n, stage in enumerate(recipe.stages, start=1) if info.teacher in stage.teachers]
    done = stages and all((stage_dir(recipe, n) / "result.json").exists() for n in stages)
    return "stage is done" if finished and done else None


def _every_few_seconds(title: str) -> Callable[[int, int], None]:
    """A line on how far a check is, now and then."""
    printed = time.monotonic()

    def progress(done: int, units: int) -> None:
        nonlocal printed
        if time.monotonic() - printed > _LINE_SECONDS:
            printed = time.monotonic()
            say(f"{title}: {done:,} of {units:,} units")

    return progress


def _show_report(report: Report) -> None:
    units = f"{report.units:,} units, {size(report.read_bytes)}"
    say(f"{report.info.name}: {report.rows:,} rows in {units}: {_count(len(report.damages), 'damaged file')}")
    for damage in report.damages[:20]:
        unit = "" if damage.unit is None else f" (unit {damage.unit[0]}-{damage.unit[1]:06d})"
        complain(f"  {damage.name}{unit}: {damage.problem}")
    if len(report.damages) > 20:
        complain(f"  and {len(report.damages) - 20} more")
    if report.uncommitted:
        say(
            f"  {len(report.uncommitted):,} units have rows without a record (interrupted run, lost part): precompute goes on"
        )


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _show_sample(teacher: str, report: SampleReport) -> None:
    rows = [
        [
            a.level,
            a.rows,
            f"{a.cosine:.5f}",
            f"{a.least_cosine:.5f}",
            f"{a.largest_error:.3g} ({a.largest_share:.1%})",
            f"{a.recorded_snr:.1f}",
            f"{a.measured_snr:.1f}",
            "-" if a.flipped_cosine is None else f"{a.flipped_cosine:.3f}",
        ]
        for a in report.levels
    ]
    columns = ["level", "rows", "cosine", "least", "largest error", "SNR recorded", "SNR now", "flip control"]
    table(f"{teacher}: live teacher against the cache", columns, rows)
    heads = [[h.what, f"{h.compared:,}", f"{h.found:.1%}", f"{h.largest_error:.3g}"] for h in report.heads]
    columns = ["what", "compared", "in the cache", "largest error of score or logit"]
    if heads:
        table(f"{teacher}: what its head gives, live against the cache", columns, heads)
    for failure in report.failures:
        complain(f"  image {failure.image_id} ({failure.file_name}) {failure.reason}")


def disagreement(reports: list[SampleReport]) -> MtpdError | None:
    """The error that a command ends in when live targets and cached ones are not the same."""
    if all(report.agrees for report in reports):
        return None
    return MtpdError(
        "the live teacher does not give what the cache holds. The images were changed under their names, or the software "
        "that runs the teacher was: delete the teacher's group and precompute again."
    )
