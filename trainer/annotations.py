"""The parts of a COCO annotation file that the plan needs."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cache import Images, RecipeError


@dataclass(frozen=True)
class Annotations:
    """A COCO annotation file.

    Attributes:
        images: every image, in the order of the file.
        classes: names of the categories, in the order of the file.
        has_masks: whether every object has a segmentation.
        labelled: (n,) bool: whether an image has an object.
    """

    images: Images
    classes: tuple[str, ...]
    has_masks: bool
    labelled: npt.NDArray[np.bool_]


def read_annotations(path: str | Path, key: str) -> Annotations:
    """Read a COCO annotation file.

    Args:
        key: the recipe's key, for errors.

    Raises:
        RecipeError: not such a file; the message names the entry at fault.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        entries, categories = content["images"], content["categories"]
        objects = content["annotations"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{key}: {path}: not a COCO annotation file with images, annotations and categories ({error!r})."
        ) from error
    try:
        sizes = np.array([(e["id"], e["width"], e["height"]) for e in entries], dtype=np.int64).reshape(-1, 3)
        names = [str(e["file_name"]) for e in entries]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RecipeError(
            f"{key}: {path}: every entry of `images` needs integer id, width and height, and file_name ({error!r})."
        ) from error
    if sizes.shape[0] == 0:
        raise RecipeError(f"{key}: {path}: `images` is empty.")
    ids = sizes[:, 0]
    unique, counts = np.unique(ids, return_counts=True)
    if unique.size != ids.size:
        raise RecipeError(f"{key}: {path}: image id {unique[counts > 1][0]} occurs more than once.")
    if (bad := np.flatnonzero((sizes[:, 1:] <= 0).any(axis=1))).size:
        raise RecipeError(f"{key}: {path}: image id {ids[bad[0]]} has width or height 0 or less.")
    images = Images(ids, sizes[:, 1].copy(), sizes[:, 2].copy(), names)
    classes = tuple(str(category["name"]) for category in categories)
    known = {category.get("id") for category in categories}
    seen = {o.get("image_id") for o in objects if o.get("category_id") in known}
    labelled = np.array([image_id in seen for image_id in ids.tolist()], dtype=np.bool_)
    return Annotations(images, classes, bool(objects) and all(o.get("segmentation") for o in objects), labelled)


def annotations_digest(path: str | Path) -> str:
    """SHA-256 (hex) of all in a COCO annotation file that a pipeline with annotations can depend on, in the order of the file.

    These are of each image id, file_name, width and height; of each object image_id, category_id, bbox, area, iscrowd, ignore
    and segmentation; of each category id and name. Whatever else is in the file may change.
    """
    status = Path(path).stat()
    return _digest(str(path), status.st_mtime_ns, status.st_size)


_DECIDING = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation"),
    "categories": ("id", "name"),
}


@lru_cache(maxsize=8)
def _digest(path: str, _mtime_ns: int, _size: int) -> str:
    content: dict[str, Any] = json.loads(Path(path).read_bytes())
    digest = hashlib.sha256()
    for part, keys in _DECIDING.items():
        for entry in content.get(part, ()):
            digest.update(json.dumps([entry.get(key) for key in keys], separators=(",", ":")).encode())
        digest.update(b"\n")
    return digest.hexdigest()
