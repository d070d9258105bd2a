"""Images x views -> buckets -> units, and the bytes of everything, before anything runs. Arithmetic only."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from cache import shard
from cache.errors import RecipeError, StaleCacheError
from cache.index import MAX_VIEWS, Index
from cache.layout import GroupInfo, bucket_name, unit_name
from cache.views import IntArray, Policy, padded

UNIT_BYTES = 128 * 2**20
MAX_UNIT_ROWS = 256


@dataclass(frozen=True)
class Images:
    """The images of a data set, as columns of equal length n, in the order of the annotation file.

    Attributes:
        ids: (n,) int64.
        widths, heights: (n,) int64, pixels, as the annotation file states them.
        file_names: n names, relative to the image folder.
    """

    ids: IntArray
    widths: IntArray
    heights: IntArray
    file_names: Sequence[str]

    def sources(self) -> npt.NDArray[np.uint64]:
        """(n,) uint64: a hash of each image's base name and size, to tell two data sets with equal ids apart."""
        sizes = zip(self.file_names, self.widths.tolist(), self.heights.tolist(), strict=True)
        digests = (
            hashlib.blake2b(f"{PurePosixPath(name).name} {w} {h}".encode(), digest_size=8).digest()
            for name, w, h in sizes
        )
        return np.frombuffer(b"".join(digests), dtype="<u8")


@dataclass(frozen=True)
class Row:
    """One (image, view) to compute, and where its targets go.

    Attributes:
        row: row in the bucket's arrays.
        width, height: the image's own pixels, as annotated.
        view_width, view_height: the view's pixels, without padding.
    """

    image_id: int
    view: int
    row: int
    file_name: str
    width: int
    height: int
    view_width: int
    view_height: int
    source: int


@dataclass(frozen=True)
class Unit:
    """The unit of work, of storage, of commit and of retry: one shard of each of a bucket's arrays.

    Attributes:
        index: place in the bucket; the unit holds rows ``index * slots`` to ``(index + 1) * slots - 1``.
        slots: rows a full unit has.
        rows: what is to be computed.
        kept: rows committed earlier, to be carried over when the shard is written anew.
    """

    bucket: str
    index: int
    slots: int
    rows: tuple[Row, ...]
    kept: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return unit_name(self.bucket, self.index)

    def slot(self, row: int) -> int:
        """The slot of a row inside this unit's shards."""
        return row - self.index * self.slots


