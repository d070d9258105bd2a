import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import (
    GroupInfo,
    Images,
    Level,
    LocalStorage,
    RecipeError,
    SampledPolicy,
    StaleCacheError,
    ViewPolicy,
    make_plan,
)
from tests.cache import make

# none so narrow that a view of it has no pixels
sizes = st.lists(st.tuples(st.integers(7, 400), st.integers(7, 400)), min_size=1, max_size=40)


def as_images(pairs: list[tuple[int, int]]) -> Images:
    array = np.array(pairs, np.int64)
    return Images(np.arange(len(pairs)) * 7 + 3, array[:, 0], array[:, 1], [f"{i}.jpg" for i in range(len(pairs))])


@given(sizes, st.integers(1, 9))
def test_every_row_has_one_place_in_the_bucket_of_its_padded_size(pairs: list[tuple[int, int]], unit_rows: int) -> None:
    plan = make_plan(as_images(pairs), make.POLICY, make.info(), unit_rows=unit_rows)
    places, keys = set(), set()
    for unit in plan.units():
        assert len(unit.rows) <= unit_rows
        height, width = (int(v) for v in unit.bucket.split("x"))
        for row in unit.rows:
            assert unit.index == row.row // unit_rows
            assert 0 <= height - row.view_height < 32
            assert 0 <= width - row.view_width < 32
            places.add((unit.bucket, row.row))
            keys.add((row.image_id, row.view))
    assert len(places) == len(keys) == plan.total == 2 * len(pairs) == plan.todo


def test_both_flips_of_an_image_are_neighbours_so_that_it_is_decoded_once() -> None:
    plan = make_plan(make.images(9), make.POLICY, make.info(), unit_rows=4)
    for unit in plan.units():
        ids = [row.image_id for row in unit.rows]
        assert ids == sorted(ids)
        assert all(ids.count(i) == 2 for i in ids)


def test_an_interrupted_plan_goes_on_with_the_same_places(tmp_path) -> None:
    storage, group, wanted = LocalStorage(tmp_path), make.info(), make.images(20)
    whole = {(r.image_id, r.view): (u.bucket, r.row) for u in make.plan(storage, group, wanted).units() for r in u.rows}
    units = list(make.plan(storage, group, wanted).units())
    made = make.plan(storage, group, wanted)
    make.prepare(storage, made)
    for unit in units[1::2]:
        make.write_unit(storage, group, unit, make.targets(group, unit, skip={7}))
    rest = make.plan(storage, group, wanted)
    assert rest.todo < len(whole)
    assert {(r.image_id, r.view): (u.bucket, r.row) for u in rest.units() for r in u.rows}.items() <= whole.items()


def test_images_added_later_go_behind_and_committed_rows_stay(tmp_path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(10))
    before = {key: make.load_index(storage, group).find(*key) for key in [(1, 0), (10, 1), (5, 1)]}
    grown = make.plan(storage, group, make.images(16))
    assert grown.todo == 12
    make.fill(storage, group, make.images(16))
    index = make.load_index(storage, group)
    assert len(index) == 32
    assert {key: index.find(*key) for key in before} == before


def test_another_data_set_with_the_same_ids_is_refused(tmp_path) -> None:
    storage, group = LocalStorage(tmp_path), make.info()
    make.fill(storage, group, make.images(6))
    other = make.images(6)
    with pytest.raises(StaleCacheError, match=r"id 2 \(x\.jpg"):
        make.plan(
            storage, group, Images(other.ids, other.widths, other.heights, ["1.jpg", "x.jpg", *other.file_names[2:]])
        )


@pytest.mark.parametrize("precision", ["int8", "float16", "int4"])
def test_planned_bytes_are_the_bytes_on_disk(tmp_path, precision: str) -> None:
    storage, group = LocalStorage(tmp_path), make.info(precision=precision)
    plan = make.fill(storage, group, make.images(23))
    shards = (file for file in (tmp_path / group.name).rglob("*") if file.is_file() and "c" in file.parts)
    on_disk = sum(file.stat().st_size for file in shards)
    assert plan.stored_bytes == on_disk


