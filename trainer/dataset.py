"""The training set as (image, view) pairs."""

import logging
from typing import Any

from mmdet.registry import DATASETS
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from torch.utils.data import Dataset

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
