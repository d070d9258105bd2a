"""The weights of a teacher's head, kept beside its targets for mechanisms that run it: one safetensors file a group."""

import hashlib
from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from cache.errors import CorruptShardError, MissingRowsError
from cache.layout import HEAD, GroupInfo
from cache.storage import Storage


def pack_head(weights: Mapping[str, Tensor]) -> bytes:
    """The bytes of the file; equal weights give equal bytes."""
    return save({name: value.detach().cpu().contiguous() for name, value in sorted(weights.items())})


def head_digest(data: bytes) -> str:
    """What `GroupInfo.head` says of the file."""
    return hashlib.sha256(data).hexdigest()


def write_head(storage: Storage, info: GroupInfo, data: bytes) -> None:
    """Store a teacher's head, unless it is there.

    Raises:
        ValueError: other weights than the group's attributes name.
    """
    if head_digest(data) != info.head:
        raise ValueError(f"{info.name}: these are not the weights of head {info.head}")
    try:
        read_head(storage, info)
    except (MissingRowsError, CorruptShardError):
        storage.write(f"{info.name}/{HEAD}", [data])


def read_head(storage: Storage, info: GroupInfo) -> dict[str, Tensor]:
    """A teacher's head: weights by their names in the detector, on the CPU.

    Raises:
        MissingRowsError: the group has none.
        CorruptShardError: other bytes than were written.
    """
    again = f"Run `mtpd precompute RECIPE --teacher {info.teacher}`: it writes the head again and keeps the rows."
    name = f"{info.name}/{HEAD}"
    try:
        data = storage.read(name)
    except FileNotFoundError as error:
        raise MissingRowsError(f"{storage.where(name)}: the teacher's head is not stored. {again}") from error
    if head_digest(data) != info.head:
        raise CorruptShardError(f"{storage.where(name)}: does not match its checksum. {again}")
    return dict(load(data))
