"""What planning, opening and looking up cost at 10^4 to 10^7 rows: seconds and peak memory, per row and in all.

A row is one (image, view). The images are drawn with COCO's mix of sizes and view policy 1333 x 800 with both flips, int8
P3-P7 of 256 channels: 43 buckets. Measured, every step and every N in a process of its own:

- ``make_plan`` of nothing committed; its yardstick is one BLAKE2 hash of each image's name and one stable sort of the rows.
- The manifest: columns drawn with numpy, written as one part and folded by the cache's own ``write_part``, ``compact``.
- ``TeacherCache.open`` of that; its yardstick is ``pyarrow.parquet`` reading the same columns of the same file. In turn three
  times, each in a process of its own; the median counts.
- ``index.find`` of random keys; its yardstick is a dict with a tuple for each row, in turn over several rounds.
- ``make_plan`` again over the opened index, everything being committed: a precompute that finds nothing to do.

Memory is the peak that the kernel notes (VmHWM), reset after the imports; getrusage's would include the parent's.

    OMP_NUM_THREADS=1 python -m benchmarks.scale --json scale.json
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from hashlib import blake2b
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

import cache
from cache import manifest
from cache.layout import MANIFEST, bucket_name

POLICY = cache.ViewPolicy(((1333, 800),), "both")
INFO = cache.GroupInfo(
    "teacher", {"precision": "int8"}, tuple(cache.Level(f"P{n}", 256, 2**n) for n in range(3, 8)), "int8", 32
)
# (width, height) and share, after COCO train2017; the rest has one side of 640 and any other
SIZES = (((640, 480), 0.24), ((640, 427), 0.16), ((480, 640), 0.09), ((640, 426), 0.07), ((500, 375), 0.05))
COLUMNS = ["image_id", "view", "bucket", "row", "unit_rows", "source"]
# what 10^7 rows may cost
TARGETS = {"plan_s": 60.0, "plan_gb": 2.0, "open_s": 2.0, "open_gb": 1.0, "find_us": 5.0}


def draw(rows: int) -> cache.Images:
    """Images of which two views make ``rows`` rows; ids with gaps, as COCO's."""
    rng, n = np.random.default_rng(0), rows // len(POLICY)
    sizes = np.array([size for size, _ in SIZES] + [(0, 0)])
    shares = [share for _, share in SIZES]
    chosen = sizes[rng.choice(len(sizes), n, p=[*shares, 1 - sum(shares)])]
    other, upright = rng.integers(320, 641, n), rng.random(n) < 0.3
    free = chosen[:, 0] == 0
    chosen[free] = np.stack([np.where(upright, other, 640), np.where(upright, 640, other)], axis=1)[free]
    ids = np.cumsum(rng.integers(1, 9, n))
    return cache.Images(ids, chosen[:, 0].copy(), chosen[:, 1].copy(), [f"{i:012d}.jpg" for i in ids.tolist()])


