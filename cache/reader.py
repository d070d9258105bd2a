"""`TeacherCache`: random access to one teacher's targets at the speed of memory."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cache import detections as ragged
from cache import manifest, shard
from cache.detections import Detections
from cache.diskcache import DiskCache
from cache.errors import CorruptShardError, MissingRowsError, RecipeError, StaleCacheError
from cache.follow import Follower
from cache.hierarchy import read_document
from cache.index import Index, Location
from cache.layout import GroupInfo, differences, fingerprint, group_name, part, unit_name
from cache.mapped import MappedRows
from cache.shard import Bytes, DamagedBytesError
from cache.storage import LocalStorage, Storage, open_storage
from cache.targets import RowLayout, Targets
from cache.views import Policy, SampledPolicy, ViewPolicy

_MAX_PARTS = 64
_LOCAL_BYTES = 64 * 2**30


class TeacherCache:
    """One teacher's targets, read-only.

    Local shards are mapped and sliced through their index; nothing is copied until a tensor is used. Shards in object
    storage are read by ranges, all levels at once, and kept on the local disk if a folder for that is given. Survives
    pickling, and ``fork`` if it is local: no thread is held, and maps are dropped when pickled. Not safe to share between
    threads.

    Attributes:
        info: the attributes of the teacher's group.
        levels: per level its channels and stride, ``{"P3": (256, 8), ...}``.
        last_kept: whether the row that was read last was on the local disk; None where no rows are kept there.
    """

    def __init__(
        self,
        storage: Storage,
        info: GroupInfo,
        index: Index,
        *,
        verify: bool = True,
        levels: Sequence[str] | None = None,
        dense: bool = True,
        kept: DiskCache | None = None,
    ) -> None:
        self.info, self.index, self._dense = info, index, dense
        self.levels: dict[str, tuple[int, int]] = {
            level.name: (level.channels, level.stride)
            for level in info.levels
            if levels is None or level.name in levels
        }
        self._storage, self._verify, self._kept = storage, verify, kept
        self.last_kept: bool | None = None
        self._follower: Follower | None = None
        self._open()

    @classmethod
    def open(
        cls,
        uri: str,
        teacher: str,
        *,
        fingerprint: dict[str, Any] | None = None,
        verify: bool = True,
        levels: Sequence[str] | None = None,
        dense: bool = True,
        detections: bool = False,
        local_dir: str | None = None,
        local_bytes: int | None = None,
    ) -> "TeacherCache":
        """Open a teacher's group.

        Args:
            uri: the cache: a path, or ``s3://``, ``gs://``, ``az://`` with bucket and prefix.
            teacher: the teacher's name in the recipe.
            fingerprint: the fingerprint record that the recipe asks for; anything else is refused. Without it the
                cache must hold one group of that teacher only.
            verify: check the checksum of every row that is read; what comes from object storage is always checked.
            levels: levels to read; all by default.
            dense: read the dense head's outputs too, where they are stored.
            detections: they are wanted: a group that stores none is refused. Where they are stored, any row gives them.
            local_dir: a folder that keeps rows of a cache in object storage; several processes and caches may share it.
            local_bytes: bytes that it may take; 64 GiB by default.

        Raises:
            MissingRowsError: nothing was computed for this teacher.
            StaleCacheError: another fingerprint (the message lists the fields that differ), or another format version; or no
                detections.
            CorruptShardError: the manifest is damaged.
            RecipeError: the cache has no such level.
        """
        storage = open_storage(uri)
        info = find_group(storage, teacher, fingerprint)
        if detections and not info.detections:
            raise StaleCacheError(
                f"{storage.where(info.name)}: holds no detections. Set teachers.{teacher}.detections: true in the recipe and run "
                "`mtpd precompute`: it computes targets with them beside these."
            )
        known = [level.name for level in info.levels]
        for name in levels or ():
            if name not in known:
                raise RecipeError(f"{storage.where(info.name)}: has no level {name!r}, only {', '.join(known)}.")
        kept = None
        if local_dir is not None and not isinstance(storage, LocalStorage):
            kept = DiskCache(
                Path(local_dir).expanduser().absolute(), _LOCAL_BYTES if local_bytes is None else local_bytes
            )
        return cls(
            storage, info, manifest.load_index(storage, info), verify=verify, levels=levels, dense=dense, kept=kept
        )

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
            StorageError: the object storage does not answer.
        """
        image_id, view = key
        location = self.index.find(image_id, view)
        if location is None:
            raise MissingRowsError(
                f"{self._storage.where()}: teacher {self.info.teacher!r} has no committed row for image {image_id}, view "
                f"{view}. Resume with `mtpd precompute RECIPE --teacher {self.info.teacher}`."
            )
        layout = self._layout(location.bucket)
        rows = self._read(image_id, view, location, layout)
        detections = (lambda: self._detections(image_id, view, location)) if self.info.detections else None
        return Targets(image_id, view, layout, rows, detections)

    def refresh(self) -> None:
        """Take in what was committed since this cache was opened, or since the last call; and what was taken out.

        Costs a listing and what is new; the whole manifest is read again by the first call, and where it was compacted.

        Raises:
            CorruptShardError: the manifest is damaged.
            StorageError: the object storage does not answer.
        """
        if self._follower is None:
            self._follower = Follower(self._storage, self.info)
            changed = None
        else:
            changed = self._follower.refresh()
        self.index = self._follower.index
        if changed is None:  # shards may have been replaced
            self._open()
            return
        for unit in changed:
            bucket, _, number = unit.rpartition("-")
            self._rows.forget(bucket, int(number))
            self._parts.pop(unit, None)

    @property
    def storage(self) -> Storage:
        """Where the cache lives."""
        return self._storage

    def fidelity(self) -> dict[str, float]:
        """Median signal-to-noise ratio per level in dB, as measured when the rows were written."""
        names = [f"snr_{name}" for name in self.levels]
        table = manifest.read_table(self._storage, self.info, names)
        return {level: float(np.median(table[name].to_numpy())) for level, name in zip(self.levels, names, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        opened = ("_rows", "_layouts", "_parts")
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._layouts: dict[str, RowLayout] = {}
        # by unit: its detections by row, and the labels of its slots
        self._parts: OrderedDict[str, tuple[dict[int, Detections], Sequence[int]]] = OrderedDict()
        if isinstance(self._storage, LocalStorage):
            self._rows: Any = MappedRows(self._storage, self.info, verify=self._verify)
            return
        from cache.objects import ObjectStorage  # only where it is needed: its library starts threads
        from cache.remote import RemoteRows

        assert isinstance(self._storage, ObjectStorage)
        self._rows = RemoteRows(self._storage, self.info)

    def _layout(self, bucket: str) -> RowLayout:
        if bucket not in self._layouts:
            self._layouts[bucket] = RowLayout.of(self.info, bucket, list(self.levels), dense=self._dense)
        return self._layouts[bucket]

    def _read(self, image_id: int, view: int, location: Location, layout: RowLayout) -> Sequence[Bytes]:
        if not layout.arrays:  # detections are read apart
            return []
        bucket, slots = location.bucket, self.index.unit_rows[location.bucket]
        unit, slot = divmod(location.row, slots)
        label = None
        if self.info.version > 1:
            label = shard.row_label(image_id, view, self.index.source(image_id))
        if self._kept is not None and label is not None:
            name = f"{self._kept_as}/{bucket}/{location.row}"
            buffer = self._kept.get(name, label, layout.nbytes)
            self.last_kept = buffer is not None
            if buffer is not None:
                return layout.rows(buffer)
        try:
            rows: list[Bytes] = self._rows.read(layout.arrays, bucket, unit, slots, slot, label)
        except (DamagedBytesError, FileNotFoundError) as error:
            raise self._damaged(unit_name(bucket, unit), error) from error
        if self._kept is not None and label is not None:
            packed = np.zeros(layout.nbytes, np.uint8)
            for own, row in zip(layout.rows(packed), rows, strict=True):
                own[:] = row
            self._kept.put(name, label, packed)
        return rows

    @property
    def _kept_as(self) -> str:
        """A folder of its own for what was read of this cache, group and choice of levels."""
        identity = f"{self._storage.where(self.info.name)}|{self.info.digest}|{','.join(self.levels)}|{self._dense}"
        return hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()

    def _detections(self, image_id: int, view: int, location: Location) -> Detections:
        bucket, slots = location.bucket, self.index.unit_rows[location.bucket]
        unit, slot = divmod(location.row, slots)
        name = unit_name(bucket, unit)
        if name not in self._parts:
            path = part(self.info.name, "detections", name)
            try:
                table = ragged.from_parquet(self._storage.read(path), path, self.info.version)
                self._parts[name] = ragged.from_table(table), self._labels(bucket, unit, slots)
            except (ValueError, FileNotFoundError, DamagedBytesError) as error:
                raise self._damaged(name, error) from error
            if len(self._parts) > _MAX_PARTS:
                self._parts.popitem(last=False)
        detections, labels = self._parts[name]
        # detections have no label of their own: where a unit was written anew, its rows may be other images'
        if labels and labels[slot] != shard.row_label(image_id, view, self.index.source(image_id)):
            raise self._damaged(name, DamagedBytesError(f"slot {slot} holds another row: the unit was written anew"))
        try:
            return detections[location.row]
        except KeyError as error:
            raise self._damaged(name, error) from error

    def _labels(self, bucket: str, unit: int, slots: int) -> list[int]:
        """The label of each slot of a unit, as the end of its smallest shard says; none in version 1, or without shards."""
        info, arrays = self.info, self.info.arrays(bucket)
        if info.version == 1 or not arrays:
            return []
        array = min(arrays, key=lambda one: one.nbytes)
        path, nbytes = array.shard(info.name, bucket, unit), shard.tail_bytes(slots, labelled=True)
        end, size, _ = self._storage.read_end(path, nbytes)
        tail = shard.read_tail(np.frombuffer(end, np.uint8), size, slots, array.nbytes, info.compression, info.version)
        own = shard.array_label(info.name, bucket, array.name)
        return [int(label) ^ own for label in tail.labels]

    def _damaged(self, unit: str, error: Exception) -> CorruptShardError:
        return CorruptShardError(
            f"{self._storage.where(self.info.name)}: unit {unit} of teacher {self.info.teacher!r} is damaged ({error}). Run "
            f"`mtpd verify {self._storage.where()} --repair`, then `mtpd precompute RECIPE --teacher {self.info.teacher}`: "
            "only the damaged units are computed again."
        )


def find_group(storage: Storage, teacher: str, record: dict[str, Any] | None = None) -> GroupInfo:
    """The group of a teacher, by its fingerprint record if one is given.

    Raises:
        MissingRowsError: there is none.
        StaleCacheError: there are only others; the message lists what differs from the one most alike.
    """
    if record is not None:
        info = read_group(storage, group_name(teacher, fingerprint(record)))
        if info is not None and info.digest == fingerprint(record):
            return info
    groups = {info.digest: info for info in list_groups(storage, teacher)}
    if not groups:
        raise MissingRowsError(
            f"{storage.where()}: no targets of teacher {teacher!r}. Run `mtpd precompute RECIPE --teacher {teacher}`."
        )
    if record is None:
        if len(groups) > 1:
            raise StaleCacheError(
                f"{storage.where()}: {len(groups)} groups of teacher {teacher!r} ({', '.join(i.name for i in groups.values())})."
                " Pass the fingerprint record of the one you want."
            )
        return next(iter(groups.values()))
    diffs = min((list(differences(info.record, record)) for info in groups.values()), key=len)
    raise StaleCacheError(
        f"{storage.where()}: the cached targets of teacher {teacher!r} are not those that the recipe asks for:\n  "
        + "\n  ".join(diffs)
        + "\nChange the recipe back, or run `mtpd precompute` to compute the new targets beside the old."
    )


def list_groups(
    storage: Storage,
    teacher: str | None = None,
    unreadable: Callable[[CorruptShardError | StaleCacheError], None] | None = None,
) -> list[GroupInfo]:
    """Every teacher's group in a cache.

    Args:
        teacher: only those of this one.
        unreadable: is given the error of each group that cannot be read; without it the first one is raised.

    Raises:
        CorruptShardError: a group's attributes were changed.
        StaleCacheError: a group is of a format version that this release does not know.
    """
    found = []
    for name in storage.folders():
        if teacher is not None and not name.startswith(f"{teacher}-"):
            continue
        try:
            info = read_group(storage, name)
        except (CorruptShardError, StaleCacheError) as error:
            if unreadable is None:
                raise
            unreadable(error)
            continue
        if info is not None and teacher in (None, info.teacher):
            found.append(info)
    return found


def read_group(storage: Storage, name: str) -> GroupInfo | None:
    """A group by its name; None if there is no such group.

    Raises:
        CorruptShardError: its attributes were changed.
    """
    attributes = (read_document(storage, f"{name}/zarr.json") or {}).get("attributes")
    if not isinstance(attributes, dict) or "fingerprint" not in attributes:
        return None
    info = GroupInfo.from_attributes(attributes, storage.where(name))
    if info.name != name:
        raise CorruptShardError(
            f"{storage.where(name)}: holds the group {info.name}; it is not where it belongs. Give the folder its name back."
        )
    return info


def planned_views(storage: Storage, info: GroupInfo) -> int | None:
    """Views of each image in a group, as its fingerprint's record says, or else the cache's root; None where neither does."""
    root = read_document(storage, "zarr.json") or {}
    for attributes in (info.record, root.get("attributes", {})):
        try:
            record = attributes["views"]
            policy: Policy = SampledPolicy.from_json(record) if "sampled" in record else ViewPolicy.from_json(record)
            return len(policy)
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
    return None


def planned_rows(storage: Storage, info: GroupInfo) -> int | None:
    """Rows of a group when it is whole, by the images that the cache's root counts; None where it does not."""
    try:
        images = int((read_document(storage, "zarr.json") or {})["attributes"]["dataset"]["images"])
    except (KeyError, TypeError, ValueError):
        return None
    views = planned_views(storage, info)
    return None if views is None else images * views
