"""Damage of any kind to any file that the manifest covers: found, and named with the unit that it takes along."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import (
    CorruptShardError,
    LocalStorage,
    MissingRowsError,
    StaleCacheError,
    TeacherCache,
    compact,
    find_garbage,
    find_group,
    list_groups,
    repair,
    verify,
)
from cache.verify import unit_of
from tests.cache import make

IMAGES = 9
GROUP = make.info()


def rows_of(root: Path) -> dict[tuple[int, int], bytes]:
    """Every row that can be read, with its bytes."""
    cache = TeacherCache.open(str(root), "t")
    found = {}
    for key in cache:
        targets = cache[key]
        assert len(targets.detections) == key[0] % 3
        found[key] = b"".join(v.numpy().tobytes() for v in [*targets.features.values(), *targets.scales.values()])
    return found


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with compacted rows and with parts."""
    root = tmp_path_factory.mktemp("sound") / "cache"
    storage = LocalStorage(root)
    make.fill(storage, GROUP, make.images(7))
    compact(storage, GROUP)
    make.fill(storage, GROUP, make.images(IMAGES))
    assert list((root / GROUP.name / "manifest").iterdir())
    return root


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> LocalStorage:
    shutil.copytree(sound, tmp_path / "cache")
    return LocalStorage(tmp_path / "cache")


def test_a_sound_cache_has_no_damage(copy: LocalStorage) -> None:
    report = verify(copy, GROUP)
    assert report.damages == []
    assert report.uncommitted == []
    assert report.rows == 2 * IMAGES
    assert report.units == 5


def test_a_group_without_detections_is_as_sound_and_its_damage_is_found_and_mended(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info(detections=False)
    make.fill(storage, group, make.images(6), skip=[4])
    compact(storage, group)
    make.fill(storage, group, make.images(IMAGES))  # units with rows that are carried over
    folder = tmp_path / group.name
    assert not (folder / "detections").exists()
    assert verify(storage, group).damages == []
    cache = TeacherCache.open(str(tmp_path), "t")
    assert len(cache) == 2 * IMAGES
    assert all(cache[key].detections is None and cache[key].features for key in cache)
    with pytest.raises(
        StaleCacheError, match=r"holds no detections\. Set teachers\.t\.detections: true .*mtpd precompute"
    ):
        TeacherCache.open(str(tmp_path), "t", detections=True)
    shard = folder / "64x64" / "P4" / "c" / "1" / "0" / "0" / "0"
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    report = verify(storage, group)
    assert report.damaged_units == [("64x64", 1)]
    repair(storage, report)
    assert [entry.reason for entry in find_garbage(storage, group)] == ["not committed"]
    make.fill(storage, group, make.images(IMAGES))
    assert verify(storage, group).damages == []
    assert len(TeacherCache.open(str(tmp_path), "t")) == 2 * IMAGES


def flip(file: Path, rng: random.Random, _: list[Path]) -> list[Path]:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return [file]


def truncate(file: Path, rng: random.Random, _: list[Path]) -> list[Path]:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])
    return [file]


def grow(file: Path, rng: random.Random, _: list[Path]) -> list[Path]:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 50)))
    return [file]


def remove(file: Path, _: random.Random, __: list[Path]) -> list[Path]:
    file.unlink()
    return [file]


def swap(file: Path, rng: random.Random, files: list[Path]) -> list[Path]:
    other = rng.choice([f for f in files if f != file and f.read_bytes() != file.read_bytes()])
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)
    return [file, other]


def is_manifest_part(name: str) -> bool:
    return name.startswith("manifest/")


@settings(max_examples=90, deadline=None)
@given(st.sampled_from([flip, truncate, grow, remove, swap]), st.integers(0, 2**32))
def test_no_damage_is_missed_or_blamed_on_another_unit(
    sound: Path, damage: Callable[..., list[Path]], seed: int
) -> None:
    rng = random.Random(seed)
    root, folder = sound, sound / GROUP.name
    files = sorted(f for f in folder.rglob("*") if f.is_file() and not f.name.endswith((".json", ".lock")))
    before = {file: file.read_bytes() for file in files}
    touched = damage(rng.choice(files), rng, files)
    report = verify(LocalStorage(root), GROUP)
    lost = [f.relative_to(folder).as_posix() for f in touched if not f.exists()]
    for file in touched:
        file.write_bytes(before[file])
    expected = {f.relative_to(root).as_posix() for f in touched}
    if all(is_manifest_part(name) for name in lost) and lost:
        # what was committed by a part that is gone is not committed: its unit is named, and nothing is damaged
        assert report.damages == []
        assert report.uncommitted == [unit_of(GROUP, lost[0])]
    else:
        # where a unit's record is broken nothing says what else of it should be there: the unit is named all the same
        assert {d.name for d in report.damages} <= expected
        assert set(report.damaged_units) == {unit_of(GROUP, name) for name in expected} - {None}
        assert len(report.damages) == len(expected) or any(is_manifest_part(n.partition("/")[2]) for n in expected)


