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
PROGRESS = "progress.json"
HEAD = "head.safetensors"
Precision = Literal["float16", "int8", "int4"]
Compression = Literal["none", "zstd"]
Role = Literal["map", "scale", "index", "logits", "terms"]
_ITEM_BYTES = {"int8": 1, "uint8": 1, "float16": 2, "float32": 4, "int32": 4}
# what a group's attributes may ask of a reader, so that a forged one cannot make it allocate without bound
_MAX_CHANNELS, _MAX_STRIDE, _MAX_SIDE, _MAX_ANCHORS, _MAX_TOP_K = 2**16, 2**10, 2**16, 2**8, 2**20


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


@dataclass(frozen=True)
class DenseSpec:
    """What is stored of a dense head's outputs on one level: those of the best positions.

    Attributes:
        name: of the level.
        stride: in pixels of the padded view.
        anchors: positions in each cell of the level's map.
        classes: class logits of a position.
        terms: box terms of a position.
        top_k: positions stored; all where a view has fewer.
    """

    name: str
    stride: int
    anchors: int
    classes: int
    terms: int
    top_k: int

    def stored(self, height: int, width: int) -> int:
        """Positions stored of a padded view of ``height`` x ``width`` pixels."""
        rows, columns = self.map_size(height, width)
        return min(self.top_k, rows * columns * self.anchors)

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the head's maps of a padded view of ``height`` x ``width`` pixels."""
        return -(-height // self.stride), -(-width // self.stride)


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
        level: the level that it belongs to.
        role: a level's maps or their scales; positions, class logits or box terms of its dense outputs.
        shape: of one row.
        dtype: numpy's name; little-endian on disk.
    """

    level: str
    role: Role
    shape: tuple[int, ...]
    dtype: str

    @cached_property
    def name(self) -> str:
        """``P3`` for a level's maps, else the level and the role: ``P3_scale``."""
        return self.level if self.role == "map" else f"{self.level}_{self.role}"

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one row, not compressed."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

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
        dense: what is stored of the dense head, per level; empty if nothing is.
        head: SHA-256 (hex) of the file that holds the teacher's head's weights; None if it is not kept.
    """

    teacher: str
    record: dict[str, Any]
    levels: tuple[Level, ...]
    precision: Precision
    divisor: int
    compression: Compression = "none"
    version: int = FORMAT_VERSION
    dense: tuple[DenseSpec, ...] = ()
    head: str | None = None

    @cached_property
    def digest(self) -> str:
        """The full fingerprint."""
        return fingerprint(self.record)

    @property
    def detections(self) -> bool:
        """Whether detections are stored. Only a record of a group without them says so: older ones all have them."""
        return self.record.get("detections") is not False

    @cached_property
    def name(self) -> str:
        """The group's name inside the cache."""
        return group_name(self.teacher, self.digest)

    def arrays(self, bucket: str) -> list[ArraySpec]:
        """A bucket's arrays: of every level its maps and, unless they are float16, their scales; then the dense outputs."""
        height, width = bucket_size(bucket)
        arrays: list[ArraySpec] = []
        for level in self.levels:
            rows, columns = level.stored_size(height, width)
            if self.precision == "int4":
                arrays.append(ArraySpec(level.name, "map", (level.channels, -(-rows * columns // 2)), "uint8"))
            else:
                arrays.append(ArraySpec(level.name, "map", (level.channels, rows, columns), self.precision))
            if self.precision != "float16":
                arrays.append(ArraySpec(level.name, "scale", (level.channels,), "float32"))
        for dense in self.dense:
            k = dense.stored(height, width)
            arrays.append(ArraySpec(dense.name, "index", (k,), "int32"))
            arrays.append(ArraySpec(dense.name, "logits", (k, dense.classes), "float16"))
            arrays.append(ArraySpec(dense.name, "terms", (k, dense.terms), "float16"))
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
            if self.dense:
                attributes["dense"] = {d.name: [d.stride, d.anchors, d.classes, d.terms, d.top_k] for d in self.dense}
            if self.head is not None:
                attributes["head_sha256"] = self.head
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
                tuple(DenseSpec(str(name), *map(int, row)) for name, row in attributes.get("dense", {}).items()),
                attributes.get("head_sha256"),
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


# what a record says of what is stored, not of how a stored value comes about
_STORED = frozenset({"levels", "pool", "dense", "head", "detections"})


def serves(info: GroupInfo, record: dict[str, Any]) -> bool:
    """Whether a group's targets are those of a fingerprint record, and hold all that it asks for, or more.

    Two records that differ only in what is stored (levels, pooling, dense outputs, head weights, detections) are of the
    same targets.
    """
    ours = {key: value for key, value in info.record.items() if key not in _STORED}
    if ours != {key: value for key, value in record.items() if key not in _STORED} or record.get("levels") is None:
        return False
    pools = {level.name: level.pool for level in info.levels}
    wanted = {name: record.get("pool", {}).get(name, 1) for name in record["levels"]}
    top_k = record.get("dense") or 0
    return (
        all(pools.get(name) == window for name, window in wanted.items())
        and (not top_k or (bool(info.dense) and min(d.top_k for d in info.dense) >= top_k))
        and (not record.get("head") or info.head is not None)
        and (info.detections or record.get("detections") is False)
    )


_REWRITE = "Run `mtpd precompute` with the recipe: it writes the attributes anew and keeps the rows."


def _is_sound(info: GroupInfo) -> bool:
    return (
        info.precision in get_args(Precision)
        and info.compression in get_args(Compression)
        and re.fullmatch(r"[A-Za-z0-9_.-]+", info.teacher) is not None
        and 0 < info.divisor <= _MAX_STRIDE
        and len(info.levels) <= 16
        and len(info.dense) <= 16
        and (info.head is None or re.fullmatch(r"[0-9a-f]{64}", info.head) is not None)
        and all(
            re.fullmatch(r"P\d{1,2}", level.name) is not None
            and 0 < level.channels <= _MAX_CHANNELS
            and 0 < level.stride <= _MAX_STRIDE
            and 0 < level.pool <= _MAX_STRIDE
            for level in info.levels
        )
        and all(
            re.fullmatch(r"P\d{1,2}", dense.name) is not None
            and 0 < dense.stride <= _MAX_STRIDE
            and 0 < dense.anchors <= _MAX_ANCHORS
            and 0 < dense.classes <= _MAX_CHANNELS
            and 0 < dense.terms <= _MAX_CHANNELS
            and 0 < dense.top_k <= _MAX_TOP_K
            for dense in info.dense
        )
    )
