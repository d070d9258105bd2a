"""An mmdet detector as a teacher: targets of a batch, in one forward pass."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from cache import (
    FORMAT_VERSION,
    Compression,
    DenseLevel,
    DenseSpec,
    Detections,
    GroupInfo,
    Level,
    Policy,
    TeacherLoadError,
    head_digest,
    level_name,
    pack_head,
    pool,
)
from trainer.capture import captured, flatten, measure_levels, recorded
from trainer.checkpoint import load_strict, read_weights, sha256
from trainer.config import build_detector, load_config, nested, plain, plain_dict
from trainer.dense import check_dense, dense_outputs, dense_shape, strides
from trainer.precision import DTYPES, refuse_unknown
from trainer.specs import TeacherSpec

# keys of a detector's config that decide how it is trained or initialised, not what it computes
_NO_EFFECT = frozenset({"init_cfg", "pretrained", "train_cfg"})
_HEAD = "bbox_head."


@dataclass(frozen=True)
class TeacherOutput:
    """Targets of a batch.

    Attributes:
        features: per level (N, C, h, w), floating point, on the teacher's device; pooled where the recipe says so.
        detections: one per image, boxes in pixels of the images given; empty if they were not asked for.
        map_sizes: per level rows and columns before pooling.
        dense: per image and level the dense head's outputs at its best positions; empty if they were not asked for.
    """

    features: dict[str, Tensor]
    detections: list[Detections]
    map_sizes: dict[str, tuple[int, int]]
    dense: list[dict[str, DenseLevel]]


class Teacher:
    """A frozen detector in eval mode, with its own normalisation.

    Args:
        spec: config, checkpoint, captured modules, levels, autocast.
        name: the teacher's name in the recipe, for errors.
        device: where it runs.
        levels: the levels that it gives; by default those that the recipe's entry names, or all.
        top_k: positions a level of the dense head's outputs that it gives; 0 for none.

    Raises:
        RecipeError: the config cannot be read, or dense outputs are asked of a detector without a dense head.
        TeacherLoadError: the checkpoint does not fit, or a captured module is no feature map.
    """

    def __init__(
        self,
        spec: TeacherSpec,
        name: str,
        device: torch.device | str = "cpu",
        *,
        levels: Sequence[Level] | None = None,
        top_k: int = 0,
    ) -> None:
        self._key = f"teachers.{name}"
        self._spec = spec
        self.device = torch.device(device)
        model = build_model(spec, name)
        load_strict(model, spec.checkpoint, f"{self._key}.checkpoint")
        self._model = model.float().to(self.device).eval().requires_grad_(False)
        refuse_unknown(self._model, spec.autocast, f"{self._key}.autocast")
        self._precision = DTYPES[spec.autocast] if spec.autocast else None
        self._all_levels = measure_levels(self._model, spec.capture, f"{self._key}.capture")
        self.levels = select_levels(self._all_levels, spec, self._key) if levels is None else tuple(levels)
        self._top_k = top_k
        if top_k:
            dense_head(self._model, self._key)

    @classmethod
    def of_group(cls, spec: TeacherSpec, info: GroupInfo, device: torch.device | str = "cpu") -> "Teacher":
        """A teacher that gives what a group of the cache stores."""
        return cls(spec, info.teacher, device, levels=info.levels, top_k=max((d.top_k for d in info.dense), default=0))

    @property
    def head(self) -> nn.Module:
        """The dense head, frozen.

        Raises:
            RecipeError: it has none.
        """
        return dense_head(self._model, self._key)

    def to(self, device: torch.device) -> None:
        """Move to another device; nothing happens if it is there."""
        if device != self.device:
            self.device = device
            self._model.to(device)

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor], *, detect: bool = True) -> TeacherOutput:
        """Targets of images of one padded shape.

        Args:
            images: N tensors (3, h, w), uint8, BGR, any device: views as mmdet loads them, not normalised.
            detect: run all of its heads too. Without it backbone and neck run alone, and the dense head on their maps where its
                outputs are given; features and dense outputs are the same to the bit.

        Raises:
            TeacherLoadError: a map has another size than its level's stride says.
        """
        samples = [_sample(image) for image in images]
        batch = self._model.data_preprocessor(dict(inputs=list(images), data_samples=samples), False)
        inputs, samples = batch["inputs"], batch["data_samples"]
        with (
            torch.autocast(self.device.type, enabled=False),  # a student's, which a live teacher is called in
            captured(self._model, self._spec.capture, self._key) as outputs,
            recorded(self._model, self._precision) as made,
        ):
            if detect:
                samples = self._model.predict(inputs, samples, rescale=False)
            elif self._top_k:
                self._model.bbox_head(self._model.extract_feat(inputs))
            else:
                self._model.extract_feat(inputs)
        maps = flatten(outputs, self._spec.capture, f"{self._key}.capture")
        features, stored = {}, {level.name: level for level in self.levels}
        for level, feature_map in zip(self._all_levels, maps, strict=True):
            if feature_map.shape[1:] != (level.channels, *level.map_size(*inputs.shape[-2:])):
                raise TeacherLoadError(
                    f"{self._key}.capture: level {level.name} is {tuple(feature_map.shape[1:])} for a padded view of "
                    f"{tuple(inputs.shape[-2:])}, not the ceiling of its stride {level.stride}."
                )
            if level.name in stored:
                features[level.name] = pool(feature_map.float(), stored[level.name].pool)
        found = [_detections(sample) for sample in samples] if detect else []
        sizes = {level.name: level.map_size(*inputs.shape[-2:]) for level in self.levels}
        dense = dense_outputs(self.head, made["head"], self._top_k) if self._top_k else []
        return TeacherOutput(
            features, found, sizes, [{level_name(stride): d for stride, d in of_image.items()} for of_image in dense]
        )


def dense_head(model: nn.Module, key: str) -> nn.Module:
    """A detector's dense head.

    Raises:
        RecipeError: it has none of a known family.
    """
    head = getattr(model, "bbox_head", None)
    check_dense(head, key)
    return head


def build_model(spec: TeacherSpec, name: str) -> nn.Module:
    """The detector of a teacher's config, with random weights; see `build_detector`."""
    key = f"teachers.{name}.config"
    config = load_config(spec.config, spec.cfg_options, key)
    for part in (config.model, config.model.get("backbone", {})):
        part.pop("init_cfg", None)  # every weight comes from the checkpoint
    return build_detector(config.model, key)


