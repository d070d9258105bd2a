"""Writer and reader together: what goes in comes out, for our reader and for anyone's."""

import gc
import multiprocessing
import pickle
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tensorstore
import torch
import zarr

from cache import (
    CorruptShardError,
    GroupInfo,
    Images,
    Index,
    LocalStorage,
    MissingRowsError,
    StaleCacheError,
    TeacherCache,
    decode,
    encode,
)
from cache import compact as compact_manifest
from tests.cache import make


@pytest.fixture(params=["int8", "float16", "int4"])
def group(request) -> GroupInfo:
    return make.info(precision=request.param)


def opened(storage: LocalStorage, group: GroupInfo) -> TeacherCache:
    return TeacherCache.open(str(storage.root), group.teacher, fingerprint=group.record)


def test_the_reader_gives_the_bytes_that_the_writer_got(tmp_path: Path, group: GroupInfo) -> None:
    storage = LocalStorage(tmp_path)
    plan = make.fill(storage, group, make.images(11))
    cache = opened(storage, group)
    assert len(cache) == 22
    assert cache.levels == {"P3": (4, 8), "P4": (3, 16)}
    for unit in plan.units():
        height, width = (int(v) for v in unit.bucket.split("x"))
        for row in unit.rows:
            read = cache[row.image_id, row.view]
            for level in group.levels:
                stored = encode(make.features(row.image_id, row.view, level, height, width), group.precision)
                assert torch.equal(read.features[level.name], stored.values[0])
                expected = decode(stored.values, stored.scales, level.stored_size(height, width))[0]
                assert torch.equal(read.dequantize()[level.name], expected)
            assert len(read.detections) == row.image_id % 3
            assert (read.detections.boxes == row.image_id).all()
            assert (read.detections.labels == row.view).all()


def test_plain_zarr_and_tensorstore_read_the_same_values(tmp_path: Path, group: GroupInfo) -> None:
    storage = LocalStorage(tmp_path)
    make.fill(storage, group, make.images(11))
    cache = opened(storage, group)
    root = zarr.open_group(tmp_path, mode="r")
    assert root[group.name].attrs["fingerprint"] == group.digest
    for image_id, view in cache.keys():  # noqa: SIM118 - a cache is no mapping of its values
        place = cache.index.find(image_id, view)
        assert place is not None
        for name, values in cache[image_id, view].features.items():
            assert np.array_equal(root[f"{group.name}/{place.bucket}/{name}"][place.row], values.numpy())
            spec = {"driver": "zarr3", "kvstore": f"file://{tmp_path}/{group.name}/{place.bucket}/{name}"}
            theirs = tensorstore.open(spec, read=True).result()[place.row].read().result()
            assert np.array_equal(theirs, values.numpy())
            if group.precision != "float16":
                scales = root[f"{group.name}/{place.bucket}/{name}_scale"][place.row]
                assert np.array_equal(scales, cache[image_id, view].scales[name].numpy())


def test_rows_that_failed_are_absent_not_zero_and_a_retry_fills_them(tmp_path: Path, group: GroupInfo) -> None:
    storage = LocalStorage(tmp_path)
    make.fill(storage, group, make.images(11), skip={4, 5})
    cache = opened(storage, group)
    assert len(cache) == 18
    assert (4, 0) not in cache
    with pytest.raises(KeyError, match="image 4, view 0"):
        cache[4, 0]
    before = {key: cache[key].dequantize()["P3"].clone() for key in cache}
    compact_manifest(storage, group)
    retried = make.fill(storage, group, make.images(11))
    assert sum(len(u.rows) for u in retried.units()) == 4
    cache = opened(storage, group)
    assert len(cache) == 22
    assert all(torch.equal(cache[key].dequantize()["P3"], value) for key, value in before.items())
    assert len(cache[4, 0].detections) == 1
    assert len(cache[1, 0].detections) == 1  # of a row carried over


def test_a_unit_without_its_part_does_not_exist(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(12))
    part = sorted((tmp_path / group.name / "manifest").iterdir())[0]
    lost = len(opened(storage, group))
    part.unlink()
    assert len(opened(storage, group)) == lost - 4


def test_compaction_keeps_every_row_and_drops_the_parts(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(12))
    keys = opened(storage, group).keys()
    assert compact_manifest(storage, group) == 6
    assert not list((tmp_path / group.name / "manifest").iterdir())
    assert opened(storage, group).keys() == keys
    # a compaction killed before it removed the parts leaves rows twice: they count once
    make.fill(storage, group, make.images(15))
    (tmp_path / "copy").mkdir()
    parts = {p.name: p.read_bytes() for p in (tmp_path / group.name / "manifest").iterdir()}
    compact_manifest(storage, group)
    for name, content in parts.items():
        (tmp_path / group.name / "manifest" / name).write_bytes(content)
    assert len(opened(storage, group)) == 30
    compact_manifest(storage, group)
    assert len(opened(storage, group)) == 30


