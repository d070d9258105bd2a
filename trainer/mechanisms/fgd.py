"""FGD: foreground and background apart, weighted by the teacher's attention, and the relation between positions."""

from collections.abc import Sequence

import torch
from mmdet.structures.bbox import get_box_tensor
from torch import Tensor, nn

from cache import Level
from trainer import parts
from trainer.mechanisms.base import (
    MECHANISMS,
    Batch,
    LevelMechanism,
    LevelNames,
    Temperature,
    Weight,
    fit,
    position_softmax,
)


@MECHANISMS.register_module()
class FGDLoss(LevelMechanism):
    """``loss_weight * sum over levels of (1 / N) * sum over images of (L_fea + L_att + L_rel)``.

    With the attentions over an image's own map, P positions of C channels,
    ``A^S(X) = P * softmax over positions (mean over channels |X| / temp)`` and
    ``A^C(X) = C * softmax over channels (mean over positions |X| / temp)``:

    - ``L_fea = sum (alpha_fgd * F + beta_fgd * B) * A^S(T) * A^C(T) * (S - T)^2``. F is 1 / (number of its positions) in a
      ground-truth box, the largest of these where boxes overlap; B is 1 / (number of positions outside all boxes) there.
    - ``L_att = gamma_fgd * (|A^C(S) - A^C(T)|_1 + |A^S(S) - A^S(T)|_1)``.
    - ``L_rel = lambda_fgd * sum (GC_S(S) - GC_T(T))^2``, `GlobalContext` blocks, learnt for the teacher's maps too.

    S is aligned by a learnable 1x1 convolution where channels differ. FGD (Yang et al., CVPR 2022), as released. A box
    covers the positions from ``floor(begin)`` to ``ceil(end)``, inclusively, as there. Three things are ours. Boxes are
    scaled by the level's stride, where the released code scales them by map over ``img_shape``, as if the map covered the
    image without its padding: boxes are displaced there in all but the largest image of a batch. Softmaxes and sums run over
    the own map only. A box's positions are counted where the map has them, so that a box at the edge weighs as much as any.

    Uses the ground truth of the student's samples, boxes in pixels of its input.

    Args:
        alpha_fgd, beta_fgd, gamma_fgd, lambda_fgd: weights of foreground, background, attention and relation.
        temp: temperature of the attentions.

    | the released configs                     | alpha  | beta   | gamma | lambda | temp | levels                     |
    |------------------------------------------|--------|--------|-------|--------|------|----------------------------|
    | RetinaNet, GFL (the defaults here)       | 1e-3   | 5e-4   | 5e-4  | 5e-6   | 0.5  | P3 to P7                   |
    | RepPoints                                | 1.6e-3 | 8e-4   | 8e-4  | 8e-6   | 0.5  | P3 to P7                   |
    | FCOS                                     | 1.6e-3 | 8e-4   | 8e-4  | 8e-6   | 0.8  | P3 to P7                   |
    | Faster and Mask R-CNN                    | 5e-5   | 2.5e-5 | 5e-5  | 5e-7   | 0.5  | P2 to P5                   |
    """

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 1.0,
        alpha_fgd: Weight = 1e-3,
        beta_fgd: Weight = 5e-4,
        gamma_fgd: Weight = 5e-4,
        lambda_fgd: Weight = 5e-6,
        temp: Temperature = 0.5,
        levels: LevelNames | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight, levels=levels)
        self.alpha_fgd, self.beta_fgd, self.gamma_fgd, self.lambda_fgd = alpha_fgd, beta_fgd, gamma_fgd, lambda_fgd
        self.temp = temp
        self.align = self.adapters()
        self.context_of_student, self.context_of_teacher = (
            nn.ModuleDict({name: GlobalContext(t.channels) for name, (_, t) in self.pairs.items()}) for _ in range(2)
        )

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        aligned = fit(self.align[level](student), valid)
        (where_s, which_s), (where_t, which_t) = (_attentions(m, valid, self.temp) for m in (aligned, teacher))
        theirs = self.pairs[level][1]
        scale = 1 / (theirs.stride * theirs.pool * batch.input_scale)  # cells per pixel of the student's input
        boxes = [get_box_tensor(sample.gt_instances.bboxes) for sample in batch.samples]
        foreground = torch.stack([_foreground(b, v[0], scale) for b, v in zip(boxes, valid, strict=True)])[:, None]
        background = valid & (foreground == 0)
        background = background / background.sum(dim=(2, 3), keepdim=True).clamp(min=1)
        weight = (self.alpha_fgd * foreground + self.beta_fgd * background) * where_t * which_t
        feature = (weight * (aligned - teacher).square()).sum()
        attention = (which_s - which_t).abs().sum() + (where_s - where_t).abs().sum()
        contexts = self.context_of_student[level](aligned, valid), self.context_of_teacher[level](teacher, valid)
        relation = ((contexts[0] - contexts[1]).square() * valid).sum()
        return (feature + self.gamma_fgd * attention + self.lambda_fgd * relation) / parts.images(teacher.shape[0])


class GlobalContext(nn.Module):
    """``X + W2 relu(LN(W1 context))``, the context a mean of the positions with learnt weights: the GcBlock of GCNet
    (Cao et al., 2019), its last layer zero at first, its softmax over each image's own map.

    Args:
        channels: C of the maps (N, C, H, W).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.score = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, channels)
        )
        nn.init.kaiming_normal_(self.score.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.score.bias)
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, maps: Tensor, valid: Tensor) -> Tensor:
        """(N, C, H, W), as the maps."""
        weights = position_softmax(self.score(maps), valid)
        return maps + self.transform((maps * weights).sum(dim=(2, 3)))[:, :, None, None]


def _attentions(maps: Tensor, valid: Tensor, temp: float) -> tuple[Tensor, Tensor]:
    """Where (N, 1, H, W) and in which channels (N, C, 1, 1) a map is large; each has mean 1."""
    count = valid.sum(dim=(2, 3), keepdim=True)
    magnitude = maps.abs()
    where = count * position_softmax(magnitude.mean(dim=1, keepdim=True) / temp, valid)
    mean = (magnitude * valid).sum(dim=(2, 3), keepdim=True) / count
    return where, maps.shape[1] * (mean / temp).softmax(dim=1)


def _foreground(boxes: Tensor, valid: Tensor, scale: float) -> Tensor:
    """F (H, W) of one image.

    Args:
        boxes: (k, 4), ``x1, y1, x2, y2`` in pixels of the student's input.
        valid: (H, W) bool.
        scale: cells per pixel.
    """
    if not len(boxes):
        return torch.zeros_like(valid, dtype=boxes.dtype)
    covered = []
    for axis, (begin, end) in enumerate(((1, 3), (0, 2))):
        first, last = (boxes[:, begin] * scale).floor(), (boxes[:, end] * scale).ceil()
        cells = torch.arange(valid.shape[axis], device=valid.device)
        covered.append((cells >= first[:, None]) & (cells <= last[:, None]))
    inside = covered[0][:, :, None] & covered[1][:, None, :] & valid
    return (inside / inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)).amax(dim=0)
