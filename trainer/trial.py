"""A recipe on a small part of its data, with everything that it writes in one folder: what is timed before a job begins."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from trainer.annotations import read_annotations
from trainer.config import load_config
from trainer.recipe import Recipe
from trainer.specs import CacheSpec, SplitSpec, StageSpec

# images of the part: enough to fill batches of every common shape, few enough to be read at once
_PART = 256
# of the val set, where one evaluation is timed as a whole
_EVALUATED = 8
Content = dict[str, Any]


def draw_trial(recipe: Recipe, folder: Path) -> tuple[Recipe, int]:
    """The recipe on images that are drawn at random.

    Returns:
        It, and the number of its training images.
    """

    def draw(content: Content) -> list[Content]:
        images = content["images"]
        chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:_PART])
        return [images[number] for number in chosen]

    small, images = _part(recipe, folder, {"train": draw, "val": draw})
    return small, images["train"]


def shortest_trial(recipe: Recipe, folder: Path) -> tuple[Recipe, int]:
    """The recipe's student without a teacher, from random weights, for one step and one evaluation.

    Returns:
        It, and the number of its val images.
    """
    config = load_config(recipe.student.config, recipe.student.cfg_options, "student.config")
    batch = recipe.training.batch_size or config.train_dataloader.batch_size

    def seen(content: Content) -> list[Content]:
        """A batch of images with objects: others the student may leave out."""
        with_objects = {entry["image_id"] for entry in content["annotations"] if not entry.get("iscrowd")}
        return [image for image in content["images"] if image["id"] in with_objects][:batch]

    small, images = _part(recipe, folder, {"train": seen, "val": lambda content: content["images"][:_EVALUATED]})
    options = {**recipe.student.cfg_options, **dict.fromkeys(_downloads(config.model), None)}
    changed = {
        "stages": (StageSpec(epochs=1),),
        "student": small.student.model_copy(update={"cfg_options": options}),
        "training": recipe.training.model_copy(update={"max_failures": 0}),
    }
    return small.model_copy(update=changed), images["val"]


def _part(
    recipe: Recipe, folder: Path, choose: dict[str, Callable[[Content], list[Content]]]
) -> tuple[Recipe, dict[str, int]]:
    """The recipe on some images of each split, and how many they are."""
    dataset, chosen = {}, {}
    for name, of in choose.items():
        split: SplitSpec = getattr(recipe.dataset, name)
        read_annotations(split.ann_file, f"dataset.{name}.ann_file")  # a file that is none is refused there
        content = json.loads(Path(split.ann_file).read_bytes())
        content["images"] = of(content)
        ids = {image["id"] for image in content["images"]}
        content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
        file = folder / f"{name}.json"
        file.write_text(json.dumps(content))
        dataset[name] = split.model_copy(update={"ann_file": str(file)})
        chosen[name] = len(ids)
    # all that decides what a row is, and where a service listens; a local folder, and what is done about damage, is left out
    given = recipe.cache
    cache = CacheSpec(
        uri=str(folder / "cache"),
        precision=given.precision,
        compression=given.compression,
        unit_rows=given.unit_rows,
        service=given.service,
    )
    changed = {
        "dataset": recipe.dataset.model_copy(update=dataset),
        "cache": cache,
        "student": recipe.student.model_copy(update={"checkpoint": None, "inherit": False}),
        "work_dir": str(folder / "work"),
    }
    return recipe.model_copy(update=changed), chosen


def _downloads(model: Any, key: str = "model") -> list[str]:
    """Dotted keys of weights that a detector's parts begin with, and that would be downloaded."""
    found = []
    for name, part in model.items() if isinstance(model, dict) else enumerate(model):
        if isinstance(part, dict) and part.get("type") == "Pretrained":
            found.append(f"{key}.{name}")
        elif isinstance(part, dict | list):
            found += _downloads(part, f"{key}.{name}")
    return found
