"""CrossKD: the student's half-way head features through the rest of the teacher's head."""

import copy
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead
from mmdet.models.losses.iou_loss import giou_loss, iou_loss
from mmdet.models.losses.kd_loss import knowledge_distillation_kl_div_loss
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from cache import Level, RecipeError, level_name
from trainer import parts
from trainer.assignment import assign, refuse_other_targets
from trainer.capture import levels_of_the_head
from trainer.dense import decode, dense_shape, flat_outputs, same_priors, strides
from trainer.mechanisms.base import MECHANISMS, Batch, Mechanism, Weight, pair
from trainer.mechanisms.dense_logit import dense_heads, student_head
from trainer.mechanisms.soft_targets import quality_focal

# weights of the authors' configurations: class, box, centerness
_WEIGHTS = {
    RetinaHead: (1.0, 1.0, 0.0),
    ATSSHead: (1.0, 1.0, 1.0),
    FCOSHead: (0.4, 0.75, 0.0),
    GFLHead: (1.0, 4.0, 0.0),
}

_Towers = list[list[list[Tensor]]]  # by image, level and branch (class, box): (1, C, h, w)


@MECHANISMS.register_module()
class CrossKDLoss(Mechanism):
    """Cross-head distillation (Wang et al., CVPR 2024): teacher's predictions against the cross predictions.

    Both towers' features of the student after convolution ``reused_teacher_head_idx``, before the activation, are brought per
    channel and level to the mean and deviation of the teacher's at the same point, and go on through the rest of the teacher's
    frozen head. With p the teacher's outputs and q these cross outputs at the positions that the student's assigner does not
    ignore, v the teacher's highest score of a position, and M what the student's head divides its losses by (the number of
    positives; for FCOS the sum of their centerness):

        ``loss_weight * (cls_weight / M * sum KDQFL(q, p) + reg_weight * reg + ctr_weight / M * sum over positives of BCE)``

    - reg of RetinaNet and ATSS: ``1 / M * sum v * (1 - GIoU)`` of the decoded boxes; of FCOS ``1 / M * sum v * -log IoU``;
    - reg of GFL: ``1 / (4 sum v) * sum over the 4 sides of v * KL(p || q)`` at temperature 1.

    The teacher's own outputs are its head run on the cached pyramid: no backbone. An image is seen in its own map alone, as the
    teacher saw it, whatever its batch is padded to; so are the moments and the sums (the authors run over the padding). The
    student's towers run a second time for their inner maps, up to that convolution.

    Args:
        reused_teacher_head_idx: convolutions that the student does itself; by default all but the last, for FCOS all but two (3
            and 2 of 4, as the authors).
        cls_weight, reg_weight, ctr_weight: by default the authors' for the family: RetinaNet 1, 1, -; ATSS 1, 1, 1; FCOS 0.4,
            0.75, -; GFL 1, 4, -.

    Raises:
        RecipeError: pooled levels; `refuse_unfit`: no dense head of these four families, a student that finds its positives in a
            way of its own, a teacher's head of another family, with other anchors, strides, classes, bins or channels, a level
            that the two do not have in common, captured maps that the teacher's head does not read.
    """

    needs = frozenset({"features", "head"})

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 1.0,
        reused_teacher_head_idx: Annotated[int, Field(ge=0)] | None = None,
        cls_weight: Weight | None = None,
        reg_weight: Weight | None = None,
        ctr_weight: Weight | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight)
        self.pairs = pair(student, teacher, None, type(self).__name__)
        pooled = [name for name, (_, theirs) in self.pairs.items() if theirs.pool != 1]
        if pooled:
            raise RecipeError(
                f"stages: CrossKDLoss: {', '.join(pooled)} of the teacher is stored pooled; its head needs the whole map. "
                "Remove it from teachers.NAME.pool."
            )
        self.index = reused_teacher_head_idx
        self.weights = cls_weight, reg_weight, ctr_weight

    def loss(self, batch: Batch) -> Tensor:
        head, theirs = student_head(batch, type(self).__name__), batch.teacher_head
        index, names = self._reused(theirs), [level_name(stride) for stride in strides(theirs)]
        features = [feature.float() for feature in batch.features]
        towers = [_towers(head, index, feature) for feature in features]
        own = _own_sizes(batch, names)
        ours = [
            [[_crop(b, n, size) for b in towers[level]] for level, size in enumerate(of)] for n, of in enumerate(own)
        ]
        rest = _rest(theirs, index)
        with torch.no_grad():
            maps = [
                [_crop(batch.targets[k].float(), n, size) for k, size in zip(names, of, strict=True)]
                for n, of in enumerate(own)
            ]
            held = [[_towers(theirs, index, one) for one in of_image] for of_image in maps]
            told = [rest(of_image) for of_image in held]
        crossed = [rest(of_image) for of_image in _matched(ours, held)]
        assigned = assign(head, [tuple(feature.shape[-2:]) for feature in features], batch.samples, features[0].device)
        seen: dict[str, list[Tensor]] = defaultdict(list)
        for n, of_image in enumerate(own):
            flat_told, flat_crossed = flat_outputs(theirs, told[n]), flat_outputs(theirs, crossed[n])
            for level, size in enumerate(of_image):
                for who, outputs, flat in (("p", told[n], flat_told), ("q", crossed[n], flat_crossed)):
                    logits, terms = flat[level][0][0], flat[level][1][0]
                    seen[f"{who}_logits"].append(logits)
                    if isinstance(theirs, GFLHead):
                        seen[f"{who}_box"].append(terms)
                    else:
                        places = torch.arange(len(terms), device=terms.device)
                        seen[f"{who}_box"].append(decode(theirs, level, places, size, terms))
                    if isinstance(theirs, ATSSHead):
                        seen[f"{who}_centre"].append(outputs[2][level].permute(0, 2, 3, 1).flatten())
                full = features[level].shape[-2:]
                seen["weights"].append(_own(assigned.weights[level][n], full, size))
                seen["labels"].append(_own(assigned.labels[level][n], full, size))
        return self._sum(theirs, {name: torch.cat(values) for name, values in seen.items()}, assigned.average)

    def _sum(self, theirs: nn.Module, seen: Mapping[str, Tensor], average: Tensor) -> Tensor:
        """The parts of the loss of the positions of all levels and images."""
        family = _family(theirs)
        cls, reg, ctr = (
            default if given is None else given for given, default in zip(self.weights, _WEIGHTS[family], strict=True)
        )
        p, q, weights = seen["p_logits"], seen["q_logits"], seen["weights"]
        loss = cls * (quality_focal(q, p) * weights[:, None]).sum() / average
        trust = p.sigmoid().amax(dim=1) * (weights > 0)
        if family is GFLHead:
            ours, told = (seen[name].reshape(len(p) * 4, -1) for name in ("q_box", "p_box"))
            kl = (
                knowledge_distillation_kl_div_loss(ours, told, reduction="none", T=1) * ours.shape[1]
            )  # a sum over bins
            return loss + reg * (kl * trust.repeat_interleave(4)).sum() / (4 * parts.whole(trust.sum()))
        overlap = iou_loss if family is FCOSHead else giou_loss
        loss = loss + reg * overlap(seen["q_box"], seen["p_box"], trust, avg_factor=average)
        if family is ATSSHead:
            positive = (seen["labels"] >= 0) & (seen["labels"] < theirs.num_classes)
            told = seen["p_centre"][positive].sigmoid()
            error = F.binary_cross_entropy_with_logits(seen["q_centre"][positive], told, reduction="sum")
            loss = loss + ctr * error / average
        return loss

    def _reused(self, theirs: nn.Module) -> int:
        if self.index is not None:
            return self.index
        return max(0, theirs.stacked_convs - (2 if isinstance(theirs, FCOSHead) else 1))

    def refuse_unfit(self, student: nn.Module, teacher: nn.Module, capture: Sequence[str] = ("neck",)) -> None:
        head, theirs = dense_heads(student, teacher, type(self).__name__)
        refuse_other_targets(head, f"stages: {type(self).__name__}: student")
        kind = _family(head)
        index, names = self._reused(theirs), [level_name(stride) for stride in strides(theirs)]
        why = None
        if kind is None:
            why = f"a {type(head).__name__} is none of {', '.join(f.__name__ for f in _WEIGHTS)}"
        elif _family(theirs) is not kind:
            why = f"the student has a {type(head).__name__}, the teacher a {type(theirs).__name__}"
        elif strides(head) != strides(theirs) or not all(same_priors(head, theirs, s) for s in strides(head)):
            why = "the heads' strides or anchors differ"
        elif dense_shape(head) != dense_shape(theirs):
            why = f"anchors, class logits and box terms are {dense_shape(head)} and the teacher's {dense_shape(theirs)}"
        elif not 0 <= index <= min(head.stacked_convs, theirs.stacked_convs):
            why = (
                f"reused_teacher_head_idx is {index}, the student's head has {head.stacked_convs} convolutions, the teacher's "
                f"{theirs.stacked_convs}"
            )
        elif (head.feat_channels if index else head.in_channels) != (
            theirs.feat_channels if index else theirs.in_channels
        ):
            why = f"after convolution {index} the heads have different numbers of channels"
        elif missing := [name for name in names if name not in self.pairs]:
            why = f"the teacher's head reads {', '.join(missing)} too, which is not among the levels that both have"
        elif any(self.pairs[name][1].channels != theirs.in_channels for name in names):
            why = f"the teacher's head reads {theirs.in_channels} channels; capture the maps that it reads (its neck)"
        elif other := set(names) - levels_of_the_head(teacher, capture, "teachers.NAME.capture"):
            why = (
                f"the teacher's head does not read what is captured on {', '.join(sorted(other))}; capture the maps that it "
                "reads (its neck)"
            )
        elif any(ours.stride != told.stride for ours, told in self.pairs.values()):
            why = "the student sees its views at another scale than the teacher"
        if why is not None:
            raise RecipeError(
                f"stages: CrossKDLoss: {why}. The student's features go through the teacher's head, so both need the same "
                "family, anchors, strides, classes and channels; take such a teacher, or a mechanism on features."
            )


