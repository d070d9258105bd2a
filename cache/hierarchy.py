"""The Zarr metadata of a teacher's group: which documents there must be, and what they say.

zarr-python makes them, in memory; they are stored like everything else, so that a full disk, object storage and a check of
what is stored need no second way.
"""

import json
from collections.abc import Mapping
from typing import Any

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from cache.layout import GroupInfo
from cache.storage import Storage


def documents(info: GroupInfo, buckets: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The group's metadata documents by name, as JSON values.

    Args:
        buckets: rows of each bucket's arrays, and rows of a full unit.
    """
    found = {f"{info.name}/zarr.json": group_document(info.to_attributes())}
    for bucket, (rows, slots) in buckets.items():
        content: dict[str, Buffer] = {}
        folder = zarr.create_group(MemoryStore(content), zarr_format=3)
        for array in info.arrays(bucket):
            folder.create_array(
                array.name,
                shape=(rows, *array.shape),
                chunks=(1, *array.shape),
                shards=(slots, *array.shape),
                dtype=array.dtype,
                compressors=[*([ZstdCodec(level=3)] if info.compression == "zstd" else []), Crc32cCodec()],
                fill_value=0,
            )
        found |= {f"{info.name}/{bucket}/{name}": json.loads(made.to_bytes()) for name, made in content.items()}
    return found


def write_changed(storage: Storage, wanted: Mapping[str, Any]) -> list[str]:
    """Write the documents that are absent or differ; arrays are never made shorter. Returns their names."""
    written = []
    for name, document in wanted.items():
        stored = read_document(storage, name)
        longer = lengthened(document, stored) if stored else document
        if stored != longer:
            storage.write(name, [json.dumps(longer, indent=1).encode()], durable=False)
            written.append(name)
    return written


def lengthened(document: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """A document; an array's with as many rows as the longer of the two."""
    if document["node_type"] != "array":
        return document
    try:
        rows = max(int(document["shape"][0]), int(stored["shape"][0]))
    except (KeyError, TypeError, ValueError, IndexError):
        return document
    return {**document, "shape": [rows, *document["shape"][1:]]}


def read_document(storage: Storage, name: str) -> dict[str, Any] | None:
    """A metadata document; None if there is none, or if it is no JSON object."""
    try:
        content = json.loads(storage.read(name))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def group_document(attributes: dict[str, Any]) -> Any:
    """The document of a Zarr group with these attributes."""
    content: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(content), zarr_format=3, attributes=attributes)
    return json.loads(content["zarr.json"].to_bytes())
