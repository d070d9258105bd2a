"""Which group of the cache holds a teacher's targets for a recipe."""

import logging
from operator import itemgetter
from typing import Any

from mmengine.logging import print_log

from cache import (
    CorruptShardError,
    GroupInfo,
    RecipeError,
    Storage,
    fingerprint,
    group_name,
    load_index,
    open_storage,
    read_group,
    serves,
)
from trainer.annotations import read_annotations
from trainer.classes import refuse_other_order
from trainer.needs import needs_of, on_heads, refuse_unfit
from trainer.recipe import Recipe
from trainer.teacher import class_counts, describe, fingerprint_record

# of its rows, of a group with detections that nothing wants: a whole forward takes about twice as long as backbone and neck
_FILLED_FURTHER = 0.5


def wanted_record(recipe: Recipe, name: str) -> dict[str, Any]:
    """The fingerprint record of a teacher's targets, and of what the recipe's mechanisms store of them.

    Raises:
        RecipeError: a mechanism matches no level of both detectors, compares classes that differ, or cannot bring their heads
            together.
    """
    needs = needs_of(recipe, name)
    _refuse_other_classes(recipe, name)
    refuse_unfit(recipe, name)
    return fingerprint_record(
        recipe.teachers[name],
        name,
        recipe.policy,
        recipe.cache.precision,
        levels=needs.levels,
        top_k=needs.top_k,
        head=needs.head,
        detections=needs.detections,
    )


def teacher_info(recipe: Recipe, name: str) -> GroupInfo:
    """Attributes of the group that holds, or will hold, a teacher's targets for this recipe.

    What is stored follows from the recipe's mechanisms. Where there is no such group yet, one that holds more of the same
    targets serves as well, if it holds every row. One that holds detections besides and nothing else is filled further if it
    holds more than half of the rows: the heads take less time on the rest than backbone and neck on all of them.
    """
    record, storage = wanted_record(recipe, name), open_storage(recipe.cache.uri)
    own = group_name(name, fingerprint(record))
    try:
        info = read_group(storage, own)
    except CorruptShardError:
        info = None  # the precompute writes its attributes anew
    else:
        info = info or _serving(recipe, storage, name, record)
    return info or describe(recipe.teachers[name], name, record, recipe.cache.compression)


def _serving(recipe: Recipe, storage: Storage, name: str, record: dict[str, Any]) -> GroupInfo | None:
    found = []
    with_detections = {key: value for key, value in record.items() if key != "detections"}
    for folder in storage.folders():
        if not folder.startswith(f"{name}-"):
            continue
        try:
            info = read_group(storage, folder)
            if info is None or info.teacher != name or not serves(info, record):
                continue
            ids = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images.ids
            share = float(load_index(storage, info).committed(ids, len(recipe.policy)).mean())
            if share == 1 or (share > _FILLED_FURTHER and info.record == with_detections):
                more = len(info.levels) + 3 * len(info.dense)
                found.append(((share < 1, more, info.detections, info.name), info))
        except CorruptShardError as error:
            print_log(f"a group that might have served is damaged: {error}", "current", logging.WARNING)
    return min(found, key=itemgetter(0), default=(None, None))[1]


def _refuse_other_classes(recipe: Recipe, name: str) -> None:
    """A mechanism on detections or heads compares classes by their numbers; features have none."""
    if not on_heads(recipe, name):
        return
    counts = class_counts(recipe.teachers[name], name)
    classes = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").classes
    if counts and len(classes) not in counts:
        raise RecipeError(
            f"teachers.{name}: its heads have {', '.join(map(str, sorted(counts)))} classes, dataset.train has {len(classes)}, "
            "and a mechanism of its stages compares classes. If it was trained for these, give it the config that it was trained "
            "with: a stage's student.py, or cfg_options for its heads' num_classes. Else take mechanisms on features."
        )
    refuse_other_order(recipe.teachers[name].checkpoint, classes, f"teachers.{name}.checkpoint")
