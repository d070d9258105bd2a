"""What becomes of a unit, as an actor reports it. Imports no model's library: who only reads records needs none."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.spans import Span

if TYPE_CHECKING:
    from trainer import Failure


@dataclass(frozen=True)
class UnitRecord:
    """What an actor reports of a unit; the targets themselves never travel through Ray.

    Attributes:
        rows: rows committed.
        device_seconds: time the unit held the device.
        actor: host and process.
        spans: when the unit was decoded, computed and written; empty if that was not asked for.
    """

    unit: str
    rows: int
    failures: "tuple[Failure, ...]"
    written_bytes: int
    device_seconds: float
    teacher: str = ""
    actor: str = ""
    spans: tuple[Span, ...] = ()
