"""PKD: match what correlates, not how large it is."""

from collections.abc import Sequence

from torch import Tensor

from cache import Level
from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, fit, masked_mean, moments


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
        return masked_mean((_normalize(student, valid) - _normalize(teacher, valid)).square(), valid) / 2


def _normalize(maps: Tensor, valid: Tensor) -> Tensor:
    count = valid.sum()
    mean, biased = moments(maps, valid)
    variance = biased * count / (count - 1).clamp(min=1)
    # the root of exactly zero has no gradient: a channel that is constant so far must still be able to move
    return (maps - mean) / ((variance + 1e-12).sqrt() + 1e-6)
