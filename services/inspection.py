"""`mtpd inspect`: what is in a cache, in words and pictures: its groups, and the rows of one image."""

from pathlib import Path

import cv2
import numpy as np

from cache import GroupInfo, MissingRowsError, RecipeError, RowRecord, Targets, TeacherCache, records_of
from services.maintain import Target
from services.present import complain, say, table
from services.registry import entries
from services.registry import show as show_entries
from trainer import LEAST_SCORE, draw_row, read_annotations, view_pixels

_SHOWN_DETECTIONS = 10


def inspect(target: Target, image_id: int | None, teacher: str | None, out: Path | None) -> None:
    """Say what the cache holds and, of one image, every row of each group; draw these rows.

    Args:
        image_id: the image; without one the groups and their buckets are told, and the first image of each group is drawn.
        teacher: only its groups.
        out: a PNG for the pictures, a row of it a row of the cache.

    Raises:
        RecipeError: no such teacher; ``out`` cannot be written.
        MissingRowsError: no group has a row of the image.
        CorruptShardError: what was to be shown is damaged.
    """
    storage = target.storage
    there = set(storage.folders())
    infos = [info for info in target.groups() if teacher in (None, info.teacher) and info.name in there]
    if not infos:
        raise RecipeError(f"{storage.where()}: holds no targets{f' of teacher {teacher!r}' if teacher else ''}.")
    names = {info.name for info in infos}
    show_entries([entry for entry in entries(storage) if entry.group in names])
    pictures: list[np.ndarray] = []
    seen = False
    for info in infos:
        cache = TeacherCache.open(storage.where().rstrip("/"), info.teacher, fingerprint=info.record)
        if image_id is None:
            _show_buckets(cache)
        chosen = image_id if image_id is not None or not len(cache) else int(cache.index.image_ids[0])
        if chosen is None or (image_id is None and out is None):
            continue
        for record in records_of(storage, info, chosen):
            seen = True
            targets = cache[chosen, record.view]
            _show_row(info, record, targets)
            if out is not None:
                pictures.append(_draw(target, info, record, targets))
    if image_id is not None and not seen:
        raise MissingRowsError(
            f"{storage.where()}: no committed row of image {image_id} in {', '.join(sorted(names))}."
        )
    if out is not None and pictures:
        _write(out, pictures)
        say(f"picture: {out}")


def _show_buckets(cache: TeacherCache) -> None:
    """The buckets of a group, and what a row of each holds."""
    index = cache.index
    rows = [
        [
            bucket,
            f"{taken.size:,}",
            f"{np.unique(taken // index.unit_rows[bucket]).size:,}",
            index.unit_rows[bucket],
            ", ".join(f"{a.name} {a.dtype}{list(a.shape)}" for a in cache.info.arrays(bucket) if a.role != "scale"),
        ]
        for bucket, taken in index.occupied().items()
    ]
    table(f"{cache.info.name}: buckets", ["bucket", "rows", "units", "unit rows", "a row"], rows)


def _show_row(info: GroupInfo, record: RowRecord, targets: Targets) -> None:
    """One row: its levels, then the best detections, where they are stored."""
    rows: list[list[object]] = []
    values = targets.dequantize()
    for level in info.levels:
        stored, scales, maps = targets.features[level.name], targets.scales.get(level.name), values[level.name]
        rows.append(
            [
                level.name,
                level.stride * level.pool,
                f"{str(stored.dtype).removeprefix('torch.')} {list(maps.shape)}",
                "-" if scales is None else f"{float(scales.min()):.3g} to {float(scales.max()):.3g}",
                f"{float(maps.min()):.3g} to {float(maps.max()):.3g}",
                f"{float(maps.square().mean().sqrt()):.3g}",
                f"{record.snr[level.name]:.1f}",
            ]
        )
    place = f"row {record.row} of {record.bucket}, {record.height}x{record.width} without padding"
    columns = ["level", "stride", "stored", "scales", "values", "RMS", "SNR (dB)"]
    table(f"{info.name}: image {record.image_id}, view {record.view}: {place}", columns, rows)
    for name, dense in targets.dense.items():
        best = float(dense.logits.max()) if dense.logits.numel() else float("nan")
        say(f"{name}: the dense head at {len(dense.indices):,} positions, best class logit {best:.2f}")
    found = targets.detections
    if found is None:
        say("no detections: none are stored in this group")
        return
    order = np.argsort(-found.scores, kind="stable")[:_SHOWN_DETECTIONS]
    sure = int((found.scores >= LEAST_SCORE).sum())
    masks = "" if found.masks is None else ", with masks"
    say(
        f"{len(found):,} detections{masks}, {sure:,} of score {LEAST_SCORE} or more{'; the best:' if len(found) else ''}"
    )
    for n in order:
        box = ", ".join(f"{float(value):.0f}" for value in found.boxes[n])
        say(f"  class {int(found.labels[n])}, score {float(found.scores[n]):.2f}, box {box}")


def _draw(target: Target, info: GroupInfo, record: RowRecord, targets: Targets) -> np.ndarray:
    pixels, classes = None, ()
    if target.recipe is not None:
        classes = read_annotations(target.recipe.dataset.train.ann_file, "dataset.train.ann_file").classes
        try:
            pixels, same = view_pixels(target.recipe, record)
        except RecipeError as error:
            complain(f"drawn without the image: {error}")
        else:
            if not same:
                complain(f"image {record.image_id} has changed since this row was computed: precompute it anew.")
    strides = {level.name: level.stride * level.pool for level in info.levels}
    return draw_row(targets, record, strides, pixels, classes)


def _write(out: Path, pictures: list[np.ndarray]) -> None:
    """All pictures below each other, as one PNG."""
    width = max(picture.shape[1] for picture in pictures)
    filled = [np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0))) for picture in pictures]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(cv2.imencode(".png", np.concatenate(filled))[1].tobytes())
    except OSError as error:
        raise RecipeError(f"--out {out}: cannot be written ({error.strerror}).") from error