def class_counts(spec: TeacherSpec, name: str) -> set[int]:
    """Every number of classes that a teacher's config gives its heads."""
    model = load_config(spec.config, spec.cfg_options, f"teachers.{name}.config").model
    return {part["num_classes"] for part in nested(plain_dict(model)) if "num_classes" in part}


def measured(spec: TeacherSpec, name: str) -> tuple[tuple[Level, ...], int]:
    """All levels that a teacher's captured modules give, and the divisor of its padding, of the detector with random weights."""
    return _measured(json.dumps(spec.model_dump(mode="json"), sort_keys=True), name)


# building a detector takes seconds; a command asks for the same one several times
@lru_cache(maxsize=32)
def _measured(spec: str, name: str) -> tuple[tuple[Level, ...], int]:
    parsed = TeacherSpec.model_validate_json(spec)
    model = build_model(parsed, name)
    levels = measure_levels(model, parsed.capture, f"teachers.{name}.capture")
    return levels, getattr(model.data_preprocessor, "pad_size_divisor", 1)


def select_levels(levels: Sequence[Level], spec: TeacherSpec, key: str) -> tuple[Level, ...]:
    """The levels that are stored: all of them or those named, pooled as the recipe says.

    Raises:
        TeacherLoadError: a level that the captured modules do not give, or that is pooled but not stored.
    """
    known = {level.name: level for level in levels}
    for name in spec.levels or ():
        if name not in known:
            raise TeacherLoadError(f"{key}.levels: {name!r} is not among the captured levels {', '.join(known)}.")
    stored = list(known) if spec.levels is None else list(spec.levels)
    for name in spec.pool:
        if name not in stored:
            raise TeacherLoadError(f"{key}.pool: {name!r} is not among the stored levels {', '.join(stored)}.")
    return tuple(replace(known[name], pool=spec.pool.get(name, 1)) for name in stored)