def memory(field: str) -> float:
    """A field of /proc/self/status, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e9


def reset_peak() -> float:
    """Forget the peak of memory. Returns what is in use, in GB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure_plan(rows: int, _: str) -> dict[str, float]:
    """`make_plan`, and what it cannot do without."""
    imports, images = reset_peak(), draw(rows)
    with_images = reset_peak()
    begin = time.perf_counter()
    plan = cache.make_plan(images, POLICY, INFO)
    took, peak = time.perf_counter() - begin, memory("VmHWM")
    some = min(rows, 20_000)
    units = seconds(lambda: [None for unit in islice(plan.units(), some // 20 + 1) for _ in unit.rows])
    listed = sum(len(unit.rows) for unit in islice(plan.units(), some // 20 + 1))
    keys = np.random.default_rng(0).integers(100, size=rows)
    bare = seconds(lambda: np.argsort(keys, kind="stable"))
    bare += seconds(lambda: [blake2b(name.encode(), digest_size=8).digest() for name in images.file_names])
    result = dict(plan_s=took, plan_us_a_row=took / rows * 1e6, plan_x_bare=took / bare, buckets=len(plan.buckets))
    result |= dict(units_us_a_row=units / listed * 1e6, imports_gb=imports, images_gb=with_images - imports)
    return result | dict(plan_gb=peak, plan_bytes_a_row=(peak - imports) / rows * 1e9)


def write(rows: int, folder: str) -> dict[str, float]:
    """The manifest of a group in which every row is committed."""
    images, storage = draw(rows), cache.LocalStorage(Path(folder))
    plan = cache.make_plan(images, POLICY, INFO)
    cache.prepare(storage, plan)
    widths, heights = cache.resized(images.widths, images.heights, POLICY[0].scale)
    keys = np.repeat(cache.padded(heights, INFO.divisor) << 32 | cache.padded(widths, INFO.divisor), len(POLICY))
    found, codes, counts = np.unique(keys, return_inverse=True, return_counts=True)
    places = np.empty(rows, np.int64)
    order = np.argsort(codes, kind="stable")
    places[order] = np.arange(rows) - np.repeat(np.cumsum(counts) - counts, counts)
    names = [bucket_name(key >> 32, key & 0xFFFFFFFF) for key in found.tolist()]
    slots = {bucket.name: bucket.slots for bucket in plan.buckets}
    rng, views = np.random.default_rng(1), len(POLICY)
    columns = {
        "image_id": np.repeat(images.ids, views),
        "view": np.tile(np.arange(views, dtype=np.int32), rows // views),
        "bucket": pa.DictionaryArray.from_arrays(codes.astype(np.int32), names).cast(pa.string()),
        "row": places,
        "unit_rows": np.array([slots[name] for name in names], np.int32)[codes],
        "height": np.repeat(heights, views).astype(np.int32),
        "width": np.repeat(widths, views).astype(np.int32),
        "source": np.repeat(images.sources(), views),
        "image_crc32c": np.repeat(rng.integers(2**32, size=rows // views, dtype=np.uint32), views),
        **{f"snr_{level.name}": rng.normal(40, 3, rows).astype(np.float32) for level in INFO.levels},
    }
    table = pa.table(columns, schema=manifest.schema(INFO))
    manifest.write_part(storage, INFO, "all", table)
    del columns, table, plan, images
    took = seconds(lambda: manifest.compact(storage, INFO))
    size = (Path(folder) / INFO.name / MANIFEST).stat().st_size
    return {"compact_s": took, "manifest_bytes_a_row": size / rows}


def measure_open(rows: int, folder: str) -> dict[str, float]:
    """`TeacherCache.open`, the first in a process."""
    imports = reset_peak()
    begin = time.perf_counter()
    opened = cache.TeacherCache.open(folder, INFO.teacher)
    took, peak, held = time.perf_counter() - begin, memory("VmHWM"), (memory("VmRSS") - imports) / len(opened) * 1e9
    result = dict(open_s=took, open_us_a_row=took / rows * 1e6, open_gb=peak, open_gb_over_imports=peak - imports)
    return result | dict(held_bytes_a_row=held)


def measure_parquet(_: int, folder: str) -> dict[str, float]:
    """The same columns, by pyarrow, the first in a process."""
    imports, path = reset_peak(), Path(folder) / INFO.name / MANIFEST
    took = seconds(lambda: pq.read_table(path, columns=COLUMNS, read_dictionary=["bucket"]))
    return dict(parquet_s=took, parquet_gb_over_imports=memory("VmHWM") - imports)


def measure_find(_: int, folder: str) -> dict[str, float]:
    """A plan over what is committed, and look-ups."""
    opened = cache.TeacherCache.open(folder, INFO.teacher)
    reset_peak()
    again = seconds(lambda: cache.make_plan(draw(len(opened)), POLICY, INFO, committed=opened.index)), memory("VmHWM")
    rng, find = np.random.default_rng(2), opened.index.find
    ids = rng.choice(opened.index.image_ids, 100_000).tolist()
    keys = list(zip(ids, rng.integers(len(POLICY), size=len(ids)).tolist(), strict=True))
    known = {key: (n, n) for n, key in enumerate(opened.keys())}
    calls = (lambda: [find(i, view) for i, view in keys]), (lambda: [known[key] for key in keys])
    found, in_dict = np.median([[seconds(call) / len(keys) * 1e6 for call in calls] for _ in range(5)], axis=0).tolist()
    result = dict(find_us=found, find_x_dict=found / in_dict)
    return result | dict(plan_again_s=again[0], plan_again_gb=again[1])


def alone(step: Callable[[int, str], dict[str, float]], rows: int, folder: str) -> dict[str, float]:
    """A step in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(step, (rows, folder))


def main(
    largest: Annotated[int, typer.Option(min=4, max=8, help="The largest power of ten.")] = 7,
    folder: Annotated[Path | None, typer.Option("--dir", help="Where manifests go; removed at the end.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure what N rows cost."""
    console, results = Console(width=200), {}
    for rows in (10**power for power in range(4, largest + 1)):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            steps = [alone(step, rows, root) for step in (measure_plan, write, *[measure_open, measure_parquet] * 3)]
            steps.append(alone(measure_find, rows, root))
        keys = dict.fromkeys(key for step in steps for key in step)
        results[rows] = {key: statistics.median(step[key] for step in steps if key in step) for key in keys}
    table = Table("", *(f"{rows:.0e}" for rows in results), title="cost of N rows")
    for key in results[10**4]:
        table.add_row(key, *(f"{result[key]:,.3g}" for result in results.values()))
    console.print(table)
    last = results[max(results)]
    held = {key: last[key] < limit for key, limit in TARGETS.items()}
    for key, limit in TARGETS.items():
        console.print(f"{key} at {max(results):.0e} rows: {last[key]:.2f}, target < {limit}: {held[key]}")
    if json_path:
        json_path.write_text(json.dumps({"rows": results, "targets": TARGETS, "held": held}, indent=1))


if __name__ == "__main__":
    typer.run(main)
