"""Sampled views: what a pipeline of random mmdet transforms draws, the same at every call, in every process.

All that a view depends on is (policy, annotation file, image files, image id, view): the image and its annotations are loaded
here, never by a student's own config, and the partners of transforms that mix images (Mosaic, MixUp, CopyPaste) are drawn
among all images of the annotation file in its order, whatever a data set filters. Partners too go through what stands before
the first mixing transform.
"""

import copy
import hashlib
import io
import itertools
import random
import threading
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, Pad
from mmdet.registry import TRANSFORMS

from cache import RecipeError, SampledPolicy
from trainer.annotations import read_annotations
from trainer.images import UnusableImageError, read_image

# how often a transform may refuse an image before the view counts as unusable; mmdet's MultiImageMixDataset tries as often
_TRIES = 15
_NOT_OURS = ("LoadImage", "LoadAnnotations", "Pack", "Collect", "DefaultFormatBundle", "ToTensor", "ImageToTensor")
# the generators below belong to the whole process: one thread draws from them at a time, and may nest (MixUp looks into the
# boxes of partners while it draws one)
_ROLLING = threading.RLock()


class Dice:
    """The global generators of numpy, Python and torch, at a place of their own while the context is open.

    Each time it is opened the draws go on where they were when it was closed; the caller's own states are put back then.

    Args:
        key: numbers that decide every draw.
    """

    def __init__(self, *key: int) -> None:
        digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=32).digest()
        self._own = (
            np.random.RandomState(np.frombuffer(digest, "<u4")).get_state(),
            random.Random(digest).getstate(),
            torch.Generator().manual_seed(int.from_bytes(digest[:7], "little")).get_state(),
        )

    def __enter__(self) -> None:
        _ROLLING.acquire()
        self._callers = _states()
        _set_states(self._own)

    def __exit__(self, *_error: object) -> None:
        self._own = _states()
        _set_states(self._callers)
        _ROLLING.release()


def _states() -> tuple[Any, Any, torch.Tensor]:
    return np.random.get_state(), random.getstate(), torch.get_rng_state()  # noqa: NPY002


def _set_states(states: tuple[Any, Any, torch.Tensor]) -> None:
    np.random.set_state(states[0])  # noqa: NPY002
    random.setstate(states[1])
    torch.set_rng_state(states[2])


@dataclass(frozen=True)
class Loaded:
    """An image with its annotations, before any transform.

    Attributes:
        results: what mmdet's loading makes of it.
        content: its file's bytes.
        place: its place in the annotation file.
    """

    results: dict[str, Any]
    content: bytes
    place: int


