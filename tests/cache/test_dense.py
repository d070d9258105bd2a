"""Dense outputs and heads beside the maps: stored, read, checked, and who is served by whom."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

from cache import (
    CorruptShardError,
    DenseSpec,
    GroupInfo,
    LocalStorage,
    MissingRowsError,
    TeacherCache,
    head_digest,
    pack_head,
    read_head,
    serves,
    verify,
    write_head,
)
from tests.cache import make

DENSE = (DenseSpec("P3", 8, 2, 5, 4, 20), DenseSpec("P5", 32, 2, 5, 4, 20))
HEAD = {"cls.weight": torch.arange(6.0).reshape(2, 3), "reg.bias": torch.ones(4)}


def group(precision: str = "int8", **record: object) -> GroupInfo:
    info = make.info("t", precision, levels=["P3", "P4"], pool={}, dense=20, head=True, **record)
    return replace(info, dense=DENSE, head=head_digest(pack_head(HEAD)))


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path)
    make.fill(storage, group(), make.images(6))
    write_head(storage, group(), pack_head(HEAD))
    return storage


def test_dense_outputs_come_back_as_they_were_given(storage: LocalStorage) -> None:
    cache = TeacherCache.open(str(storage.root), "t")
    assert len(cache) == 12
    for image_id, view in cache:
        place = cache.index.find(image_id, view)
        height, width = map(int, place.bucket.split("x"))
        given = make.dense(group(), image_id, view, height, width)
        targets = cache[image_id, view]
        for found in (targets.dense, targets.layout.dense(targets.copy().buffer)):
            assert list(found) == ["P3", "P5"]
            for level, of in found.items():
                assert of.indices.dtype == torch.int64
                assert np.array_equal(of.indices, given[level]["index"])
                assert np.array_equal(of.logits, given[level]["logits"].astype(np.float32))
                assert np.array_equal(of.terms, given[level]["terms"].astype(np.float32))
        # where a view has fewer positions than top_k, all of them are stored
        assert len(targets.dense["P5"].indices) == min(20, -(-height // 32) * -(-width // 32) * 2)
        array = zarr.open_group(str(storage.root))[f"{group().name}/{place.bucket}/P3_logits"]
        assert np.array_equal(array[place.row], given["P3"]["logits"])


def test_a_reader_that_wants_maps_only_reads_no_dense_outputs(storage: LocalStorage) -> None:
    for file in storage.root.glob("t-*/*/P3_logits/c/0/0/0"):
        file.unlink()
    alone = TeacherCache.open(str(storage.root), "t", dense=False)
    assert set(alone[1, 0].features) == {"P3", "P4"}
    assert alone[1, 0].dense == {}
    with pytest.raises(CorruptShardError, match=r"unit 64x64-000000 .*is damaged"):
        TeacherCache.open(str(storage.root), "t")[1, 0]


def test_a_flipped_byte_of_logits_or_head_is_found_and_named(storage: LocalStorage) -> None:
    assert verify(storage, group()).damages == []
    shard = next(storage.root.glob("t-*/*/P3_logits/c/0/0/0"))
    head = storage.root / group().name / "head.safetensors"
    for file in (shard, head):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 4
        file.write_bytes(data)
    named = {damage.name for damage in verify(storage, group()).damages}
    assert named == {str(file.relative_to(storage.root)) for file in (shard, head)}
    with pytest.raises(CorruptShardError, match=r"head\.safetensors: does not match its checksum.*mtpd precompute"):
        read_head(storage, group())
    write_head(storage, group(), pack_head(HEAD))
    assert torch.equal(read_head(storage, group())["cls.weight"], HEAD["cls.weight"])
    head.unlink()
    with pytest.raises(MissingRowsError, match="the teacher's head is not stored"):
        read_head(storage, group())
    with pytest.raises(ValueError, match="not the weights"):
        write_head(storage, group(), pack_head({"cls.weight": torch.zeros(1)}))


def test_who_wants_less_of_the_same_targets_is_served() -> None:
    have = group().record

    def wanted(**changes: object) -> dict:
        record = {**have, **changes}
        return {key: value for key, value in record.items() if value is not None}

    for less in (wanted(), wanted(levels=["P4"]), wanted(dense=None, head=None), wanted(dense=7), wanted(levels=[])):
        assert serves(group(), less)
    for other in (
        wanted(levels=["P3", "P5"]),
        wanted(dense=21),
        wanted(pool={"P3": 2}),
        wanted(model={"depth": 50}),
        wanted(levels=None),
    ):
        assert not serves(group(), other)
    without = replace(group(), record=wanted(detections=False))
    assert serves(group(), without.record), "a record without the key is of a group that holds detections"
    assert serves(without, without.record)
    assert not serves(without, have)


def test_a_cache_of_detections_alone_holds_no_maps(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    info = replace(make.info("t", levels=[]), levels=())
    made = make.fill(storage, info, make.images(6))
    assert made.stored_bytes == 0
    cache = TeacherCache.open(str(tmp_path), "t")
    assert len(cache) == 12
    assert len(cache[2, 1].detections) == 2
    assert cache[2, 1].features == {}
    assert verify(storage, info).damages == []