def test_the_plan_of_the_shape_of_coco_takes_seconds() -> None:
    rng = np.random.default_rng(0)
    kinds = np.array([(640, 480), (640, 427), (480, 640), (427, 640), (500, 375), (640, 640)])
    pairs = kinds[rng.integers(0, len(kinds), 118_287)] - rng.integers(0, 3, (118_287, 2)) * (
        rng.random((118_287, 1)) < 0.1
    )
    images = Images(np.arange(118_287), pairs[:, 0], pairs[:, 1], [f"{i:012d}.jpg" for i in range(118_287)])
    group = GroupInfo("t", {}, tuple(Level(f"P{k}", 256, 2**k) for k in range(3, 8)), "int8", 32)
    plan = make_plan(images, ViewPolicy(((1333, 800),), "both"), group)
    assert plan.total == 236_574
    assert 1.0e12 < plan.stored_bytes < 1.4e12  # anchors: 1.1 TB fp16 a view, so int8 with two views
    assert sum(len(u.rows) for u in plan.units()) == plan.total


@given(sizes, st.integers(1, 9), st.randoms(use_true_random=False))
def test_rows_needed_first_are_there_early_whoever_takes_them_in_turn(
    pairs: list[tuple[int, int]], unit_rows: int, rng
) -> None:
    views = [image * 2 + rng.randrange(2) for image in range(len(pairs))]
    rng.shuffle(views)
    first = np.array(views[: len(views) - len(views) // 4])  # not every image is trained on
    images = as_images(pairs)
    plan = make_plan(images, make.POLICY, make.info(), unit_rows=unit_rows, first=first)
    committed, after = 0, {}
    for unit in plan.units():
        committed += len(unit.rows)
        after |= {(row.image_id, row.view): committed for row in unit.rows}
    assert len(after) == plan.total == 2 * len(pairs)
    for turn, member in enumerate(first.tolist()):
        # only what is needed before it, and a unit of each bucket, is computed before a row can be taken
        assert after[int(images.ids[member // 2]), member % 2] <= turn + 1 + len(plan.buckets) * unit_rows
    named = {plan.unit_of(int(images.ids[member // 2]), member % 2).name for member in range(2 * len(pairs))}
    assert named == {unit.name for unit in plan.units()}


def test_a_plan_for_who_waits_goes_on_with_the_same_places(tmp_path) -> None:
    storage, group, wanted = LocalStorage(tmp_path), make.info(), make.images(20)
    first = np.random.default_rng(0).permutation(20) * 2 + 1
    begin = lambda: make_plan(  # noqa: E731
        wanted, make.POLICY, group, committed=make.load_index(storage, group), unit_rows=4, first=first
    )
    made = begin()
    whole = {(r.image_id, r.view): (u.bucket, r.row) for u in made.units() for r in u.rows}
    make.prepare(storage, made)
    for unit in list(made.units())[1::2]:
        make.write_unit(storage, group, unit, make.targets(group, unit, skip={7}))
    rest = begin()
    left = {(r.image_id, r.view): (u.bucket, r.row) for u in rest.units() for r in u.rows}
    assert left.items() <= whole.items()
    assert rest.unit_of(7, 1) in list(rest.units())
    committed = next(iter(whole.keys() - left.keys()))
    assert rest.unit_of(*committed) is None
    assert rest.unit_of(21, 0) is None
    assert rest.unit_of(7, 2) is None


def test_an_image_without_pixels_in_a_view_and_too_many_views_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"image id 10 \(1\.jpg, 3000x1\) becomes 64x0 pixels in view 0"):
        make_plan(as_images([(64, 48), (3000, 1)]), make.POLICY, make.info())
    many = SampledPolicy(1025, (64, 64), {"seed": 0, "pipeline": []})
    with pytest.raises(RecipeError, match="views: 1025 of each image, 1024 at most"):
        make_plan(as_images([(64, 48)]), many, make.info())
