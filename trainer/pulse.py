"""What a training stage tells while it runs: pulses of counters, and ``pulse.json`` in its folder, a sign of life."""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

PULSE = "pulse.json"
_PERIOD_SECONDS = 5.0
_RECENT = 50  # iterations that rates and losses are averaged over


@dataclass(frozen=True)
class Pulse:
    """A few seconds of a stage on one worker, up to now.

    Attributes:
        iteration: of the stage, from 1.
        iterations: of the whole stage.
        epoch: begun, from 1.
        losses: means over the last iterations; what is not finite is left out.
        seconds_left: of training, without the evaluations.
        written: seconds since the epoch, by this machine's clock.
        steps, images: since the pulse before.
        seconds, data_seconds: since then: of the steps, and of them what was spent waiting for the loader.
        kept_rows, fetched_rows: since then: rows of a cache in object storage that were on the local disk, and that were not.
    """

    iteration: int
    iterations: int
    epoch: int
    epochs: int
    losses: dict[str, float]
    seconds_left: float
    written: float
    steps: int
    images: int
    seconds: float
    data_seconds: float
    kept_rows: int
    fetched_rows: int


class PulseHook(Hook):
    """Make a pulse every few seconds of training, and one at the end.

    Args:
        folder: of the stage, where the main worker keeps its last pulse.
        listen: given every pulse, on each worker.
    """

    def __init__(
        self, folder: Path, listen: Callable[[Pulse], None] | None = None, period: float = _PERIOD_SECONDS
    ) -> None:
        self._file, self._listen, self._period = folder / PULSE, listen, period
        self._last = time.monotonic()
        self._begin_anew()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Count the rows of a batch by where they come from; the model takes them out of it."""
        batches = data_batch.get("teacher_maps", {}) if isinstance(data_batch, Mapping) else {}
        for maps in (maps for of_teacher in batches.values() for maps in of_teacher):
            self._kept += maps.kept is True
            self._fetched += maps.kept is False

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Mapping[str, Any] | None = None
    ) -> None:
        """Count an iteration. Times are those that mmengine's own timer gave it, which runs before."""
        scalars = runner.message_hub.log_scalars
        self._steps += 1
        self._seconds += _current(scalars, "train/time")
        self._data_seconds += _current(scalars, "train/data_time")
        samples = data_batch["data_samples"] if isinstance(data_batch, Mapping) else ()
        self._images += len(samples)
        if time.monotonic() - self._last >= self._period or runner.iter + 1 == runner.max_iters:
            self._beat(runner)

    def _beat(self, runner: Runner) -> None:
        scalars = runner.message_hub.log_scalars
        losses = {k.removeprefix("train/"): float(v.mean(_RECENT)) for k, v in scalars.items() if "loss" in k}
        done = runner.iter + 1
        pulse = Pulse(
            iteration=done,
            iterations=runner.max_iters,
            epoch=runner.epoch + 1,
            epochs=runner.max_epochs,
            losses={name: value for name, value in losses.items() if math.isfinite(value)},
            seconds_left=(runner.max_iters - done) * float(scalars["train/time"].mean(_RECENT)),
            written=time.time(),
            steps=self._steps,
            images=self._images,
            seconds=self._seconds,
            data_seconds=self._data_seconds,
            kept_rows=self._kept,
            fetched_rows=self._fetched,
        )
        if runner.rank == 0:
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps(asdict(pulse), indent=1))
            temporary.replace(self._file)
        if self._listen is not None:
            self._listen(pulse)
        self._last = time.monotonic()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._steps, self._images, self._kept, self._fetched = 0, 0, 0, 0
        self._seconds, self._data_seconds = 0.0, 0.0


def read_pulse(folder: Path) -> Pulse | None:
    """The last pulse of a stage; None if there is none, or if it is no pulse."""
    try:
        return Pulse(**json.loads((folder / PULSE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _current(scalars: Mapping[str, Any], name: str) -> float:
    return float(scalars[name].current()) if name in scalars else 0.0
