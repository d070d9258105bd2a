"""Check every byte that a group's manifest covers, and take what is damaged out of the manifest."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache import detections as ragged
from cache import hierarchy, manifest, shard
from cache.errors import CorruptShardError, MissingRowsError, StaleCacheError
from cache.heads import read_head
from cache.index import Index
from cache.layout import HEAD, MANIFEST, MANIFEST_COPY, ArraySpec, GroupInfo, part, unit_name
from cache.lease import Lease
from cache.storage import Storage

_SHARD = re.compile(r"(?P<bucket>\d+x\d+)/[^/]+/c/(?P<unit>\d+)(?:/0)+")
_PART = re.compile(r"(?:manifest|detections)/part-(?P<bucket>\d+x\d+)-(?P<unit>\d{6,})\.parquet")
_COLUMNS = ("image_id", "view", "bucket", "row", "unit_rows", "source")
UnitKey = tuple[str, int]


@dataclass(frozen=True)
class Damage:
    """One file that is not what was written.

    Attributes:
        name: of the file, in the cache.
        unit: the unit whose rows it takes along; None for metadata, which takes none.
        problem: what was found.
    """

    name: str
    unit: UnitKey | None
    problem: str


@dataclass
class Report:
    """What a check of a group found.

    Attributes:
        rows, units, read_bytes: committed, and checked.
        damages: files that are not what was written.
        uncommitted: units of which there are rows without a record: of a run that was interrupted, or that lost its part.
    """

    info: GroupInfo
    rows: int = 0
    units: int = 0
    read_bytes: int = 0
    damages: list[Damage] = field(default_factory=list)
    uncommitted: list[UnitKey] = field(default_factory=list)

    @property
    def damaged_units(self) -> list[UnitKey]:
        """The units with damage, each once."""
        return sorted({damage.unit for damage in self.damages if damage.unit is not None})


def verify(
    storage: Storage, info: GroupInfo, progress: Callable[[int, int], None] = lambda done, units: None
) -> Report:
    """Read every committed row of a group, its detections where it stores any, its manifest and its metadata.

    Args:
        progress: called with the units done and all units.

    Raises:
        StorageError: the object storage does not answer.
        StaleCacheError: the group is of format version 1, which holds too little to be checked.
    """
    if info.version == 1:
        raise StaleCacheError(
            f"{storage.where(info.name)}: written in format version 1, whose rows have no labels: it can be read, not verified."
        )
    report = Report(info)
    table = pa.concat_tables(_readable(storage, info, report)).unify_dictionaries()
    try:
        index = Index([table])
    except ValueError as error:
        report.damages.append(Damage(f"{info.name}/{MANIFEST}", None, f"contradicts itself: {error}"))
        return report
    report.rows = len(index)
    units = dict(_units(table))
    report.units = len(units)
    for done, ((bucket, unit), rows) in enumerate(units.items()):
        progress(done, len(units))
        _check_unit(storage, info, bucket, unit, index.unit_rows[bucket], rows, report)
    _check_metadata(storage, info, index, report)
    _check_root(storage, info, report)
    if info.head is not None:
        try:
            read_head(storage, info)
        except (CorruptShardError, MissingRowsError) as error:
            report.damages.append(Damage(f"{info.name}/{HEAD}", None, str(error)))
    without_record = {key for key in stored_units(storage, info) if key not in units}
    report.uncommitted = sorted(without_record.union(report.uncommitted) - set(report.damaged_units))
    return report


def repair(storage: Storage, report: Report) -> None:
    """Take the damaged units out of the manifest, restore it from its copy, and write damaged metadata anew.

    The rows of the damaged units are then not committed any more: a precompute computes them again, and no others. Killed on
    the way, it leaves a cache that can be checked and repaired again.

    Raises:
        LeaseHeldError: a run writes this group.
    """
    info, units = report.info, set(report.damaged_units)
    with Lease(storage, info.name) as lease:
        scratch = Report(info)
        tables = list(_readable(storage, info, scratch, manifest.schema(info).names))
        broken = {damage.name for damage in scratch.damages}
        if units or broken:
            # the compacted manifest is not removed, but replaced below: without it all would seem to be uncommitted
            kept_names = {f"{info.name}/{name}" for name in (MANIFEST, MANIFEST_COPY)}
            for name in sorted(
                (broken | {part(info.name, "manifest", unit_name(*unit)) for unit in units}) - kept_names
            ):
                storage.delete(name)
            table = pa.concat_tables(tables).unify_dictionaries()
            kept = table.filter(pa.array([key not in units for key in _keys(table)], pa.bool_()))
            lease.check()
            manifest.replace(storage, info, kept, manifest.part_names(storage, info))
        hierarchy.write_changed(storage, _documents(info, manifest.load_index(storage, info)))


def stored_units(storage: Storage, info: GroupInfo) -> Iterator[UnitKey]:
    """The units of which there is any file, committed or not."""
    for entry in storage.walk(info.name):
        if key := unit_of(info, entry.name):
            yield key


def committed_units(storage: Storage, info: GroupInfo) -> set[UnitKey]:
    """The units with committed rows."""
    table = manifest.read_table(storage, info, ("bucket", "row", "unit_rows"))
    return {key for key, _ in _units(table)}


def unit_of(info: GroupInfo, name: str) -> UnitKey | None:
    """The unit that a file of a group belongs to, by its name; None for other files."""
    name = name.removeprefix(f"{info.name}/")
    match = _SHARD.fullmatch(name) or _PART.fullmatch(name)
    return (match["bucket"], int(match["unit"])) if match else None


def _readable(
    storage: Storage, info: GroupInfo, report: Report, columns: Sequence[str] = _COLUMNS
) -> Iterator[pa.Table]:
    """The manifest's files that can be read; the others are reported, with the copy in place of a broken original."""
    read = partial(_read, storage, info, report, columns)
    for name in manifest.part_names(storage, info):
        unit = unit_of(info, name)
        table = read(name, unit)
        if table is not None and any(key != unit for key in _keys(table)):
            report.damages.append(Damage(name, unit, "records rows of another unit"))
            continue
        if table is not None:
            yield table
    found = {name: read(f"{info.name}/{name}", None) for name in (MANIFEST, MANIFEST_COPY)}
    reported = {damage.name for damage in report.damages}
    for name, table in found.items():
        if (
            table is None
            and any(other is not None for other in found.values())
            and f"{info.name}/{name}" not in reported
        ):
            report.damages.append(Damage(f"{info.name}/{name}", None, "is missing"))
    yield next((table for table in found.values() if table is not None), manifest.empty(info, columns))


