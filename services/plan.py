"""What `mtpd plan` says: the plan of each teacher, and, where it was measured, what online and cached targets cost."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cache import Plan, Policy, SampledPolicy
from services.present import duration, say, size, table
from trainer import (
    Job,
    Place,
    Spending,
    StageCost,
    break_even_epochs,
    break_even_students,
    cheapest,
    spend,
    total,
)

_STUDENTS = (1, 2, 5)


def plan_record(plans: Sequence[Plan], job: Job | None) -> dict[str, Any]:
    """All of it as JSON: ``teachers``, and ``cost``, which is None where nothing was measured."""
    return {"teachers": [_teacher_record(plan) for plan in plans], "cost": None if job is None else cost_record(job)}


def show_plans(plans: Sequence[Plan], job: Job | None) -> None:
    """All of it for people."""
    for plan in plans:
        _show_teacher(plan)
    if job is not None:
        _show_cost(job)


def cost_record(job: Job) -> dict[str, Any]:
    """The seconds that were measured, and what follows from them.

    ``predicted`` has for each way and number of students the stages' seconds, teacher forwards and bytes, and those in all.
    """
    stages = [
        {
            "teachers": list(stage.teachers),
            "cached_of_plain_step": stage.cached.seconds / stage.plain.seconds,
            "read_bytes_per_second": read_rate(job, stage),
            "caching_pays_from_epochs": break_even_epochs(job, stage),
        }
        for stage in job.stages
    ]
    predicted = {
        way: {str(students): _predicted(spend(job, way, students)) for students in _STUDENTS} for way in job.ways
    }
    return {
        "measured": asdict(job),
        "stages": stages,
        "predicted": predicted,
        "cheapest": {str(students): cheapest(job, students) for students in _STUDENTS},
        "caching_pays_from_students": break_even_students(job),
    }


def _predicted(spent: Sequence[Spending]) -> dict[str, Any]:
    stages = [asdict(one) | {"seconds": one.seconds} for one in (*spent, total(spent))]
    return {"stages": stages[:-1], "total": stages[-1]}


def read_rate(job: Job, stage: StageCost) -> float:
    """Bytes a second that all workers of a stage read from the cache."""
    return stage.read_bytes / job.pace(stage.cached)


def verdict(job: Job) -> list[str]:
    """Whether caching beats running the teachers online here, in sentences."""
    seconds = {way: total(spend(job, way)).seconds for way in job.ways}
    least = cheapest(job)
    others = ", ".join(f"{way} {duration(seconds[way])}" for way in job.ways if way != least)
    lines = [f"for one student {least} is cheapest here: {duration(seconds[least])} ({others})"]
    students = break_even_students(job)
    if students is None:
        lines.append(
            "online is cheaper here for any number of students: a row costs more to read than the teachers to run"
        )
    elif students == 1:
        lines.append("cached beats online from the first student on")
    else:
        lines.append(f"online is cheaper here for fewer than {students} students; cached beats it from {students} on")
    return lines


def _teacher_record(plan: Plan) -> dict[str, Any]:
    views = len(plan.policy)
    return {
        "teacher": plan.info.teacher,
        "group": plan.info.name,
        "images": plan.total // views,
        "views": views,
        "view_policy": plan.policy.to_json(),
        "rows": plan.total,
        "rows_to_compute": plan.todo,
        "units": sum(bucket.units for bucket in plan.buckets),
        "precision": plan.info.precision,
        "bytes": plan.stored_bytes,
        "bytes_per_row": plan.stored_bytes / max(1, plan.total),
        "level_bytes": plan.level_bytes(),
        "dense_bytes": plan.dense_bytes(),
        "detections": plan.info.detections,
        "levels": {level.name: {"channels": level.channels, "stride": level.stride} for level in plan.info.levels},
        "buckets": [
            {
                "name": bucket.name,
                "rows": bucket.rows,
                "rows_to_compute": bucket.todo,
                "unit_rows": bucket.slots,
                "units": bucket.units,
                "bytes": plan.bucket_bytes(bucket),
            }
            for bucket in plan.buckets
        ],
    }


def _show_teacher(plan: Plan) -> None:
    views = len(plan.policy)
    shown = plan.buckets[:12]
    rows: list[list[object]] = [
        [b.name, f"{b.rows:,}", f"{b.todo:,}", b.slots, f"{b.units:,}", size(plan.bucket_bytes(b))] for b in shown
    ]
    if rest := plan.buckets[12:]:
        rows.append(
            [
                f"{len(rest)} more",
                f"{sum(b.rows for b in rest):,}",
                f"{sum(b.todo for b in rest):,}",
                "",
                f"{sum(b.units for b in rest):,}",
                size(sum(plan.bucket_bytes(b) for b in rest)),
            ]
        )
    table(f"{plan.info.name}", ["bucket", "rows", "to compute", "unit rows", "units", "bytes"], rows)
    levels = ", ".join(f"{name} {size(count)}" for name, count in plan.level_bytes().items())
    if plan.info.dense:
        levels += f"; dense outputs {size(plan.dense_bytes())}"
    row_bytes = plan.stored_bytes / max(1, plan.total)
    say(f"{plan.total // views:,} images x {views} views = {plan.total:,} rows, {plan.todo:,} to compute")
    say(f"views: {_views(plan.policy)}")
    besides = "and detections, as many as there are" if plan.info.detections else "no detections"
    say(f"{size(plan.stored_bytes)} as {plan.info.precision} ({levels}), {besides}")
    say(f"training reads {size(row_bytes)} an image\n")


def _views(policy: Policy) -> str:
    if isinstance(policy, SampledPolicy):
        transforms = ", ".join(transform["type"] for transform in policy.record["pipeline"])
        return f"sampled with seed {policy.record['seed']}, {policy.size[0]}x{policy.size[1]} (height x width): {transforms}"
    scales = ", ".join(f"{long}x{short}" for long, short in policy.scales)
    return f"resized into {scales}{', each also mirrored' if policy.mirrors else ''}"


def _show_cost(job: Job) -> None:
    where = f"students on {_place(job.student)}, teachers on {_place(job.teacher)}"
    parts: list[list[object]] = []
    for number, stage in enumerate(job.stages, 1):
        steps = {"plain": stage.plain, "cached": stage.cached, "online": stage.online}
        for way in steps if stage.teachers else ["plain"]:
            seconds, ratio = steps[way].seconds, steps[way].seconds / stage.plain.seconds
            parts.append([f"stage {number}: step, an image", way, _ms(seconds), f"{ratio:.2f}"])
    for name, of in job.teachers.items():
        for part in ("decode", "compute", "write"):
            seconds = getattr(of, part)
            parts.append([f"teacher {name}: a row", part, _ms(seconds), f"{seconds / job.stages[0].plain.seconds:.2f}"])
    table(f"measured: {where}", ["", "", "ms", "of the plain step"], parts)
    rows = []
    for students in _STUDENTS:
        for way in job.ways:
            of_all = total(spend(job, way, students))
            mark = " <" if way == cheapest(job, students) else ""
            forwards, written = f"{of_all.teacher_forwards:,}", size(of_all.written_bytes)
            rows.append(
                [f"{students}, {way}", f"{duration(of_all.seconds)}{mark}", forwards, written, size(of_all.read_bytes)]
            )
    table("predicted, by students", ["students", "wall time", "teacher forwards", "written", "read"], rows)
    spent = {way: spend(job, way) for way in job.ways}
    rows = []
    for number, stage in enumerate(job.stages):
        times = [duration(spent[way][number].seconds) for way in job.ways]
        epochs = break_even_epochs(job, stage)
        pays = "" if not stage.teachers else "never" if epochs is None else f"epoch {epochs}"
        rate = f"{size(read_rate(job, stage))}/s" if stage.teachers else ""
        rows.append([f"{number + 1}: {' + '.join(stage.teachers) or 'no teacher'}", stage.epochs, *times, pays, rate])
    columns = ["stage", "epochs", *job.ways, "cached beats online from", "training reads"]
    table("predicted, by stage, one student", columns, rows)
    for line in verdict(job):
        say(line)
    say("rows were read from memory, as of a cache that fits it; a disk or bucket must give what `training reads` says")


def _place(place: Place) -> str:
    return place.device if place.device != "cpu" else f"cpu ({place.threads} of {place.cores} threads)"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"
