"""How many actors one driver feeds: throughput against the ideal, and the driver's processor time for each unit.

The real driver's loop (``services.driver.drive``: pool, lease, journal, progress) runs a real plan (COCO's mix of sizes, units
of 24 rows) on real Ray actors, whose ``run`` sleeps under their device's lock in place of a teacher, and answers with the
record that a teacher's actor answers with. Only what the driver does is left: decoding, the teacher and writing are not here.

- **Efficiency** at 1, 4 and 16 actors: units x sleep / actors, over the time from the first unit handed out to the last
  answered. At least 0.95 is wanted at 16 actors and 10,000 units.
- **Driver**: processor's time of the driver's process, all of its threads, over that time: less than 10 % of a core is
  wanted. The sleep is 0.2 s; a real unit takes a minute, so that this load is that of some thousands of actors.
- **Many actors**: as many as ``--seats`` say share 16 processes, each a worker of its own to the pool, with three units in
  flight; they sleep so long that units end as often as with 16 actors. What a unit costs the driver may not grow with the
  number of workers.

Actors ask for no CPU of Ray's, so that any number fits the machine; they only sleep::

    python -W ignore -m benchmarks.pool --json pool.json
"""

import asyncio
import io
import json
import os
import tempfile
import threading
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from rich.console import Console
from rich.table import Table

import cache
from benchmarks.scale import draw
from services.driver import Tally, drive
from services.journal import Journal
from services.outcome import UnitRecord
from services.pool import PIPELINE_DEPTH, Pool
from services.present import Progress

UNIT_ROWS, PROCESSES = 24, 16
INFO = cache.GroupInfo("teacher", {"precision": "int8"}, (cache.Level("P3", 256, 8),), "int8", 32)
POLICY = cache.ViewPolicy(((1333, 800),), "both")  # two views of each image
EFFICIENCY, CORE = 0.95, 0.10


@ray.remote(num_cpus=0, max_concurrency=PIPELINE_DEPTH)
class Sleeper:
    """An actor whose device takes a fixed time for each unit."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._device = seconds, threading.Lock()

    def load(self) -> str:
        """As a teacher's actor."""
        return ray.get_runtime_context().get_node_id()

    def run(self, unit: cache.Unit) -> UnitRecord:
        """Hold the device for the time of a unit."""
        with self._device:
            time.sleep(self._seconds)
        return UnitRecord(unit.name, len(unit.rows), (), 0, self._seconds, INFO.teacher, "host:1")


@ray.remote(num_cpus=0, max_concurrency=10_000)
class Hall:
    """One process that is many actors, each with a device of its own."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._devices = seconds, dict[int, asyncio.Lock]()

    async def load(self, seat: int) -> str:
        """As a teacher's actor."""
        self._devices[seat] = asyncio.Lock()
        return ray.get_runtime_context().get_node_id()

    async def run(self, seat: int, unit: cache.Unit) -> UnitRecord:
        """Hold the seat's device for the time of a unit."""
        async with self._devices[seat]:
            await asyncio.sleep(self._seconds)
        return UnitRecord(unit.name, len(unit.rows), (), 0, self._seconds, INFO.teacher, "host:1")


class Seat:
    """One of the actors of a hall, as the pool sees an actor."""

    def __init__(self, hall: Any, number: int) -> None:
        self.load, self.run = _Call(hall.load, number), _Call(hall.run, number)


class _Call:
    def __init__(self, method: Any, seat: int) -> None:
        self._method, self._seat = method, seat

    def remote(self, *arguments: Any) -> Any:
        """As a method of an actor."""
        return self._method.remote(self._seat, *arguments)


class Seats(Pool):
    """A pool whose workers share processes: one that is given back leaves its process to the others."""

    def _give_back(self, worker: Any) -> None:
        self._forget(worker)


def measure(actors: int, units: int, seconds: float, *, seats: bool = False) -> dict[str, float]:
    """A run of so many actors that sleep so long for each unit."""
    plan = cache.make_plan(draw(units * UNIT_ROWS), POLICY, INFO, unit_rows=UNIT_ROWS)
    if seats:
        halls, numbers = [Hall.remote(seconds) for _ in range(PROCESSES)], iter(range(10**9))
        ray.get([hall.load.remote(-1) for hall in halls])

    def create() -> Any:
        return Seat(halls[(number := next(numbers)) % PROCESSES], number) if seats else Sleeper.remote(seconds)

    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()):
        storage = cache.LocalStorage(Path(name))
        cache.prepare(storage, plan)
        with (
            cache.Lease(storage, INFO.name) as lease,
            Progress("teacher", plan.total, 0) as progress,
            Journal(storage, plan, lease, actors) as journal,
        ):
            pool, tally = (Seats if seats else Pool)(create, actors, actors, print), Tally()
            used = time.process_time()
            drive(pool, plan, storage, lease, journal, progress, tally)
            end, used = time.monotonic(), time.process_time() - used
            pool.close()
    assert tally.computed == plan.todo
    assert pool.begun is not None
    took, done = end - pool.begun, plan.todo_units
    ideal = done * seconds / actors
    return dict(
        actors=actors, units=done, sleep_s=seconds, wall_s=took, efficiency=ideal / took, core=used / took,
        ms_a_unit=1000 * used / done, units_a_second=done / took,
    )  # fmt: skip


def main(
    actors: Annotated[list[int] | None, typer.Option("--actors", min=1, help="Default: 1, 4 and 16.")] = None,
    units: Annotated[int, typer.Option(min=100, help="Of 16 actors; others get their share.")] = 10_000,
    sleep: Annotated[float, typer.Option(min=0.01, help="Seconds of a unit.")] = 0.2,
    seats: Annotated[int, typer.Option(min=0, help="Actors that share processes; 0 leaves them out.")] = 1000,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure what one driver can feed."""
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR", object_store_memory=2**28)
    measured = [measure(n, units if n >= 16 else max(100, units * n // 40), sleep) for n in actors or [1, 4, 16]]
    if seats:
        measured.append(measure(seats, units, sleep * seats / 16, seats=True))
    ray.shutdown()
    table = Table("actors", "units", "sleep, s", "efficiency", "driver, of a core", "driver, ms a unit", "units/s")
    for m in measured:
        table.add_row(
            f"{m['actors']:,}", f"{m['units']:,}", f"{m['sleep_s']:g}", f"{m['efficiency']:.3f}", f"{m['core']:.3f}",
            f"{m['ms_a_unit']:.2f}", f"{m['units_a_second']:.1f}",
        )  # fmt: skip
    Console().print(table)
    for m in measured:
        if m["actors"] == 16:
            print(
                f"16 actors: {EFFICIENCY} of the ideal {m['efficiency'] >= EFFICIENCY}, < {CORE} of a core {m['core'] < CORE}"
            )
    if json_path:
        json_path.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    typer.run(main)
