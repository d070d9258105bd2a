"""FBKD: where attention lies, attention itself, and the relation of every position to every other."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
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
    moments,
    position_softmax,
)


@MECHANISMS.register_module()
class FBKDLoss(LevelMechanism):
    """``loss_weight * sum over levels of (L_AM + L_channel + L_spatial + L_NL)``, norms over the whole batch.

    - ``L_AM = mask_l2_weight * sqrt(sum M * (T - a(S))^2)``, M the mean of both attentions, no gradient through it:
      ``P * softmax over the own map's P positions (mean over channels |X| / temp)``; a is a 1x1 convolution.
    - ``L_channel = channel_weight * |mean over positions of T - linear(mean over positions of S)|_2``.
    - ``L_spatial = spatial_weight * |mean over channels of T - conv3x3(mean over channels of S)|_2``.
    - ``L_NL = nonlocal_weight * |R(T) - c(R(S))|_2``, R a `NonLocal` block, learnt for the teacher's maps too, c a 1x1
      convolution.

    Zhang & Ma, "Improve Object Detection with Feature-based Knowledge Distillation" (ICLR 2021), attention-guided (AM,
    channel, spatial) and non-local distillation, as in mmrazor's ``FBKDLoss``. Everything is restricted to own maps, the
    statistics of R's batch normalisation too. A norm over the batch is no mean over images: batch-mates share one root.

    Args:
        mask_l2_weight, channel_weight, spatial_weight, nonlocal_weight: alpha, beta, beta and gamma of the paper. The
            defaults are those of two-stage detectors in the authors' code and mmrazor. For one-stage detectors the paper
            has, as recalled, alpha = gamma = 4e-4 and beta = 2e-2; code derived from the authors' has 6 times the defaults.
        temp: temperature of the attentions; 0.5 in mmrazor and in the authors' two-stage code.
    """

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight = 1.0,
        mask_l2_weight: Weight = 7e-5,
        channel_weight: Weight = 4e-3,
        spatial_weight: Weight = 4e-3,
        nonlocal_weight: Weight = 7e-5,
        temp: Temperature = 0.5,
        levels: LevelNames | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight, levels=levels)
        self.mask_l2_weight, self.channel_weight = mask_l2_weight, channel_weight
        self.spatial_weight, self.nonlocal_weight = spatial_weight, nonlocal_weight
        self.temp = temp
        self.parts = nn.ModuleDict(
            {name: _Parts(s.channels, t.channels, place) for place, (name, (s, t)) in enumerate(self.pairs.items())}
        )

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        parts: _Parts = self.parts[level]
        student = fit(student, valid) * valid
        mask = (_attention(student, valid, self.temp) + _attention(teacher, valid, self.temp)) / 2
        masked = mask.detach().sqrt() * (teacher - parts.align(student))
        count = valid.sum(dim=(2, 3))
        channel = (teacher.sum(dim=(2, 3)) / count) - parts.channel(student.sum(dim=(2, 3)) / count)
        spatial = (teacher.mean(dim=1, keepdim=True) - parts.spatial(student.mean(dim=1, keepdim=True))) * valid
        ours, theirs = parts.relation_of_student(student, valid), parts.relation_of_teacher(teacher, valid)
        relation = (theirs - parts.relation(ours)) * valid
        # the norm's gradient at zero is zero, as it must be; that of a square root would not be finite
        norms = _norms(torch.stack([torch.linalg.vector_norm(of) for of in (masked, channel, spatial, relation)]))
        weights = (self.mask_l2_weight, self.channel_weight, self.spatial_weight, self.nonlocal_weight)
        return (norms * norms.new_tensor(weights)).sum()


class NonLocal(nn.Module):
    """``X + norm(W y)``, ``y_i = mean over windows j of (theta(X)_i . phi(X)_j) g(X)_j``: a non-local block (Wang et al.,
    2018), dot product, phi and g the maxima over windows; norm is a batch normalisation that is zero at first.

    Windows that the own map's edge cuts count with what lies inside; the authors' pooling leaves them out.

    Args:
        channels: C of the maps (N, C, H, W).
        hidden: channels of theta, phi and g.
        window: side of the windows, in positions.
    """

    def __init__(self, channels: int, hidden: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.theta, self.phi, self.g = (nn.Conv2d(channels, hidden, 1) for _ in range(3))
        self.out = nn.Conv2d(hidden, channels, 1)
        self.scale, self.shift = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))

    def forward(self, maps: Tensor, valid: Tensor) -> Tensor:
        """(N, C, H, W), as the maps."""
        windows = F.max_pool2d(valid.to(maps.dtype), self.window, ceil_mode=True) > 0
        keys, values = (self._maxima(transform(maps), valid, windows) for transform in (self.phi, self.g))
        # without a softmax the products may be taken in either order: hidden^2 numbers instead of positions x windows
        relation = values @ keys.transpose(1, 2) / windows.sum(dim=(2, 3))[:, :, None]
        queries = self.theta(maps)
        answers = self.out((relation @ queries.flatten(2)).view_as(queries))
        mean, variance = moments(answers, valid, partial(parts.joint, what="FBKDLoss"))
        return maps + (answers - mean) * (variance + 1e-5).rsqrt() * self.scale + self.shift

    def _maxima(self, maps: Tensor, valid: Tensor, windows: Tensor) -> Tensor:
        pooled = F.max_pool2d(maps.masked_fill(~valid, -torch.inf), self.window, ceil_mode=True)
        return torch.where(windows, pooled, 0).flatten(2)


class _Parts(nn.Module):
    """What one level learns. The finest two levels relate fewer channels and larger windows, as in mmrazor's config."""

    def __init__(self, student: int, teacher: int, place: int) -> None:
        super().__init__()
        share, window = ((4, 8), (4, 4))[place] if place < 2 else (2, 2)
        self.align = nn.Conv2d(student, teacher, 1)
        self.channel = nn.Linear(student, teacher)
        self.spatial = nn.Conv2d(1, 1, 3, padding=1)
        self.relation_of_student = NonLocal(student, max(student // share, 1), window)
        self.relation_of_teacher = NonLocal(teacher, max(teacher // share, 1), window)
        self.relation = nn.Conv2d(student, teacher, 1)


def _norms(own: Tensor) -> Tensor:
    """Norms over the whole batch out of those of each part, as this part's addends."""
    if parts.count() == 1:
        return own
    squares = parts.agreed(own.square())
    root = torch.where(squares > 0, squares.where(squares > 0, torch.ones_like(squares)).sqrt(), 0)
    return root / parts.count()


def _attention(maps: Tensor, valid: Tensor, temp: float) -> Tensor:
    """(N, 1, H, W), mean 1 over the own map, zero outside."""
    magnitude = maps.abs().mean(dim=1, keepdim=True)
    return valid.sum(dim=(2, 3), keepdim=True) * position_softmax(magnitude / temp, valid)
