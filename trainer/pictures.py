"""What detectors see and say: val images with ground truth, detections and feature energy of a teacher and of students."""

import io
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.logging import MMLogger
from pycocotools import mask as coco_mask
from torch import Tensor

from cache import RecipeError
from trainer.capture import captured, flatten, measure_levels
from trainer.recipe import Recipe
from trainer.specs import SplitSpec
from trainer.teacher import Teacher

_LONGEST_SIDE = 640
_JPEG_QUALITY = 85
LEAST_SCORE = 0.3
_MOST_OBJECTS = 30
Outline = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class SeenObject:
    """One object in an image, in pixels of the image as it is stored.

    Attributes:
        box: ``x1, y1, x2, y2``.
        score: in [0, 1]; None for ground truth.
        outlines: polygons of its mask; empty without one.
    """

    box: tuple[float, float, float, float]
    label: int
    score: float | None = None
    outlines: tuple[Outline, ...] = ()


@dataclass(frozen=True)
class Energy:
    """Mean magnitude of a level's features at every position: mean over channels of |x|.

    Attributes:
        png: one pixel a position, coloured from the least value (dark) to the largest (bright).
        low, high: these values.
        share: height and width of what the map covers, as shares of the image's: a little more than 1 where the stride does
            not divide it.
    """

    png: bytes
    low: float
    high: float
    share: tuple[float, float]