@TRANSFORMS.register_module()
class ApplySampledView(BaseTransform):
    """Make one sampled view of an image and its annotations, from the file on: takes the place of loading too.

    The view is ``results["view"]`` of image ``results["img_id"]``; where ``view`` is absent one is drawn at random and set.
    The pixels are rounded to uint8 (colour jitter gives fractions) and padded at the right and bottom to the policy's size:
    the padding belongs to the view, both sides see it, and ``img_shape`` is that size.

    Args:
        policy: a `SampledPolicy` as JSON.
        ann_file: the COCO annotation file; every image in it can be a partner.
        img_dir: folder of the images.
        keep_masks: hand on the masks that the policy loads; without it they only serve the pipeline.

    Raises:
        RecipeError: the policy wants masks and the annotation file has none.
    """

    def __init__(self, policy: dict[str, Any], ann_file: str, img_dir: str, keep_masks: bool = True) -> None:
        self.policy = SampledPolicy.from_json(policy)
        record = self.policy.record
        self._seed, self._keep_masks = int(record["seed"]), keep_masks
        annotations = read_annotations(ann_file, "dataset.train.ann_file")
        if record["masks"] and not annotations.has_masks:
            raise RecipeError(
                f"views.sampled.masks: dataset.train.ann_file ({ann_file}) has objects without segmentation."
            )
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            self._data = CocoDataset(
                ann_file=ann_file,
                data_prefix=dict(img=img_dir),
                metainfo=dict(classes=annotations.classes),
                pipeline=[],
            )
        self._place = {image_id: place for place, image_id in enumerate(annotations.images.ids.tolist())}
        self._annotate = LoadAnnotations(with_bbox=True, with_mask=record["masks"])
        height, width = self.policy.size
        self._pad = Pad(size=(width, height), pad_val=dict(img=record["pad"]))
        self._transforms = build_pipeline(record["pipeline"])

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Make the view.

        Raises:
            RecipeError: the image cannot be used; where there was a precompute, it has named it before.
        """
        if "view" not in results:
            results["view"] = int(np.random.randint(len(self.policy)))  # noqa: NPY002 - the generator that mmengine seeds
        try:
            return {**results, **self.make(self.load(results["img_id"]), results["view"])}
        except UnusableImageError as error:
            raise RecipeError(
                f"views.sampled: image {results['img_id']} ({results.get('img_path')}) {error}. Mend the pipeline, or take the "
                "image out of the annotation file."
            ) from error

    def load(self, image_id: int) -> Loaded:
        """An image with its annotations, before any transform; serves all its views.

        Raises:
            UnusableImageError: the file cannot be used.
        """
        return self._load(self._place[image_id])

    def make(self, loaded: Loaded, view: int) -> dict[str, Any]:
        """One view.

        Returns:
            What mmdet's transforms made of the image: ``img`` (h, w, 3) uint8, BGR, ``gt_bboxes`` and the like in pixels of
            the view, each box at least one wide and high; and ``files_crc32c``, the checksum of the image's file followed by
            its partners', each once, in the order of their first use.

        Raises:
            UnusableImageError: a transform refuses the image or fails on it, a partner's file cannot be used, or the result is
                larger than the policy's size.
        """
        key = (self._seed, loaded.results["img_id"], view)
        dice, partners = Dice(*key), _Partners(self, loaded, *key)
        results = copy.deepcopy(loaded.results)
        for number, transform in enumerate(self._transforms, start=1):
            try:
                results = _apply(transform, results, partners, dice)
            except UnusableImageError:
                raise
            except Exception as error:
                name = f"views.sampled.pipeline.{number} ({type(transform).__name__})"
                raise UnusableImageError(f"view {view}: {name} fails: {type(error).__name__}: {error}") from error
            if results is None:
                raise UnusableImageError(
                    f"view {view}: views.sampled.pipeline.{number} ({type(transform).__name__}) refuses it {_TRIES} times. "
                    "Images without objects need transforms that take them (allow_negative_crop: true)."
                )
        return self._finish(results, view) | {"files_crc32c": partners.crc32c}

    def check_replay(self, rows: Sequence[tuple[int, int]]) -> None:
        """Make some (image id, view)s, then again by a new pipeline in the opposite order, and compare pixels and boxes.

        Raises:
            RecipeError: they differ; something in the pipeline draws from a generator that is not seeded here, or remembers.
        """
        first = {row: self._outcome(row) for row in rows}
        used, self._transforms = self._transforms, build_pipeline(self.policy.record["pipeline"])
        try:
            for row in reversed(rows):
                if self._outcome(row) != first[row]:
                    raise RecipeError(
                        f"views.sampled.pipeline: made twice, view {row[1]} of image {row[0]} differs. A transform keeps state "
                        "or draws from a generator of its own; only those that draw from numpy's, Python's or torch's "
                        "global generator can be replayed."
                    )
        finally:
            self._transforms = used

    def _outcome(self, row: tuple[int, int]) -> tuple[bytes, list[Any]] | str:
        try:
            made = self.make(self.load(row[0]), row[1])
        except UnusableImageError as error:
            return str(error)
        return hashlib.sha256(made["img"]).digest(), made["gt_bboxes"].tensor.tolist()

    def _finish(self, results: dict[str, Any], view: int) -> dict[str, Any]:
        image = results["img"]
        if image.dtype != np.uint8:
            results["img"] = image = np.clip(np.rint(image), 0, 255).astype(np.uint8)
        height, width = image.shape[:2]
        most_high, most_wide = self.policy.size
        if height > most_high or width > most_wide:
            raise UnusableImageError(
                f"view {view} is {width}x{height} after the pipeline, larger than views.sampled.size ({most_wide}x{most_high}, "
                "width x height). End the pipeline with a crop or resize into it, or raise the size."
            )
        results = self._pad(_without_slivers(results, width, height))
        results["img"] = np.ascontiguousarray(results["img"])
        results["img_shape"] = results["img"].shape[:2]
        if not self._keep_masks:
            results.pop("gt_masks", None)
        # what packing asks for and not every transform sets
        return {"scale_factor": (1.0, 1.0), "flip": False, "flip_direction": None} | results

    def _load(self, place: int) -> Loaded:
        info = self._data.get_data_info(place)
        image, content = read_image(info["img_path"], info["width"], info["height"])
        shape = image.shape[:2]
        results = self._annotate({**info, "img": image, "img_shape": shape, "ori_shape": shape})
        return Loaded(results, content, place)


class _RefusedPartnerError(Exception):
    """A transform has looked at an image that cannot be its partner."""


class _Partners:
    """The data set as the mixing transforms of one view see it: every image of the annotation file, loaded and put through
    what stands before the first of them. So mmdet's MultiImageMixDataset nests them.
    """

    def __init__(self, view: ApplySampledView, own: Loaded, *key: int) -> None:
        self._view, self._own, self._key = view, own, key
        self._made: dict[int, dict[str, Any] | None] = {}
        self._before = list(itertools.takewhile(lambda t: not hasattr(t, "get_indexes"), view._transforms))
        self.crc32c = int(google_crc32c.value(own.content))

    def __len__(self) -> int:
        return len(self._view._data)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """An image, for a transform that chooses by what is in it.

        Raises:
            _RefusedPartnerError: what stands before refuses it.
        """
        made = self.made(place)
        if made is None:
            raise _RefusedPartnerError(place)
        return made

    def made(self, place: int) -> dict[str, Any] | None:
        """An image, or None where what stands before refuses it."""
        if place not in self._made:
            loaded = self._own if place == self._own.place else self._load(place)
            results, dice = loaded.results, Dice(*self._key, place)
            for transform in self._before:
                results = results and _apply(transform, results, self, dice)
            self._made[place] = results
        return copy.deepcopy(self._made[place])

    def _load(self, place: int) -> Loaded:
        try:
            loaded = self._view._load(place)
        except UnusableImageError as error:
            path = self._view._data.get_data_info(place)["img_path"]
            raise UnusableImageError(f"is mixed with {path}, which {error}") from error
        self.crc32c = int(google_crc32c.extend(self.crc32c, loaded.content))
        return loaded


def _apply(transform: Any, results: dict[str, Any], partners: _Partners, dice: Dice) -> dict[str, Any] | None:
    """One transform, as mmdet's MultiImageMixDataset applies it; None if it, or every partner, is refused on every try."""
    if hasattr(transform, "get_indexes"):
        for _ in range(_TRIES):
            try:
                with dice:
                    places = transform.get_indexes(partners)
            except _RefusedPartnerError:  # the next try draws on from here
                continue
            # all of them, also behind one that is refused: the view's checksum is of every file that was looked at
            mixed = [partners.made(place) for place in (places if isinstance(places, Sequence) else [places])]
            if None not in mixed:
                break
        else:
            return None
        results["mix_results"] = mixed
    for _ in range(_TRIES):
        with dice:
            made = transform(copy.deepcopy(results))
        if made is not None:
            made.pop("mix_results", None)
            return made
    return None