@dataclass(frozen=True)
class Bucket:
    """The (image, view)s whose padded height x width are equal.

    Attributes:
        rows: rows when the plan is done, the committed ones included.
        slots: rows of a full unit.
        todo: rows not committed yet.
    """

    name: str
    rows: int
    slots: int
    todo: int

    @property
    def units(self) -> int:
        return -(-self.rows // self.slots)


@dataclass(frozen=True)
class Plan:
    """What a teacher's group will hold, and what is left to compute.

    Bytes are exact where rows are not compressed, and an upper bound but for a few bytes a row where they are.

    Attributes:
        info: the group's attributes.
        buckets: every bucket, the largest first.
        total: rows that are wanted; all that the data set and the view policy ask for, unless it is a plan for some.
        images, policy: what the plan was made for.
        first: members (see `row`) in the order in which they are needed; the others come behind.
    """

    info: GroupInfo
    buckets: tuple[Bucket, ...]
    total: int
    images: Images
    policy: Policy
    _sources: npt.NDArray[np.uint64]
    _todo: dict[str, tuple[IntArray, IntArray]]
    _occupied: Mapping[str, IntArray] = field(default_factory=dict)
    first: IntArray | None = None

    @property
    def dataset_digest(self) -> str:
        """A hash over every image's id, base name and size."""
        return hashlib.sha256(self.images.ids.tobytes() + self._sources.tobytes()).hexdigest()

    @property
    def todo(self) -> int:
        """Rows left to compute."""
        return sum(bucket.todo for bucket in self.buckets)

    @property
    def todo_units(self) -> int:
        """Units with something left to compute."""
        return sum(np.unique(self._todo[b.name][1] // b.slots).size for b in self.buckets)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all shards when the plan is done."""
        return sum(self.bucket_bytes(bucket) for bucket in self.buckets)

    @property
    def todo_bytes(self) -> int:
        """Bytes of the maps and scales that are left to write."""
        return sum(bucket.todo * self._row_bytes(bucket) for bucket in self.buckets)

    def bucket_bytes(self, bucket: Bucket) -> int:
        """Bytes of a bucket's shards."""
        arrays = len(self.info.arrays(bucket.name))
        tails = bucket.units * arrays * shard.size(0, 0, bucket.slots)
        return tails + bucket.rows * self._row_bytes(bucket)

    def level_bytes(self) -> dict[str, int]:
        """Bytes of each level's maps, without scales and indices."""
        totals = {level.name: 0 for level in self.info.levels}
        for bucket in self.buckets:
            for array in self.info.arrays(bucket.name):
                if array.role == "map":
                    totals[array.level] += bucket.rows * array.nbytes
        return totals

    def dense_bytes(self) -> int:
        """Bytes of the dense outputs."""
        return sum(
            bucket.rows * array.nbytes
            for bucket in self.buckets
            for array in self.info.arrays(bucket.name)
            if array.role in ("index", "logits", "terms")
        )

    def _row_bytes(self, bucket: Bucket) -> int:
        return sum(shard.size(a.nbytes, 1, 0) - shard.size(0, 0, 0) for a in self.info.arrays(bucket.name))

    def units(self) -> Iterator[Unit]:
        """The units with something left to compute: bucket by bucket, or in the order in which they are needed."""
        todo = [bucket for bucket in self.buckets if bucket.todo]
        if self.first is None:
            for bucket in todo:
                yield from self._bucket_units(bucket)
            return
        ranks = _ranks(self.first, self.images.ids.size * len(self.policy))
        yield from merge(*map(self._bucket_units, todo), key=lambda unit: self._rank(unit, ranks))

    def unit_of(self, image_id: int, view: int) -> Unit | None:
        """The unit that a row is to be computed in; None if it is not left to compute.

        Takes time in proportion to the rows of its bucket.
        """
        (positions,) = np.nonzero(self.images.ids == image_id)
        if positions.size == 0 or not 0 <= view < len(self.policy):
            return None
        member = int(positions[0]) * len(self.policy) + view
        for name, (members, rows) in self._todo.items():
            (found,) = np.nonzero(members == member)
            if found.size:
                bucket = next(bucket for bucket in self.buckets if bucket.name == name)
                return self._unit(bucket, int(rows[found[0]]) // bucket.slots)
        return None

    def _rank(self, unit: Unit, ranks: IntArray) -> int:
        members, rows = self._todo[unit.bucket]
        return int(ranks[members[np.searchsorted(rows, unit.rows[0].row)]])

    def _bucket_units(self, bucket: Bucket) -> Iterator[Unit]:
        _, rows = self._todo[bucket.name]
        for start in np.flatnonzero(np.diff(rows // bucket.slots, prepend=-1)):
            yield self._unit(bucket, int(rows[start]) // bucket.slots)

    def _unit(self, bucket: Bucket, index: int) -> Unit:
        members, rows = self._todo[bucket.name]
        occupied = self._occupied.get(bucket.name, np.zeros(0, np.int64))
        bounds = (index * bucket.slots, (index + 1) * bucket.slots)
        (start, end), (lo, hi) = np.searchsorted(rows, bounds), np.searchsorted(occupied, bounds)
        wanted = zip(members[start:end].tolist(), rows[start:end].tolist(), strict=True)
        todo = tuple(self.row(member, row) for member, row in wanted)
        return Unit(bucket.name, index, bucket.slots, todo, tuple(occupied[lo:hi].tolist()))

    def row(self, member: int, row: int) -> Row:
        """One (image, view) at a row of its bucket; ``member`` is ``image * views + view``, the image by its position."""
        images = self.images
        position, view = divmod(member, len(self.policy))
        width, height = images.widths[position], images.heights[position]
        view_width, view_height = self.policy.sizes(view, width, height)
        return Row(
            image_id=int(images.ids[position]),
            view=view,
            row=row,
            file_name=images.file_names[position],
            width=int(width),
            height=int(height),
            view_width=int(view_width),
            view_height=int(view_height),
            source=int(self._sources[position]),
        )


def make_plan(
    images: Images,
    policy: Policy,
    info: GroupInfo,
    *,
    committed: Index | None = None,
    unit_rows: int | None = None,
    wanted: npt.NDArray[np.bool_] | None = None,
    first: IntArray | None = None,
) -> Plan:
    """Give every row that is wanted and not committed a place.

    Committed rows keep theirs. The others fill, in the order of (image, view), the free rows of their bucket from the
    first on; so an interrupted plan made again from what it committed puts every remaining row where it was before,
    and images added later go behind.

    Args:
        committed: the manifest's index, if the group exists.
        unit_rows: rows of a full unit in buckets of which nothing is committed; by default as many as make about 128 MiB,
            at most 256. Where rows are committed the size of a unit is fixed.
        wanted: (n, views), the rows to compute; by default all. A later plan for more goes on behind them.
        first: (k,) members, ``image * views + view`` with the image by its position, in the order in which they are needed,
            each once: the units are made and ordered for whoever needs them in that order while they are computed.

    Raises:
        StaleCacheError: a committed row belongs to another image of the same id.
        RecipeError: too many views, or one in which an image has no pixels.
    """
    sources = images.sources()
    if committed is not None:
        _refuse_other_images(images, sources, committed)
    occupied = {} if committed is None else committed.occupied()
    fixed = {} if committed is None else committed.unit_rows
    if len(policy) > MAX_VIEWS:
        raise RecipeError(
            f"views: {len(policy)} of each image, {MAX_VIEWS} at most. Take fewer scales, or a smaller sampled.count."
        )
    keys = _bucket_keys(images, policy, info.divisor).ravel()
    names, codes, counts = np.unique(keys, return_inverse=True, return_counts=True)
    del keys
    if committed is not None:
        codes[committed.committed(images.ids, len(policy)).ravel()] = names.size
    if wanted is not None:
        codes[~wanted.ravel()] = names.size
    # a stable sort keeps the order of (image, view) inside each bucket; the committed rows come last
    codes = codes.astype(np.int32)
    order = np.argsort(codes, kind="stable") if first is None else np.lexsort((_ranks(first, codes.size), codes))
    bounds = np.cumsum(np.bincount(codes, minlength=names.size + 1))
    del codes
    buckets, todo = [], {}
    for code, (key, count) in enumerate(zip(names.tolist(), counts.tolist(), strict=True)):
        name = bucket_name(key >> 32, key & 0xFFFFFFFF)
        members = order[bounds[code - 1] if code else 0 : bounds[code]]
        taken = occupied.get(name, np.zeros(0, np.int64))
        free = _first_free(taken, members.size)
        slots = fixed.get(name) or unit_rows or _default_slots(info, name)
        rows = int(max(taken.max(initial=-1), free.max(initial=-1))) + 1
        if rows == 0:
            continue  # nothing of it is wanted
        buckets.append((count, Bucket(name, rows, slots, members.size)))
        todo[name] = (members, free)
    ordered = tuple(bucket for _, bucket in sorted(buckets, key=lambda pair: (-pair[0], pair[1].name)))
    total = images.ids.size * len(policy) if wanted is None else int(wanted.sum())
    return Plan(info, ordered, total, images, policy, sources, todo, occupied, first)


def _ranks(first: IntArray, count: int) -> IntArray:
    """(count,) int64: each member's turn; those of ``first`` come first, the others behind in their own order."""
    ranks = np.arange(count) + first.size
    ranks[first] = np.arange(first.size)
    return ranks


def _first_free(taken: IntArray, count: int) -> IntArray:
    """The first ``count`` numbers from 0 on that are not in ``taken``, which is sorted."""
    if taken.size == 0 or int(taken[-1]) == taken.size - 1:
        return np.arange(taken.size, taken.size + count)
    return np.setdiff1d(np.arange(taken.size + count), taken, assume_unique=True)[:count]


def _bucket_keys(images: Images, policy: Policy, divisor: int) -> IntArray:
    """(n, views) int64: padded height << 32 | padded width."""
    columns = []
    for view in range(len(policy)):
        widths, heights = policy.sizes(view, images.widths, images.heights)
        if (empty := np.flatnonzero(np.minimum(widths, heights) < 1)).size:
            at = int(empty[0])
            raise RecipeError(
                f"dataset.train.ann_file: image id {images.ids[at]} ({images.file_names[at]}, {images.widths[at]}x"
                f"{images.heights[at]}) becomes {widths[at]}x{heights[at]} pixels in view {view}. Take it out of the file."
            )
        columns.append((padded(heights, divisor) << 32) | padded(widths, divisor))
    return np.stack(columns, axis=1)


def _refuse_other_images(images: Images, sources: npt.NDArray[np.uint64], committed: Index) -> None:
    known, cached = committed.sources_of(images.ids)
    wrong = np.flatnonzero(known & (cached != sources))
    if wrong.size:
        at = int(wrong[0])
        raise StaleCacheError(
            f"{wrong.size} of {images.ids.size} images have targets of another image with the same id in this cache, "
            f"the first is id {images.ids[at]} ({images.file_names[at]}, {images.widths[at]}x{images.heights[at]}). "
            "Give this data set a cache of its own: another cache.uri."
        )


def _default_slots(info: GroupInfo, bucket: str) -> int:
    return max(1, min(MAX_UNIT_ROWS, round(UNIT_BYTES / max(1, sum(array.nbytes for array in info.arrays(bucket))))))
