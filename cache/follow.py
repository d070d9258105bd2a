"""An index that follows what is committed: new parts of the manifest, and the whole of it where it was compacted."""

from cache.index import Index
from cache.layout import MANIFEST, GroupInfo
from cache.manifest import index_parts, load_index, part_names
from cache.storage import Storage


class Follower:
    """Reads the manifest, and afterwards what is new of it.

    Attributes:
        index: of what was committed at the last `refresh`, which replaces it.

    Raises:
        CorruptShardError: the manifest is damaged.
    """

    def __init__(self, storage: Storage, info: GroupInfo) -> None:
        self._storage, self._info = storage, info
        self._stamp: str | None = None
        self._seen: set[str] = set()
        self.index = Index([])
        self._read_all()

    def refresh(self) -> list[str] | None:
        """Take in what changed.

        Returns:
            Names of the units that have new rows; None if everything was read again.

        Raises:
            CorruptShardError: the manifest is damaged.
        """
        # the stamp first: parts that are compacted after it was taken are found by the next call
        if self._storage.stamp(self._compacted) != self._stamp:
            self._read_all()
            return None
        listed = part_names(self._storage, self._info)
        new = [name for name in listed if name not in self._seen]
        try:
            self.index = self.index.joined(index_parts(self._storage, self._info, new))
        except FileNotFoundError:  # compacted between the listing and the read
            self._read_all()
            return None
        self._seen = set(listed)
        return [name.rpartition("/part-")[2].removesuffix(".parquet") for name in new]

    @property
    def _compacted(self) -> str:
        return f"{self._info.name}/{MANIFEST}"

    def _read_all(self) -> None:
        self._stamp = self._storage.stamp(self._compacted)
        self._seen = set(part_names(self._storage, self._info))
        self.index = load_index(self._storage, self._info)
