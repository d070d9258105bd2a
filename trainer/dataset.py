"""The training set as (image, view) pairs, and the order in which a student meets them."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from mmdet.registry import DATA_SAMPLERS, DATASETS
from mmengine.dataset import BaseDataset
from mmengine.dist import get_dist_info
from mmengine.logging import print_log
from torch.utils.data import Dataset, Sampler

from cache import CorruptShardError


@DATASETS.register_module()
class ViewedDataset(Dataset[dict[str, Any]]):
    """A COCO data set in which item ``i * views + v`` is view ``v`` of image ``i``.

    Args:
        dataset: config of the data set; its pipeline holds `ApplyView`.
        views: number of views.
        on_damage: ``skip`` takes the same view of the next image where a row of the cache is damaged, and counts that in the
            sample's ``damaged_rows``; ``error`` stops.
    """

    def __init__(self, dataset: dict[str, Any], views: int, on_damage: str = "error") -> None:
        self.dataset: BaseDataset = DATASETS.build(dataset)
        self.views, self.on_damage = views, on_damage

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
        damaged = 0
        for attempt in range(len(self.dataset)):
            # a pipeline may refuse an image, for having no box left: the same view of the next one takes its place
            info = self.get_data_info((index + attempt * self.views) % len(self))
            info["view"] = index % self.views
            try:
                sample = self.dataset.pipeline(info)
            except CorruptShardError as error:
                if self.on_damage != "skip":
                    raise
                print_log(f"image {info['img_id']} is skipped: {error}", "current", logging.WARNING)
                damaged += 1
                continue
            if sample is not None:
                sample["data_samples"].set_metainfo({"damaged_rows": damaged})
                return sample
        raise ValueError(
            "the training pipeline refuses every image of the data set, or every row of the cache is damaged"
        )


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
