"""Generated detection data: drawn scenes in COCO format, with instance masks.

The project's demo, tests and studies train and evaluate on these, so that nothing has to be downloaded. A scene is a
textured background with clutter (which is nobody's object) and a few rotated, textured shapes that may hide one another.
The class of an object is its shape alone; colour, texture, size and angle say nothing. Aspect ratios differ between
scenes, so that a keep-ratio resize yields several padded shapes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as coco_mask

CLASSES = ("disc", "square", "triangle", "star", "ring", "cross")

# (width, height) and how often it occurs; after a keep-ratio resize each lands in a padded shape of its own
SHAPES: tuple[tuple[tuple[int, int], float], ...] = (
    ((256, 192), 0.5),
    ((192, 256), 0.2),
    ((224, 224), 0.2),
    ((288, 160), 0.1),
)


@dataclass(frozen=True)
class SceneOptions:
    """What scenes look like.

    Attributes:
        max_objects: objects in a scene are uniform in 1 .. max_objects (before some are hidden).
        min_size, max_size: diameter of an object as a share of the scene's shorter side, log-uniform between the two.
        empty_share: share of scenes without any object.
        clutter: mean number of pieces of clutter.
        min_visible: an object hidden by more than ``1 - min_visible`` of its area is not drawn at all.
    """

    max_objects: int = 7
    min_size: float = 0.06
    max_size: float = 0.55
    empty_share: float = 0.04
    clutter: float = 6.0
    min_visible: float = 0.4


def generate(
    root: Path,
    split: str,
    images: int,
    *,
    seed: int,
    options: SceneOptions | None = None,
    first_id: int = 1,
    enlarge: int = 1,
) -> Path:
    """Draw ``images`` scenes into ``root/<split>/`` and write ``root/annotations/<split>.json``.

    Scene ``i`` depends on ``(seed, first_id + i)`` alone: a larger set begins with the smaller one. Boxes are
    ``[x, y, width, height]`` in pixels, masks compressed RLE of the visible part.

    Args:
        enlarge: how many times wider and higher than `SHAPES` the scenes are drawn: objects and clutter grow with them, strokes,
            stripes and noise do not, so that there is detail to every pixel.

    Returns:
        The annotation file.
    """
    options = options or SceneOptions()
    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    image_entries, annotations = [], []
    for image_id in range(first_id, first_id + images):
        rng = np.random.default_rng((seed, image_id))
        pixels, objects = draw_scene(rng, options, enlarge)
        name = f"{image_id:08d}.jpg"
        cv2.imwrite(str(folder / name), pixels, [cv2.IMWRITE_JPEG_QUALITY, 92])
        height, width = pixels.shape[:2]
        image_entries.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for category, mask in objects:
            rle = coco_mask.encode(np.asfortranarray(mask))
            box = [float(v) for v in coco_mask.toBbox(rle)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category + 1,
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": rle["counts"].decode()},
                }
            )
    ann_file = root / "annotations" / f"{split}.json"
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    ann_file.write_text(json.dumps({"images": image_entries, "annotations": annotations, "categories": categories}))
    return ann_file


def draw_scene(
    rng: np.random.Generator, options: SceneOptions, enlarge: int = 1
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Draw one scene, so many times wider and higher than `SHAPES` says.

    Returns:
        Pixels, uint8 (height, width, 3) BGR; and for every object its class index and its visible mask, uint8
        (height, width) of 0 and 1.
    """
    sizes, weights = zip(*SHAPES, strict=True)
    width, height = (side * enlarge for side in sizes[rng.choice(len(sizes), p=weights)])
    pixels = _background(rng, height, width)
    for _ in range(rng.poisson(options.clutter)):
        _draw_clutter(rng, pixels, enlarge)
    if rng.random() < options.empty_share:
        return _finish(rng, pixels), []
    placed: list[tuple[int, np.ndarray]] = []
    for category, mask in _placements(rng, height, width, options):
        # what is drawn later hides what was drawn before: refuse an object that would hide another almost wholly
        remaining = [before & ~mask for _, before in placed]
        if any(
            left.sum() < options.min_visible * full.sum() for left, (_, full) in zip(remaining, placed, strict=True)
        ):
            continue
        _paint(rng, pixels, mask)
        placed = [(c, left) for left, (c, _) in zip(remaining, placed, strict=True)]
        placed.append((category, mask))
    objects = [(category, mask.astype(np.uint8)) for category, mask in placed if mask.sum() >= 16]
    return _finish(rng, pixels), objects


def _placements(
    rng: np.random.Generator, height: int, width: int, options: SceneOptions
) -> Iterator[tuple[int, np.ndarray]]:
    short = min(height, width)
    for _ in range(rng.integers(1, options.max_objects + 1)):
        category = int(rng.integers(len(CLASSES)))
        size = short * np.exp(rng.uniform(np.log(options.min_size), np.log(options.max_size)))
        centre = rng.uniform((0.0, 0.0), (width, height))
        yield category, _shape_mask(rng, CLASSES[category], centre, size / 2, height, width)


