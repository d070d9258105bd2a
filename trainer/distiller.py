"""Student and mechanisms as one mmdet model, trained by an ordinary mmengine Runner."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from cache import Level, find_group, open_storage, read_head
from trainer.capture import captured, flatten, measure_levels, recorded
from trainer.checkpoint import inherit, load_strict, read_weights
from trainer.mechanisms import MECHANISMS, Batch, Mechanism
from trainer.mechanisms.base import fit
from trainer.mechanisms.draws import SampledBoxes
from trainer.precision import DTYPES, as_float, refuse_unknown
from trainer.pretrained import loading
from trainer.specs import TeacherSpec
from trainer.step import take_step
from trainer.student_losses import sum_over_parts
from trainer.targets import CachedMaps, LiveMaps, TeacherMaps, assemble, own_maps, pool_student
from trainer.teacher import Teacher


@MODELS.register_module()
class Distiller(BaseModel):
    """A student that is trained on its own losses and on its teachers' targets.

    Every sample comes with them in ``teacher_maps``, by the teacher's name: `LoadTeacherTargets` read them from the cache, or
    the live teacher made them here. With several teachers each mechanism's losses are averaged over them. Prediction is the
    student's alone.

    Args:
        student: config of the detector.
        mechanisms: configs of the mechanisms; none trains the student alone.
        teachers: by name what each gives: ``levels``, ``{"P3": [256, 8, 1], ...}`` (channels, stride and pooling window);
            ``live``, a `TeacherSpec` as a dict, to run it beside the student instead of reading its cache, with ``top_k``
            positions a level of its dense head; or ``head``, its dense head: ``config``, and ``uri`` and ``fingerprint``
            of the group that keeps its weights.
        capture: modules of the student whose maps are matched.
        checkpoint: weights of the student to start from.
        inherit_from: a teacher's checkpoint whose neck and heads the student takes over.
        input_scale: the student's inputs are the views resized by this factor; targets are of the whole views.
        batch_size: samples of a step of all workers together; None where this process is the only one.
        micro_batch: the most samples of one forward pass in training; None puts a worker's whole share into one.
        precision: ``bfloat16`` trains backbone and neck in it, the rest in float32; by default what is set outside.

    Attributes:
        input_scale: multiplies boxes in pixels of a view into boxes in pixels of the student's input.
    """

    def __init__(
        self,
        student: dict[str, Any],
        mechanisms: Sequence[dict[str, Any]] = (),
        teachers: Mapping[str, dict[str, Any]] | None = None,
        capture: Sequence[str] = ("neck",),
        checkpoint: str | None = None,
        inherit_from: str | None = None,
        input_scale: float = 1.0,
        batch_size: int | None = None,
        micro_batch: int | None = None,
        precision: str | None = None,
    ) -> None:
        detector = MODELS.build(student)
        refuse_unknown(detector, precision, "training.amp")
        teachers = teachers or {}
        self._needs = {need for mechanism in mechanisms for need in MECHANISMS.get(mechanism["type"]).needs}
        live = {
            name: _live(name, given["live"], given.get("top_k", 0))
            for name, given in teachers.items()
            if given.get("live")
        }
        preprocessor = _Preprocessor(detector.data_preprocessor, live, detect="detections" in self._needs)
        super().__init__(data_preprocessor=preprocessor)
        self.student = detector
        self.batch_size, self.micro_batch = batch_size, micro_batch
        self._precision = DTYPES[precision] if precision else None
        self.adds_up = sum_over_parts(detector)
        self._sampled = SampledBoxes(detector)
        self.capture = list(capture) if mechanisms else []
        self.input_scale = input_scale
        self._checkpoint, self._inherit_from = checkpoint, inherit_from
        self.mechanisms = nn.ModuleDict()
        self._of_teacher: dict[str, dict[str, str]] = {}  # per teacher: the loss's name -> its mechanism's
        self._windows: dict[str, dict[str, int]] = {}
        # in a dict, as live teachers are: no submodules, always in eval mode, never in a checkpoint
        self._heads: dict[str, nn.Module] = {}
        if "head" in self._needs:
            self._heads = {
                name: live[name].head if name in live else _kept_head(name, given["head"])
                for name, given in teachers.items()
            }
        if not mechanisms:
            return
        measured = measure_levels(self.student, self.capture, "student.capture")
        self._level_names = [level.name for level in measured]
        # in pixels of the view a reduced student's strides are larger than their names say
        ours = [replace(level, stride=round(level.stride / input_scale)) for level in measured]
        for place, (teacher, given) in enumerate(teachers.items()):
            theirs = [Level(name, *map(int, numbers)) for name, numbers in given["levels"].items()]
            self._windows[teacher] = {level.name: level.pool for level in theirs}
            self._of_teacher[teacher] = {}
            for name, spec in zip(_names(mechanisms), mechanisms, strict=True):
                arguments = {key: value for key, value in spec.items() if key != "type"}
                # a module's name may hold no dot, a teacher's may
                own = name if len(teachers) == 1 else f"{name}_of_{place + 1}"
                self.mechanisms[own] = MECHANISMS.get(spec["type"])(ours, theirs, **arguments)
                self._of_teacher[teacher][f"loss_{name}" if len(teachers) == 1 else f"loss_{name}_{teacher}"] = own

    @property
    def teacher_forwards(self) -> int:
        """Images that the live teachers saw."""
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
        with loading(self.student):
            self.student.init_weights()
        if self._inherit_from is not None:
            result = inherit(self.student, read_weights(self._inherit_from, "student.inherit"))
            MMLogger.get_current_instance().info(
                f"inherited {len(result.copied)} weights of neck and heads, left {len(result.left)} as initialised: "
                f"{', '.join(result.left) or 'none'}"
            )

    def train_step(self, data: Any, optim_wrapper: OptimWrapper) -> dict[str, Tensor]:
        """One optimiser step; see `take_step`."""
        return take_step(self, self, data, optim_wrapper)

    def forward(self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = "tensor") -> Any:
        """As any mmdet detector; with ``mode="loss"`` the mechanisms' losses join the student's.

        Losses are this part's addends of those of the step: see `trainer.parts`.
        """
        if mode == "loss":
            self._sampled.begin(data_samples or [])
        if mode != "loss":
            return self.student(inputs, data_samples, mode=mode)
        samples = data_samples or []
        with (
            captured(self.student, self.capture, "student.capture") as outputs,
            recorded(self.student, self._precision) as made,
        ):
            losses = self.student(inputs, samples, mode="loss")
        if not self.mechanisms:
            return losses
        found = as_float(flatten(outputs, self.capture, "student.capture"))
        maps = dict(zip(self._level_names, found, strict=True))
        for teacher, mechanisms in self._of_teacher.items():
            given = [sample.teacher_maps[teacher] for sample in samples]
            batch = self._batch(teacher, given, maps, inputs, samples, made)
            for loss, own in mechanisms.items():
                losses[loss] = self.mechanisms[own](batch) / len(self._of_teacher)
                for metric, value in self.mechanisms[own].metrics().items():
                    losses[f"{metric}_{loss.removeprefix('loss_')}"] = inputs.new_tensor(value)
        return losses

    def _batch(
        self,
        teacher: str,
        given: Sequence[TeacherMaps],
        maps: Mapping[str, Tensor],
        inputs: Tensor,
        samples: Sequence[Any],
        made: Mapping[str, Any],
    ) -> Batch:
        """One teacher's targets beside what the student made."""
        mechanisms: list[Mechanism] = [self.mechanisms[own] for own in self._of_teacher[teacher].values()]
        ours, targets, valid = dict(maps), {}, {}
        for level in {level for mechanism in mechanisms for level in mechanism.pairs}:
            own, window = [one.map_sizes[level] for one in given], self._windows[teacher][level]
            # rows and columns that the student's map would have if it saw the whole views
            whole = [round(side / self.input_scale) for side in maps[level].shape[-2:]]
            if window > 1:
                # enlarged before it is averaged: of its own positions only, as the mechanisms enlarge what is not averaged
                enlarged = fit(maps[level], own_maps(own, whole, maps[level].device))
                ours[level] = pool_student(enlarged, own, window)
            targets[level], valid[level] = assemble(given, level, (-(-whole[0] // window), -(-whole[1] // window)))
        head = self._heads.get(teacher)
        return Batch(
            maps=ours,
            targets=targets,
            valid=valid,
            samples=samples,
            inputs=inputs,
            student=self.student,
            features=tuple(made["features"]),
            head_outputs=made.get("head"),
            dense=[one.dense for one in given] if "dense" in self._needs else None,
            detections=[one.detections.resized(self.input_scale) for one in given]
            if "detections" in self._needs
            else None,
            teacher_head=None if head is None else head.to(inputs.device),
            input_scale=self.input_scale,
        )


class _Preprocessor(nn.Module):
    """The student's data preprocessor, and what brings each sample its teachers' targets.

    Live teachers look at the pixels as they were loaded; features from the cache travel to the device still quantised.
    """

    def __init__(self, student: nn.Module, live_teachers: dict[str, Teacher], *, detect: bool) -> None:
        super().__init__()
        self.student = student
        self.teacher_forwards = 0
        self.damaged_rows = 0
        # a plain dict, so that they are no submodules: they must stay in eval mode and out of the checkpoints
        self._teachers, self._detect = live_teachers, detect

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        cached: Mapping[str, Sequence[CachedMaps]] = data.pop("teacher_maps", {})
        maps: dict[str, Sequence[TeacherMaps]] = {}
        if training:
            views = _whole_views(data) if self._teachers else []
            maps = {name: [self._look(name, view) for view in views] for name in self._teachers}
        data = self.student(data, training)
        if training:
            # from pinned memory the copies run beside the computation
            for name, stored in cached.items():
                maps[name] = [one.to(self.student.device, non_blocking=True) for one in stored]
            for n, sample in enumerate(data["data_samples"]):
                sample.teacher_maps = {name: of_batch[n] for name, of_batch in maps.items()}
                self.damaged_rows += sample.metainfo.get("damaged_rows", 0)
        return data

    def _look(self, name: str, image: Tensor) -> LiveMaps:
        teacher = self._teachers[name]
        teacher.to(self.student.device)
        # one image at a time, padded to its own shape, for a target must not depend on its batch-mates
        output = teacher([image], detect=self._detect)
        self.teacher_forwards += 1
        return LiveMaps(
            {level: maps[0] for level, maps in output.features.items()},
            output.map_sizes,
            output.dense[0] if output.dense else {},
            output.detections[0] if self._detect else None,
        )


def _whole_views(data: Mapping[str, Any]) -> list[Tensor]:
    """The pixels (3, h, w) of a batch's views: the inputs, or what was kept of them before they were resized."""
    kept = [sample.metainfo.get("whole_view") for sample in data["data_samples"]]
    return [
        image if view is None else torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))
        for image, view in zip(data["inputs"], kept, strict=True)
    ]


def _live(name: str, spec: dict[str, Any], top_k: int) -> Teacher:
    # the weights that it is built with, before its own are loaded, must not shift the student's random numbers
    with torch.random.fork_rng():
        return Teacher(TeacherSpec.model_validate(spec), name, top_k=top_k)


def _kept_head(teacher: str, kept: dict[str, Any]) -> nn.Module:
    """A teacher's dense head with the weights that the cache keeps."""
    storage = open_storage(kept["uri"])
    weights = read_head(storage, find_group(storage, teacher, kept["fingerprint"]))
    with torch.random.fork_rng():
        head = MODELS.build(kept["config"])
    head.load_state_dict(weights, strict=True)
    return head.float().eval().requires_grad_(False)


def _names(mechanisms: Sequence[dict[str, Any]]) -> list[str]:
    """The type of each mechanism, numbered where it occurs more than once."""
    total, seen, names = Counter(m["type"] for m in mechanisms), Counter[str](), []
    for mechanism in mechanisms:
        kind = mechanism["type"]
        seen[kind] += 1
        names.append(kind if total[kind] == 1 else f"{kind}_{seen[kind]}")
    return names
