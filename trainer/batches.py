"""Which samples a training step takes: a pure function of (seed, epoch, step), whatever the number of workers.

Three pieces that know nothing of each other: `ViewSampler` gives an epoch's items in order, `epoch_batches` cuts them into the
total batches of its steps, and `share` gives each worker its part of a total batch. A sampler of another order is registered
with mmdet's ``DATA_SAMPLERS`` and named in the config's ``train_dataloader.sampler``; it only overrides `ViewSampler.order`.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from mmdet.registry import DATA_SAMPLERS
from mmengine.dist import get_dist_info
from torch.utils.data import Sampler

from cache import RecipeError
from trainer.dataset import ViewedDataset

Share = TypeVar("Share", np.ndarray, range)


def epoch_order(images: int, views: int, seed: int, epoch: int) -> np.ndarray:
    """Items of one epoch in the order of training: (images,) int64, ``image * views + view``."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(images) * views + rng.integers(views, size=images)


def epoch_batches(items: np.ndarray, groups: np.ndarray, size: int) -> np.ndarray:
    """The total batches of an epoch, in the order in which their last items come.

    A batch is of one group as long as the group lasts; what is left over of the groups makes the last batches. The very last one
    is filled up with the epoch's first items, so that every step has the same number of samples and none is left out.

    Args:
        items: (n,) int64, an epoch's items in order.
        groups: (n,) of which group each item is: what should be padded together.
        size: samples of a step.

    Returns:
        (ceil(n / size), size) int64.
    """
    whole, ends, left = [], [], []
    for group in np.unique(groups):
        places = np.flatnonzero(groups == group)
        full = places.size // size * size
        whole.append(places[:full].reshape(-1, size))
        left.append(places[full:])
        ends.append(whole[-1][:, -1])
    in_turn = np.concatenate(whole)[np.argsort(np.concatenate(ends), kind="stable")]
    rest = np.concatenate(left)
    short = -rest.size % size
    # resize repeats an epoch that is shorter than what is missing
    filled = np.concatenate([rest, np.resize(np.arange(items.size), short)])
    return items[np.concatenate([in_turn, filled.reshape(-1, size)])]


def share(batch: Share, rank: int, world: int) -> Share:
    """A worker's part of a total batch: the ``rank``-th of ``world`` runs whose sizes differ by one at most."""
    return batch[rank * len(batch) // world : (rank + 1) * len(batch) // world]


@DATA_SAMPLERS.register_module()
class ViewSampler(Sampler[int]):
    """Every image once an epoch, each in a random view: what a random flip does, as a pure function of (seed, epoch).

    The whole epoch on every worker: `TotalBatchSampler` shares it out.

    Args:
        dataset: a `ViewedDataset`.
        seed: of the order and of the views.
    """

    def __init__(self, dataset: ViewedDataset, seed: int | None = None) -> None:
        self.dataset = dataset
        self.seed = seed or 0
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by mmengine before each epoch."""
        self.epoch = epoch

    def order(self) -> np.ndarray:
        """Items of the epoch that is set, in order: (images,) int64. A pure function of the seed and the epoch."""
        return epoch_order(len(self), self.dataset.views, self.seed, self.epoch)

    def __len__(self) -> int:
        return len(self.dataset) // self.dataset.views

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())


@DATA_SAMPLERS.register_module()
class TotalBatchSampler(Sampler[list[int]]):
    """Each step's total batch, of which this worker takes its share.

    Args:
        sampler: gives an epoch's items.
        batch_size: samples of a step, of all workers together.
        by_shape: keep upright and lying images apart as far as it goes, as mmdet's ``AspectRatioBatchSampler``: less padding.

    Attributes:
        skip: steps of the next epoch that are done already; it begins behind them. Set back by it.

    Raises:
        RecipeError: more workers than samples in a step.
    """

    def __init__(self, sampler: ViewSampler, batch_size: int, by_shape: bool = False) -> None:
        self.sampler, self.batch_size, self.skip = sampler, batch_size, 0
        self._rank, self._world = get_dist_info()
        self._by_shape = by_shape
        self._upright: np.ndarray | None = None
        if self._world > batch_size:
            raise RecipeError(
                f"training.workers: {self._world} workers cannot share a total batch of {batch_size}. Take fewer workers, or a "
                "larger training.batch_size."
            )

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        items = np.fromiter(self.sampler, dtype=np.int64, count=len(self.sampler))
        groups = (
            self._is_upright()[items // self.sampler.dataset.views] if self._by_shape else np.zeros(items.size, bool)
        )
        batches, self.skip = epoch_batches(items, groups, self.batch_size)[self.skip :], 0
        for batch in batches:
            yield share(batch, self._rank, self._world).tolist()

    def _is_upright(self) -> np.ndarray:
        """(images,) bool: higher than wide. Asked for once: each answer unpacks an image's annotations."""
        if self._upright is None:
            data = self.sampler.dataset
            infos = (data.get_data_info(index * data.views) for index in range(len(self.sampler)))
            self._upright = np.array([info["width"] < info["height"] for info in infos], dtype=bool)
        return self._upright