@pytest.mark.parametrize("document", ["zarr.json", "64x64/zarr.json", "64x64/P3/zarr.json", "64x64/P4_scale/zarr.json"])
def test_damaged_metadata_is_found_and_written_anew(copy: LocalStorage, document: str) -> None:
    file = copy.root / GROUP.name / document
    before = file.read_bytes()
    file.write_bytes(before.replace(b"3", b"4", 1))
    if document == "zarr.json":
        with pytest.raises(CorruptShardError, match="were changed"):
            find_group(copy, "t")
    report = verify(copy, GROUP)
    assert [d.name for d in report.damages] == [f"{GROUP.name}/{document}"]
    assert report.damaged_units == []
    repair(copy, report)
    assert file.read_bytes() == before
    assert verify(copy, GROUP).damages == []


def test_repair_drops_the_damaged_unit_and_a_fill_brings_exactly_that_back(copy: LocalStorage) -> None:
    before = rows_of(copy.root)
    file = sorted((copy.root / GROUP.name / "64x64" / "P3" / "c").rglob("0"))[-1]
    content = bytearray(file.read_bytes())
    content[3] ^= 255
    file.write_bytes(content)
    report = verify(copy, GROUP)
    ((bucket, unit),) = report.damaged_units
    repair(copy, report)
    assert verify(copy, GROUP).damages == []
    kept = rows_of(copy.root)
    assert kept.items() < before.items()
    plan = make.plan(copy, GROUP, make.images(IMAGES))
    assert [(u.bucket, u.index) for u in plan.units()] == [(bucket, unit)]
    make.fill(copy, GROUP, make.images(IMAGES))
    assert rows_of(copy.root) == before


def test_a_broken_manifest_costs_no_row(copy: LocalStorage) -> None:
    before = rows_of(copy.root)
    file = copy.root / GROUP.name / "manifest.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CorruptShardError, match=r"manifest\.parquet.*mtpd verify .* --repair"):
        TeacherCache.open(str(copy.root), "t")
    report = verify(copy, GROUP)
    assert report.rows == len(before)
    repair(copy, report)
    assert rows_of(copy.root) == before


def test_a_lost_manifest_is_no_empty_cache(copy: LocalStorage) -> None:
    before = rows_of(copy.root)
    (copy.root / GROUP.name / "manifest.parquet").unlink()
    for look in (
        lambda: TeacherCache.open(str(copy.root), "t"),
        lambda: list(find_garbage(copy, GROUP)),
        lambda: make.plan(copy, GROUP, make.images(IMAGES)),
    ):
        with pytest.raises(CorruptShardError, match=r"manifest\.parquet: is missing, .*mtpd verify .* --repair"):
            look()
    report = verify(copy, GROUP)
    assert [damage.problem for damage in report.damages] == ["is missing"]
    repair(copy, report)
    assert rows_of(copy.root) == before


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_repair_that_is_killed_while_it_restores_the_manifest_costs_no_row(
    copy: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows_of(copy.root)
    file = copy.root / GROUP.name / "manifest.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    report = verify(copy, GROUP)
    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            repair(copy, report)
    assert verify(copy, GROUP).rows == len(before)
    with pytest.raises(CorruptShardError):
        list(find_garbage(copy, GROUP))
    repair(copy, verify(copy, GROUP))
    assert rows_of(copy.root) == before


@pytest.mark.parametrize("content", [None, "{}"])
def test_the_document_of_the_whole_cache_is_looked_at(copy: LocalStorage, content: str | None) -> None:
    file = copy.root / "zarr.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    assert [damage.name for damage in verify(copy, GROUP).damages] == ["zarr.json"]


def test_a_group_that_cannot_be_read_hides_no_other(copy: LocalStorage) -> None:
    other = make.info("u")
    make.fill(copy, other, make.images(3))
    (copy.root / other.name / "zarr.json").write_text(
        (copy.root / other.name / "zarr.json").read_text().replace('"depth": 18', '"depth": 19')
    )
    assert rows_of(copy.root)
    with pytest.raises(CorruptShardError, match=other.name):
        TeacherCache.open(str(copy.root), "u")
    errors: list[Exception] = []
    assert list_groups(copy, unreadable=errors.append) == [GROUP]
    assert len(errors) == 1


def test_a_missing_row_says_how_to_get_it_and_a_damaged_one_how_to_repair_it(copy: LocalStorage) -> None:
    cache = TeacherCache.open(str(copy.root), "t")
    with pytest.raises(MissingRowsError, match="mtpd precompute RECIPE --teacher t"):
        cache[99, 0]
    for file in (copy.root / GROUP.name / "detections").iterdir():
        file.write_bytes(b"PAR1")
    with pytest.raises(CorruptShardError, match=r"unit 64x64-00000\d .*mtpd verify .* --repair"):
        assert cache[1, 0].detections
