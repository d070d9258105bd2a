import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer import ApplyView, ViewSampler, epoch_order


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


@given(st.integers(1, 60), st.integers(1, 5))
def test_ranks_share_an_epoch_without_losing_an_image(images: int, world: int) -> None:
    class Data:
        views = 2

        def __len__(self) -> int:
            return images * 2

    samplers = [ViewSampler(Data(), seed=3) for _ in range(world)]  # type: ignore[arg-type]
    parts = []
    for rank, sampler in enumerate(samplers):
        sampler._rank, sampler._world = rank, world
        sampler.set_epoch(4)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler)
    # interleaved again, the parts are the order of one rank
    whole = [item for step in zip(*parts, strict=True) for item in step]
    assert whole[:images] == epoch_order(images, 2, 3, 4).tolist()


def test_a_view_moves_pixels_and_boxes_together() -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[20:40, 10:30] = 255
    results = {"img": image, "img_shape": (60, 80), "ori_shape": (60, 80), "gt_bboxes": np.array([[10.0, 20, 30, 40]])}
    for view, x in ((0, 20), (1, 100)):
        made = ApplyView([160, 120])(
            {**results, "img": image.copy(), "gt_bboxes": _boxes(results["gt_bboxes"]), "view": view}
        )
        ys, xs = np.nonzero(made["img"][..., 0] > 127)
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x, 40, x + 40, 80)
        assert made["gt_bboxes"].tensor.tolist() == [[x, 40, x + 40, 80]]
        assert made["flip"] is (view == 1)


def _boxes(array: np.ndarray):
    from mmdet.structures.bbox import HorizontalBoxes

    return HorizontalBoxes(array.astype(np.float32).copy())