def fingerprint_record(
    spec: TeacherSpec,
    name: str,
    policy: Policy,
    precision: str,
    *,
    levels: Sequence[str] | None = None,
    top_k: int = 0,
    head: bool = False,
    detections: bool = True,
) -> dict[str, Any]:
    """All that decides the value of a target, and what is stored, as plain JSON.

    Args:
        levels: stored levels, by default those that the recipe's entry names.
        top_k, head, detections: positions a level of dense outputs that are stored, and whether the head's weights and
            detections are.
    """
    config = load_config(spec.config, spec.cfg_options, f"teachers.{name}.config")
    chosen = spec.levels if levels is None else levels
    return {
        "format_version": FORMAT_VERSION,
        "model": plain(config.model, _NO_EFFECT),
        "checkpoint_sha256": sha256(spec.checkpoint),
        "capture": list(spec.capture),
        "levels": None if chosen is None else list(chosen),
        "pool": dict(sorted(spec.pool.items())),
        # not the bare name: under that heads ran in it too, and later an actor's first batch alone
        "autocast": spec.autocast and f"{spec.autocast}, backbone and neck",
        "views": policy.to_json(),
        "precision": precision,
        **({"dense": top_k} if top_k else {}),
        **({"head": True} if head else {}),
        # a group that stores them has no such key: it is named as it was when every group did
        **({} if detections else {"detections": False}),
    }


def describe(spec: TeacherSpec, name: str, record: dict[str, Any], compression: Compression = "none") -> GroupInfo:
    """What a teacher's group will hold."""
    levels, divisor = measured(spec, name)
    chosen = record.get("levels")
    spec = spec if chosen is None else spec.model_copy(update={"levels": tuple(chosen)})
    levels = select_levels(levels, spec, f"teachers.{name}")
    dense: tuple[DenseSpec, ...] = ()
    if top_k := record.get("dense"):
        anchors, classes, terms = dense_shape(head := dense_head(build_model(spec, name), f"teachers.{name}"))
        dense = tuple(DenseSpec(level_name(s), s, anchors, classes, terms, top_k) for s in strides(head))
    kept = head_digest(head_file(spec, name)) if record.get("head") else None
    return GroupInfo(name, record, levels, record["precision"], divisor, compression, dense=dense, head=kept)


def head_file(spec: TeacherSpec, name: str) -> bytes:
    """The file that keeps a teacher's dense head's weights beside its targets.

    Raises:
        RecipeError: it has no dense head.
        TeacherLoadError: its checkpoint cannot be read.
    """
    dense_head(build_model(spec, name), f"teachers.{name}")
    weights = read_weights(spec.checkpoint, f"teachers.{name}.checkpoint")
    return pack_head({k.removeprefix(_HEAD): v for k, v in weights.items() if k.startswith(_HEAD)})


def _sample(image: Tensor) -> DetDataSample:
    size = tuple(image.shape[-2:])
    return DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))


def _detections(sample: DetDataSample) -> Detections:
    found = sample.pred_instances
    masks = None
    if "masks" in found:
        bitmaps = np.asarray(found.masks.cpu() if isinstance(found.masks, Tensor) else found.masks, np.uint8)
        encoded = coco_mask.encode(np.asfortranarray(bitmaps.transpose(1, 2, 0))) if len(bitmaps) else []
        masks = tuple(rle["counts"] for rle in encoded)
    boxes = found.bboxes.tensor if hasattr(found.bboxes, "tensor") else found.bboxes
    return Detections(
        boxes.float().cpu().numpy().reshape(-1, 4),
        found.scores.float().cpu().numpy(),
        found.labels.cpu().numpy().astype(np.int32),
        masks,
    )
