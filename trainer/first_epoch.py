"""What the first epoch of a stage reads, in which order: what a precompute commits first while students wait."""

import io
from contextlib import redirect_stdout

import numpy as np
import numpy.typing as npt
from mmdet.registry import DATASETS

from trainer.annotations import read_annotations
from trainer.batches import epoch_order
from trainer.config import load_config
from trainer.recipe import Recipe
from trainer.stage_config import training_images


def first_epoch(recipe: Recipe) -> npt.NDArray[np.int64]:
    """The rows that the first epoch of every stage reads, in the order of training.

    One row of each image that the student's config lets through. All stages draw from one seed, so that they agree.

    Returns:
        (k,) int64, ``image * views + view`` with the image by its position in the annotation file.

    Raises:
        RecipeError: the student's config has no data set.
    """
    train = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file")
    cfg = load_config(recipe.student.config, recipe.student.cfg_options, "student.config")
    with redirect_stdout(io.StringIO()):  # pycocotools tells that it reads the file
        dataset = DATASETS.build(training_images(cfg, recipe, train) | dict(pipeline=[]))
    views, ids = len(recipe.policy), train.images.ids
    images, view = np.divmod(epoch_order(len(dataset), views, recipe.training.seed, 0), views)
    kept = np.array([dataset.get_data_info(i)["img_id"] for i in range(len(dataset))], np.int64)
    by_id = np.argsort(ids)
    return by_id[np.searchsorted(ids, kept[images], sorter=by_id)] * views + view
