import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import RecipeError
from trainer import TotalBatchSampler, ViewSampler, epoch_batches, epoch_order


@given(st.integers(1, 200), st.integers(1, 6), st.integers(0, 5), st.integers(0, 50))
def test_an_epoch_meets_every_image_once_in_one_view(images: int, views: int, seed: int, epoch: int) -> None:
    order = epoch_order(images, views, seed, epoch)
    assert sorted(order // views) == list(range(images))
    assert np.array_equal(order, epoch_order(images, views, seed, epoch))


def test_order_and_views_differ_between_epochs_and_seeds_and_views_are_even() -> None:
    orders = [epoch_order(1000, 2, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert 400 < (orders[0] % 2).sum() < 600


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 9))
def test_batches_are_full_keep_groups_apart_and_leave_nothing_out(groups: list[bool], size: int) -> None:
    items = np.random.default_rng(len(groups)).permutation(len(groups)) + 100
    batches = epoch_batches(items, np.array(groups), size)
    assert batches.shape == (-(-len(groups) // size), size)
    flat = batches.flatten()
    assert sorted(flat[: len(groups)]) == sorted(items)
    # what fills the last step are the first of the epoch, in their order
    assert flat[len(groups) :].tolist() == np.resize(items, flat.size - len(groups)).tolist()
    of = dict(zip(items.tolist(), groups, strict=True))
    whole = sum(groups.count(kind) // size for kind in (False, True))
    assert all(len({of[item] for item in batch}) == 1 for batch in batches[:whole].tolist())


def test_without_groups_batches_are_the_order() -> None:
    items = epoch_order(12, 2, 0, 0)
    assert epoch_batches(items, np.zeros(12), 4).flatten().tolist() == items.tolist()


class Data:
    """As much of a `ViewedDataset` as samplers ask for: every third image is upright."""

    views = 2

    def __init__(self, images: int) -> None:
        self.images = images

    def __len__(self) -> int:
        return self.images * 2

    def get_data_info(self, index: int) -> dict[str, int]:
        return {"width": 10, "height": 20 if index // 2 % 3 == 0 else 5}


def sampler(images: int, size: int, rank: int = 0, world: int = 1, epoch: int = 0) -> TotalBatchSampler:
    views = ViewSampler(Data(images), seed=3)  # type: ignore[arg-type]
    views.set_epoch(epoch)
    batches = TotalBatchSampler(views, size, by_shape=True)
    batches._rank, batches._world = rank, world
    return batches


@given(st.integers(1, 40), st.integers(1, 8), st.data())
def test_the_samples_of_a_step_do_not_depend_on_the_number_of_workers(images: int, size: int, data) -> None:
    world = data.draw(st.integers(1, size))
    whole = list(sampler(images, size))
    parts = [list(sampler(images, size, rank, world)) for rank in range(world)]
    joined = [[item for part in step for item in part] for step in zip(*parts, strict=True)]
    assert joined == whole
    assert {len(step) for step in whole} == {size}
    shares = {len(share) for part in parts for share in part}
    assert max(shares) - min(shares) <= 1


@given(st.integers(1, 40), st.integers(1, 8), st.data())
def test_an_epoch_goes_on_behind_the_steps_that_are_done(images: int, size: int, data) -> None:
    whole = list(sampler(images, size, epoch=5))
    done = data.draw(st.integers(0, len(whole)))
    again = sampler(images, size, epoch=5)
    again.skip = done
    assert list(again) == whole[done:]
    assert list(again) == whole, "only the epoch that was resumed"
    assert len(again) == len(whole)


def test_more_workers_than_samples_in_a_step_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.batches.get_dist_info", lambda: (0, 3))
    with pytest.raises(RecipeError, match=r"training\.workers: 3 workers cannot share a total batch of 2"):
        sampler(4, 2)