class _Entry(nn.Module):
    """Stands before the rest of a tower: takes its branch of a pair of maps."""

    def __init__(self, branch: int, activate: bool) -> None:
        super().__init__()
        self.branch, self.activate = branch, activate

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return F.relu(maps[self.branch]) if self.activate else maps[self.branch]


def _rest(head: nn.Module, index: int) -> nn.Module:
    """A head from convolution ``index`` on, of the same weights; reads per level the pair of its towers' maps."""
    rest = copy.copy(head)
    towers = {
        name: nn.ModuleList([_Entry(branch, index > 0), *getattr(head, name)[index:]])
        for branch, name in enumerate(("cls_convs", "reg_convs"))
    }
    rest.__dict__["_modules"] = {**head._modules, **towers}  # the copy shares its dictionary with the head
    return rest


def _towers(head: nn.Module, index: int, feature: Tensor) -> list[Tensor]:
    """Both towers' maps after convolution ``index``, not activated; the feature itself for 0."""
    inner = []
    for convs in (head.cls_convs, head.reg_convs):
        x = feature
        for place, conv in enumerate(convs[:index], start=1):
            x = conv(x, activate=place < index)
        inner.append(x)
    return inner


def _matched(ours: _Towers, theirs: _Towers) -> _Towers:
    """The student's maps with the teacher's moments: by image, level and branch (1, C, h, w)."""
    matched: _Towers = [[[] for _ in of_image] for of_image in ours]
    for level in range(len(ours[0])):
        for branch in range(2):
            joint = partial(parts.joint, what="CrossKDLoss")
            mean, deviation = _moments([of_image[level][branch] for of_image in ours], joint)
            their_mean, their_deviation = _moments([of_image[level][branch] for of_image in theirs], parts.whole)
            for out, of_image in zip(matched, ours, strict=True):
                normed = (of_image[level][branch] - mean) / (deviation + 1e-6)
                out[level].append(normed * their_deviation + their_mean)
    return matched


