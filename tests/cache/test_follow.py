"""An index that follows the manifest against one that is read anew, and a reader of units that are written anew."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import CorruptShardError, Index, LocalStorage, TeacherCache, compact, load_index, repair, verify, write_unit
from cache.follow import Follower
from tests.cache import make


def rows(keys: list[tuple[int, int, int]]) -> pa.Table:
    """Manifest rows of (image id, view, bucket's number); an image's source is its id."""
    return pa.table(
        {
            "image_id": pa.array([k[0] for k in keys], pa.int64()),
            "view": pa.array([k[1] for k in keys], pa.int32()),
            "bucket": pa.array([f"64x{32 * (k[2] + 1)}" for k in keys], pa.string()).dictionary_encode(),
            "row": pa.array([k[0] * 10 + k[1] for k in keys], pa.int64()),
            "unit_rows": pa.array([4] * len(keys), pa.int32()),
            "source": pa.array([k[0] for k in keys], pa.uint64()),
        }
    )


keys = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(0, 2)), max_size=30, unique_by=lambda k: k[:2]
)


@given(keys, keys)
def test_two_indices_joined_are_that_of_both(first: list, second: list) -> None:
    taken = {k[:2] for k in second}
    first = [k for k in first if k[:2] not in taken]  # a row has one place
    before = Index([rows(first)])
    index = before.joined(Index([rows(second)]))
    assert sorted(before.keys()) == sorted(k[:2] for k in first)
    whole = Index([rows(first + second)])
    assert len(index) == len(whole)
    assert index.keys() == whole.keys()
    assert all(index.find(*key) == whole.find(*key) for key in whole.keys())  # noqa: SIM118 - a method of its own
    assert all(index.source(image) == image for image, _ in whole.keys())  # noqa: SIM118
    found, expected = index.occupied(), whole.occupied()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("seed", range(8))
def test_a_follower_sees_what_a_fresh_reader_sees(tmp_path: Path, seed: int) -> None:
    storage, group, rng = LocalStorage(tmp_path), make.info(), random.Random(seed)
    plan = make.plan(storage, group, make.images(24))
    make.prepare(storage, plan)
    units = list(plan.units())
    rng.shuffle(units)
    follower = Follower(storage, group)
    for unit in units:
        write_unit(storage, group, unit, make.targets(group, unit, skip={rng.randrange(24)}))
        if rng.random() < 0.3:  # of what it has seen, or of what it has never seen
            compact(storage, group)
        if rng.random() < 0.5:
            follower.refresh()
            fresh = load_index(storage, group)
            assert follower.index.keys() == fresh.keys()
            assert all(follower.index.find(*key) == fresh.find(*key) for key in fresh.keys())  # noqa: SIM118


def test_a_reader_sees_rows_added_to_a_unit_that_it_has_mapped(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(12), skip={4})
    compact(storage, group)
    cache = TeacherCache.open(str(tmp_path), "t")
    cache.refresh()
    neighbours = [key for key in cache if key[0] in (1, 7, 10)]  # of image 4's bucket
    before = {key: cache[key].features["P3"].clone() for key in neighbours}
    assert all(len(cache[key].detections) == key[0] % 3 for key in neighbours)
    make.fill(storage, group, make.images(12))
    with pytest.raises(KeyError):
        cache[4, 0]
    cache.refresh()
    for view in (0, 1):
        assert cache[4, view].features["P3"].shape == (4, 8, 8)
        assert len(cache[4, view].detections) == 1
    assert all((cache[key].features["P3"] == value).all() for key, value in before.items())


def test_a_reader_lets_go_of_what_was_repaired(tmp_path: Path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(12))
    cache = TeacherCache.open(str(tmp_path), "t")
    cache.refresh()
    place = cache.index.find(4, 0)
    shard = tmp_path / group.name / place.bucket / "P3" / "c" / str(place.row // 4) / "0" / "0" / "0"
    shard.unlink()
    with pytest.raises(CorruptShardError):
        cache[4, 0]
    repair(storage, verify(storage, group))
    cache.refresh()
    assert (4, 0) not in cache
    make.fill(storage, group, make.images(12))
    cache.refresh()
    assert len(cache[4, 0].detections) == 1
