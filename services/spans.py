"""When an actor did what with a unit: intervals on one clock, for metrics and for the trace."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

# `forward` and `quantise` lie inside `device`, batch by batch
Phase = Literal["decode", "wait", "device", "forward", "quantise", "write"]
# one offset a process: its clock never goes back, and all of its intervals are comparable
_OFFSET = time.time() - time.monotonic()


@dataclass
class Span:
    """An interval, in seconds since the epoch by the actor's clock."""

    phase: Phase
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


class Spans:
    """The intervals of one unit, in the order in which they ended."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    @contextmanager
    def measured(self, phase: Phase) -> Iterator[Span]:
        """Measure what is done in the context; the span is complete when that is left."""
        span = Span(phase, time.monotonic() + _OFFSET, 0.0)
        try:
            yield span
        finally:
            span.end = time.monotonic() + _OFFSET
            self._spans.append(span)

    def add(self, phase: Phase, start: float, end: float) -> None:
        """An interval by ``time.monotonic``."""
        self._spans.append(Span(phase, start + _OFFSET, end + _OFFSET))

    def seconds(self, phase: Phase) -> float:
        """Time spent in a phase."""
        return sum(span.seconds for span in self._spans if span.phase == phase)

    def all(self) -> tuple[Span, ...]:
        """Every interval."""
        return tuple(self._spans)
