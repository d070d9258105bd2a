"""CWD: match where in the image each channel responds, not how strongly."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cache import Level
from trainer import parts
from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, LevelNames, Temperature, Weight, fit


@MECHANISMS.register_module()
class CWDLoss(LevelMechanism):
    """``loss_weight * sum over levels of tau^2 / (C * N) * sum over images and channels of KL(p(T) || p(S))``.

    p is the softmax of a channel's map, divided by ``tau``, over the positions of the image's own map. CWD (Shu et al., ICCV
    2021), as in mmrazor's ``ChannelWiseDivergence``, which it equals where every position is valid; there the
    softmax runs over the padding too. Channels that differ are aligned by a learnable 1x1 convolution.

    Args:
        loss_weight: 5 in the authors' RetinaNet config, which uses P3 to P6; 10 in mmrazor's RetinaNet and Faster R-CNN
            configs, which use all levels.
        tau: temperature; 1 in all of them.
    """

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 5.0,
        tau: Temperature = 1.0,
        levels: LevelNames | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight, levels=levels)
        self.tau = tau
        self.align = self.adapters()

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        student = fit(self.align[level](student), valid)
        ours, theirs = (_log_softmax(maps / self.tau, valid) for maps in (student, teacher))
        # outside both are minus infinity, whose difference is no number
        divergence = theirs.exp() * (theirs - ours).masked_fill(~valid.flatten(2), 0)
        return self.tau**2 * divergence.sum() / (parts.images(teacher.shape[0]) * teacher.shape[1])


def _log_softmax(maps: Tensor, valid: Tensor) -> Tensor:
    """(N, C, H * W), minus infinity outside."""
    return maps.masked_fill(~valid, -torch.inf).flatten(2).log_softmax(dim=2)
