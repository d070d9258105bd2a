"""What a data loader gets out of the cache: images/s through ``LoadTeacherTargets``, with and without worker processes.

The rows are those of 800 x 1344 views, P3-P7 of 256 channels (int8: 5.7 MB), in the page cache. A sample is an image id and
a view without any pixels, so that nothing but the targets is loaded, checked (CRC-32C), copied into memory of its own, and
collated by mmengine's ``pseudo_collate``; with workers it then travels through shared memory. Contenders: no workers; one
and two workers under fork, forkserver and spawn; what such workers carry of tensors that need not be read ("bare"); and a
loop of ``preadv`` over the same bytes as one flat file, into one buffer, in this process. In every epoch each reads all rows
once in a random order, one contender after the other; the first epoch, in which workers start, is shown apart, the median of
the others counts.

Shown besides: the memory of this process after each epoch (RSS; it should stay), the same of all workers, and what /dev/shm
holds more when the last loader is gone than before (other programs' names too, if any run beside). Workers divide the cores
with whatever else runs there.

    OMP_NUM_THREADS=1 python -W ignore -m benchmarks.feed --json feed.json
"""

import gc
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset

import cache
from benchmarks.cold import build
from trainer.transforms import LoadTeacherTargets

SHM = Path("/dev/shm")
WORKERS = [(n, start, "") for start in ("fork", "forkserver", "spawn") for n in (1, 2)]
WORKERS += [(n, "fork", ", bare tensors") for n in (1, 2)]


class Feed(Dataset[dict[str, Any]]):
    """Samples that consist of their targets."""

    def __init__(self, uri: Path, teacher: str) -> None:
        self.load = LoadTeacherTargets(str(uri), teacher)

    def __len__(self) -> int:
        return len(self.load.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.load.transform({"data_samples": DetDataSample(metainfo=dict(img_id=index, view=0))})


class Bare(Feed):
    """Samples that are a copy of one tensor of a row's size: what the loader itself can carry."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"teacher_maps": self.row.clone()}

    @cached_property
    def row(self) -> torch.Tensor:
        """The tensor."""
        return torch.from_numpy(np.ones(self.load.cache[0, 0].copy().layout.nbytes, np.uint8))


def warm(folder: Path) -> None:
    """Have every file in the page cache: a system may drop pages at any time."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.read_bytes()


def loader_epoch(loader: DataLoader[Any]) -> int:
    """Images of one epoch."""
    return sum(len(batch["teacher_maps"]) for batch in loader)


def preadv_epoch(file: int, buffer: np.ndarray, rows: int, rng: np.random.Generator) -> int:
    """The same bytes by plain reads."""
    for row in rng.permutation(rows).tolist():
        os.preadv(file, [buffer.data], row * buffer.nbytes)
    return rows


def contenders(
    root: Path, precision: cache.Precision, rows: int, batch: int
) -> Iterator[tuple[str, Callable[[], int]]]:
    """Names, and what reads one epoch."""
    flat = root / f"{precision}.flat"
    buffer = np.zeros(flat.stat().st_size // rows, np.uint8)
    file = os.open(flat, os.O_RDONLY)
    yield "preadv", partial(preadv_epoch, file, buffer, rows, np.random.default_rng(0))
    options: dict[str, Any] = dict(batch_size=batch, shuffle=True, collate_fn=pseudo_collate)
    feeds = {"": Feed(root, precision), ", bare tensors": Bare(root, precision)}
    yield "no worker", partial(loader_epoch, DataLoader(feeds[""], **options))
    for workers, start, what in WORKERS:
        more = dict(num_workers=workers, persistent_workers=True, multiprocessing_context=start)
        yield f"{workers} x {start}{what}", partial(loader_epoch, DataLoader(feeds[what], **options, **more))


def resident(process: psutil.Process) -> float:
    """Memory of a process, in MB, without what it shares with others."""
    memory = process.memory_info()
    return (memory.rss - memory.shared) / 1e6


def in_shm() -> dict[str, Any]:
    """What /dev/shm holds: names, and bytes (those of deleted files that are still open count too)."""
    state = os.statvfs(SHM)
    return {"names": sorted(p.name for p in SHM.iterdir()), "bytes": (state.f_blocks - state.f_bfree) * state.f_frsize}


def measure(root: Path, precision: cache.Precision, rows: int, batch: int, epochs: int) -> dict[str, Any]:
    """All contenders, in turn in every epoch."""
    build(root, precision, rows)
    warm(root)
    before, rates, rss, workers = in_shm(), {}, [], []
    feeds = dict(contenders(root, precision, rows, batch))
    for _ in range(epochs + 1):
        for name, epoch in feeds.items():
            begin = time.perf_counter()
            images = epoch()
            rates.setdefault(name, []).append(images / (time.perf_counter() - begin))
            assert images == rows
        gc.collect()
        rss.append(resident(psutil.Process()))
        workers.append(sum(map(resident, psutil.Process().children(recursive=True))))
    del epoch, feeds
    gc.collect()
    result = {"rates": rates, "rss_mb": rss, "workers_rss_mb": workers, "shm_before": before, "shm_after": in_shm()}
    return result | {"row_bytes": (root / f"{precision}.flat").stat().st_size // rows}


def main(
    rows: Annotated[int, typer.Option(min=2, help="Rows stored.")] = 120,
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs after the first.")] = 3,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where the rows go; removed at the end.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure how fast rows are fed to a student."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    console, results = Console(width=120), {}
    for precision in ("int8", "int4"):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            result = results[precision] = measure(Path(root), precision, rows, batch, epochs)
        steady = {name: statistics.median(rates[1:]) for name, rates in result["rates"].items()}
        table = Table("", title=f"{precision}, rows of {result['row_bytes'] / 1e6:.2f} MB, batches of {batch}")
        for heading in ("images/s", "GB/s", "of preadv", "first epoch, images/s"):
            table.add_column(heading)
        for name, rate in steady.items():
            numbers = rate * result["row_bytes"] / 1e9, rate / steady["preadv"], result["rates"][name][0]
            table.add_row(name, f"{rate:.0f}", f"{numbers[0]:.2f}", f"{numbers[1]:.2f}", f"{numbers[2]:.0f}")
        console.print(table)
        for name in ("rss_mb", "workers_rss_mb"):
            console.print(f"{name} after each epoch: {', '.join(f'{value:.0f}' for value in result[name])}")
        before, after = result["shm_before"], result["shm_after"]
        new = set(after["names"]) - set(before["names"])
        console.print(
            f"/dev/shm: {after['bytes'] - before['bytes']:+} bytes, new names: {', '.join(sorted(new)) or 'none'}"
        )
    if json_path:
        json_path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
