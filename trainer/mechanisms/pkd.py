"""PKD: match what correlates, not how large it is."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cache import Level
from trainer import parts
from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, LevelNames, Weight, fit


@MECHANISMS.register_module()
class PKDLoss(LevelMechanism):
    """``loss_weight * sum over levels of 0.5 * mean (norm(S) - norm(T))^2`` = 1 - Pearson r per channel.

    ``norm`` gives each channel zero mean and unit deviation over the batch's valid positions. PKD (Cao et al., NeurIPS
    2022), as in mmrazor's ``PKDLoss`` (unbiased deviation, eps 1e-6 added to it), which it equals where every position is
    valid. Channels that differ are aligned by a learnable 1x1 convolution, an extension of ours.

    Args:
        loss_weight: 6 for two-stage detectors and for a two-stage teacher of a one-stage student, 10 for RetinaNet, FCOS and
            RepPoints (mmrazor's configs, which use the first four maps of the neck); beside CrossKD 2 for RetinaNet, 6 for GFL.
    """

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 6.0,
        levels: LevelNames | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight, levels=levels)
        self.align = self.adapters()

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        student = fit(self.align[level](student), valid)
        count, squares, products, their_squares = _moments(student, teacher, valid)
        ours, theirs = (_deviation(of, count) for of in (squares, their_squares))
        # the mean of (norm(S) - norm(T))^2, multiplied out
        apart = squares / ours.square() - 2 * products / (ours * theirs) + their_squares / theirs.square()
        return (apart.mean() / 2 / parts.count()).to(student.dtype)


def _moments(student: Tensor, teacher: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the whole batch: its valid positions; and per channel (C,) the means of s^2, s t and t^2, s and t without their means.

    In double, as differences of what is nearly equal are taken of them.
    """
    count = valid.sum()
    means = [(maps * valid).sum(dim=(0, 2, 3)) / count for maps in (student, teacher)]
    s, t = ((maps - mean[:, None, None]) * valid for maps, mean in zip((student, teacher), means, strict=True))
    own = [(a * b).sum(dim=(0, 2, 3)) for a, b in ((s, s), (s, t), (t, t))]
    if parts.count() == 1:
        return count.double(), *(of.double() / count for of in own)
    # the parts' means differ: what is about each part's own is brought to zero, summed, and brought to the common mean
    n, a, b = count.double(), means[0].double(), means[1].double()
    about_zero = [of.double() + n * product for of, product in zip(own, (a * a, a * b, b * b), strict=True)]
    sums = parts.agreed(torch.cat([n[None], n * a, n * b, *about_zero]))
    n, rest = sums[0].detach(), (sums[1:] / sums[0].detach()).view(5, -1)
    a, b = rest[0], rest[1]
    return n, *(of - product for of, product in zip(rest[2:], (a * a, a * b, b * b), strict=True))


def _deviation(variance: Tensor, count: Tensor) -> Tensor:
    """The unbiased deviation, of a biased variance."""
    # the root of exactly zero has no gradient: a channel that is constant so far must still be able to move
    return (variance * count / (count - 1).clamp(min=1) + 1e-12).sqrt() + 1e-6
