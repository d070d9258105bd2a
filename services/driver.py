"""The driver's loop: what becomes of each unit of a plan is counted, told, and folded into the manifest."""

from dataclasses import dataclass, field

from cache import Lease, Plan, Storage, compact
from services import logs
from services.journal import Journal
from services.pool import Pool, SetAside
from services.present import Progress
from services.trace import Trace
from trainer import Failure

# the manifest's parts are folded when so many are new, and a quarter of those folded before: work stays linear in units
_PARTS = 256


@dataclass
class Tally:
    """What a run did so far.

    Attributes:
        computed: rows committed.
        failures: (image, view)s without targets, and why.
        device_seconds: seconds in which units had their actor's device.
    """

    computed: int = 0
    written_bytes: int = 0
    device_seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)


def drive(
    pool: Pool,
    plan: Plan,
    storage: Storage,
    lease: Lease,
    journal: Journal,
    progress: Progress,
    tally: Tally,
    trace: Trace | None = None,
) -> None:
    """Have the pool run a plan's units.

    Args:
        tally: what they did is added to it, also where the run is interrupted.

    Raises:
        LeaseHeldError: another run took the lease over.
        MtpdError, KeyboardInterrupt: see `Pool.run`.
    """
    teacher, parts, folded = plan.info.teacher, 0, 0
    for outcome in pool.run(plan.units()):
        lease.check()
        progress.begin(pool.begun)
        journal.update(pool.begun, pool.retried)
        if isinstance(outcome, SetAside):
            lost = [Failure(r.image_id, r.view, r.file_name, outcome.reason) for r in outcome.unit.rows]
            tally.failures += lost
            progress.advance(0, len(lost))
            journal.count(0, 0, lost)
            logs.event("unit set aside", teacher=teacher, unit=outcome.unit.name, reason=outcome.reason)
            continue
        if trace is not None:
            trace.add(outcome)
        tally.failures += outcome.failures
        tally.computed += outcome.rows
        tally.written_bytes += outcome.written_bytes
        tally.device_seconds += outcome.device_seconds
        progress.advance(outcome.rows, len(outcome.failures))
        journal.count(outcome.rows, outcome.written_bytes, outcome.failures)
        parts += outcome.rows > 0
        if parts > max(_PARTS, folded // 4):
            folded, parts = folded + compact(storage, plan.info), 0
