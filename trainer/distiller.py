"""Student and mechanisms as one mmdet model, trained by an ordinary mmengine Runner."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from torch import Tensor, nn

from cache import Level, RecipeError
from trainer.capture import captured, flatten, measure_levels
from trainer.checkpoint import inherit, load_strict, read_weights
from trainer.mechanisms import MECHANISMS
from trainer.recipe import TeacherSpec
from trainer.targets import CachedMaps, LiveMaps, TeacherMaps, assemble, pool_student
from trainer.teacher import Teacher


@MODELS.register_module()
class Distiller(BaseModel):
    """A student that is trained on its own losses and on a teacher's features.

    Every sample comes with its teacher's features: as ``teacher_maps``, which `LoadTeacherTargets` read from the cache, or
    from the live teacher here. Prediction is the student's alone.

    Args:
        student: config of the detector.
        mechanisms: configs of the mechanisms; none trains the student alone.
        teacher_levels: what the teacher gives, ``{"P3": [256, 8, 1], ...}``: channels, stride and pooling window.
        capture: modules of the student whose maps are matched.
        checkpoint: weights of the student to start from.
        inherit_from: a teacher's checkpoint whose neck and heads the student takes over.
        live_teacher: `TeacherSpec` as a dict, to run the teacher beside the student instead of reading its cache.
    """

    def __init__(
        self,
        student: dict[str, Any],
        mechanisms: Sequence[dict[str, Any]] = (),
        teacher_levels: dict[str, Sequence[int]] | None = None,
        capture: Sequence[str] = ("neck",),
        checkpoint: str | None = None,
        inherit_from: str | None = None,
        live_teacher: dict[str, Any] | None = None,
    ) -> None:
        detector = MODELS.build(student)
        if getattr(detector.data_preprocessor, "batch_augments", None):
            raise RecipeError(
                "student.config: its data_preprocessor has batch_augments, which change the pixels after the view. "
                "Switch them off: student.cfg_options: {model.data_preprocessor.batch_augments: null}"
            )
        super().__init__(data_preprocessor=_Preprocessor(detector.data_preprocessor, live_teacher))
        self.student = detector
        self.capture = list(capture) if mechanisms else []
        self._checkpoint, self._inherit_from = checkpoint, inherit_from
        self.mechanisms = nn.ModuleDict()
        if mechanisms:
            ours = measure_levels(self.student, self.capture, "student.capture")
            self._level_names = [level.name for level in ours]
            theirs = [Level(name, *map(int, numbers)) for name, numbers in (teacher_levels or {}).items()]
            self._windows = {level.name: level.pool for level in theirs}
            for name, spec in zip(_names(mechanisms), mechanisms, strict=True):
                arguments = {key: value for key, value in spec.items() if key != "type"}
                self.mechanisms[name] = MECHANISMS.get(spec["type"])(ours, theirs, **arguments)

    @property
    def teacher_forwards(self) -> int:
        """Images that the live teacher saw."""
        return self.data_preprocessor.teacher_forwards

    @property
    def damaged_rows(self) -> int:
        """Rows of the cache that were skipped, for their bytes were damaged."""
        return self.data_preprocessor.damaged_rows

    def init_weights(self) -> None:
        """The student's weights: from its checkpoint, else as its config says, then inherited ones over them."""
        if self._checkpoint is not None:
            load_strict(self.student, self._checkpoint, "student.checkpoint")
            return
        self.student.init_weights()
        if self._inherit_from is not None:
            result = inherit(self.student, read_weights(self._inherit_from, "student.inherit"))
            MMLogger.get_current_instance().info(
                f"inherited {len(result.copied)} weights of neck and heads, left {len(result.left)} as initialised: "
                f"{', '.join(result.left) or 'none'}"
            )

    def forward(self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = "tensor") -> Any:
        """As any mmdet detector; with ``mode="loss"`` the mechanisms' losses join the student's."""
        if mode != "loss" or not self.mechanisms:
            return self.student(inputs, data_samples, mode=mode)
        with captured(self.student, self.capture, "student.capture") as outputs:
            losses = self.student(inputs, data_samples, mode="loss")
        maps = dict(zip(self._level_names, flatten(outputs, self.capture, "student.capture"), strict=True))
        batch: list[TeacherMaps] = [sample.teacher_maps for sample in data_samples or ()]
        used = {level for mechanism in self.mechanisms.values() for level in mechanism.pairs}
        targets, valid = {}, {}
        for level in used:
            maps[level] = pool_student(maps[level], [m.map_sizes[level] for m in batch], self._windows[level])
            targets[level], valid[level] = assemble(batch, level, maps[level].shape[-2:])
        for name, mechanism in self.mechanisms.items():
            losses[f"loss_{name}"] = mechanism(maps, targets, valid)
        return losses


class _Preprocessor(nn.Module):
    """The student's data preprocessor, and what brings each sample its teacher's features.

    The live teacher looks at the pixels as they were loaded; features from the cache travel to the device still quantised.
    """

    def __init__(self, student: nn.Module, live_teacher: dict[str, Any] | None) -> None:
        super().__init__()
        self.student = student
        self.teacher_forwards = 0
        self.damaged_rows = 0
        # in a list, so that it is no submodule: it must stay in eval mode and out of the checkpoints
        self._teacher = [] if live_teacher is None else [_live(live_teacher)]

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        cached: Sequence[CachedMaps] = data.pop("teacher_maps", ())
        live = [self._look(image) for image in data["inputs"]] if training and self._teacher else ()
        data = self.student(data, training)
        if training and (cached or live):
            # from pinned memory the copies run beside the computation
            moved = live or [m.to(self.student.device, non_blocking=True) for m in cached]
            for sample, maps in zip(data["data_samples"], moved, strict=True):
                sample.teacher_maps = maps
                self.damaged_rows += sample.metainfo.get("damaged_rows", 0)
        return data

    def _look(self, image: Tensor) -> LiveMaps:
        self._teacher[0].to(self.student.device)
        # one image at a time, padded to its own shape, for a target must not depend on its batch-mates
        output = self._teacher[0]([image], detect=False)
        self.teacher_forwards += 1
        return LiveMaps({name: maps[0] for name, maps in output.features.items()}, output.map_sizes)


def _live(spec: dict[str, Any]) -> Teacher:
    name = spec["name"]
    arguments = {key: value for key, value in spec.items() if key != "name"}
    # the weights that it is built with, before its own are loaded, must not shift the student's random numbers
    with torch.random.fork_rng():
        return Teacher(TeacherSpec.model_validate(arguments), name)


def _names(mechanisms: Sequence[dict[str, Any]]) -> list[str]:
    """The type of each mechanism, numbered where it occurs more than once."""
    total, seen, names = Counter(m["type"] for m in mechanisms), Counter[str](), []
    for mechanism in mechanisms:
        kind = mechanism["type"]
        seen[kind] += 1
        names.append(kind if total[kind] == 1 else f"{kind}_{seen[kind]}")
    return names
