"""The training set as (image, view) pairs, and the order in which a student meets them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from mmdet.registry import DATA_SAMPLERS, DATASETS
from mmengine.dataset import BaseDataset
from mmengine.dist import get_dist_info
from torch.utils.data import Dataset, Sampler


@DATASETS.register_module()
class ViewedDataset(Dataset[dict[str, Any]]):
    """A COCO data set in which item ``i * views + v`` is view ``v`` of image ``i``.

    Args:
        dataset: config of the data set; its pipeline holds `ApplyView`.
        views: number of views.
    """

    def __init__(self, dataset: dict[str, Any], views: int) -> None:
        self.dataset: BaseDataset = DATASETS.build(dataset)
        self.views = views

    @property
    def metainfo(self) -> dict[str, Any]:
        """Classes and palette."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Read the annotations."""
        self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset) * self.views

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Annotations of the image behind an item; mmdet's batch samplers ask for its size."""
        return self.dataset.get_data_info(index // self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for attempt in range(len(self.dataset)):
            # a pipeline may refuse an image, for having no box left: the same view of the next one takes its place
            info = self.get_data_info((index + attempt * self.views) % len(self))
            info["view"] = index % self.views
            sample = self.dataset.pipeline(info)
            if sample is not None:
                return sample
        raise ValueError("the training pipeline refuses every image of the data set")


@DATA_SAMPLERS.register_module()
class ViewSampler(Sampler[int]):
    """Every image once an epoch, each in a random view: what a random flip does, as a pure function of (seed, epoch).

    Args:
        dataset: a `ViewedDataset`.
        seed: of the order and of the views.
    """

    def __init__(self, dataset: ViewedDataset, seed: int | None = None) -> None:
        self.dataset = dataset
        self.seed = seed or 0
        self.epoch = 0
        self._rank, self._world = get_dist_info()

    def set_epoch(self, epoch: int) -> None:
        """Called by mmengine before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-(len(self.dataset) // self.dataset.views) // self._world)

    def __iter__(self) -> Iterator[int]:
        items = epoch_order(len(self.dataset) // self.dataset.views, self.dataset.views, self.seed, self.epoch)
        # every rank takes the same number: the first items serve twice where they do not divide
        padded = np.resize(items, len(self) * self._world)
        return iter(padded[self._rank :: self._world].tolist())


def epoch_order(images: int, views: int, seed: int, epoch: int) -> np.ndarray:
    """Items of one epoch in the order of training: (images,) int64, ``image * views + view``."""
    rng = np.random.default_rng((seed, epoch))
    return rng.permutation(images) * views + rng.integers(views, size=images)
