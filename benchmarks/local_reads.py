"""How fast one row of a teacher's targets, all levels of it, is read at random: this cache against its peers.

A row is int8 P3-P7 of an 800 x 1344 view with 256 channels, and a float32 scale per level and channel: 5.7 MB. Every
reader holds the same rows, lies in the page cache and hands out arrays (this cache: tensors) in memory of its own; each row
of it is compared once, before the clock starts, with what was written. All run in this one process (torch on one thread, as in a
data loader's worker), in turn in every round, over the same rows in the same random order, so that whatever else the
machine does falls on all of them; a round reads them twice and the second time counts. A reader's time is that of its
best round; every round goes to --json. On a machine that is shared no round may be quiet: the processor's seconds are compared
too, in each round with those of ``preadv``, and the median of these ratios is shown.

Run from the repository's root; a reader whose package is missing is left out::

    pip install --no-deps -r requirements/benchmarks.txt
    OMP_NUM_THREADS=1 python -m benchmarks.local_reads --rows 200 --json reads.json

Takes seven times the rows' bytes (400 rows: 16 GB) of disk and of page cache; where memory is short, use fewer --rows.
"""

import ctypes
import json
import os
import platform
import re
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.readers import CONTENDERS, ROW, Contender, Payload, checksum


def keep_freed_memory() -> None:
    """Have malloc reuse large blocks, as it does late in a long process: whose blocks it hands back is luck otherwise."""
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, 2**28)
    libc.mallopt(mmap_threshold, 2**25)


def build(payload: Payload, root: Path, console: Console) -> list[Contender]:
    """Build and open every contender that can be imported; every row of each is what was written."""
    written = {row: checksum(payload.row(row)) for row in range(payload.rows)}
    contenders = []
    for kind in CONTENDERS:
        try:
            contender = kind(root)
        except ImportError as error:
            console.print(f"{kind.name}: left out ({error})")
            continue
        if not contender.root.exists():
            contender.root.mkdir()
            contender.build(payload)
        contender.open()
        if {row: checksum(contender.arrays(one)) for row, one in contender.read(range(payload.rows))} != written:
            raise RuntimeError(f"{kind.name}: what is read is not what was written")
        contenders.append(contender)
    os.sync()  # or the kernel writes the rows to the disk while the clock runs
    return contenders


def results(contenders: list[Contender]) -> list[dict[str, Any]]:
    """What was measured, per reader."""
    limit, ours = (min(contender.rounds) for contender in contenders[:2])
    readers = []
    for contender in contenders:
        best = min(contender.rounds)
        about = {"name": contender.name, "version": contender.package and version(contender.package)}
        numbers = {"ms": best, "median_ms": statistics.median(contender.rounds), "gb_per_s": ROW.itemsize / best / 1e6}
        processor = statistics.median(np.divide(contender.processor, contenders[0].processor))
        ratios = {"x_preadv": best / limit, "x_this_cache": best / ours, "x_preadv_processor": float(processor)}
        rounds = {"rounds_ms": contender.rounds, "processor_ms": contender.processor}
        readers.append({**about, **numbers, **ratios, **rounds, "setup": contender.setup})
    return readers


def show(readers: list[dict[str, Any]], console: Console) -> None:
    """The table, and how each reader was set up."""
    table = Table("reader", title=f"one row of {ROW.itemsize / 1e6:.2f} MB, warm page cache: the best round")
    keys = {"ms": "ms", "median_ms": "median ms", "gb_per_s": "GB/s", "x_preadv": "x preadv", "x_this_cache": "x ours"}
    keys["x_preadv_processor"] = "x preadv, processor"
    for heading in keys.values():
        table.add_column(heading, justify="right")
    for reader in readers:
        table.add_row(reader["name"], *(f"{reader[key]:.2f}" for key in keys))
    console.print(table)
    for reader in readers:
        print(f"{reader['name']} {reader['version']}: {reader['setup']}".replace(" :", ":"))


def main(
    rows: Annotated[int, typer.Option(min=1, help="Rows stored.")] = 400,
    reads: Annotated[int, typer.Option(min=1, help="Rows that each reader reads in a round.")] = 50,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the rows' values and of the orders.")] = 0,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where the rows go; removed at the end.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure random reads of whole rows."""
    console = Console()
    torch.set_num_threads(1)
    keep_freed_memory()
    needed = len({kind.folder for kind in CONTENDERS}) * rows * ROW.itemsize
    available = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
    if available and needed > int(available[1]) * 1024:
        console.print(f"[red]{needed / 1e9:.0f} GB do not fit the page cache: some reads will be from disk[/red]")
    draw = np.random.default_rng([seed, 1])
    with tempfile.TemporaryDirectory(dir=folder) as root:
        contenders = build(Payload(rows, seed), Path(root), console)
        for _ in range(rounds):
            order = draw.permutation(rows)[:reads].tolist()
            for contender in contenders:
                contender.run(order)
    readers = results(contenders)
    show(readers, console)
    if json_path:
        machine = {"cpus": os.cpu_count(), "platform": platform.platform(), "python": platform.python_version()}
        settings = {"rows": rows, "reads": reads, "rounds": rounds, "seed": seed, "row_bytes": ROW.itemsize}
        json_path.write_text(json.dumps({"machine": machine, "settings": settings, "readers": readers}, indent=2))


if __name__ == "__main__":
    typer.run(main)
