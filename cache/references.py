"""Which recipes need which groups of a cache: one small record a recipe, so that gc of one keeps what another needs.

A record is a courtesy to others, not a lock: training works without (its role may be one that only reads the bucket).
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cache.errors import CorruptShardError, RecipeError
from cache.storage import Storage

FOLDER = "references"
# a record that says the same is not written again before it is so old
_RENEW_SECONDS = 3600.0
_NAME = re.compile(r"[A-Za-z0-9_.-]+-[0-9a-f]{8}")


@dataclass(frozen=True)
class Use:
    """What a recipe needs a group for.

    Attributes:
        teacher: whose targets the group holds.
        stages: numbers of the stages that read it.
        done: of them those that are trained.
    """

    teacher: str
    stages: tuple[int, ...]
    done: tuple[int, ...] = ()


@dataclass(frozen=True)
class Reference:
    """A recipe, by its work_dir, and the groups that it needs.

    Attributes:
        name: of the record: the work_dir's name and a hash of its path.
        used: when a run last said so, in seconds since the epoch by its clock.
        groups: by the group's name.
    """

    name: str
    work_dir: str
    used: float
    groups: dict[str, Use] = field(default_factory=dict)

    def needs(self, group: str) -> bool:
        """Whether a stage that reads the group is not trained yet, or no stage says when it is done with.

        Trained is what the record says so of, and also what has a result in the work_dir, if that is seen from here: a role
        that only reads the cache cannot say it in the record.
        """
        use = self.groups.get(group)
        if use is None:
            return False
        left = [stage for stage in use.stages if stage not in use.done]
        return not use.stages or any(not Path(self.work_dir, f"stage-{n}", "result.json").exists() for n in left)


def reference_name(work_dir: str) -> str:
    """The name of a recipe's record."""
    folder = re.sub(r"[^A-Za-z0-9_.-]", "_", work_dir.rstrip("/").rpartition("/")[2]) or "recipe"
    return f"{folder}-{hashlib.blake2b(work_dir.encode(), digest_size=4).hexdigest()}"


def refer(storage: Storage, work_dir: str, group: str, use: Use) -> None:
    """Record that a recipe needs a group; a group that it needed of the same teacher before is needed no more.

    Raises:
        RecipeError: the storage cannot be written to.
        StorageError: it does not answer.
    """
    name = reference_name(work_dir)
    while True:
        stored = _content(storage, name)
        before = _parse(name, stored) or Reference(name, work_dir, 0.0)
        others = {g: u for g, u in before.groups.items() if u.teacher != use.teacher}
        wanted = replace(before, used=time.time(), groups=dict(sorted({**others, group: use}.items())))
        if before.groups == wanted.groups and wanted.used - before.used < _RENEW_SECONDS:
            return
        content = {key: value for key, value in asdict(wanted).items() if key != "name"}
        # two teachers of one recipe may be filled at once: neither may write over the other
        if storage.swap(_file(name), stored, json.dumps(content, indent=1).encode()):
            return


def references(storage: Storage, but: str | None = None) -> list[Reference]:
    """Every record.

    Args:
        but: name of one that is left out.

    Raises:
        CorruptShardError: one cannot be read: then it is not known what its recipe needs.
    """
    found = []
    for file in storage.names(FOLDER, ".json"):
        name, content = file.rpartition("/")[2].removesuffix(".json"), storage.read(file)
        if name == but:
            continue
        record = _parse(name, content)
        if record is None:
            raise CorruptShardError(
                f"{storage.where(file)}: not the record of a recipe. If that recipe runs again it is written anew; if not, "
                f"`mtpd gc {storage.where()} --forget {name} --delete` removes it."
            )
        found.append(record)
    return found


def forget(storage: Storage, name: str) -> None:
    """Remove a record: what only that recipe needs may go then.

    Raises:
        RecipeError: there is none of this name.
    """
    if not _NAME.fullmatch(name) or not storage.exists(_file(name)):
        known = [file.rpartition("/")[2].removesuffix(".json") for file in storage.names(FOLDER, ".json")]
        raise RecipeError(
            f"{storage.where()}: no recipe {name!r} uses this cache (known: {', '.join(known) or 'none'})."
        )
    storage.delete(_file(name))


def needed_by(group: str, known: Iterable[Reference]) -> list[Reference]:
    """Of some recipes those that need a group."""
    return [one for one in known if one.needs(group)]


def _file(name: str) -> str:
    return f"{FOLDER}/{name}.json"


def _content(storage: Storage, name: str) -> bytes | None:
    try:
        return storage.read(_file(name))
    except FileNotFoundError:
        return None


def _parse(name: str, content: bytes | None) -> Reference | None:
    try:
        record = json.loads(content or b"")
        groups = {
            str(group): Use(str(use["teacher"]), tuple(map(int, use["stages"])), tuple(map(int, use["done"])))
            for group, use in record["groups"].items()
        }
        return Reference(name, str(record["work_dir"]), float(record["used"]), groups)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
