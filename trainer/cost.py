"""What it costs to give students their targets, in each of three ways, from seconds that were measured. Arithmetic only; ours.

``online``: the teachers run beside the student in every step. ``cached``: every row is computed once, before, and read from then
on. ``hybrid``: every row is computed once, when a student first asks the teacher service for it. Nothing runs beside something
else here but what `Place.overlapped` says, and in ``hybrid`` the teachers beside the first two epochs, where there are loading
processes that ask ahead.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

Way = Literal["online", "cached", "hybrid"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Place:
    """Where a teacher or a student runs.

    Attributes:
        device: ``cpu`` or ``cuda``.
        cores: processors that it may use.
        threads: of torch.
    """

    device: str
    cores: int
    threads: int

    def overlapped(self, device: float, host: float, lanes: int) -> float:
        """Seconds an item when the device is fed, and its results taken away, by ``lanes`` threads or processes beside it.

        The slowest of the three decides: the device, the lanes, or the processors, which have both to do. A GPU's work keeps
        one of them busy.

        Args:
            device, host: seconds an item, each measured alone; host in one thread.
            lanes: 0 for one after the other.
        """
        if lanes == 0:
            return device + host
        busy = self.threads if self.device == "cpu" else 1
        return max(device, host / lanes, (busy * device + host) / max(busy, self.cores))


@dataclass(frozen=True)
class Step:
    """An image's share of one step, in seconds.

    Attributes:
        load: to read the image, make its view and read its targets, in one process.
        compute: for forward, losses, backward and the optimiser; and for the teachers, where they are live.
    """

    load: float
    compute: float

    @property
    def seconds(self) -> float:
        """Both, one after the other."""
        return self.load + self.compute


@dataclass(frozen=True)
class TeacherCost:
    """One teacher's rows and what one takes, in seconds.

    Attributes:
        rows: that the recipe asks for; ``todo`` of them are not committed yet.
        row_bytes: bytes that a row takes in the cache.
        start: until it is loaded and may look at its first view.
        decode, write: in one thread. ``compute``: forward and quantisation, on its device.
    """

    rows: int
    todo: int
    row_bytes: float
    start: float
    decode: float
    compute: float
    write: float


@dataclass(frozen=True)
class StageCost:
    """One stage.

    Attributes:
        evaluations: on the val set.
        plain, cached, online: a step of the student without any teacher, with targets from the cache, and with the teachers
            beside it; the same batches.
        read: seconds to read the targets of one image, a part of ``cached.load``. ``read_bytes``: their bytes.
    """

    teachers: tuple[str, ...]
    epochs: int
    evaluations: int
    plain: Step
    cached: Step
    online: Step
    read: float = 0.0
    read_bytes: float = 0.0


@dataclass(frozen=True)
class Job:
    """A recipe in numbers.

    Attributes:
        images: that the student trains on in an epoch; it may leave out images without objects.
        start: of a stage, and its end: processes, data set and models, how much longer the first step takes, a checkpoint, and
            what an evaluation takes beside its images.
        evaluate: a val image; ``val_images`` of them in an evaluation.
        workers, loaders: data-parallel workers, and loading processes of each (0: the worker itself).
        actors: teacher actors of a precompute; ``decoders`` threads decode in each.
        actor_start: until an actor's process is up.
        batch: samples of a step, of all workers together.
        service: until the teacher service answers, and to end it; None where the recipe has none, and so no ``hybrid``.
    """

    images: int
    val_images: int
    student: Place
    teacher: Place
    evaluate: Step
    start: float
    actor_start: float
    teachers: Mapping[str, TeacherCost]
    stages: tuple[StageCost, ...]
    workers: int = 1
    loaders: int = 0
    actors: int = 1
    decoders: int = 1
    service: float | None = None
    batch: int = 1

    @property
    def samples(self) -> int:
        """Of an epoch: its last step is filled."""
        return -(-self.images // self.batch) * self.batch

    @property
    def ways(self) -> tuple[Way, ...]:
        """Those that the recipe knows."""
        return tuple(way for way in WAYS if way != "hybrid" or self.service is not None)

    def pace(self, step: Step) -> float:
        """Wall seconds an image of a training that goes on, of all workers."""
        return self.student.overlapped(step.compute, step.load, self.loaders) / self.workers

    def precompute(self, name: str) -> float:
        """Wall seconds of what is left of a teacher's precompute."""
        of = self.teachers[name]
        if of.todo == 0:
            return 0.0
        row = self.teacher.overlapped(of.compute, of.decode + of.write, self.decoders)
        return self.actor_start + of.start + of.todo * row / self.actors

    def asked(self, name: str, stage: StageCost, students: int) -> int:
        """How many of a teacher's rows the service computes for a stage's students.

        A unit has the rows that the first epoch reads one after the other, or else all that are left: the second epoch asks
        for a row of each of those.
        """
        todo = self.teachers[name].todo
        return todo if students * stage.epochs > 1 else min(todo, self.images)

    def waiting(self, name: str, stage: StageCost, rows: int) -> float:
        """Wall seconds that a stage's students wait for so many of a teacher's rows, which come as they ask for them."""
        of = self.teachers[name]
        if rows == 0:
            return 0.0
        seconds = rows * (of.decode + of.compute + of.write)
        if self.loaders:
            seconds = max(0.0, seconds - min(stage.epochs, 2) * self.samples * self.pace(stage.cached))
        return self.actor_start + of.start + seconds

    def training(self, stage: StageCost, step: Step) -> float:
        """Wall seconds of one student's stage with such steps."""
        evaluations = stage.evaluations * self.val_images * self.pace(self.evaluate)
        return self.start + stage.epochs * self.samples * self.pace(step) + evaluations


