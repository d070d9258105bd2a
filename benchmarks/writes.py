"""What it costs to quantise, write and commit a unit, against one plain file of the same bytes on the same disk.

A unit is 800 x 1344 views, P3-P7 of 256 channels, as many as the plan puts in one (int8: 23 rows, 132 MB). The maps lie
there as float32, as a teacher on the CPU leaves them: four times the bytes that are stored as int8. Contenders, in turn in
every round, each into a fresh folder:

- "whole": ``encode`` every view, make its `RowTargets`, ``write_unit``: shards (each flushed to the disk), detections, the
  part of the manifest that commits them; one after the other.
- "overlapped": the same of three units, each written while the next is encoded, as an actor does it (there the next one's
  forward comes between); seconds a unit, the first encoding and the last writing included.
- "write": ``write_unit`` alone, of rows quantised before.
- "plain": one file of the same stored bytes, written from memory in pieces of 4 MiB by one thread, and flushed to the disk:
  the yardstick. It reads no float, makes no checksum and ends in one flush; ``write_unit`` ends in one for each of 12 files.
- "limit": the largest magnitude of every map (``amax``, one pass over the floats without arithmetic to speak of), then
  "plain": a quantisation needs the peak of a channel before it can begin, so none that is followed by a write is faster.

Medians and the best over the rounds; the first round warms up and does not count. The share of "plain" in the time of "whole"
is what is aimed at: at least 0.5 for int8. The processor's seconds are compared too: other programs on the machine disturb them
less. The parts of "whole" are timed in the same rounds, by wrapping the functions that do them; "write", "fsync" and "crc" add
up the seconds of two threads. Torch runs on ``--threads`` threads.

    OMP_NUM_THREADS=1 python -m benchmarks.writes --json writes.json
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args
from unittest import mock

import google_crc32c
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import cache
from cache import detections, manifest

HEIGHT, WIDTH, CHANNELS = 800, 1344, 256
LEVELS = tuple(cache.Level(f"P{n}", CHANNELS, 2**n) for n in range(3, 8))
TARGET = 0.5
PIECE = 2**22
UNITS = 3
# what is timed inside: its name, and the functions that do it
PARTS = (
    ("write", ((os, "write"),)),
    ("fsync", ((os, "fsync"),)),
    ("crc", ((google_crc32c, "value"),)),
    ("parquet", ((manifest, "seal"), (detections, "seal"), (detections, "to_table"))),
)
PART_NAMES = ("encode", *(name for name, _ in PARTS))
CONTENDERS = ("whole", "overlapped", "write", "plain", "limit")
Maps = dict[str, torch.Tensor]


def draw(rows: int) -> list[Maps]:
    """Maps of every view: normally distributed, every channel with a spread of its own, as a neck gives them."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(1, CHANNELS, 1, 1, generator=generator) + 0.5
    sizes = {level.name: level.map_size(HEIGHT, WIDTH) for level in LEVELS}
    return [
        {name: torch.randn(1, CHANNELS, *size, generator=generator).mul_(spread) for name, size in sizes.items()}
        for _ in range(rows)
    ]


def quantise(unit: cache.Unit, maps: Sequence[Maps], precision: cache.Precision) -> list[cache.RowTargets]:
    """What an actor does with a teacher's maps, one view after the other."""
    targets = []
    boxes = np.tile(np.array([[10, 10, 99, 99]], np.float32), (50, 1))
    found = cache.Detections(boxes, np.full(50, 0.5, np.float32), np.zeros(50, np.int32))
    for row, own in zip(unit.rows, maps, strict=True):
        levels = {name: cache.encode(one, precision) for name, one in own.items()}
        values = {name: level.values[0].numpy() for name, level in levels.items()}
        scales = {name: level.scales[0].numpy() for name, level in levels.items() if level.scales is not None}
        snr = {name: float(level.snr[0]) for name, level in levels.items()}
        targets.append(cache.RowTargets(row, values, scales, snr, found, 0))
    return targets


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Add the seconds of every part to ``spent``."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*values, **options)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - begin

        return call

    with ExitStack() as stack:
        for name, functions in PARTS:
            for module, function in functions:
                stack.enter_context(mock.patch.object(module, function, wrap(name, getattr(module, function))))
        yield


