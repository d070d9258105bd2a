"""MGD: generate the teacher's map from the student's map with positions missing. The mechanism that MTPD released."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from cache import Level
from trainer import parts
from trainer.mechanisms import draws
from trainer.mechanisms.base import MECHANISMS, Batch, LevelMechanism, LevelNames, Weight, fit


@MECHANISMS.register_module()
class MGDLoss(LevelMechanism):
    """``loss_weight * sum over levels of (1 / N) * sum (G(align(S) * M) - T)^2``.

    M (N, 1, H, W) zeroes a position, in all channels, with probability ``mask_ratio``, anew for every image, step and level; G is
    conv3x3 - ReLU - conv3x3. MGD (Yang et al., ECCV 2022, eq. 5), as released with MTPD.

    G sees zeros outside an image's own map, in its hidden map too, so that an image's loss does not depend on how far its
    batch is padded.

    Args:
        loss_weight: alpha; 2e-5 for one-stage detectors, 5e-7 for two-stage ones. The maps' magnitude counts: a sum of squares.
        mask_ratio: lambda; 0.65 for one-stage detectors, 0.45 for two-stage ones.
    """

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 2e-5,
        mask_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.65,
        levels: LevelNames | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight, levels=levels)
        self.mask_ratio = mask_ratio
        self.align = self.adapters()
        self.generation = nn.ModuleDict(
            {
                name: nn.ModuleList([nn.Conv2d(t.channels, t.channels, 3, padding=1) for _ in range(2)])
                for name, (_, t) in self.pairs.items()
            }
        )

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        student = fit(self.align[level](student), valid)
        kept = self._drawn(level, student, batch) <= 1 - self.mask_ratio
        first, second = self.generation[level]
        hidden = first(student * (kept & valid)).relu() * valid
        error = (second(hidden) - teacher).square() * valid
        return error.sum() / parts.images(student.shape[0])

    def _drawn(self, level: str, student: Tensor, batch: Batch) -> Tensor:
        """(N, 1, H, W) between 0 and 1."""
        count, _, *size = student.shape
        purpose, device = f"MGDLoss {level}", student.device
        drawn = [
            torch.rand(1, *size, device=device, generator=draws.generator(batch.samples, n, purpose, device))
            for n in range(count)
        ]
        return torch.stack(drawn)