@dataclass(frozen=True)
class Sight:
    """What one detector makes of one image: objects of at least `LEAST_SCORE`, best first, and energy by level."""

    objects: tuple[SeenObject, ...]
    energy: dict[str, Energy] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One image.

    Attributes:
        width, height: in pixels, as stored on disk.
        jpeg: the image, made smaller where its longer side has more than 640 pixels.
        truth: its annotations.
        sights: what each detector makes of it, by the detector's name.
    """

    image_id: int
    file_name: str
    width: int
    height: int
    jpeg: bytes
    truth: tuple[SeenObject, ...]
    sights: dict[str, Sight]


@dataclass(frozen=True)
class Pictures:
    """Some images, and the classes that labels are indices of."""

    images: tuple[Picture, ...]
    classes: tuple[str, ...]


def take_pictures(
    recipe: Recipe, teacher: str | None, students: Mapping[str, Path], count: int, *, device: str = "cpu", seed: int = 0
) -> Pictures:
    """Run detectors on some val images.

    Args:
        teacher: its name in the recipe; run live on each image, resized as students are evaluated.
        students: folders of trained stages, by the name that each student goes under here.
        count: images, drawn from those with objects; all if there are fewer.

    Raises:
        RecipeError: the val set's files are not what they were.
        TeacherLoadError: the teacher's files are not what they were.
    """
    images, classes = _choose(recipe.dataset.val, count, seed)
    for number, picture in enumerate(images):
        images[number] = _with_pixels(picture, recipe.dataset.val)
    paths = [Path(recipe.dataset.val.img_dir) / picture.file_name for picture in images]
    sights: dict[str, list[Sight]] = {}
    with _quiet():
        if teacher is not None:
            model = Teacher(recipe.teachers[teacher], teacher, device)
            sights[teacher] = [_teacher_sight(model, path, recipe.views.evaluation_scale) for path in paths]
        for name, folder in students.items():
            student = init_detector(str(folder / "student.py"), str(folder / "student.pth"), device=device)
            sights[name] = [_student_sight(student, recipe.student.capture, path) for path in paths]
    has_masks = any(seen.outlines for of_all in sights.values() for sight in of_all for seen in sight.objects)
    return Pictures(
        tuple(
            replace(
                picture,
                sights={name: of_all[n] for name, of_all in sights.items()},
                truth=picture.truth if has_masks else tuple(replace(seen, outlines=()) for seen in picture.truth),
            )
            for n, picture in enumerate(images)
        ),
        classes,
    )


def _choose(split: SplitSpec, count: int, seed: int) -> tuple[list[Picture], tuple[str, ...]]:
    """Images with objects, drawn by the seed, without their pixels."""
    try:
        content = json.loads(Path(split.ann_file).read_bytes())
        label = {category["id"]: place for place, category in enumerate(content["categories"])}
        entries = {entry["id"]: entry for entry in content["images"]}
        objects: dict[int, list[dict[str, Any]]] = {}
        for one in content["annotations"]:
            if not one.get("iscrowd"):
                objects.setdefault(one["image_id"], []).append(one)
        chosen = sorted(np.random.default_rng(seed).permutation(sorted(objects))[:count].tolist())
        pictures = []
        for image_id in chosen:
            entry = entries[image_id]
            truth = tuple(_annotated(one, label, entry["height"], entry["width"]) for one in objects[image_id])
            pictures.append(Picture(image_id, str(entry["file_name"]), 0, 0, b"", truth, {}))
        return pictures, tuple(str(category["name"]) for category in content["categories"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"dataset.val.ann_file: {split.ann_file}: cannot be read any more ({error!r}).") from error


def _with_pixels(picture: Picture, split: SplitSpec) -> Picture:
    path = Path(split.img_dir) / picture.file_name
    try:
        image = mmcv.imread(str(path))  # as mmdet's LoadImageFromFile decodes it
    except FileNotFoundError as error:
        raise RecipeError(f"dataset.val.img_dir: {path} is not there any more.") from error
    if image is None:
        raise RecipeError(f"dataset.val.img_dir: {path} cannot be decoded.")
    height, width = image.shape[:2]
    if max(height, width) > _LONGEST_SIDE:
        image = mmcv.imrescale(image, (_LONGEST_SIDE, _LONGEST_SIDE))
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
    return replace(picture, width=width, height=height, jpeg=jpeg)


def _teacher_sight(teacher: Teacher, path: Path, scale: tuple[int, int]) -> Sight:
    image = mmcv.imread(str(path))
    view = mmcv.imrescale(image, scale)
    output = teacher([torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))])
    found = output.detections[0]
    height, width = image.shape[:2]
    factors = np.array([width / view.shape[1], height / view.shape[0]] * 2, np.float32)
    order = np.argsort(-found.scores)[:_MOST_OBJECTS]
    objects = []
    for n in order[found.scores[order] >= LEAST_SCORE]:
        outlines: tuple[Outline, ...] = ()
        if found.masks is not None:
            bitmap = coco_mask.decode({"size": list(view.shape[:2]), "counts": found.masks[n]})
            outlines = _outlines(cv2.resize(bitmap, (width, height), interpolation=cv2.INTER_NEAREST))
        objects.append(
            SeenObject(_box(found.boxes[n] * factors), int(found.labels[n]), float(found.scores[n]), outlines)
        )
    strides = {level.name: level.stride * level.pool for level in teacher.levels}
    maps = {name: features[0] for name, features in output.features.items()}
    return Sight(tuple(objects), energies(maps, strides, view.shape[:2]))


def _student_sight(student: Any, capture: Sequence[str], path: Path) -> Sight:
    with captured(student, capture, "student.capture") as outputs:
        sample = inference_detector(student, str(path))
    found = sample.pred_instances.cpu()
    scores = found.scores.numpy()
    order = np.argsort(-scores)[:_MOST_OBJECTS]
    objects = []
    for n in order[scores[order] >= LEAST_SCORE]:
        outlines = _outlines(found.masks[n].numpy().astype(np.uint8)) if "masks" in found else ()
        objects.append(SeenObject(_box(found.bboxes[n].numpy()), int(found.labels[n]), float(scores[n]), outlines))
    maps = flatten(outputs, capture, "student.capture")
    levels = measure_levels(student, capture, "student.capture")
    named = {level.name: feature_map[0] for level, feature_map in zip(levels, maps, strict=True)}
    return Sight(tuple(objects), energies(named, {level.name: level.stride for level in levels}, sample.img_shape))


def energies(maps: Mapping[str, Tensor], strides: Mapping[str, int], size: tuple[int, int]) -> dict[str, Energy]:
    """Energy of each level, finest first, of an image of ``size`` (height, width) in pixels, without its padding.

    Args:
        maps: per level (C, h, w).
        strides: per level pixels of the image per position, pooling included.
    """
    found = {}
    for name in sorted(maps, key=lambda name: strides[name]):
        rows, columns = (math.ceil(side / strides[name]) for side in size)
        values = maps[name].float().abs().mean(dim=0)[:rows, :columns].cpu().numpy()
        low, high = float(values.min()), float(values.max())
        grey = (255 * (values - low) / max(high - low, 1e-12)).astype(np.uint8)
        png = cv2.imencode(".png", cv2.applyColorMap(grey, cv2.COLORMAP_INFERNO))[1].tobytes()
        found[name] = Energy(png, low, high, (rows * strides[name] / size[0], columns * strides[name] / size[1]))
    return found


def _annotated(annotation: Mapping[str, Any], label: Mapping[int, int], height: int, width: int) -> SeenObject:
    """An object of a COCO annotation file; its segmentation is polygons, or run lengths."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = coco_mask.frPyObjects(segmentation, height, width)
        outlines = _outlines(coco_mask.decode(segmentation))
    else:
        outlines = tuple(
            tuple((round(x), round(y)) for x, y in zip(polygon[::2], polygon[1::2], strict=True))
            for polygon in segmentation or ()
        )
    x, y, across, down = annotation["bbox"]
    return SeenObject((x, y, x + across, y + down), label[annotation["category_id"]], None, outlines)


def _outlines(bitmap: np.ndarray) -> tuple[Outline, ...]:
    contours, _ = cv2.findContours(bitmap, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return tuple(tuple((int(x), int(y)) for x, y in contour[:, 0]) for contour in contours if len(contour) > 2)


def _box(values: np.ndarray) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(value) for value in values)
    return x1, y1, x2, y2


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what mmdet prints and logs on loading a detector."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
