"""Which positions of a dense head are positive: the head's own assigner on the ground truth."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmdet.models.dense_heads import FCOSHead
from mmdet.models.utils import unpack_gt_instances
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from cache import RecipeError
from trainer import parts
from trainer.dense import family


@dataclass(frozen=True)
class Assignment:
    """What a head learns at each position.

    Attributes:
        labels: per level (N, H * W * A) int64, a class; the number of classes for the background.
        weights: per level (N, H * W * A) float32, zero where the head ignores a position: between its thresholds, or outside
            an image's own padded view.
        average: scalar float32, what the head divides its losses by, summed over all parts of the step: the number of
            positives, for FCOS the sum of their centerness.
    """

    labels: list[Tensor]
    weights: list[Tensor]
    average: Tensor


def refuse_other_targets(head: nn.Module, key: str) -> None:
    """Refuse a head whose targets `assign` cannot read: one that does not get them as its family does.

    Args:
        head: a dense head of a known family.
        key: what the message begins with.

    Raises:
        RecipeError: such a head (PAA and LAD find their positives by their losses, in a second pass).
    """
    kind = family(head)
    if type(head).get_targets is not kind.get_targets:
        raise RecipeError(
            f"{key}: a {type(head).__name__} finds its positives in another way than a {kind.__name__}, which this mechanism "
            "cannot follow. Take a student with one of these, or DenseLogitLoss, or mechanisms on features or detections."
        )


@torch.no_grad()
def assign(
    head: nn.Module, sizes: Sequence[tuple[int, int]], samples: Sequence[DetDataSample], device: torch.device
) -> Assignment:
    """The targets of a head of an anchor-based family, or FCOS, for a batch.

    Args:
        sizes: per level rows and columns of the head's maps.
    """
    truth, ignored, meta = unpack_gt_instances(list(samples))
    if isinstance(head, FCOSHead):
        points = head.prior_generator.grid_priors(sizes, dtype=torch.float32, device=device)
        flat, boxes = head.get_targets(points, truth)
        labels = [of_level.view(len(truth), -1) for of_level in flat]
        positive = torch.cat(flat) < head.num_classes
        centerness = head.centerness_target(torch.cat(boxes)[positive]).sum()
        weights = [torch.ones_like(of_level, dtype=torch.float32) for of_level in labels]
        return Assignment(labels, weights, parts.whole(centerness).clamp(min=1e-6))
    anchors, valid = head.get_anchors(sizes, meta, device=device)
    # anchor-free assigners of this family put the anchors first: the rest is counted from the end
    # of the class: what the head itself calls has summed the count over parts already
    targets = type(head).get_targets(head, anchors, valid, truth, meta, batch_gt_instances_ignore=ignored)
    *_, labels, weights, _, _, count = targets
    return Assignment(labels, weights, parts.whole(torch.tensor(float(count), device=device)).clamp(min=1))
