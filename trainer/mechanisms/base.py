"""What every mechanism shares: what it sees of a step, levels paired by stride, adapters, masked reductions, the registry."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from mmengine.registry import Registry
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from cache import DenseLevel, Detections, Level, RecipeError
from trainer import parts

Need = Literal["features", "dense", "detections", "head"]
# what a recipe may give for an argument, see `check_mechanism`; a weight of 0 switches a part off
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
LevelNames = Annotated[Sequence[str], Field(min_length=1)]
MECHANISMS = Registry("distillation mechanism", locations=["trainer.mechanisms"])


@dataclass(frozen=True)
class Batch:
    """What a mechanism sees of one training step: one teacher's targets and what the student made of the same views.

    Everything is on the student's device. What no mechanism of the stage needs is None or empty.

    Attributes:
        maps: per level (N, C_s, H, W), what the student's captured modules gave.
        targets: per level (N, C_t, H', W') float32, the teacher's, detached, zero outside each image's own map. H', W' are H, W
            unless the student sees its views at a reduced scale.
        valid: per level (N, 1, H', W') bool, the images' own maps.
        samples: the student's data samples: ``gt_instances`` in pixels of the student's input, ``img_shape``.
        inputs: (N, 3, h, w), the student's normalised input.
        student: the detector.
        features: what the student's ``extract_feat`` gave in this step.
        head_outputs: what the student's dense ``bbox_head`` gave in this step, lists of maps; None for two-stage students.
        dense: per image and level the teacher's sparse dense-head outputs.
        detections: per image what the teacher detected, boxes in pixels of the student's input.
        teacher_head: the teacher's own head, frozen, in eval mode.
        input_scale: pixels of the student's input per pixel of the view.
    """

    maps: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    valid: Mapping[str, Tensor]
    samples: Sequence[Any] = ()
    inputs: Tensor | None = None
    student: nn.Module | None = None
    features: tuple[Tensor, ...] = ()
    head_outputs: tuple[Any, ...] | None = None
    dense: Sequence[Mapping[str, DenseLevel]] | None = None
    detections: Sequence[Detections] | None = None
    teacher_head: nn.Module | None = None
    input_scale: float = 1.0


class Mechanism(nn.Module):
    """A distillation loss with its trainable adapters.

    Args:
        student, teacher: the levels that each gives.
        loss_weight: factor of the loss.

    Attributes:
        needs: what it wants of the teacher; nothing else has to be stored for it.
        pairs: per level that it matches the student's and the teacher's.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, student: Sequence[Level], teacher: Sequence[Level], *, loss_weight: Weight) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.pairs: dict[str, tuple[Level, Level]] = {}

    def forward(self, batch: Batch) -> Tensor:
        """The weighted loss, a scalar; computed in float32 whatever the training's precision."""
        device = next(iter(batch.maps.values())).device if batch.maps else batch.features[0].device
        with torch.autocast(device.type, enabled=False):
            return self.loss_weight * self.loss(batch)

    def loss(self, batch: Batch) -> Tensor:
        """The unweighted loss, a scalar: this part's addend of the whole batch's, see `trainer.parts`."""
        raise NotImplementedError

    def metrics(self) -> dict[str, float]:
        """What is worth a curve beside the loss, by name."""
        return {}

    def refuse_unfit(self, student: nn.Module, teacher: nn.Module, capture: Sequence[str] = ("neck",)) -> None:
        """Refuse detectors that this mechanism cannot bring together, before a teacher is run.

        Args:
            student, teacher: the detectors, with any weights.
            capture: modules of the teacher whose maps are its targets.

        Raises:
            RecipeError: what does not fit, and what would.
        """


