import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmcv.image import rescale_size

from cache import SampledPolicy, ViewPolicy, make_plan, padded, resized
from tests.cache import make

sides = st.integers(1, 5000)


@given(sides, sides, st.tuples(st.integers(32, 2000), st.integers(32, 2000)))
def test_sizes_are_those_that_mmcv_computes(width: int, height: int, scale: tuple[int, int]) -> None:
    # one pixel of difference and the plan's buckets are not those of the pixels that the teacher sees
    ours = resized(np.array([width]), np.array([height]), scale)
    assert (int(ours[0][0]), int(ours[1][0])) == rescale_size((width, height), scale)


@given(st.integers(1, 10**6), st.integers(1, 256))
def test_padding_is_the_smallest_multiple(size: int, divisor: int) -> None:
    result = int(padded(np.array([size]), divisor)[0])
    assert result % divisor == 0
    assert 0 <= result - size < divisor


def test_views_are_scales_times_flips() -> None:
    policy = ViewPolicy(((1333, 800), (1333, 640)), "both")
    assert [(v.index, v.scale[1], v.flip) for v in policy] == [
        (0, 800, False),
        (1, 800, True),
        (2, 640, False),
        (3, 640, True),
    ]
    assert [v.flip for v in ViewPolicy(((1333, 800), (1333, 640)), "none")] == [False, False]
    assert ViewPolicy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("index", [-1, 2])
def test_a_view_that_does_not_exist_is_an_error(index: int) -> None:
    with pytest.raises(IndexError, match="views 0 to 1"):
        ViewPolicy(((1333, 800),), "both")[index]


def test_sampled_views_have_one_size_which_the_plan_knows() -> None:
    policy = SampledPolicy(3, (40, 64), {"seed": 1, "pipeline": [{"type": "RandomCrop"}]})
    assert SampledPolicy.from_json(policy.to_json()) == policy
    plan = make_plan(make.images(5), policy, make.info())
    assert [(bucket.name, bucket.rows) for bucket in plan.buckets] == [("64x64", 15)]
    rows = [row for unit in plan.units() for row in unit.rows]
    assert {(row.view_width, row.view_height) for row in rows} == {(64, 40)}
    assert len({(row.image_id, row.view) for row in rows}) == 15
