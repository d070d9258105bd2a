"""Names on disk, the attributes that describe a teacher's group, and the fingerprint that guards it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cache.errors import StaleCacheError

FORMAT_VERSION = 1
MANIFEST = "manifest.parquet"
LEASE = "lease.json"
Precision = Literal["float16", "int8"]
ITEM_BYTES: dict[str, int] = {"float16": 2, "int8": 1}


@dataclass(frozen=True)
class Level:
    """One map of a pyramid: channels C and stride in pixels of the padded view."""

    name: str
    channels: int
    stride: int

    def map_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map of a padded view of ``height`` x ``width`` pixels."""
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
    """Padded (height, width) of a bucket, from its name."""
    height, _, width = name.partition("x")
    return int(height), int(width)


def unit_name(bucket: str, index: int) -> str:
    """A unit is named by its bucket and its place there."""
    return f"{bucket}-{index:06d}"


def features_shard(group: str, bucket: str, level: str, index: int) -> str:
    """Path of the shard that holds one unit of a level's maps (Zarr v3 default chunk keys)."""
    return f"{group}/{bucket}/{level}/c/{index}/0/0/0"


def scales_shard(group: str, bucket: str, level: str, index: int) -> str:
    """Path of the shard that holds one unit of a level's quantisation scales."""
    return f"{group}/{bucket}/{level}_scale/c/{index}/0"


def part(group: str, folder: Literal["manifest", "detections"], unit: str) -> str:
    """Path of a unit's part of the manifest, or of the detections."""
    return f"{group}/{folder}/part-{unit}.parquet"


@dataclass(frozen=True)
class GroupInfo:
    """The attributes of a teacher's group: what its arrays hold and under which fingerprint."""

    teacher: str
    record: dict[str, Any]
    levels: tuple[Level, ...]
    precision: Precision
    divisor: int

    @property
    def digest(self) -> str:
        """The full fingerprint."""
        return fingerprint(self.record)

    @property
    def name(self) -> str:
        """The group's name inside the cache."""
        return group_name(self.teacher, self.digest)

    def to_attributes(self) -> dict[str, Any]:
        """The group's Zarr attributes."""
        return {
            "format_version": FORMAT_VERSION,
            "teacher": self.teacher,
            "fingerprint": self.digest,
            "record": self.record,
            "levels": {level.name: [level.channels, level.stride] for level in self.levels},
            "precision": self.precision,
            "pad_divisor": self.divisor,
        }

    @classmethod
    def from_attributes(cls, attributes: dict[str, Any], where: str) -> "GroupInfo":
        """Read a group's attributes.

        Raises:
            StaleCacheError: another format version, or attributes that are not a teacher group's.
        """
        version = attributes.get("format_version")
        if version != FORMAT_VERSION:
            raise StaleCacheError(
                f"{where}: format version {version!r}, this release reads {FORMAT_VERSION}. "
                "Point cache.uri elsewhere and run `mtpd precompute`, or use the release that wrote it."
            )
        try:
            levels = tuple(Level(name, int(c), int(s)) for name, (c, s) in attributes["levels"].items())
            info = cls(
                str(attributes["teacher"]),
                attributes["record"],
                levels,
                attributes["precision"],
                int(attributes["pad_divisor"]),
            )
            intact = attributes["fingerprint"] == info.digest
        except (KeyError, TypeError, ValueError) as error:
            raise StaleCacheError(f"{where}: not the attributes of a teacher's group ({error!r}).") from error
        if not intact:
            raise StaleCacheError(f"{where}: the stored fingerprint is not that of the stored record; it was edited.")
        return info
