"""What every mechanism shares: levels paired by stride, adapters, masked reductions, its place in the registry."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import Registry
from torch import Tensor, nn

from cache import Level, RecipeError

MECHANISMS = Registry("distillation mechanism", locations=["trainer.mechanisms"])


class Mechanism(nn.Module):
    """A distillation loss on pyramid levels, with its trainable adapters.

    Args:
        student, teacher: the levels that each gives; they are paired by stride.
        loss_weight: factor of the loss.
        levels: names of the levels to use; by default all that both have.

    Raises:
        RecipeError: no common level, or a level that one of the two does not have.
    """

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: float,
        levels: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.pairs = _pair(student, teacher, levels, type(self).__name__)

    def forward(
        self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], valid: Mapping[str, Tensor]
    ) -> Tensor:
        """The weighted loss, summed over levels; computed in float32 whatever the training's precision.

        Args:
            student: per level (N, C_s, H, W).
            teacher: per level (N, C_t, H, W), detached, zero outside each image's own map.
            valid: per level (N, 1, H, W) bool, the images' own maps.
        """
        device = next(iter(student.values())).device
        with torch.autocast(device.type, enabled=False):
            losses = [
                self.level_loss(name, student[name].float(), teacher[name].float(), valid[name]) for name in self.pairs
            ]
            return self.loss_weight * torch.stack(losses).sum()

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
        """The unweighted loss of one level, a scalar."""
        raise NotImplementedError

    def adapters(self) -> nn.ModuleDict:
        """A 1x1 convolution for every level on which the channels differ, the identity on the others."""
        return nn.ModuleDict(
            {
                name: nn.Identity() if s.channels == t.channels else nn.Conv2d(s.channels, t.channels, 1)
                for name, (s, t) in self.pairs.items()
            }
        )


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of (N, C, H, W) over the channels and the valid positions."""
    return (values * valid).sum() / (valid.sum() * values.shape[1])


def fit(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's map at the teacher's size, bilinear where they differ (align_corners=False, as mmrazor)."""
    if student.shape[-2:] == teacher.shape[-2:]:
        return student
    return F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)


def check_mechanism(spec: Mapping[str, Any]) -> None:
    """Check a recipe's mechanism without building it.

    Raises:
        ValueError: an unknown type or argument; the message names what is known.
    """
    known = MECHANISMS.get(str(spec.get("type")))
    if known is None:
        names = ", ".join(sorted(MECHANISMS.module_dict))
        raise ValueError(f"type {spec.get('type')!r} is not a mechanism; there are {names}")
    arguments = [
        name
        for name, parameter in inspect.signature(known).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    for name in spec:
        if name != "type" and name not in arguments:
            raise ValueError(f"{spec['type']} has no argument {name!r}; it has {', '.join(arguments)}")


def _pair(
    student: Sequence[Level], teacher: Sequence[Level], levels: Sequence[str] | None, mechanism: str
) -> dict[str, tuple[Level, Level]]:
    ours, theirs = {level.name: level for level in student}, {level.name: level for level in teacher}
    names = [name for name in ours if name in theirs] if levels is None else list(levels)
    for name in names:
        for who, has in (("student", ours), ("teacher", theirs)):
            if name not in has:
                raise RecipeError(
                    f"stages: {mechanism}.levels: the {who} has no level {name!r}, only {', '.join(has)}."
                )
    if not names:
        raise RecipeError(
            f"stages: {mechanism}: student ({', '.join(ours)}) and teacher ({', '.join(theirs)}) have no level of equal "
            "stride. Capture other modules."
        )
    return {name: (ours[name], theirs[name]) for name in names}