def _without_slivers(results: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """Leave out boxes that mmdet's data set would not load: less than a pixel wide or high, or with no part in the image.

    Transforms that move and clip boxes leave them behind (RandAugment). Boxes without area make losses of boxes infinite, and
    assigners give them anchors that they do not overlap.
    """
    x1, y1, x2, y2 = (results["gt_bboxes"].tensor[:, side].numpy() for side in range(4))
    kept = (x2 - x1 >= 1) & (y2 - y1 >= 1) & (x1 < width) & (x2 > 0) & (y1 < height) & (y2 > 0)
    if not kept.all():
        for key in ("gt_bboxes_labels", "gt_ignore_flags", "gt_masks"):
            if key in results:
                results[key] = results[key][kept]
        results["gt_bboxes"] = results["gt_bboxes"][torch.from_numpy(kept)]
    return results


def build_pipeline(pipeline: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The transforms of a recipe's pipeline. Lists of numbers become tuples, for many of mmdet's transforms take no list.

    Raises:
        ValueError: one cannot be built, or cannot stand in a sampled view; the message gives its number, from 1.
    """
    transforms = []
    for number, spec in enumerate(pipeline, start=1):
        kind = str(spec.get("type"))
        if kind.startswith(_NOT_OURS):
            raise ValueError(f"transform {number}: {kind}: loading and packing are not part of a view; leave it out")
        try:
            transform = TRANSFORMS.build({key: _tuples(value, key) for key, value in spec.items()})
        except Exception as error:  # transforms check their arguments as they like
            raise ValueError(f"transform {number}: {kind}: {_first_line(error)}") from error
        if hasattr(transform, "results_cache"):
            raise ValueError(
                f"transform {number}: {kind} mixes images that it met before, so it cannot be replayed; take "
                f"{kind.removeprefix('Cached')}, whose partners are drawn from the whole data set"
            )
        transforms.append(transform)
    return transforms


def _tuples(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _tuples(inner, name) for name, inner in value.items()}
    if not isinstance(value, list | tuple):
        return value
    # probabilities must be lists: RandomFlip asks for one by type
    if key != "prob" and value and all(isinstance(one, int | float) for one in value):
        return tuple(value)
    return [_tuples(one, key) for one in value]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