def _moments(maps: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over the positions of all images of the whole batch: (1, C, 1, 1)."""
    columns = torch.cat([one[0].flatten(1) for one in maps], dim=1)
    count = columns.shape[1]
    mean, variance = columns.mean(dim=1), columns.var(dim=1, correction=min(1, count - 1))
    if parts.count() > 1:
        squares = variance * (count - min(1, count - 1))
        count, mean, biased = parts.combined(mean.new_tensor(float(count)), mean, squares, total)
        variance = biased * count / (count - 1).clamp(min=1)
    # the root of exactly zero has no gradient
    return mean.view(1, -1, 1, 1), (variance + 1e-12).sqrt().view(1, -1, 1, 1)


def _own_sizes(batch: Batch, names: Sequence[str]) -> list[list[tuple[int, int]]]:
    """By image and level rows and columns of the teacher's own map."""
    sides = [(batch.valid[k].any(dim=3).sum(dim=2), batch.valid[k].any(dim=2).sum(dim=2)) for k in names]
    numbers = torch.stack([torch.cat(pair, dim=1) for pair in sides], dim=1).tolist()
    return [[(rows, columns) for rows, columns in of_image] for of_image in numbers]


def _crop(maps: Tensor, n: int, size: tuple[int, int]) -> Tensor:
    return maps[n : n + 1, :, : size[0], : size[1]]


def _own(values: Tensor, full: Sequence[int], size: tuple[int, int]) -> Tensor:
    """Values (H * W * A,) of one image's padded map at the positions of its own map."""
    return values.view(*full, -1)[: size[0], : size[1]].flatten()


def _family(head: nn.Module) -> type[nn.Module] | None:
    return next((family for family in _WEIGHTS if isinstance(head, family)), None)
