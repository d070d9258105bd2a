"""Rows that are not in memory: the first read of each from the disk, and a store several times larger than the memory.

The rows are int8, 800 x 1344 views, P3-P7 of 256 channels (5.7 MB), once as this cache and once as one flat file.

- cold: the page cache is emptied of the files (``posix_fadvise``, which leaves alone what is mapped: the cache is opened anew
  each time), then rows are read once in a random order: by the cache, checked (CRC-32C) and copied, opening and mapping of
  every shard included; by ``preadv`` of the flat file into one buffer, the kernel told that reads are random: the yardstick.
  In turn, over several rounds.
- larger than memory: the same two, each in a process whose control group may use a quarter of the store's bytes, page cache
  included, over all rows in two passes of random order. Images/s for each quarter of the run: a reader that collapses under
  reclaim gets slower; and the memory of the process. Needs a control group that may be created (root; version 1 or 2).

    OMP_NUM_THREADS=1 python -m benchmarks.cold --json cold.json
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import cache

HEIGHT, WIDTH, CHANNELS = 800, 1344, 256
LEVELS = tuple(cache.Level(f"P{n}", CHANNELS, 2**n) for n in range(3, 8))
GROUPS = Path("/sys/fs/cgroup")
TARGET = 0.5


def build(root: Path, precision: cache.Precision, rows: int) -> Path:
    """A cache of random rows, one view an image, and ``flat``: the same bytes, row after row. Returns the flat file."""
    info = cache.GroupInfo(precision, {"precision": precision}, LEVELS, precision, 32)
    sizes = np.full(rows, WIDTH), np.full(rows, HEIGHT)
    images = cache.Images(np.arange(rows), *sizes, [f"{i}.jpg" for i in range(rows)])
    plan = cache.make_plan(images, cache.ViewPolicy(((WIDTH, HEIGHT),), "none"), info)
    storage, flat, rng = cache.LocalStorage(root), root / f"{precision}.flat", np.random.default_rng(0)
    nothing = cache.Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    cache.prepare(storage, plan)
    with flat.open("wb") as file:
        for unit in plan.units():
            targets = []
            for row in unit.rows:
                drawn = {
                    a.name: np.frombuffer(rng.bytes(a.nbytes), a.dtype).reshape(a.shape)
                    for a in info.arrays(unit.bucket)
                }
                file.writelines(array.data for array in drawn.values())
                values = {level.name: drawn[level.name] for level in LEVELS}
                scales = {name: drawn[f"{name}_scale"] for name in values}
                targets.append(cache.RowTargets(row, values, scales, dict.fromkeys(values, 40.0), nothing, 0))
            cache.write_unit(storage, info, unit, targets)
        os.fsync(file.fileno())
    cache.compact(storage, info)
    return flat


def reader(root: Path, kind: str, rows: int) -> Callable[[int], None]:
    """What reads one row: ``ours`` or ``preadv``."""
    if kind == "ours":
        opened = cache.TeacherCache.open(str(root), "int8")
        return lambda row: opened[row, 0].copy() and None
    file = os.open(root / "int8.flat", os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    buffer = np.zeros(os.fstat(file).st_size // rows, np.uint8)
    return lambda row: os.preadv(file, [buffer.data], row * buffer.nbytes) and None


def drop(root: Path) -> None:
    """Take every file out of the page cache."""
    for path in filter(Path.is_file, root.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(root: Path, rows: int, reads: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a row of each reader, a number for each round."""
    rng, times = np.random.default_rng(0), {"ours": [], "preadv": []}
    for _ in range(rounds):
        order = rng.permutation(rows)[:reads].tolist()
        for kind, taken in times.items():
            read = reader(root, kind, rows)
            drop(root)
            begin = time.perf_counter()
            for row in order:
                read(row)
            taken.append((time.perf_counter() - begin) * 1e3 / reads)
            del read
    return times


def shuffled(root: Path, kind: str, rows: int) -> dict[str, Any]:
    """Two passes over all rows in random order, in a process of little memory. Images/s and memory of each quarter."""
    torch.set_num_threads(1)
    order = np.concatenate([np.random.default_rng(seed).permutation(rows) for seed in (0, 1)])
    read, rates, resident = reader(root, kind, rows), [], []
    for quarter in np.array_split(order, 4):
        begin = time.perf_counter()
        for row in quarter.tolist():
            read(row)
        rates.append(quarter.size / (time.perf_counter() - begin))
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        resident.append({name: int(fields[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")})
    return {"images_per_s": rates, "resident_mb": resident}


@contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A control group of so many bytes, the page cache of its processes included."""
    first = (GROUPS / "cgroup.controllers").exists()
    group = (GROUPS if first else GROUPS / "memory") / f"mtpd-cold-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if first else "memory.limit_in_bytes")).write_text(str(limit))
        yield group
    finally:
        group.rmdir()


def in_little_memory(root: Path, kind: str, rows: int, limit: int) -> dict[str, Any]:
    """`shuffled`, in a control group of its own."""
    code = "import os, sys; open(sys.argv[1] + '/cgroup.procs', 'w').write(str(os.getpid()))\n"
    code += "import json; from pathlib import Path; from benchmarks import cold\n"
    code += "print(json.dumps(cold.shuffled(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))))"
    drop(root)
    with limited(limit) as group:
        command = [sys.executable, "-W", "ignore", "-c", code, group, root, kind, rows]
        answer = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return json.loads(answer.stdout)


def main(
    rows: Annotated[int, typer.Option(min=4, help="Rows stored.")] = 400,
    reads: Annotated[int, typer.Option(min=1, help="Rows of a cold round.")] = 60,
    rounds: Annotated[int, typer.Option(min=1, help="Cold rounds.")] = 5,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where the rows go; removed at the end.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure reads from the disk."""
    torch.set_num_threads(1)
    console, large = Console(width=140), {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        stored = build(root, "int8", rows).stat().st_size
        times = cold(root, rows, min(reads, rows), rounds)
        for kind in ("preadv", "ours", "preadv again", "ours again"):
            large[kind] = in_little_memory(root, kind.split()[0], rows, stored // 4)
    middle = {kind: statistics.median(taken) for kind, taken in times.items()}
    table = Table("cold", "ms a row", "GB/s", "of preadv", title=f"rows of {stored / rows / 1e6:.2f} MB from the disk")
    for kind, taken in middle.items():
        rate = stored / rows / taken / 1e6
        table.add_row(kind, f"{taken:.2f}", f"{rate:.2f}", f"{middle['preadv'] / taken:.2f}")
    console.print(table)
    title = f"{stored / 1e9:.1f} GB in {stored / 4e9:.2f} GB of memory, two passes"
    table = Table("", *(f"quarter {n}" for n in range(1, 5)), "slowest / median", "anon MB", "file MB", title=title)
    for kind, result in large.items():
        rates, memory = result["images_per_s"], result["resident_mb"]
        share = min(rates) / statistics.median(rates)
        shown = [*(f"{rate:.0f}" for rate in rates), f"{share:.2f}"]
        table.add_row(kind, *shown, *("/".join(f"{m[name]:.0f}" for m in memory) for name in ("RssAnon", "RssFile")))
        result["steady"] = share
    console.print(table)
    holds = min(large[kind]["steady"] for kind in ("ours", "ours again")) >= TARGET
    console.print(f"no quarter below {TARGET} of the median: {holds}")
    if json_path:
        json_path.write_text(json.dumps({"bytes": stored, "cold_ms": times, "large": large}, indent=1))


if __name__ == "__main__":
    typer.run(main)