class LevelMechanism(Mechanism):
    """A mechanism that is a sum over pyramid levels, paired by stride.

    Args:
        levels: names of the levels to use; by default all that both have.

    Raises:
        RecipeError: no common level, or a level that one of the two does not have.
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        student: Sequence[Level],
        teacher: Sequence[Level],
        *,
        loss_weight: Weight,
        levels: LevelNames | None = None,
    ) -> None:
        super().__init__(student, teacher, loss_weight=loss_weight)
        self.pairs = pair(student, teacher, levels, type(self).__name__)

    def loss(self, batch: Batch) -> Tensor:
        """The unweighted loss, summed over levels."""
        losses = [
            self.level_loss(name, batch.maps[name].float(), batch.targets[name].float(), batch.valid[name], batch)
            for name in self.pairs
        ]
        return torch.stack(losses).sum()

    def level_loss(self, level: str, student: Tensor, teacher: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        """The unweighted loss of one level, a scalar."""
        raise NotImplementedError

    def adapters(self, *, by_stride: bool = False) -> nn.ModuleDict:
        """A 1x1 convolution for every level on which the channels differ, the identity on the others.

        Args:
            by_stride: a convolution also where the strides, in pixels of the view, differ: the student's input is reduced.
        """
        same = {
            name: s.channels == t.channels and (s.stride == t.stride or not by_stride)
            for name, (s, t) in self.pairs.items()
        }
        return nn.ModuleDict(
            {
                name: nn.Identity() if same[name] else nn.Conv2d(s.channels, t.channels, 1)
                for name, (s, t) in self.pairs.items()
            }
        )


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """This part's addend of the mean of (N, C, H, W) over the channels and the whole batch's valid positions."""
    return (values * valid).sum() / (parts.whole(valid.sum()) * values.shape[1])


def moments(maps: Tensor, valid: Tensor, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance (1, C, 1, 1) of each channel of (N, C, H, W) over the whole batch's valid positions.

    Args:
        total: how sums over parts are taken: see `trainer.parts`.
    """
    count = valid.sum()
    mean = (maps * valid).sum(dim=(0, 2, 3), keepdim=True) / count
    squares = ((maps - mean).square() * valid).sum(dim=(0, 2, 3), keepdim=True)
    if parts.count() == 1:
        return mean, squares / count
    _, mean, variance = parts.combined(count, mean, squares, total)
    return mean, variance


def position_softmax(values: Tensor, valid: Tensor) -> Tensor:
    """Softmax of each map (N, C, H, W) over its image's valid positions; zero at the others."""
    return values.masked_fill(~valid, -torch.inf).flatten(2).softmax(dim=2).view_as(values)


def fit(student: Tensor, valid: Tensor) -> Tensor:
    """The student's map at the teacher's size, bilinear where they differ (align_corners=False, as mmrazor).

    Only positions of each image's own map are mixed, so that what the student has in the padding cannot reach the edge.

    Args:
        student: (N, C, H, W).
        valid: (N, 1, H', W') bool, the images' own maps at the teacher's size.
    """
    size = student.shape[-2:]
    if size == valid.shape[-2:]:
        return student
    inside = F.interpolate(valid.to(student.dtype), size, mode="nearest")
    both = torch.cat([student * inside, inside], dim=1)
    resized = F.interpolate(both, valid.shape[-2:], mode="bilinear", align_corners=False)
    return resized[:, :-1] / resized[:, -1:].clamp(min=1e-6)


def check_mechanism(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Check a recipe's mechanism without building it.

    Returns:
        It, with numbers that were written as text (YAML takes ``2e-5`` for one) as numbers.

    Raises:
        ValueError: an unknown type or argument, or a value of another kind or outside of its bounds; the message names what is
            known.
    """
    known = MECHANISMS.get(str(spec.get("type")))
    if known is None:
        names = ", ".join(sorted(MECHANISMS.module_dict))
        raise ValueError(f"type {spec.get('type')!r} is not a mechanism; there are {names}")
    arguments = {
        name: parameter.annotation
        for name, parameter in inspect.signature(known).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    checked = {"type": spec["type"]}
    for name, value in spec.items():
        if name == "type":
            continue
        if name not in arguments:
            raise ValueError(f"{spec['type']} has no argument {name!r}; it has {', '.join(arguments)}")
        try:
            checked[name] = TypeAdapter(arguments[name]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{spec['type']}.{name}: {error.errors()[0]['msg']} (got {value!r})") from None
    return checked


def pair(
    student: Sequence[Level], teacher: Sequence[Level], levels: Sequence[str] | None, mechanism: str
) -> dict[str, tuple[Level, Level]]:
    """Levels of equal stride: those named, or all that both have.

    Raises:
        RecipeError: no common level, or a level that one of the two does not have.
    """
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
