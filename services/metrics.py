"""The system's metrics, on Ray's Prometheus endpoint of every node: names, meanings, and how they are published.

Ray exports a metric as ``ray_`` and its name, a counter with ``_total`` behind it, and adds the worker and the node as labels.
Rates and shares are left to Prometheus: only counters add up over workers that come and go. Means come from counters too, for
Ray makes a histogram's sum from the middles of its buckets.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import Any, Literal

import ray
from ray.util.metrics import Counter, Gauge, Histogram

from cache import repeated_requests
from services.spans import Phase, Spans
from trainer import Pulse


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        tags: its labels, beside those of Ray.
        boundaries: of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()

    @property
    def exported(self) -> str:
        """The name that Prometheus sees; of a histogram what its series' names begin with."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


ROWS = Metric("mtpd_rows", "counter", "Rows committed.", ("teacher",))
FAILED_ROWS = Metric("mtpd_failed_rows", "counter", "Rows left without targets.", ("teacher",))
UNITS = Metric("mtpd_units", "counter", "Units committed.", ("teacher",))
WRITTEN_BYTES = Metric("mtpd_written_bytes", "counter", "Bytes of shards and detections written.", ("teacher",))
PHASE_SECONDS = Metric(
    "mtpd_phase_seconds",
    "counter",
    "Seconds that units spent decoding, waiting for the device, on it, and being written.",
    ("teacher", "phase"),
)
UNITS_IN_PHASE = Metric("mtpd_units_in_phase", "gauge", "Units in a phase now.", ("teacher", "phase"))
WRITE_LAG = Metric(
    "mtpd_write_lag_seconds",
    "histogram",
    "Seconds from the end of a unit's computation to its commit.",
    ("teacher",),
    (0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300),
)
STORAGE_REPEATS = Metric(
    "mtpd_storage_repeats", "counter", "Requests to the storage that were made again.", ("teacher",)
)
PLANNED_ROWS = Metric("mtpd_planned_rows", "gauge", "Rows that the group is to have in the end.", ("teacher",))
COMMITTED_ROWS = Metric("mtpd_committed_rows", "gauge", "Rows that the group has.", ("teacher",))
RETRIED_UNITS = Metric("mtpd_retried_units", "counter", "Units that went back to the queue.", ("teacher",))
TRAINING_STEPS = Metric("mtpd_training_steps", "counter", "Steps of training, of each worker.", ("stage",))
TRAINING_IMAGES = Metric("mtpd_training_images", "counter", "Images trained on.", ("stage",))
TRAINING_SECONDS = Metric(
    "mtpd_training_seconds", "counter", "Seconds in steps, waiting for data included.", ("stage",)
)
TRAINING_DATA_SECONDS = Metric("mtpd_training_data_seconds", "counter", "Of them, waiting for data.", ("stage",))
TRAINING_EPOCH = Metric("mtpd_training_epoch", "gauge", "Epoch that a stage is in, from 1.", ("stage",))
TRAINING_LOSS = Metric("mtpd_training_loss", "gauge", "Loss, a mean over the last steps.", ("stage", "loss"))
KEPT_ROWS = Metric("mtpd_kept_rows", "counter", "Rows that the local disk had (cache.local_dir).", ("stage",))
FETCHED_ROWS = Metric("mtpd_fetched_rows", "counter", "Rows that it had not.", ("stage",))
METRICS = (
    ROWS,
    FAILED_ROWS,
    UNITS,
    WRITTEN_BYTES,
    PHASE_SECONDS,
    UNITS_IN_PHASE,
    WRITE_LAG,
    STORAGE_REPEATS,
    PLANNED_ROWS,
    COMMITTED_ROWS,
    RETRIED_UNITS,
    TRAINING_STEPS,
    TRAINING_IMAGES,
    TRAINING_SECONDS,
    TRAINING_DATA_SECONDS,
    TRAINING_EPOCH,
    TRAINING_LOSS,
    KEPT_ROWS,
    FETCHED_ROWS,
)


def publish(metric: Metric, value: float, **tags: str) -> None:
    """Add to a counter, set a gauge, or observe with a histogram. Without Ray nothing happens."""
    if not ray.is_initialized():
        return
    made = _made(metric)
    if metric.kind == "gauge":
        made.set(value, tags=tags)
    elif metric.kind == "histogram":
        made.observe(value, tags=tags)
    elif value > 0:  # Ray refuses to add nothing
        made.inc(value, tags=tags)


@lru_cache(maxsize=len(METRICS))
def _made(metric: Metric) -> Any:
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.description, boundaries=list(metric.boundaries), tag_keys=metric.tags)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(metric.name, metric.description, tag_keys=metric.tags)


class ActorMeter:
    """Publishes what an actor does with its units, whose phases overlap."""

    def __init__(self, teacher: str) -> None:
        self._teacher, self._lock = teacher, Lock()
        self._inside: dict[Phase, int] = {}
        self._repeats = repeated_requests()

    @contextmanager
    def phase(self, spans: Spans, phase: Phase) -> Iterator[None]:
        """Time a phase of a unit."""
        self._move(phase, 1)
        try:
            with spans.measured(phase) as span:
                yield
        finally:
            self._move(phase, -1)
        publish(PHASE_SECONDS, span.seconds, teacher=self._teacher, phase=phase)

    def committed(self, rows: int, written_bytes: int, lag: float) -> None:
        """Count a unit that is done with.

        Args:
            lag: seconds from the end of its computation to its commit.
        """
        teacher = self._teacher
        publish(ROWS, rows, teacher=teacher)
        publish(UNITS, 1, teacher=teacher)
        publish(WRITTEN_BYTES, written_bytes, teacher=teacher)
        publish(WRITE_LAG, lag, teacher=teacher)
        with self._lock:
            before, self._repeats = self._repeats, repeated_requests()
            publish(STORAGE_REPEATS, self._repeats - before, teacher=teacher)

    def _move(self, phase: Phase, step: int) -> None:
        with self._lock:
            self._inside[phase] = self._inside.get(phase, 0) + step
            publish(UNITS_IN_PHASE, self._inside[phase], teacher=self._teacher, phase=phase)


def publish_pulse(pulse: Pulse, stage: str) -> None:
    """What a training worker did in the last seconds.

    Args:
        stage: its name: the work_dir's last folder and ``stage-N``.
    """
    publish(TRAINING_STEPS, pulse.steps, stage=stage)
    publish(TRAINING_IMAGES, pulse.images, stage=stage)
    publish(TRAINING_SECONDS, pulse.seconds, stage=stage)
    publish(TRAINING_DATA_SECONDS, pulse.data_seconds, stage=stage)
    publish(KEPT_ROWS, pulse.kept_rows, stage=stage)
    publish(FETCHED_ROWS, pulse.fetched_rows, stage=stage)
    publish(TRAINING_EPOCH, pulse.epoch, stage=stage)
    for name, value in pulse.losses.items():
        publish(TRAINING_LOSS, value, stage=stage, loss=name)
