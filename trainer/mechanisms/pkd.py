"""PKD: match what correlates, not how large it is."""

from collections.abc import Sequence

from torch import Tensor

from cache import Level
from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, fit


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
        loss_weight: float = 6.0,
        levels: Sequence[str] | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight, levels=levels)
        self.align = self.adapters()

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        student = fit(self.align[level](student), teacher, valid)
        count = valid.sum()
        ours, theirs = (_centred(maps, valid, count) for maps in (student, teacher))
        # (a / x - b / y) squared, summed: of three sums a channel, where the maps themselves need not be normalised
        (own, x), (other, y) = (_spread(maps, count) for maps in (ours, theirs))
        both = (ours * theirs).sum(dim=(0, 2, 3))
        squares = own / x.square() + other / y.square() - 2 * both / (x * y)
        return squares.sum() / (2 * count * student.shape[1])


def _centred(maps: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """(N, C, H, W) less each channel's mean over the batch's valid positions, and zero at the others."""
    mean = (maps * valid).sum(dim=(0, 2, 3), keepdim=True) / count
    return (maps - mean) * valid


def _spread(centred: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel the sum of squares (C,) and the deviation."""
    squares = centred.square().sum(dim=(0, 2, 3))
    # the root of exactly zero has no gradient: a channel that is constant so far must still be able to move
    return squares, (squares / (count - 1).clamp(min=1) + 1e-12).sqrt() + 1e-6
