"""Plain feature matching: the paper's default loss as far as it is known."""

from collections.abc import Sequence

from torch import Tensor

from cache import Level
from trainer import parts
from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, LevelNames, Weight, fit, masked_mean, moments


@MECHANISMS.register_module()
class FeatureMatchingLoss(LevelMechanism):
    """``loss_weight * sum over levels of mean (r(S) - T)^2``, the mean over channels and valid positions.

    r is the identity where channels and strides agree (homogeneous), else a learnable 1x1 convolution, and bilinear
    enlargement where the student sees a reduced input (heterogeneous). Form from MTPD (Cao et al., ICML 2023), recalled;
    weight, reduction and interpolation of the paper are unknown, these are ours.

    Args:
        normalize: divide each channel's error by the variance of the teacher's channel over the batch's valid
            positions. Features of detectors have standard deviations of 1 to 20; without this the weight has to be
            chosen anew for each teacher.
    """

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 1.0,
        normalize: bool = False,
        levels: LevelNames | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight, levels=levels)
        self.normalize = normalize
        self.align = self.adapters(by_stride=True)

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        error = (fit(self.align[level](student), valid) - teacher).square()
        if self.normalize:
            _, variance = moments(teacher, valid, parts.whole)
            error = error / (variance + 1e-6)
        return masked_mean(error, valid)
