"""The thin Ray actor around `trainer.UnitComputer` and `cache.write_unit`."""

import logging
import os
import socket
import threading
from dataclasses import asdict, dataclass

import ray

from cache import GroupInfo, Policy, RowTargets, TeacherLoadError, Unit, fence, open_storage, write_unit
from services import logs
from services.device import given_device
from services.metrics import ActorMeter
from services.outcome import UnitRecord
from services.pool import PIPELINE_DEPTH
from services.spans import Spans
from trainer import SplitSpec, Teacher, TeacherSpec, UnitComputer


@dataclass(frozen=True)
class ActorJob:
    """What an actor must know; a few hundred bytes.

    Attributes:
        log: how it writes logs, see `services.logs`.
        traced: its records tell when each unit was where: a few kilobytes each.
    """

    uri: str
    run: str
    info: GroupInfo
    spec: TeacherSpec
    policy: Policy
    split: SplitSpec
    log: str = ""
    traced: bool = False


class UnitWorker:
    """Holds one teacher. Calls of `run` may overlap; one at a time is on the device."""

    def __init__(self, job: ActorJob) -> None:
        self._job = job
        self._device_lock = threading.Lock()
        self._computer: UnitComputer | None = None
        self._meter = ActorMeter(job.info.teacher)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        logs.set_up(job.log)

    def load(self) -> str:
        """Load the teacher. Not done on creation, for an error there would arrive as the death of the actor.

        Returns:
            The id of the node that it is on.

        Raises:
            TeacherLoadError: config and checkpoint do not fit, or torch cannot use the GPU that this actor was given.
        """
        job = self._job
        device = given_device("actors.gpus", "this actor", f"teachers.{job.info.teacher}", TeacherLoadError)
        teacher = Teacher.of_group(job.spec, job.info, device)
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self._computer = UnitComputer(
            teacher, job.info, job.policy, job.split, job.spec.batch_size, decoders=max(1, int(cpus))
        )
        logs.event("teacher loaded", teacher=job.info.teacher, device=device)
        return ray.get_runtime_context().get_node_id()

    def run(self, unit: Unit, run: str | None = None) -> UnitRecord:
        """Decode, compute, write and commit one unit.

        Args:
            run: `Lease.run` of the run that it is for; the job's by default.
        """
        assert self._computer is not None, "load() comes first"
        teacher, meter, spans = self._job.info.teacher, self._meter, Spans()
        logs.event("unit begun", teacher=teacher, unit=unit.name)
        with meter.phase(spans, "decode"):
            views, unusable = self._computer.decode(unit)
        with meter.phase(spans, "wait"):
            self._device_lock.acquire()
        try:
            with meter.phase(spans, "device"):
                targets, refused = self._computer.compute(views, spans.add if self._job.traced else None)
        finally:
            self._device_lock.release()
        del views
        with meter.phase(spans, "write"):
            written = self._write(unit, targets, run or self._job.run) if targets else 0
        failures, seconds = (*unusable, *refused), spans.seconds("device")
        meter.committed(len(targets), written, spans.seconds("write"))
        logs.event(
            "unit committed", teacher=teacher, unit=unit.name, rows=len(targets), bytes=written, device_seconds=seconds
        )
        for failure in failures:
            logs.event("row failed", level=logging.WARNING, teacher=teacher, unit=unit.name, **asdict(failure))
        told = spans.all() if self._job.traced else ()
        return UnitRecord(unit.name, len(targets), failures, written, seconds, teacher, self._name, told)

    def _write(self, unit: Unit, targets: list[RowTargets], run: str) -> int:
        storage, info = open_storage(self._job.uri), self._job.info
        return write_unit(storage, info, unit, targets, lambda: fence(storage, info.name, run))


@ray.remote(max_concurrency=PIPELINE_DEPTH)
class TeacherActor(UnitWorker):
    """A worker of a precompute, which pulls units. Up to `PIPELINE_DEPTH` calls of `run` overlap."""
