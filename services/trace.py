"""A precompute as a Chrome trace: what each actor did with each unit and when, and whether its device ever waited.

The file is in Chrome's trace event format (JSON object format, complete events): open it with Perfetto or chrome://tracing.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from services.outcome import UnitRecord
from services.present import duration, say
from services.spans import Span

# in this order from top to bottom; decoding and writing of several units overlap, each in a lane of its own
_DEVICE = ("device", "forward", "quantise")
_LANES = {"device": 1, "decode": 10, "wait": 20, "write": 30}


@dataclass(frozen=True)
class DeviceUse:
    """An actor's device between its first unit and its last.

    Attributes:
        busy: seconds on units.
        window: seconds from the first unit's begin to the last one's end.
        gaps: seconds between units, in order.
    """

    actor: str
    busy: float
    window: float
    gaps: tuple[float, ...]

    @property
    def share(self) -> float:
        """Share of the time in which the device was busy."""
        return self.busy / self.window if self.window else 1.0


@dataclass
class Trace:
    """Collects what actors report, and writes it on leaving the context, also where a run was interrupted.

    Args:
        file: where the trace goes.
    """

    file: Path
    _records: list[UnitRecord] = field(default_factory=list)

    def __enter__(self) -> "Trace":
        self.file.parent.mkdir(parents=True, exist_ok=True)  # not after hours of work
        return self

    def __exit__(self, *_: object) -> None:
        if not self._records:
            return
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        temporary.write_text(json.dumps({"traceEvents": events(self._records), "displayTimeUnit": "ms"}))
        temporary.replace(self.file)
        for use in device_use(self._records):
            say(
                f"trace: {use.actor}: device busy {use.share:.1%} of {duration(use.window)}, longest wait "
                f"{1000 * max(use.gaps, default=0.0):.1f} ms"
            )
        say(f"trace: {self.file} (open it at https://ui.perfetto.dev or in chrome://tracing)")

    def add(self, record: UnitRecord) -> None:
        """Take in a unit."""
        self._records.append(record)


def device_use(records: Iterable[UnitRecord]) -> list[DeviceUse]:
    """How each actor's device was used, by the actor's name."""
    spans: dict[str, list[Span]] = {}
    for record in records:
        spans.setdefault(record.actor, []).extend(span for span in record.spans if span.phase == "device")
    found = []
    for actor, of_actor in sorted(spans.items()):
        of_actor.sort(key=lambda span: span.start)
        gaps = tuple(b.start - a.end for a, b in pairwise(of_actor))
        busy = sum(span.seconds for span in of_actor)
        found.append(DeviceUse(actor, busy, of_actor[-1].end - of_actor[0].start if of_actor else 0.0, gaps))
    return found


def events(records: Sequence[UnitRecord]) -> list[dict[str, Any]]:
    """The trace's events: an actor is a process, the device and each lane of overlapping work a thread; times in µs."""
    begin = min((span.start for record in records for span in record.spans), default=0.0)
    made: list[dict[str, Any]] = []
    for process, actor in enumerate(sorted({record.actor for record in records}), start=1):
        own = [record for record in records if record.actor == actor]
        made.append(_name("process_name", process, 0, f"{own[0].teacher} {actor}"))
        for phase, first in _LANES.items():
            kinds = _DEVICE if phase == "device" else (phase,)
            spans = [(span, record) for record in own for span in record.spans if span.phase in kinds]
            # what encloses another comes before it
            spans.sort(key=lambda pair: (pair[0].start, -pair[0].end))
            free: list[float] = []  # when each lane's last interval ends
            for span, record in spans:
                lane = 0
                if phase != "device":
                    lane = next((n for n, end in enumerate(free) if end <= span.start), len(free))
                    free[lane : lane + 1] = [span.end]
                made.append(
                    {
                        "name": span.phase,
                        "cat": record.teacher,
                        "ph": "X",
                        "ts": (span.start - begin) * 1e6,
                        "dur": span.seconds * 1e6,
                        "pid": process,
                        "tid": first + lane,
                        "args": {"unit": record.unit, "rows": record.rows},
                    }
                )
            made += [_name("thread_name", process, first + n, phase) for n in range(max(1, len(free)))]
    return made


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