@dataclass(frozen=True)
class Spending:
    """What one stage of so many students costs.

    Attributes:
        precompute: wall seconds before the training, ``training`` of it.
        teacher_forwards: (image, view)s that teachers look at, of all its teachers.
        written_bytes, read_bytes: to and from the cache.
    """

    precompute: float
    training: float
    teacher_forwards: int
    written_bytes: float
    read_bytes: float

    @property
    def seconds(self) -> float:
        """Wall time in all."""
        return self.precompute + self.training


def spend(job: Job, way: Way, students: int = 1) -> tuple[Spending, ...]:
    """What each stage costs when so many students, each with its own seed, are trained one after the other.

    A teacher's rows are paid for by the first stage that names it; those that are committed are not paid for. Neither is a
    service for a student that misses none.

    Raises:
        ValueError: the job has no such way.
    """
    if way not in job.ways:
        raise ValueError(f"no {way} targets in this job")
    paid: set[str] = set()
    spent = []
    for stage in job.stages:
        looks = students * stage.epochs * job.samples
        precompute, forwards, written = 0.0, 0, 0.0
        training = students * job.training(stage, stage.online if way == "online" else stage.cached)
        for name in stage.teachers:
            of = job.teachers[name]
            if way == "online":
                forwards += looks
                training += students * of.start
            elif name not in paid:
                rows = of.todo
                if way == "cached":
                    precompute += job.precompute(name)
                else:
                    rows = job.asked(name, stage, students)
                    training += job.waiting(name, stage, rows)
                forwards += rows
                written += rows * of.row_bytes
            paid.add(name)
        read = 0.0 if way == "online" else looks * stage.read_bytes
        spent.append(Spending(precompute, training, forwards, written, read))
    if way == "hybrid" and any(job.teachers[name].todo for name in paid):
        spent[0] = replace(spent[0], training=spent[0].training + (job.service or 0.0))
    return tuple(spent)


def total(spent: Sequence[Spending]) -> Spending:
    """Of all stages together."""
    return Spending(
        sum(s.precompute for s in spent),
        sum(s.training for s in spent),
        sum(s.teacher_forwards for s in spent),
        sum(s.written_bytes for s in spent),
        sum(s.read_bytes for s in spent),
    )


def cheapest(job: Job, students: int = 1) -> Way:
    """The way with the least wall time; where two take the same, the one that stores less."""
    return min(job.ways, key=lambda way: total(spend(job, way, students)).seconds)


def break_even_epochs(job: Job, stage: StageCost) -> int | None:
    """From how many epochs on this stage alone, of one student, takes less time cached than online; None if it never does."""
    starts = sum(job.teachers[name].start for name in stage.teachers)
    saved = job.samples * (job.pace(stage.online) - job.pace(stage.cached))
    return _first_above(sum(map(job.precompute, stage.teachers)) - starts, saved)


def break_even_students(job: Job) -> int | None:
    """From how many students on the whole recipe takes less time cached than online; None if it never does."""
    names = dict.fromkeys(name for stage in job.stages for name in stage.teachers)
    saved = sum(
        job.training(stage, stage.online)
        - job.training(stage, stage.cached)
        + sum(job.teachers[name].start for name in stage.teachers)
        for stage in job.stages
    )
    return _first_above(sum(map(job.precompute, names)), saved)


def _first_above(cost: float, gain: float) -> int | None:
    """The least n of 1 and more from which on ``n * gain > cost``."""
    return max(1, math.floor(cost / gain) + 1) if gain > 0 else None