def _read(
    storage: Storage, info: GroupInfo, report: Report, columns: Sequence[str], name: str, unit: UnitKey | None
) -> pa.Table | None:
    try:
        return pa.concat_tables(manifest.read_one(storage, name, info, columns)).unify_dictionaries()
    except FileNotFoundError:
        return None
    except CorruptShardError as error:
        report.damages.append(Damage(name, unit, str(error.__cause__)))
        return None


def _keys(table: pa.Table) -> list[UnitKey]:
    """The unit of each row."""
    names, codes, units = _columns(table)
    return [(names[code], unit) for code, unit in zip(codes.tolist(), units.tolist(), strict=True)]


def _units(table: pa.Table) -> Iterator[tuple[UnitKey, dict[str, npt.NDArray[Any]]]]:
    """The rows of each unit, as numpy columns."""
    names, codes, units = _columns(table)
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "bucket"}
    order = np.lexsort((units, codes))
    change = np.flatnonzero((np.diff(codes[order], prepend=-1) != 0) | (np.diff(units[order], prepend=-1) != 0))
    for rows in np.split(order, change[1:]) if order.size else ():
        yield (names[codes[rows[0]]], int(units[rows[0]])), {name: values[rows] for name, values in columns.items()}


def _columns(table: pa.Table) -> tuple[list[str], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Names of the buckets, and per row the number of its bucket and of its unit there."""
    bucket = table["bucket"].unify_dictionaries().combine_chunks()
    codes = bucket.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    units = table["row"].to_numpy() // np.maximum(1, table["unit_rows"].to_numpy())
    return bucket.dictionary.to_pylist(), codes, units


def _check_unit(
    storage: Storage,
    info: GroupInfo,
    bucket: str,
    unit: int,
    slots: int,
    rows: dict[str, npt.NDArray[Any]],
    report: Report,
) -> None:
    members = zip(rows["image_id"].tolist(), rows["view"].tolist(), rows["source"].tolist(), strict=True)
    labels = [shard.row_label(*member) for member in members]
    places = dict(zip((rows["row"] - unit * slots).tolist(), labels, strict=True))
    for array in info.arrays(bucket):
        name = array.shard(info.name, bucket, unit)
        try:
            data = np.frombuffer(storage.read(name), np.uint8)
            report.read_bytes += data.size
            if _check_shard(info, bucket, array, data, slots, places):
                report.uncommitted.append((bucket, unit))
        except FileNotFoundError:
            report.damages.append(Damage(name, (bucket, unit), "is missing"))
        except shard.DamagedBytesError as error:
            report.damages.append(Damage(name, (bucket, unit), str(error)))
    if info.detections:
        _check_detections(storage, info, (bucket, unit), set(rows["row"].tolist()), report)


def _check_detections(storage: Storage, info: GroupInfo, unit: UnitKey, rows: set[int], report: Report) -> None:
    name = part(info.name, "detections", unit_name(*unit))
    try:
        content = storage.read(name)
        report.read_bytes += len(content)
        found = ragged.from_table(ragged.from_parquet(content, name, info.version))
        if lacking := rows - found.keys():
            report.damages.append(Damage(name, unit, f"lacks row {min(lacking)}"))
    except FileNotFoundError:
        report.damages.append(Damage(name, unit, "is missing"))
    except ValueError as error:
        report.damages.append(Damage(name, unit, str(error)))


def _check_shard(
    info: GroupInfo, bucket: str, array: ArraySpec, data: shard.Bytes, slots: int, places: dict[int, int]
) -> bool:
    """Check every chunk that is there, and every row that must be. Returns whether there are more rows than those."""
    tail = shard.tail_of(data, slots, array.nbytes, info.compression, info.version)
    here = shard.array_label(info.name, bucket, array.name)
    for slot, label in places.items():
        tail.find(slot, label ^ here)
    for offset, length in zip(tail.offsets, tail.lengths, strict=True):
        if offset >= 0:
            chunk = shard.read_chunk(data[offset : offset + length], verify=True)
            shard.decompress(chunk, array.nbytes, info.compression)
    return any(offset >= 0 and slot not in places for slot, offset in enumerate(tail.offsets))


def _check_metadata(storage: Storage, info: GroupInfo, index: Index, report: Report) -> None:
    for name, document in _documents(info, index).items():
        stored = hierarchy.read_document(storage, name)
        wanted = hierarchy.lengthened(document, stored) if stored else document
        if stored != wanted:
            report.damages.append(Damage(name, None, "is missing" if stored is None else "is not what it must be"))


def _check_root(storage: Storage, info: GroupInfo, report: Report) -> None:
    """The document that makes a Zarr group of the whole cache. What it says of the data set is the last precompute's."""
    document = hierarchy.read_document(storage, "zarr.json")
    if document is None:
        report.damages.append(Damage("zarr.json", None, "is missing, or no JSON"))
        return
    attributes = document.get("attributes")
    if (
        not isinstance(attributes, dict)
        or not {"format_version", "views", "dataset"} <= attributes.keys()
        or document != hierarchy.group_document(attributes)
    ):
        report.damages.append(Damage("zarr.json", None, "is not what it must be"))


def _documents(info: GroupInfo, index: Index) -> dict[str, Any]:
    """The metadata that the committed rows need."""
    rows = {bucket: int(taken[-1]) + 1 for bucket, taken in index.occupied().items() if taken.size}
    return hierarchy.documents(info, {bucket: (count, index.unit_rows[bucket]) for bucket, count in rows.items()})
