"""What mmdet's heads divide their losses by, summed over all parts of a step: see `trainer.parts`.

mmdet normalises by each worker's own counts, or by their mean over workers. Here a part's losses are its addends of those of the
whole batch, so that the number of parts does not matter.
"""

from collections.abc import Callable
from typing import Any

import torch
from mmdet.models.dense_heads import (
    AnchorHead,
    ATSSHead,
    FCOSHead,
    GFLHead,
    RepPointsHead,
    RPNHead,
    atss_head,
    fcos_head,
    gfl_head,
)
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import Tensor, nn

from trainer import parts

# these divide by `reduce_mean` of a count that they clamp afterwards: with its sum over parts the clamp is the whole batch's
for _module in (atss_head, fcos_head, gfl_head):
    _module.reduce_mean = parts.whole

_REDUCED = {ATSSHead.loss_by_feat, FCOSHead.loss_by_feat, GFLHead.loss_by_feat}
_COUNTED = {AnchorHead.loss_by_feat, RPNHead.loss_by_feat, RepPointsHead.loss_by_feat}


def sum_over_parts(student: nn.Module) -> bool:
    """Let a detector's losses be addends of the whole batch's.

    Returns:
        Whether it is of a family of which this is known: one-stage with the head of RetinaNet, ATSS, GFL, FCOS or RepPoints, or
        Faster and Mask R-CNN. Of others the losses of the parts are averaged, as mmdet does.
    """
    heads = [head for name in ("rpn_head", "bbox_head") if (head := getattr(student, name, None)) is not None]
    roi = getattr(student, "roi_head", None)
    if not heads or not all(_is_dense(head) for head in heads) or not (roi is None or _is_standard(roi)):
        student.loss = _averaged(student.loss)
        return False
    for head in heads:
        if type(head).loss_by_feat in _COUNTED:
            head.get_targets = _counted(head.get_targets)
    if roi is not None:
        roi.bbox_head.loss = _box_losses(roi.bbox_head.loss)
        if roi.with_mask:
            roi.mask_head.loss_and_target = _mask_losses(roi.mask_head.loss_and_target)
    return True


def _is_dense(head: nn.Module) -> bool:
    return getattr(type(head), "loss_by_feat", None) in _REDUCED | _COUNTED


def _is_standard(roi: nn.Module) -> bool:
    kind = type(roi)
    # a cascade's heads are lists
    if kind.loss is not StandardRoIHead.loss or type(roi.bbox_head).loss is not BBoxHead.loss:
        return False
    # others (Mask Scoring R-CNN, PointRend) have further losses in it
    masks = kind.mask_loss is StandardRoIHead.mask_loss
    return not roi.with_mask or (masks and type(roi.mask_head).loss_and_target is FCNMaskHead.loss_and_target)


def _averaged(loss: Callable[..., dict]) -> Callable[..., dict]:
    """Losses whose sum over parts is their mean."""

    def addends(*arguments: Any, **options: Any) -> dict:
        return {
            name: _divided(value) if "loss" in name else value for name, value in loss(*arguments, **options).items()
        }

    def _divided(value: Any) -> Any:
        return [one / parts.count() for one in value] if isinstance(value, list | tuple) else value / parts.count()

    return addends


def _counted(get_targets: Callable[..., tuple]) -> Callable[..., tuple]:
    """Targets with the number of samples, the only one among them, summed over parts."""

    def summed(*arguments: Any, **options: Any) -> tuple:
        targets = get_targets(*arguments, **options)
        if parts.count() == 1:
            return targets
        device = targets[0][0].device
        return tuple(
            parts.whole(torch.tensor(float(value), device=device)) if isinstance(value, int | float) else value
            for value in targets
        )

    return summed


def _box_losses(loss: Callable[..., dict]) -> Callable[..., dict]:
    """Losses of an R-CNN's boxes: means over its samples, of which some may weigh nothing, and over all of them."""

    def addends(cls_score: Any, bbox_pred: Any, rois: Tensor, *targets: Any, **options: Any) -> dict:
        losses = loss(cls_score, bbox_pred, rois, *targets, **options)
        if parts.count() == 1:
            return losses
        weights = targets[1]
        counts = torch.stack([(weights > 0).sum().float(), weights.new_tensor(float(len(weights)))])
        shares = counts / parts.whole(counts).clamp(min=1)
        of = {"loss_cls": shares[0], "loss_bbox": shares[1]}
        return {name: value * of[name] if name in of else value for name, value in losses.items()}

    return addends


def _mask_losses(loss: Callable[..., dict]) -> Callable[..., dict]:
    """The loss of an R-CNN's masks: a mean over its positives."""

    def addends(mask_preds: Tensor, *arguments: Any, **options: Any) -> dict:
        found = loss(mask_preds, *arguments, **options)
        if parts.count() == 1:
            return found
        count = mask_preds.new_tensor(float(len(mask_preds)))
        found["loss_mask"]["loss_mask"] = found["loss_mask"]["loss_mask"] * count / parts.whole(count).clamp(min=1)
        return found

    return addends