class Round:
    """One precision: its unit, and a folder for what is written.

    Attributes:
        times: seconds of each contender, a number for each round.
        processor: the processor's seconds of each.
        parts: seconds of each part of "whole", a number for each round.
    """

    def __init__(self, precision: cache.Precision, maps: Sequence[Maps], folder: Path) -> None:
        rows = len(maps)
        sizes = np.full(rows, WIDTH), np.full(rows, HEIGHT)
        images = cache.Images(np.arange(rows), *sizes, [f"{i}.jpg" for i in range(rows)])
        self._info = cache.GroupInfo("teacher", {"precision": precision}, LEVELS, precision, 32)
        self._plan = cache.make_plan(images, cache.ViewPolicy(((WIDTH, HEIGHT),), "none"), self._info, unit_rows=rows)
        self._unit = next(iter(self._plan.units()))
        self._maps, self._folder, self._precision = maps, folder, precision
        self._targets = quantise(self._unit, maps, precision)
        self.stored_bytes = 0
        self.times: dict[str, list[float]] = {}
        self.processor: dict[str, list[float]] = {}
        self.parts: dict[str, list[float]] = {}

    def run(self) -> None:
        """Every contender once."""
        spent: dict[str, float] = {}
        with timed(spent):
            self._clock("whole", lambda storage: self._write(storage, self._quantise(spent)))
        for name in PART_NAMES:
            self.parts.setdefault(name, []).append(spent[name])
        self._clock("overlapped", self._overlapped, UNITS)
        self._clock("write", lambda storage: self._write(storage, self._targets))
        buffers = [one for row in self._targets for one in (*row.values.values(), *row.scales.values())]
        content = b"".join(np.ascontiguousarray(one).tobytes() for one in buffers)
        self._clock("plain", lambda storage: self._plain(storage.root / "plain", content))
        self._clock("limit", lambda storage: self._limit(storage.root / "plain", content))

    def _overlapped(self, storage: cache.LocalStorage) -> None:
        with ThreadPoolExecutor(1) as writer:
            writing = [writer.submit(int)]
            for n in range(UNITS):
                targets = self._quantise({})
                writing.pop().result()
                writing.append(writer.submit(self._write, cache.LocalStorage(storage.root / str(n)), targets))
            writing.pop().result()

    def _limit(self, path: Path, content: bytes) -> None:
        for row in self._maps:
            for maps in row.values():
                maps.amax(dim=(2, 3))
        self._plain(path, content)

    def _quantise(self, spent: dict[str, float]) -> list[cache.RowTargets]:
        begin = time.perf_counter()
        targets = quantise(self._unit, self._maps, self._precision)
        spent["encode"] = time.perf_counter() - begin
        return targets

    def _write(self, storage: cache.LocalStorage, targets: list[cache.RowTargets]) -> None:
        self.stored_bytes = cache.write_unit(storage, self._info, self._unit, targets)

    @staticmethod
    def _plain(path: Path, content: bytes) -> None:
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(content), PIECE):  # one call for all of it is slower
                file.write(memoryview(content)[start : start + PIECE])
            os.fsync(file.fileno())

    def _clock(self, name: str, call: Callable[[cache.LocalStorage], None], units: int = 1) -> None:
        storage = cache.LocalStorage(self._folder / name)
        cache.prepare(storage, self._plan)
        os.sync()
        begin, used = time.perf_counter(), time.process_time()
        call(storage)
        self.processor.setdefault(name, []).append((time.process_time() - used) / units)
        self.times.setdefault(name, []).append((time.perf_counter() - begin) / units)
        shutil.rmtree(storage.root)


def summary(one: Round) -> dict[str, Any]:
    """What was measured of a precision: seconds, and the share of "plain" in each."""
    seconds = {
        "median": {key: statistics.median(values[1:]) for key, values in one.times.items()},
        "best": {key: min(values[1:]) for key, values in one.times.items()},
        "processor": {key: statistics.median(values[1:]) for key, values in one.processor.items()},
    }
    shares = {
        f"of {how}": {key: own["plain"] / own[key] for key in CONTENDERS if key != "plain"}
        for how, own in seconds.items()
    }
    parts = {name: statistics.median(one.parts[name][1:]) for name in PART_NAMES}
    parts["rest"] = seconds["median"]["whole"] - sum(parts.values())
    rounds = {"seconds": one.times, "processor": one.processor}
    return {"bytes": one.stored_bytes, **seconds, **shares, "parts": parts, "rounds": rounds}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds after the first.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the int8 unit; other precisions: as many.")] = 23,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    only: Annotated[str | None, typer.Option(help="One precision; all by default.")] = None,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where units are written; removed at the end.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure what a unit costs."""
    torch.set_num_threads(threads)
    maps = draw(rows)
    with tempfile.TemporaryDirectory(dir=folder) as root:
        precisions = {name: Round(name, maps, Path(root)) for name in ([only] if only else get_args(cache.Precision))}
        for _ in range(rounds + 1):
            for one in precisions.values():
                one.run()
    results = {name: summary(one) for name, one in precisions.items()}
    console = Console(width=150)
    table = Table("", "MB", "", title=f"one unit of {rows} rows, seconds; torch on {threads} thread(s)")
    for heading in (*CONTENDERS, *(f"plain/{name}" for name in CONTENDERS if name != "plain")):
        table.add_column(heading, justify="right")
    inside = Table("seconds of", *(*PART_NAMES, "rest"), title="parts of whole, medians")
    for name, result in results.items():
        for how in ("median", "best", "processor"):
            shown = (
                *(f"{result[how][key]:.3f}" for key in CONTENDERS),
                *(f"{v:.2f}" for v in result["of " + how].values()),
            )
            table.add_row(name, f"{result['bytes'] / 1e6:.0f}", how, *shown)
        inside.add_row(name, *(f"{seconds:.3f}" for seconds in result["parts"].values()))
    console.print(table)
    console.print(inside)
    for how in ("median", "best") if "int8" in results else ():
        reached = results["int8"][f"of {how}"]["whole"]
        print(f"int8, {how}: plain/whole {reached:.2f}, target >= {TARGET}: {reached >= TARGET}")
    if json_path:
        json_path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
