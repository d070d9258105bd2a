"""Names on disk, the attributes that describe a teacher's group, and the fingerprint that guards it."""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from cache.errors import CorruptShardError, StaleCacheError

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
MANIFEST = "manifest.parquet"
MANIFEST_COPY = "manifest.copy.parquet"
LEASE = "lease.json"
Precision = Literal["float16", "int8", "int4"]
Compression = Literal["none", "zstd"]
# what a group's attributes may ask of a reader, so that a forged one cannot make it allocate without bound
_MAX_CHANNELS, _MAX_STRIDE, _MAX_SIDE = 2**16, 2**10, 2**16


@dataclass(frozen=True)
class Level:
    """One map of a pyramid.

    Attributes:
        channels: C.
        stride: in pixels of the padded view, as the detector gives the map.
        pool: the map is stored averaged over windows of ``pool`` x ``pool``; 1 stores it as it is.
    """

    name: str
    channels: int
    stride: int
    pool: int = 1

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the detector's map of a padded view of ``height`` x ``width`` pixels."""
        return -(-height // self.stride), -(-width // self.stride)

    def stored_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map as it is stored: pooled."""
        rows, columns = self.map_size(height, width)
        return -(-rows // self.pool), -(-columns // self.pool)


def level_name(stride: int) -> str:
    """``P3`` for stride 8, ``P7`` for stride 128."""
    return f"P{stride.bit_length() - 1}"


def fingerprint(record: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON of everything that decides a target's value."""
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(stored: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """The leaves in which two fingerprint records differ, one line each."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for key in sorted(stored.keys() | wanted.keys()):
            yield from differences(stored.get(key), wanted.get(key), f"{path}.{key}" if path else key)
    elif (
        isinstance(stored, list)
        and isinstance(wanted, list)
        and len(stored) == len(wanted)
        and stored
        and isinstance(stored[0], dict)
    ):
        for place, (a, b) in enumerate(zip(stored, wanted, strict=True)):
            yield from differences(a, b, f"{path}.{place}")
    elif stored != wanted:
        yield f"{path}: was {_short(stored)}, asked for {_short(wanted)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def group_name(teacher: str, digest: str) -> str:
    """The teacher's group: its name and the first eight digits of its fingerprint."""
    return f"{teacher}-{digest[:8]}"


def bucket_name(height: int, width: int) -> str:
    """A bucket is named by the padded height x width of its rows, in pixels."""
    return f"{height}x{width}"


def bucket_size(name: str) -> tuple[int, int]:
    """Padded (height, width) of a bucket, from its name.

    Raises:
        ValueError: no bucket has this name, so that a name read from a file can be used in a path.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", name)
    if match is None:
        raise ValueError(f"{name!r} is not the name of a bucket (padded height x width)")
    height, width = int(match[1]), int(match[2])
    if max(height, width) > _MAX_SIDE:
        raise ValueError(f"bucket {name}: no side may be longer than {_MAX_SIDE} pixels")
    return height, width


def unit_name(bucket: str, index: int) -> str:
    """A unit is named by its bucket and its place there."""
    return f"{bucket}-{index:06d}"


@dataclass(frozen=True)
class ArraySpec:
    """One of a bucket's arrays.

    Attributes:
        name: ``P3`` for a level's maps, ``P3_scale`` for their scales.
        level: the level that it belongs to.
        shape: of one row.
        dtype: numpy's name; little-endian on disk.
    """

    name: str
    level: str
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one row, not compressed."""
        return math.prod(self.shape) * (4 if self.dtype == "float32" else 2 if self.dtype == "float16" else 1)

    def shard(self, group: str, bucket: str, unit: int) -> str:
        """Path of the shard that holds one unit (Zarr v3 default chunk keys)."""
        return f"{group}/{bucket}/{self.name}/c/{unit}" + "/0" * len(self.shape)


def part(group: str, folder: Literal["manifest", "detections"], unit: str) -> str:
    """Path of a unit's part of the manifest, or of the detections."""
    return f"{group}/{folder}/part-{unit}.parquet"


@dataclass(frozen=True)
class GroupInfo:
    """The attributes of a teacher's group: what its arrays hold and under which fingerprint.

    Attributes:
        record: what the fingerprint hashes.
        divisor: views are padded to multiples of so many pixels.
        compression: of every stored row. It changes no value, so it is not part of the fingerprint.
        version: of the format that the group is written in.
    """

    teacher: str
    record: dict[str, Any]
    levels: tuple[Level, ...]
    precision: Precision
    divisor: int
    compression: Compression = "none"
    version: int = FORMAT_VERSION

    @cached_property
    def digest(self) -> str:
        """The full fingerprint."""
        return fingerprint(self.record)

    @cached_property
    def name(self) -> str:
        """The group's name inside the cache."""
        return group_name(self.teacher, self.digest)

    def arrays(self, bucket: str) -> list[ArraySpec]:
        """A bucket's arrays: of every level its maps and, unless they are float16, their scales."""
        height, width = bucket_size(bucket)
        arrays: list[ArraySpec] = []
        for level in self.levels:
            rows, columns = level.stored_size(height, width)
            if self.precision == "int4":
                arrays.append(ArraySpec(level.name, level.name, (level.channels, -(-rows * columns // 2)), "uint8"))
            else:
                arrays.append(ArraySpec(level.name, level.name, (level.channels, rows, columns), self.precision))
            if self.precision != "float16":
                arrays.append(ArraySpec(f"{level.name}_scale", level.name, (level.channels,), "float32"))
        return arrays

    def to_attributes(self) -> dict[str, Any]:
        """The group's Zarr attributes."""
        attributes = {
            "format_version": self.version,
            "teacher": self.teacher,
            "fingerprint": self.digest,
            "record": self.record,
            "levels": {level.name: [level.channels, level.stride] for level in self.levels},
            "precision": self.precision,
            "pad_divisor": self.divisor,
        }
        if self.version > 1:
            attributes["pool"] = {level.name: level.pool for level in self.levels if level.pool != 1}
            attributes["compression"] = self.compression
            attributes["attributes_sha256"] = fingerprint(attributes)
        return attributes

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], where: str) -> "GroupInfo":
        """Read a group's attributes.

        Raises:
            StaleCacheError: another format version.
            CorruptShardError: attributes that are not a teacher group's, or were changed.
        """
        version = attributes.get("format_version")
        if version not in READABLE_VERSIONS:
            raise StaleCacheError(
                f"{where}: format version {version!r}, this release reads {', '.join(map(str, READABLE_VERSIONS))}. "
                "Point cache.uri elsewhere and run `mtpd precompute`, or use the release that wrote it."
            )
        try:
            pool = attributes.get("pool", {})
            levels = tuple(
                Level(str(name), int(c), int(s), int(pool.get(name, 1)))
                for name, (c, s) in attributes["levels"].items()
            )
            info = cls(
                str(attributes["teacher"]),
                dict(attributes["record"]),
                levels,
                attributes["precision"],
                int(attributes["pad_divisor"]),
                attributes.get("compression", "none"),
                int(version),
            )
            rest = {key: value for key, value in attributes.items() if key != "attributes_sha256"}
            intact = attributes["fingerprint"] == info.digest and (
                version == 1 or attributes["attributes_sha256"] == fingerprint(rest)
            )
            sound = _is_sound(info)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptShardError(
                f"{where}: not the attributes of a teacher's group ({error!r}). {_REWRITE}"
            ) from error
        if not (intact and sound):
            raise CorruptShardError(
                f"{where}: the attributes do not match their checksum; they were changed. {_REWRITE}"
            )
        return info


_REWRITE = "Run `mtpd precompute` with the recipe: it writes the attributes anew and keeps the rows."


def _is_sound(info: GroupInfo) -> bool:
    return (
        info.precision in get_args(Precision)
        and info.compression in get_args(Compression)
        and re.fullmatch(r"[A-Za-z0-9_.-]+", info.teacher) is not None
        and 0 < info.divisor <= _MAX_STRIDE
        and 0 < len(info.levels) <= 16
        and all(
            re.fullmatch(r"P\d{1,2}", level.name) is not None
            and 0 < level.channels <= _MAX_CHANNELS
            and 0 < level.stride <= _MAX_STRIDE
            and 0 < level.pool <= _MAX_STRIDE
            for level in info.levels
        )
    )
