"""A picture of one row of a cache: the view with what the teacher detected, and the energy of each stored level."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
from mmdet.registry import TRANSFORMS

from cache import Detections, RecipeError, RowRecord, SampledPolicy, Targets
from trainer.annotations import read_annotations
from trainer.images import UnusableImageError, read_image
from trainer.pictures import LEAST_SCORE, energies
from trainer.recipe import Recipe
from trainer.transforms import view_config

_HEIGHT = 320  # of each picture, in pixels
_TITLE = 24
_GREY = 48
_BOX = (80, 220, 80)
_WHITE = (240, 240, 240)


def view_pixels(recipe: Recipe, record: RowRecord) -> tuple[np.ndarray, bool]:
    """The pixels that a row was computed from, made again from the image file.

    Returns:
        The view (h, w, 3) uint8, BGR, and whether the files are those that the row was computed from.

    Raises:
        RecipeError: the recipe's data set has no such image, or its file cannot be used.
    """
    split = recipe.dataset.train
    images = read_annotations(split.ann_file, "dataset.train.ann_file").images
    places = np.flatnonzero(images.ids == record.image_id)
    if not places.size:
        raise RecipeError(f"dataset.train.ann_file: {split.ann_file} has no image {record.image_id}.")
    at = int(places[0])
    make = TRANSFORMS.build(view_config(recipe.policy, split.ann_file, split.img_dir))
    try:
        if isinstance(recipe.policy, SampledPolicy):
            made = make.make(make.load(record.image_id), record.view)
            return made["img"], made["files_crc32c"] == record.image_crc32c
        width, height = int(images.widths[at]), int(images.heights[at])
        image, content = read_image(Path(split.img_dir) / images.file_names[at], width, height)
    except UnusableImageError as error:
        raise RecipeError(f"dataset.train.img_dir: {images.file_names[at]} {error}.") from error
    view = make({"img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2], "view": record.view})
    return view["img"], int(google_crc32c.value(content)) == record.image_crc32c


def draw_row(
    targets: Targets,
    record: RowRecord,
    strides: Mapping[str, int],
    pixels: np.ndarray | None,
    classes: Sequence[str] = (),
) -> np.ndarray:
    """Draw a row: its view on the left, then its levels from the finest on, all of one height.

    Args:
        strides: per level pixels of the view per stored position, pooling included.
        pixels: of the view (h, w, 3) uint8, BGR; grey where they are not there.
        classes: names of the labels; numbers where there are none.

    Returns:
        (h, w, 3) uint8, BGR.
    """
    size = (record.height, record.width)
    canvas = np.full((*size, 3), _GREY, np.uint8) if pixels is None else pixels[: size[0], : size[1]].copy()
    panels = [_titled(_with_boxes(canvas, targets.detections, classes), f"image {record.image_id} view {record.view}")]
    for name, energy in energies(targets.dequantize(), strides, size).items():
        tile = cv2.imdecode(np.frombuffer(energy.png, np.uint8), cv2.IMREAD_COLOR)
        # a map covers a little more than the view where its stride does not divide it
        covered = [max(1, round(_HEIGHT * energy.share[0])), max(1, round(_width(size) * energy.share[1]))]
        tile = cv2.resize(tile, (covered[1], covered[0]), interpolation=cv2.INTER_NEAREST)
        panels.append(_titled(tile[:_HEIGHT, : _width(size)], f"{name} {energy.low:.2g} to {energy.high:.2g}"))
    return np.concatenate(panels, axis=1)


def _with_boxes(canvas: np.ndarray, found: Detections | None, classes: Sequence[str]) -> np.ndarray:
    """The view at the height of all pictures, with the detections that are shown; None where none are stored."""
    factor = _HEIGHT / canvas.shape[0]
    canvas = cv2.resize(canvas, (_width(canvas.shape[:2]), _HEIGHT), interpolation=cv2.INTER_AREA)
    if found is None:
        return canvas
    for n in np.argsort(found.scores, kind="stable"):  # the best on top
        if found.scores[n] < LEAST_SCORE:
            continue
        x1, y1, x2, y2 = (round(float(value) * factor) for value in found.boxes[n])
        label = int(found.labels[n])
        cv2.rectangle(canvas, (x1, y1), (x2, y2), _BOX, 1)
        name = classes[label] if label < len(classes) else str(label)
        cv2.putText(canvas, f"{name} {found.scores[n]:.2f}", (x1 + 2, y1 + 11), cv2.FONT_HERSHEY_PLAIN, 0.8, _BOX)
    return canvas


def _titled(picture: np.ndarray, title: str) -> np.ndarray:
    strip = np.zeros((_TITLE, picture.shape[1], 3), np.uint8)
    cv2.putText(strip, title, (4, _TITLE - 8), cv2.FONT_HERSHEY_PLAIN, 0.9, _WHITE, lineType=cv2.LINE_AA)
    return np.concatenate([strip, picture])


def _width(size: tuple[int, int]) -> int:
    return max(1, round(_HEIGHT * size[1] / size[0]))
