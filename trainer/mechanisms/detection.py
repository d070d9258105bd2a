"""Detection-level distillation: the student learns the teacher's detections as if they were ground truth."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from pydantic import Field
from torch import Tensor, nn

from cache import Detections, Level, RecipeError
from trainer.mechanisms import draws
from trainer.mechanisms.base import MECHANISMS, Batch, Mechanism, Weight

_SMALLEST = 1.0  # pixels: no anchor fits what is smaller, and box coders take logarithms of sides


@MECHANISMS.register_module()
class DetectionLoss(Mechanism):
    """``loss_weight * the student's own loss`` with the teacher's boxes, labels and, for students with masks, masks as truth.

    Every student family has such a loss, two-stage ones too; what the detector names a loss is summed. The features of this step
    are used again, so that the backbone runs once. The teacher may be of any family with the same classes.

    A score tells how far a detection is to be believed: every step keeps each with a probability equal to its score, so that it
    counts as often as the teacher trusts it, or, with ``score_threshold``, those that reach it. Images where nothing is kept
    teach the background. Self-training on pseudo-labels is old (Lee, 2013); drawing them by score is ours. A resumed run draws
    the same, and so does one with another number of workers.

    Args:
        score_threshold: keep detections of at least this score, always; None draws.

    Raises:
        RecipeError: `refuse_unfit`: a teacher without masks for a student that learns them; (first step) a label that the student
            has no class for.
    """

    needs = frozenset({"detections"})

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 1.0,
        score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight)
        self.score_threshold = score_threshold

    def loss(self, batch: Batch) -> Tensor:
        samples = [
            self._pseudo(n, sample, found, batch)
            for n, (sample, found) in enumerate(zip(batch.samples, batch.detections or (), strict=True))
        ]
        features = tuple(feature.float() for feature in batch.features)
        losses = _loss_on(batch.student, features, batch.inputs, samples)
        return torch.stack([_scalar(value) for name, value in losses.items() if "loss" in name]).sum()

    def refuse_unfit(self, student: nn.Module, teacher: nn.Module, capture: Sequence[str] = ("neck",)) -> None:
        if student.with_mask and not teacher.with_mask:
            raise RecipeError(
                "stages: DetectionLoss: the student learns masks, the teacher gives none. Take a teacher with masks, or a "
                "student without."
            )

    def _pseudo(self, n: int, sample: DetDataSample, found: Detections, batch: Batch) -> DetDataSample:
        """A sample whose truth are those of the teacher's detections that this step keeps."""
        classes = _classes(batch.student)
        if len(found) and int(found.labels.max()) >= classes:
            raise RecipeError(
                f"stages: DetectionLoss: the teacher detects class {int(found.labels.max())}, the student has {classes} classes "
                "(counted from 0). Take a teacher that was trained on the student's classes."
            )
        height, width = sample.img_shape[:2]
        boxes = torch.from_numpy(np.array(found.boxes)).view(-1, 4)
        boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=2).flatten(1)
        scores = torch.from_numpy(np.array(found.scores))
        if self.score_threshold is None:
            kept = torch.rand(len(scores), generator=draws.generator(batch.samples, n, "DetectionLoss", "cpu")) < scores
        else:
            kept = scores >= self.score_threshold
        kept &= ((boxes[:, 2:] - boxes[:, :2]) >= _SMALLEST).all(dim=1)
        device = batch.inputs.device
        truth = InstanceData(
            bboxes=boxes[kept].to(device), labels=torch.from_numpy(found.labels[kept.numpy()]).long().to(device)
        )
        if getattr(batch.student, "with_mask", False):
            bitmaps = _masks(found, kept.nonzero().flatten().tolist(), _view(sample, batch.input_scale))
            truth.masks = bitmaps.resize((height, width)).pad(tuple(batch.inputs.shape[-2:]))
        pseudo = DetDataSample(metainfo=sample.metainfo, gt_instances=truth)
        if "ignored_instances" in sample:
            pseudo.ignored_instances = sample.ignored_instances
        return pseudo


def _view(sample: DetDataSample, input_scale: float) -> tuple[int, int]:
    """Rows and columns of the view that a student's input shows."""
    height, width = sample.img_shape[:2]
    if input_scale == 1:
        return height, width
    across, down = sample.scale_factor  # of the last resize, which made the input of the view
    return round(height / down), round(width / across)


def _masks(found: Detections, kept: Sequence[int], view: tuple[int, int]) -> BitmapMasks:
    """The masks of some detections, over the view."""
    bitmaps = [coco_mask.decode({"size": list(view), "counts": found.masks[k]}) for k in kept]
    return BitmapMasks(bitmaps, *view)


def _loss_on(
    student: nn.Module, features: tuple[Tensor, ...], inputs: Tensor, samples: list[DetDataSample]
) -> dict[str, Any]:
    """A detector's losses on features that it has already extracted."""
    student.extract_feat = lambda *_arguments, **_options: features
    try:
        return student.loss(inputs, samples)
    finally:
        del student.extract_feat


def _scalar(value: Tensor | Sequence[Tensor]) -> Tensor:
    """As mmengine reads a detector's losses: the mean of a tensor, the sum of the means of a list."""
    return value.mean() if isinstance(value, Tensor) else torch.stack([one.mean() for one in value]).sum()


def _classes(student: nn.Module) -> int:
    head = getattr(student, "bbox_head", None) or student.roi_head.bbox_head
    return int((head[0] if isinstance(head, nn.ModuleList) else head).num_classes)