def _shape_mask(
    rng: np.random.Generator, name: str, centre: np.ndarray, radius: float, height: int, width: int
) -> np.ndarray:
    """Boolean (height, width) mask of one rotated, slightly squeezed shape."""
    angle = rng.uniform(0, 2 * np.pi)
    squeeze = rng.uniform(0.7, 1.0)
    mask = np.zeros((height, width), np.uint8)
    if name in ("disc", "ring"):
        axes = (max(radius, 2.0), max(radius * squeeze, 2.0))
        box = (tuple(map(float, centre)), (2 * axes[0], 2 * axes[1]), float(np.degrees(angle)))
        cv2.ellipse(mask, box, 1, thickness=-1)
        if name == "ring":
            cv2.ellipse(mask, (box[0], (1.1 * axes[0], 1.1 * axes[1]), box[2]), 0, thickness=-1)
        return mask.astype(bool)
    outline = _OUTLINES[name] * (1.0, squeeze) * radius
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = outline @ rotation.T + centre
    cv2.fillPoly(mask, [np.round(points * 16).astype(np.int32)], 1, shift=4)
    return mask.astype(bool)


def _polygon(angles: np.ndarray, radii: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)


_OUTLINES = {
    "square": _polygon(np.pi / 4 + np.arange(4) * np.pi / 2, np.ones(4)),
    "triangle": _polygon(np.arange(3) * 2 * np.pi / 3, np.ones(3)),
    "star": _polygon(np.arange(10) * np.pi / 5, np.where(np.arange(10) % 2, 0.42, 1.0)),
    "cross": np.array(
        [[-1, -3], [1, -3], [1, -1], [3, -1], [3, 1], [1, 1], [1, 3], [-1, 3], [-1, 1], [-3, 1], [-3, -1], [-1, -1]]
    )
    / 3.0,
}


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Smooth colour noise: a few random pixels enlarged to the scene."""
    coarse = rng.integers(40, 216, (int(rng.integers(2, 6)), int(rng.integers(2, 6)), 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _draw_clutter(rng: np.random.Generator, pixels: np.ndarray, enlarge: int) -> None:
    """A line, an arc or an irregular polygon: shapes of no class."""
    height, width = pixels.shape[:2]
    colour = tuple(int(v) for v in rng.integers(0, 256, 3))
    x, y = int(rng.integers(width)), int(rng.integers(height))
    kind = rng.integers(3)
    if kind == 0:
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(pixels, (x, y), end, colour, int(rng.integers(1, 5)), cv2.LINE_AA)
    elif kind == 1:
        axes = (enlarge * int(rng.integers(4, 40)), enlarge * int(rng.integers(4, 40)))
        start = float(rng.uniform(0, 360))
        cv2.ellipse(
            pixels, (x, y), axes, 0, start, start + float(rng.uniform(40, 160)), colour, int(rng.integers(1, 5))
        )
    else:
        count = int(rng.integers(5, 8))
        angles = np.sort(rng.uniform(0, 2 * np.pi, count))
        points = _polygon(angles, rng.uniform(0.3, 1.0, count)) * (enlarge * float(rng.uniform(5, 30))) + (x, y)
        cv2.fillPoly(pixels, [points.astype(np.int32)], colour, cv2.LINE_AA)


def _paint(rng: np.random.Generator, pixels: np.ndarray, mask: np.ndarray) -> None:
    """Fill ``mask`` with stripes, a gradient or one colour, then shade its rim."""
    ys, xs = np.nonzero(mask)
    if ys.size == 0:
        return
    first, second = rng.integers(0, 256, (2, 3)).astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 14)
    along = xs * np.cos(angle) + ys * np.sin(angle)
    kind = rng.integers(3)
    if kind == 0:
        blend = (np.sin(along * 2 * np.pi / period) > 0).astype(np.float32)
    elif kind == 1:
        blend = ((along - along.min()) / max(float(np.ptp(along)), 1.0)).astype(np.float32)
    else:
        blend = np.zeros(ys.size, np.float32)
    opacity = rng.uniform(0.75, 1.0)
    paint = first * (1 - blend[:, None]) + second * blend[:, None]
    pixels[ys, xs] = (opacity * paint + (1 - opacity) * pixels[ys, xs]).astype(np.uint8)


def _finish(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Sensor noise and a blur, each of random strength."""
    if rng.random() < 0.3:
        pixels = cv2.GaussianBlur(pixels, (3, 3), float(rng.uniform(0.4, 1.0)))
    noise = rng.standard_normal(pixels.shape, np.float32) * np.float32(rng.uniform(2, 14))
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)