def test_another_fingerprint_is_refused_with_the_fields_that_differ(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    make.fill(storage, make.info(), make.images(3))
    wanted = make.info(model={"depth": 50}).record
    with pytest.raises(StaleCacheError, match=r"model\.depth: was 18, asked for 50"):
        TeacherCache.open(str(tmp_path), "t", fingerprint=wanted)
    with pytest.raises(MissingRowsError, match="mtpd precompute RECIPE --teacher u"):
        TeacherCache.open(str(tmp_path), "u")


def test_an_edited_record_is_noticed(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(3))
    file = tmp_path / group.name / "zarr.json"
    file.write_text(file.read_text().replace('"depth": 18', '"depth": 50'))
    with pytest.raises(CorruptShardError, match="were changed"):
        TeacherCache.open(str(tmp_path), "t")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_with_its_unit(tmp_path: Path, damage: str) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(12))
    place = opened(storage, group).index.find(4, 0)
    assert place is not None
    file = tmp_path / group.name / place.bucket / "P3" / "c" / str(place.row // 4) / "0" / "0" / "0"
    content = bytearray(file.read_bytes())
    if damage == "flip":
        # a byte of this very row: the rows of the same shard before it stay readable
        content[(place.row % 4) * (len(content) // 4) + 9] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-5])
    else:
        file.unlink()
    with pytest.raises(CorruptShardError, match=f"unit {place.bucket}-{place.row // 4:06d}"):
        opened(storage, group)[4, 0]


def test_a_reader_survives_pickling_and_fork_in_use(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(12))
    cache = opened(storage, group)
    expected = {key: cache[key].dequantize()["P3"].sum().item() for key in cache}  # maps are open now
    copy = pickle.loads(pickle.dumps(cache))
    assert {key: copy[key].dequantize()["P3"].sum().item() for key in copy} == expected
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        sums = pool.map_async(_sum, [(cache, key) for key in expected]).get(timeout=60)
    assert sums == list(expected.values())


def _sum(argument: tuple[TeacherCache, tuple[int, int]]) -> float:
    cache, key = argument
    return cache[key].dequantize()["P3"].sum().item()


def test_a_look_up_finds_exactly_what_was_committed(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(9, first_id=2**40))
    index = make.load_index(storage, group)
    wanted = np.arange(2**40 - 3, 2**40 + 12)
    found = index.committed(wanted, 3)
    assert found[:, :2].sum() == 18
    assert not found[:, 2].any()
    assert all(((int(i), v) in index) == found[n, v] for n, i in enumerate(wanted) for v in range(3))


@pytest.mark.parametrize("lost", ["shard", "detections"])
def test_a_unit_whose_committed_rows_are_damaged_is_not_written_over(tmp_path: Path, lost: str) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(11), skip={4})
    compact_manifest(storage, group)
    (unit,) = make.plan(storage, group, make.images(11)).units()
    assert unit.kept
    folder = tmp_path / group.name
    shard = folder / unit.bucket / "P4" / "c" / str(unit.index) / "0" / "0" / "0"
    (shard if lost == "shard" else folder / "detections" / f"part-{unit.name}.parquet").unlink()
    with pytest.raises(CorruptShardError, match="cannot be carried over"):
        make.fill(storage, group, make.images(11))
    assert len(opened(storage, group)) == 20


def test_a_look_up_among_many_images_is_that_of_a_dict() -> None:
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(20_000, 3_000, replace=False))
    rows = rng.permutation(ids.size)
    table = pa.table(
        {
            "image_id": ids,
            "view": pa.array(rng.integers(0, 3, ids.size), pa.int32()),
            "bucket": pa.array(["64x64", "32x96"]).dictionary_encode().take(pa.array(ids % 2)),
            "row": rows,
            "unit_rows": pa.array(np.where(ids % 2, 5, 7), pa.int32()),
            "source": ids.astype(np.uint64),
        }
    )
    views = table["view"].to_pylist()
    expected = {(int(i), v): int(r) for i, v, r in zip(ids, views, rows, strict=True)}
    # in any order, and in pieces
    for index in (
        Index([table]),
        Index([table.slice(0, 1_700), table.slice(1_700)]),
        Index([table.take(rng.permutation(3_000))]),
    ):
        assert len(index) == 3_000
        for image_id in range(-2, 20_002):
            for view in range(-1, 4):
                place = index.find(image_id, view)
                assert (None if place is None else place.row) == expected.get((image_id, view))
        assert index.unit_rows == {"64x64": 7, "32x96": 5}
        assert all(index.source(int(i)) == int(i) for i in ids[::97])


def test_detections_of_a_unit_that_was_written_anew_are_not_given_for_another_image(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(6))
    old = TeacherCache.open(str(tmp_path), "t", levels=[], dense=False)
    keys = list(old)
    # all of it is computed again, in another order
    folder = tmp_path / group.name / "manifest"
    for file in folder.iterdir():
        file.unlink()
    images = make.images(6)
    turned = Images(images.ids[::-1], images.widths[::-1], images.heights[::-1], images.file_names[::-1])
    make.fill(storage, group, turned)
    refused = 0
    for key in keys:
        with suppress(CorruptShardError):
            assert (old[key].detections.boxes == key[0]).all()
            continue
        refused += 1
    assert refused
    new = TeacherCache.open(str(tmp_path), "t", levels=[], dense=False)
    assert all((new[key].detections.boxes == key[0]).all() for key in keys)


def test_readers_of_one_process_share_its_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.mapped._ALL_MAPS", 4 * 4 * 3)  # three units of four arrays for each of four readers
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(24))
    gc.collect()
    readers = [TeacherCache.open(str(tmp_path), "t") for _ in range(4)]
    for key in readers[0]:
        for reader in readers:
            assert reader[key].features
    maps = Path("/proc/self/maps").read_text()
    assert maps.count(f"{tmp_path}/") <= 4 * 4 * 3


def test_rows_of_small_units_do_not_fill_the_memory_with_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache.mapped._MAX_VIEWS", 2 * 4 * 4)  # of two units: four rows in four arrays
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(24))
    cache = TeacherCache.open(str(tmp_path), "t")
    for key in cache:
        assert cache[key].features
    assert Path("/proc/self/maps").read_text().count(f"{tmp_path}/") <= 2 * 4
