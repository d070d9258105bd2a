"""`TeacherCache`: random access to one teacher's targets at the speed of memory."""

import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from cache import codec, manifest, shard
from cache import detections as ragged
from cache.detections import Detections
from cache.errors import CorruptShardError, MissingRowsError, StaleCacheError
from cache.layout import (
    GroupInfo,
    Level,
    bucket_size,
    differences,
    features_shard,
    fingerprint,
    part,
    scales_shard,
    unit_name,
)
from cache.manifest import Index, Location
from cache.storage import LocalStorage, open_storage

# a process may hold 65,530 maps by Linux's default; the rest is left to others
_MAX_MAPS = 16_384
_MAX_PARTS = 64
_TORCH_DTYPES = {"int8": torch.int8, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Targets:
    """All that one teacher gives for one (image, view).

    Attributes:
        image_id, view: what it was computed from.
        features: per level (C, h, w) int8 or float16, as stored; a view into the mapped shard, not to be written to.
        scales: per level (C,) float32, ``value = stored * scale``; empty for float16.
    """

    image_id: int
    view: int
    features: dict[str, Tensor]
    scales: dict[str, Tensor]
    _cache: "TeacherCache"
    _location: Location

    def dequantize(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Per level (C, h, w) float32 on ``device``; the stored numbers travel, the floats are made there."""
        return {
            name: codec.decode(values.to(device), self.scales[name].to(device) if name in self.scales else None)
            for name, values in self.features.items()
        }

    @cached_property
    def detections(self) -> Detections:
        """What the teacher detected in this view.

        Raises:
            CorruptShardError: the unit's part of the detections is damaged or gone.
        """
        return self._cache._detections(self._location)


class TeacherCache:
    """One teacher's targets, read-only.

    Shards are mapped and sliced through their index; nothing is copied until a tensor is used. Survives ``fork`` and
    pickling: no thread is held, and maps are dropped when pickled. Not safe to share between threads.

    Attributes:
        info: the attributes of the teacher's group.
        levels: per level its channels and stride, ``{"P3": (256, 8), ...}``.
    """

    def __init__(self, storage: LocalStorage, info: GroupInfo, index: Index, *, verify: bool = True) -> None:
        self.info = info
        self.index = index
        self.levels: dict[str, tuple[int, int]] = {level.name: (level.channels, level.stride) for level in info.levels}
        self._levels = {level.name: level for level in info.levels}
        self._storage = storage
        self._verify = verify
        self._slots: dict[str, int] = {}
        self._drop_maps()

    @classmethod
    def open(
        cls, uri: str, teacher: str, *, fingerprint: dict[str, Any] | None = None, verify: bool = True
    ) -> "TeacherCache":
        """Open a teacher's group.

        Args:
            uri: the cache.
            teacher: the teacher's name in the recipe.
            fingerprint: the fingerprint record that the recipe asks for; anything else is refused. Without it the
                cache must hold one group of that teacher only.
            verify: check the checksum of every chunk that is read.

        Raises:
            MissingRowsError: nothing was computed for this teacher.
            StaleCacheError: another fingerprint (the message lists the fields that differ), or another format version.
            CorruptShardError: the manifest is damaged.
        """
        storage = open_storage(uri)
        info = find_group(storage, teacher, fingerprint)
        table = manifest.read_table(storage, info.name, info.levels)
        return cls(storage, info, Index(table), verify=verify)

    def __len__(self) -> int:
        """Committed rows."""
        return len(self.index)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self.index

    def keys(self) -> list[tuple[int, int]]:
        """Every committed (image id, view)."""
        return self.index.keys()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.keys())

    def __getitem__(self, key: tuple[int, int]) -> Targets:
        """The targets of ``(image_id, view)``.

        Raises:
            MissingRowsError: (a KeyError) the row is not committed.
            CorruptShardError: its bytes are damaged or gone.
        """
        image_id, view = key
        location = self.index.find(image_id, view)
        if location is None:
            raise MissingRowsError(
                f"{self._storage.root}: teacher {self.info.teacher!r} has no committed row for image {image_id}, view "
                f"{view}. Resume with `mtpd precompute RECIPE --teacher {self.info.teacher}`."
            )
        bucket, row = location.bucket, location.row
        unit, slot = divmod(row, self.slots(bucket))
        features, scales = {}, {}
        for name, level in self._levels.items():
            shape = (level.channels, *level.map_size(*bucket_size(bucket)))
            path = features_shard(self.info.name, bucket, name, unit)
            features[name] = self._read(path, bucket, unit, slot, shape, self.info.precision)
            if self.info.precision == "int8":
                path = scales_shard(self.info.name, bucket, name, unit)
                scales[name] = self._read(path, bucket, unit, slot, (level.channels,), "float32")
        return Targets(image_id, view, features, scales, self, location)

    def fidelity(self) -> dict[str, float]:
        """Median signal-to-noise ratio per level in dB, as measured when the rows were written."""
        table = manifest.read_table(self._storage, self.info.name, self.info.levels)
        return {name: float(np.median(table[f"snr_{name}"].to_numpy())) for name in self.levels}

    def slots(self, bucket: str) -> int:
        """Rows of a full unit of a bucket."""
        if bucket not in self._slots:
            self._slots[bucket] = read_slots(self._storage, self.info, bucket)
        return self._slots[bucket]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_maps", "_parts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._drop_maps()

    def _drop_maps(self) -> None:
        self._maps: OrderedDict[str, tuple[Tensor, npt.NDArray[np.uint64]]] = OrderedDict()
        self._parts: OrderedDict[str, dict[int, Detections]] = OrderedDict()

    def _read(self, path: str, bucket: str, unit: int, slot: int, shape: tuple[int, ...], dtype: str) -> Tensor:
        try:
            mapped, index = self._map(path, self.slots(bucket))
            nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            chunk = shard.read_chunk(mapped.numpy(), index, slot, nbytes, verify=self._verify)
        except (shard.DamagedBytesError, FileNotFoundError) as error:
            raise self._damaged(path, unit_name(bucket, unit), error) from error
        start = chunk.__array_interface__["data"][0] - mapped.data_ptr()
        return mapped[start : start + nbytes].view(_TORCH_DTYPES[dtype]).view(shape)

    def _map(self, path: str, slots: int) -> tuple[Tensor, npt.NDArray[np.uint64]]:
        if path in self._maps:
            self._maps.move_to_end(path)
            return self._maps[path]
        file = self._storage.path(path)
        size = file.stat().st_size
        if size == 0:
            raise shard.DamagedBytesError("the shard is empty")
        # a private map that keeps no file descriptor open: tens of thousands of shards may be mapped at once
        mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
        self._maps[path] = mapped, shard.read_index(mapped.numpy(), slots)
        if len(self._maps) > _MAX_MAPS:
            self._maps.popitem(last=False)
        return self._maps[path]

    def _detections(self, location: Location) -> Detections:
        name = unit_name(location.bucket, location.row // self.slots(location.bucket))
        if name not in self._parts:
            path = part(self.info.name, "detections", name)
            try:
                self._parts[name] = ragged.from_table(ragged.from_parquet(self._storage.read(path)))
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._damaged(path, name, error) from error
            if len(self._parts) > _MAX_PARTS:
                self._parts.popitem(last=False)
        try:
            return self._parts[name][location.row]
        except KeyError as error:
            raise self._damaged(part(self.info.name, "detections", name), name, error) from error

    def _damaged(self, path: str, unit: str, error: Exception) -> CorruptShardError:
        return CorruptShardError(
            f"{self._storage.path(path)}: unit {unit} of teacher {self.info.teacher!r} is damaged ({error}). Delete "
            f"{self._storage.path(self.info.name)} and run `mtpd precompute` to compute the teacher's targets again."
        )


def find_group(storage: LocalStorage, teacher: str, record: dict[str, Any] | None = None) -> GroupInfo:
    """The group of a teacher, by its fingerprint record if one is given.

    Raises:
        MissingRowsError: there is none.
        StaleCacheError: there are only others; the message lists what differs from the one most alike.
    """
    groups = {info.digest: info for info in list_groups(storage) if info.teacher == teacher}
    if not groups:
        raise MissingRowsError(
            f"{storage.root}: no targets of teacher {teacher!r}. Run `mtpd precompute RECIPE --teacher {teacher}`."
        )
    if record is None:
        if len(groups) > 1:
            raise StaleCacheError(
                f"{storage.root}: {len(groups)} groups of teacher {teacher!r} ({', '.join(i.name for i in groups.values())})."
                " Pass the fingerprint record of the one you want."
            )
        return next(iter(groups.values()))
    wanted = fingerprint(record)
    if wanted in groups:
        return groups[wanted]
    diffs = min((list(differences(info.record, record)) for info in groups.values()), key=len)
    raise StaleCacheError(
        f"{storage.root}: the cached targets of teacher {teacher!r} are not those that the recipe asks for:\n  "
        + "\n  ".join(diffs)
        + "\nChange the recipe back, or run `mtpd precompute` to compute the new targets beside the old."
    )


def list_groups(storage: LocalStorage) -> list[GroupInfo]:
    """Every teacher's group in a cache."""
    names = [name for name in storage.folders() if storage.exists(f"{name}/zarr.json")]
    groups = ((name, _attributes(storage, f"{name}/zarr.json")) for name in names)
    return [GroupInfo.from_attributes(a, str(storage.path(name))) for name, a in groups if "fingerprint" in a]


def read_slots(storage: LocalStorage, info: GroupInfo, bucket: str) -> int:
    """Rows of a full unit of a bucket, from its arrays' metadata.

    Raises:
        FileNotFoundError: the bucket has no arrays yet.
    """
    metadata = _json(storage, f"{info.name}/{bucket}/{info.levels[0].name}/zarr.json")
    return int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])


def existing_slots(storage: LocalStorage, info: GroupInfo) -> dict[str, int]:
    """Rows of a full unit for every bucket that has arrays."""
    folder = storage.path(info.name)
    names = [p.name for p in folder.glob("*x*") if (p / info.levels[0].name / "zarr.json").is_file()]
    return {name: read_slots(storage, info, name) for name in names}


def _attributes(storage: LocalStorage, path: str) -> dict[str, Any]:
    attributes = _json(storage, path).get("attributes", {})
    return attributes if isinstance(attributes, dict) else {}


def _json(storage: LocalStorage, path: str) -> dict[str, Any]:
    try:
        content = json.loads(storage.read(path))
    except ValueError as error:
        raise CorruptShardError(f"{storage.path(path)}: not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CorruptShardError(f"{storage.path(path)}: not a JSON object.")
    return content


__all__ = ["Level", "Targets", "TeacherCache", "existing_slots", "find_group", "list_groups"]
