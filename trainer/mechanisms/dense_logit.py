"""Sparse dense-logit distillation: the class logits of the student's head against the teacher's best positions."""

from collections.abc import Sequence
from typing import Literal

import torch
from mmdet.models.losses.iou_loss import giou_loss
from mmdet.models.losses.kd_loss import knowledge_distillation_kl_div_loss
from torch import Tensor, nn

from cache import Level, RecipeError, level_name
from trainer import parts
from trainer.dense import check_dense, decode, dense_shape, family, flat_outputs, place, same_priors, strides
from trainer.mechanisms.base import MECHANISMS, Batch, LevelNames, Mechanism, Temperature, Weight
from trainer.mechanisms.soft_targets import quality_focal


@MECHANISMS.register_module()
class DenseLogitLoss(Mechanism):
    """Class logits at the positions that the cache keeps of the teacher's dense head, all levels in one sum.

    - ``qfl``, the default of sigmoid heads (RetinaNet, GFL, ATSS, FCOS, RepPoints as they ship): ``loss_weight / Q * sum over
      positions and classes of KDQFL(s, t)``, `quality_focal` with beta 1 as in CrossKD (Wang et al., CVPR 2024). Q is the sum
      over the positions of the teacher's highest score, at least 1: the number of objects' positions that
      the teacher expects, in place of CrossKD's number of positive anchors. Positions and Q are ours.
    - ``kl``, the default of softmax heads: ``loss_weight * mean over positions of T^2 * mean over classes of KL(softmax(t / T) ||
      softmax(s / T))``, mmdet's ``KnowledgeDistillationKLDivLoss`` (Hinton et al., 2015).
    - ``box_weight > 0`` adds ``loss_weight * box_weight / Q * sum over positions of q * (1 - GIoU)`` of the decoded boxes, q the
      teacher's highest score there. Both heads must be of one family.

    A position is (row, column, anchor). The heads must have equal anchors and classes. Positions outside the student's map are
    left out.

    Args:
        mode: ``qfl`` or ``kl``; by default what suits the student's head.
        temperature: T.
        levels: the levels to use; by default all that both heads have.

    Raises:
        RecipeError: `refuse_unfit`: no dense head, other anchors or classes, no common level, with ``box_weight`` another family,
            with ``mode: kl`` a single class logit.
    """

    needs = frozenset({"dense"})

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 1.0,
        mode: Literal["qfl", "kl"] | None = None,
        temperature: Temperature = 10.0,
        box_weight: Weight = 0.0,
        levels: LevelNames | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight)
        if mode not in (None, "qfl", "kl"):
            raise RecipeError(f"stages: DenseLogitLoss.mode: {mode!r} is not known; take qfl or kl.")
        self.mode, self.temperature, self.box_weight = mode, temperature, box_weight
        self.levels = None if levels is None else list(levels)

    def loss(self, batch: Batch) -> Tensor:
        head = student_head(batch, type(self).__name__)
        stored = batch.dense
        names = [level_name(stride) for stride in strides(head)]
        used = [name for name in names if name in stored[0]] if self.levels is None else self.levels
        flat = flat_outputs(head, batch.head_outputs)
        ours, theirs, boxes, their_boxes = [], [], [], []
        for name in used:
            level = names.index(name)
            logits, terms = flat[level]
            size = tuple(batch.head_outputs[0][level].shape[-2:])
            for n, of_image in enumerate(stored):
                positions, kept = place(of_image[name], size)
                ours.append(logits[n, positions])
                theirs.append(of_image[name].logits[kept])
                if self.box_weight:
                    boxes.append(decode(head, level, positions, size, terms[n, positions]))
                    their_boxes.append(decode(head, level, positions, size, of_image[name].terms[kept]))
        s, t = torch.cat(ours), torch.cat(theirs)
        sigmoid = s.shape[1] == head.num_classes
        best = (t.sigmoid() if sigmoid else t.softmax(dim=1)[:, : head.num_classes]).amax(dim=1)
        expected = parts.whole(best.sum()).clamp(min=1)
        if self.mode == "kl" or (self.mode is None and not sigmoid):
            positions = parts.whole(s.new_tensor(float(len(s)))).clamp(min=1)
            loss = knowledge_distillation_kl_div_loss(s, t, T=self.temperature) * len(s) / positions
        else:
            loss = quality_focal(s, t).sum() / expected
        if self.box_weight:
            loss = loss + self.box_weight * giou_loss(
                torch.cat(boxes), torch.cat(their_boxes), best, avg_factor=expected
            )
        return loss

    def refuse_unfit(self, student: nn.Module, teacher: nn.Module, capture: Sequence[str] = ("neck",)) -> None:
        ours, theirs = dense_heads(student, teacher, type(self).__name__)
        names, known = ([level_name(stride) for stride in strides(head)] for head in (ours, theirs))
        used = [name for name in names if name in known] if self.levels is None else self.levels
        if not used or any(name not in names or name not in known for name in used):
            raise RecipeError(
                f"stages: DenseLogitLoss.levels: the student's head has {', '.join(names)}, the teacher's "
                f"{', '.join(known)}; name levels that both have."
            )
        refuse_other_positions(ours, theirs, used, type(self).__name__)
        if self.mode == "kl" and dense_shape(ours)[1] == 1:
            raise RecipeError(
                "stages: DenseLogitLoss.mode: kl compares softmaxes over the class logits; with one class and sigmoid there is "
                "one, whose softmax is 1 on both sides, and the loss is 0. Take qfl, the default."
            )
        if self.box_weight and family(ours) is not family(theirs):
            raise RecipeError(
                f"stages: DenseLogitLoss.box_weight: boxes of a {type(theirs).__name__} are not read as those of the student's "
                f"{type(ours).__name__}. Set it to 0, or take a teacher of the student's family."
            )


def student_head(batch: Batch, mechanism: str) -> nn.Module:
    """The student's dense head.

    Raises:
        RecipeError: it has none of a known family.
    """
    head = getattr(batch.student, "bbox_head", None)
    check_dense(head, f"stages: {mechanism}: student")
    return head


def dense_heads(student: nn.Module, teacher: nn.Module, mechanism: str) -> tuple[nn.Module, nn.Module]:
    """The dense heads of two detectors.

    Raises:
        RecipeError: one has none of a known family.
    """
    heads = [getattr(detector, "bbox_head", None) for detector in (student, teacher)]
    for head, who in zip(heads, ("student", "teacher"), strict=True):
        check_dense(head, f"stages: {mechanism}: {who}")
    return heads[0], heads[1]


def refuse_other_positions(ours: nn.Module, theirs: nn.Module, levels: Sequence[str], mechanism: str) -> None:
    """Refuse heads that do not predict the same classes at the same places of some levels.

    Raises:
        RecipeError: other anchors or classes.
    """
    (anchors, classes, _), (their_anchors, their_classes, _) = dense_shape(ours), dense_shape(theirs)
    why = None
    if (anchors, classes) != (their_anchors, their_classes):
        why = (
            f"the teacher's head has {their_anchors} anchors and {their_classes} class logits a position, the student's "
            f"{type(ours).__name__} {anchors} and {classes}"
        )
    elif anchors > 1:  # a cell's only logits mean the same whatever its anchor's size
        differing = [s for s in strides(ours) if level_name(s) in levels and not same_priors(ours, theirs, s)]
        if differing:
            why = f"the anchors of teacher and student differ on {', '.join(map(level_name, differing))}"
    if why is not None:
        raise RecipeError(
            f"stages: {mechanism}: {why}. Take a teacher with such a head, or DetectionLoss, which only needs equal classes."
        )
