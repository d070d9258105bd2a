"""LD: how the teacher spreads each side of a box over distances, at the student's own positives."""

import logging
from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import GFLHead
from mmdet.models.losses.kd_loss import knowledge_distillation_kl_div_loss
from mmdet.structures.bbox import bbox_overlaps
from mmengine.logging import print_log
from torch import Tensor, nn

from cache import Level, RecipeError, level_name
from trainer import parts
from trainer.assignment import assign, refuse_other_targets
from trainer.dense import dense_shape, flat_outputs, place, strides
from trainer.mechanisms.base import MECHANISMS, Batch, Mechanism, Temperature, Weight
from trainer.mechanisms.dense_logit import dense_heads, refuse_other_positions, student_head


@MECHANISMS.register_module()
class LDLoss(Mechanism):
    """Localisation distillation with class distillation, for students and teachers with GFL heads of equal ``reg_max``.

    The sum over levels of three parts; KL at temperature T is mmdet's, ``T^2 * mean over bins of p * log(p / q)`` with p =
    softmax(t / T), q = softmax(s / T):

    - ``ld_weight * 1/4 * sum over positives and their 4 sides of v * KL``, v the student's highest class score there, T =
      ``temperature``. Positives are those of the student's own assigner. This is ``loss_ld`` of mmdet's ``LDHead``, which like
      it is not divided by the number of positives (Zheng et al., CVPR 2022, eq. 5).
    - ``vlr_weight * 1/16 * sum over the valuable region and 4 sides of u * KL``: anchors with ``0.25 a <= DIoU < a`` to a box,
      a the threshold of ATSS for that box, u their highest IoU with such boxes (section 3.3 and the authors' code).
    - ``kd_weight * mean over positives of KL`` of the class logits, T = ``kd_temperature`` (the authors' configuration). It is 0
      for one class: the softmax of one logit is 1. That is logged once.

    Only positions whose outputs are stored take part. `coverage` says which share of the positives these were: with a small
    ``teachers.NAME.top_k`` the teacher's best positions may miss positives of small or unsure objects.

    Args:
        loss_weight: of the whole.
        ld_weight, vlr_weight, kd_weight: of the parts; the authors' are 0.25, 0.25 and 10, the valuable region is off here.

    Raises:
        RecipeError: `refuse_unfit`: a head without distributions, or with others; other classes; a level that the teacher's head
            lacks; a student that finds its positives in a way of its own.
    """

    needs = frozenset({"dense"})

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 1.0,
        ld_weight: Weight = 0.25,
        temperature: Temperature = 10.0,
        vlr_weight: Weight = 0.0,
        kd_weight: Weight = 10.0,
        kd_temperature: Temperature = 2.0,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight)
        self.ld_weight, self.vlr_weight, self.kd_weight = ld_weight, vlr_weight, kd_weight
        self.temperature, self.kd_temperature = temperature, kd_temperature
        self._told = False
        self.register_buffer("positives", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("covered", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def coverage(self) -> float:
        """The share of the positives so far whose outputs were stored."""
        return int(self.covered) / max(1, int(self.positives))

    def metrics(self) -> dict[str, float]:
        """`coverage`."""
        return {"coverage": self.coverage}

    def loss(self, batch: Batch) -> Tensor:
        head = student_head(batch, type(self).__name__)
        self._tell_of_one_class(head)
        sizes = [tuple(scores.shape[-2:]) for scores in batch.head_outputs[0]]
        device = batch.head_outputs[0][0].device
        assigned = assign(head, sizes, batch.samples, device)
        regions = valuable_region(head, sizes, batch) if self.vlr_weight else [None] * len(sizes)
        flat = flat_outputs(head, batch.head_outputs)
        losses = []
        for level, (stride, (logits, terms)) in enumerate(zip(strides(head), flat, strict=True)):
            their_logits, their_terms = torch.zeros_like(logits), torch.zeros_like(terms)
            known = torch.zeros(logits.shape[:2], dtype=torch.bool, device=device)
            for n, of_image in enumerate(batch.dense):
                dense = of_image[level_name(stride)]
                positions, kept = place(dense, sizes[level])
                known[n, positions] = True
                their_logits[n, positions], their_terms[n, positions] = dense.logits[kept], dense.terms[kept]
            positive = (assigned.labels[level] >= 0) & (assigned.labels[level] < head.num_classes)
            self.positives += positive.sum()
            positive &= known
            self.covered += positive.sum()
            score = logits.detach()[positive].sigmoid().amax(dim=1)
            losses.append(self.ld_weight / 4 * self._sides(terms[positive], their_terms[positive], score))
            kl = _kl(logits[positive], their_logits[positive], self.kd_temperature)
            losses.append(self.kd_weight * kl.sum() / parts.whole(positive.sum()).clamp(min=1))
            if regions[level] is not None:
                inside = (regions[level] > 0) & known
                weight = regions[level][inside]
                losses.append(self.vlr_weight / 16 * self._sides(terms[inside], their_terms[inside], weight))
        return torch.stack(losses).sum()

    def _tell_of_one_class(self, head: nn.Module) -> None:
        if self.kd_weight and dense_shape(head)[1] == 1 and not self._told:
            self._told = True
            print_log(
                "LDLoss: with one class its class part (kd_weight) is 0: the softmax of one logit is 1. The boxes' distributions "
                "are learnt as ever; for the class add DenseLogitLoss, whose default compares scores.",
                "current",
                logging.WARNING,
            )

    def _sides(self, ours: Tensor, theirs: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum of the KL of the four sides: (k, 4 * bins) each, weight (k,)."""
        bins = ours.shape[1] // 4
        kl = _kl(ours.reshape(-1, bins), theirs.reshape(-1, bins), self.temperature)
        return (kl * weight.repeat_interleave(4)).sum()

    def refuse_unfit(self, student: nn.Module, teacher: nn.Module, capture: Sequence[str] = ("neck",)) -> None:
        head, theirs = dense_heads(student, teacher, type(self).__name__)
        if not isinstance(head, GFLHead):
            raise RecipeError(
                f"stages: LDLoss: the student's {type(head).__name__} gives boxes, not distributions over distances. Take a "
                "student with a GFL head, or DenseLogitLoss."
            )
        refuse_other_targets(head, f"stages: {type(self).__name__}: student")
        wanted, known = ([level_name(stride) for stride in strides(one)] for one in (head, theirs))
        missing = [name for name in wanted if name not in known]
        if missing:
            raise RecipeError(
                f"stages: LDLoss: the student's head has levels {', '.join(wanted)}, the teacher's gives no "
                f"{', '.join(missing)}. Take a teacher whose head has the same levels."
            )
        if dense_shape(theirs)[2] != dense_shape(head)[2]:
            raise RecipeError(
                f"stages: LDLoss: the teacher gives {dense_shape(theirs)[2]} box terms a position, the student "
                f"4 x (reg_max + 1) = {dense_shape(head)[2]}. Both need GFL heads of equal reg_max."
            )
        refuse_other_positions(head, theirs, wanted, type(self).__name__)


@torch.no_grad()
def valuable_region(head: nn.Module, sizes: Sequence[tuple[int, int]], batch: Batch) -> list[Tensor]:
    """LD's valuable localisation region.

    Returns:
        Per level (N, H * W) float32: the highest IoU of an anchor with the boxes whose region it is in, else zero.
    """
    device = batch.head_outputs[0][0].device
    anchors, flags = head.get_anchors(sizes, [sample.metainfo for sample in batch.samples], device=device)
    counts = [len(of_level) for of_level in anchors[0]]
    candidates = getattr(head.assigner, "topk", 9)
    regions = []
    for own, valid, sample in zip(anchors, flags, batch.samples, strict=True):
        inside = torch.cat(valid)
        region = torch.zeros(len(inside), device=device)
        seen = [int(of_level.sum()) for of_level in valid]
        region[inside] = _region(torch.cat(own)[inside], seen, sample.gt_instances.bboxes, candidates)
        regions.append(region)
    return list(torch.stack(regions).split(counts, dim=1))


def _region(anchors: Tensor, counts: Sequence[int], boxes: Tensor, candidates: int) -> Tensor:
    """The region of one image: (anchors,) float32."""
    if not len(boxes):
        return anchors.new_zeros(len(anchors))
    iou = bbox_overlaps(anchors, boxes)
    centres = [(box[:, :2] + box[:, 2:]) / 2 for box in (anchors, boxes)]
    distance = torch.cdist(*centres, compute_mode="donot_use_mm_for_euclid_dist")
    low = torch.minimum(anchors[:, None, :2], boxes[None, :, :2])
    high = torch.maximum(anchors[:, None, 2:], boxes[None, :, 2:])
    diou = iou - distance.square() / (high - low).square().sum(dim=2).clamp(min=1e-7)
    starts = [sum(counts[:level]) for level in range(len(counts))]
    nearest = [
        start + of_level.topk(min(candidates, len(of_level)), dim=0, largest=False).indices
        for start, of_level in zip(starts, distance.split(list(counts)), strict=True)
    ]
    near = iou.gather(0, torch.cat(nearest))
    threshold = near.mean(dim=0) + near.std(dim=0)
    return (iou * ((diou >= 0.25 * threshold) & (diou < threshold))).amax(dim=1)


def _kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return knowledge_distillation_kl_div_loss(student, teacher, reduction="none", T=temperature)
