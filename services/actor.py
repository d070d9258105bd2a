"""The thin Ray actor around `trainer.UnitComputer` and `cache.write_unit`."""

import os
import socket
import threading
import time
from dataclasses import dataclass

import ray
import torch

from cache import GroupInfo, Policy, RowTargets, Unit, fence, open_storage, write_unit
from services.pool import PIPELINE_DEPTH
from trainer import Failure, SplitSpec, Teacher, TeacherSpec, UnitComputer


@dataclass(frozen=True)
class ActorJob:
    """What an actor must know; a few hundred bytes."""

    uri: str
    run: str
    info: GroupInfo
    spec: TeacherSpec
    policy: Policy
    split: SplitSpec


@dataclass(frozen=True)
class UnitRecord:
    """What an actor reports of a unit; the targets themselves never travel through Ray.

    Attributes:
        rows: rows committed.
        device_seconds: time the unit held the device.
    """

    unit: str
    rows: int
    failures: tuple[Failure, ...]
    written_bytes: int
    device_seconds: float


@ray.remote(max_concurrency=PIPELINE_DEPTH)
class TeacherActor:
    """Holds one teacher. Up to `PIPELINE_DEPTH` calls of `run` overlap; one at a time is on the device."""

    def __init__(self, job: ActorJob) -> None:
        self._job = job
        self._device_lock = threading.Lock()
        self._computer: UnitComputer | None = None

    def load(self) -> str:
        """Load the teacher. Not done on creation, for an error there would arrive as the death of the actor.

        Returns:
            Host and process, for logs.

        Raises:
            TeacherLoadError: config and checkpoint do not fit.
        """
        job = self._job
        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        teacher = Teacher.of_group(job.spec, job.info, device)
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        self._computer = UnitComputer(
            teacher, job.info, job.policy, job.split, job.spec.batch_size, decoders=max(1, int(cpus))
        )
        return f"{socket.gethostname()}:{os.getpid()}"

    def run(self, unit: Unit) -> UnitRecord:
        """Decode, compute, write and commit one unit."""
        assert self._computer is not None, "load() comes first"
        views, unusable = self._computer.decode(unit)
        with self._device_lock:
            started = time.monotonic()
            targets, refused = self._computer.compute(views)
            seconds = time.monotonic() - started
        del views
        written = self._write(unit, targets) if targets else 0
        return UnitRecord(unit.name, len(targets), (*unusable, *refused), written, seconds)

    def _write(self, unit: Unit, targets: list[RowTargets]) -> int:
        storage, info = open_storage(self._job.uri), self._job.info
        return write_unit(storage, info, unit, targets, lambda: fence(storage, info.name, self._job.run))
