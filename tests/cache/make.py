"""Small caches without any detector: targets drawn from a generator seeded by image and view."""

from collections.abc import Iterable

import numpy as np
import torch

from cache import (
    DenseArrays,
    Detections,
    GroupInfo,
    Images,
    Level,
    Plan,
    RowTargets,
    Storage,
    Unit,
    ViewPolicy,
    encode,
    load_index,
    make_plan,
    pool,
    prepare,
    write_unit,
)

POLICY = ViewPolicy(((64, 48),), "both")
LEVELS = (Level("P3", 4, 8), Level("P4", 3, 16))


def info(teacher: str = "t", precision: str = "int8", **record: object) -> GroupInfo:
    return GroupInfo(teacher, {"precision": precision, "model": {"depth": 18}, **record}, LEVELS, precision, 32)  # type: ignore[arg-type]


def images(count: int, first_id: int = 1) -> Images:
    """Landscape, portrait and square images in turn: three buckets."""
    sizes = np.array([(64, 48), (48, 64), (50, 50)])[np.arange(count) % 3]
    ids = np.arange(first_id, first_id + count)
    return Images(ids, sizes[:, 0], sizes[:, 1], [f"{i}.jpg" for i in ids])


def features(image_id: int, view: int, level: Level, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(image_id * 100 + view)
    return torch.randn(1, level.channels, *level.map_size(height, width), generator=generator)


def targets(group: GroupInfo, unit: Unit, skip: Iterable[int] = ()) -> list[RowTargets]:
    height, width = (int(v) for v in unit.bucket.split("x"))
    result = []
    for row in unit.rows:
        if row.image_id in skip:
            continue
        encoded = {
            level.name: encode(
                pool(features(row.image_id, row.view, level, height, width), level.pool), group.precision
            )
            for level in group.levels
        }
        k = row.image_id % 3
        detections = Detections(
            np.full((k, 4), row.image_id, np.float32), np.full(k, 0.5, np.float32), np.full(k, row.view, np.int32)
        )
        result.append(
            RowTargets(
                row,
                {n: e.values[0].numpy() for n, e in encoded.items()},
                {n: e.scales[0].numpy() for n, e in encoded.items() if e.scales is not None},
                {n: float(e.snr[0]) for n, e in encoded.items()},
                detections if group.detections else None,
                row.image_id % 2**32,
                dense(group, row.image_id, row.view, height, width),
            )
        )
    return result


def dense(group: GroupInfo, image_id: int, view: int, height: int, width: int) -> dict[str, DenseArrays]:
    rng = np.random.default_rng((image_id, view))
    return {
        d.name: {
            "index": rng.permutation(10_000)[: d.stored(height, width)].astype(np.int32),
            "logits": rng.normal(size=(d.stored(height, width), d.classes)).astype(np.float16),
            "terms": rng.normal(size=(d.stored(height, width), d.terms)).astype(np.float16),
        }
        for d in group.dense
    }


def plan(storage: Storage, group: GroupInfo, wanted: Images, unit_rows: int | None = 4) -> Plan:
    return make_plan(wanted, POLICY, group, committed=load_index(storage, group), unit_rows=unit_rows)


def fill(storage: Storage, group: GroupInfo, wanted: Images, *, skip: Iterable[int] = ()) -> Plan:
    """Precompute everything that is missing."""
    made = plan(storage, group, wanted)
    prepare(storage, made)
    for unit in made.units():
        write_unit(storage, group, unit, targets(group, unit, skip))
    return made
