"""The parts of a recipe, each with what can be known to be wrong about it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from cache import Compression, Policy, Precision, SampledPolicy, ViewPolicy
from trainer.annotations import annotations_digest
from trainer.config import kind, resolve
from trainer.mechanisms import check_mechanism
from trainer.sampled import build_pipeline


def _existing_file(value: Any) -> Any:
    path = Path(str(value)).expanduser().absolute()
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return str(path)


def _existing_folder(value: Any) -> Any:
    path = Path(str(value)).expanduser().absolute()
    if not path.is_dir():
        raise ValueError(f"no such folder: {path}")
    return str(path)


def _config(value: Any) -> Any:
    name = resolve(str(value))
    if "::" not in name and not Path(name).is_file():
        raise ValueError(
            f"no such config file: {name} (configs that ship inside mmdet are written mmdet::FOLDER/FILE.py)"
        )
    return name


def _mechanism(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("a mechanism is a mapping with a `type`")
    return check_mechanism(value)


def _pipeline(value: Any) -> Any:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) and "type" in one for one in value):
        raise ValueError("a pipeline is a list of mmdet transforms, each a mapping with a `type`")
    build_pipeline(value)
    return value


def _scales(value: Any) -> Any:
    return [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value


def _teachers(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if not value or not all(isinstance(name, str) for name in value):
            raise ValueError("a teacher's name, or a list of names")
        return value[0] if len(value) == 1 else value
    if value is not None and not isinstance(value, str):
        raise ValueError("a teacher's name, or a list of names")
    return value


ExistingFile = Annotated[str, BeforeValidator(_existing_file)]
ExistingFolder = Annotated[str, BeforeValidator(_existing_folder)]
ConfigName = Annotated[str, BeforeValidator(_config)]
PipelineSpec = Annotated[list[dict[str, Any]], BeforeValidator(_pipeline)]
MechanismSpec = Annotated[dict[str, Any], BeforeValidator(_mechanism)]
Scale = tuple[PositiveInt, PositiveInt]


class Spec(BaseModel):
    """Unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SplitSpec(Spec):
    """One COCO annotation file and the folder of its images."""

    ann_file: ExistingFile
    img_dir: ExistingFolder


class DatasetSpec(Spec):
    """The images that teachers see and students train on, and those that students are evaluated on."""

    train: SplitSpec
    val: SplitSpec


# mmdet's transforms that move boxes and leave masks where they were
_LEAVE_MASKS = ("MixUp", "Mosaic", "RandomShift")


class SampledSpec(Spec):
    """Views that a pipeline draws.

    Attributes:
        pipeline: mmdet transforms between loading and packing, with their random choices.
        count: views of an image.
        size: (height, width) in pixels; every view is padded to it at the right and bottom, none may be larger.
        seed: another seed draws other views.
        pad: value of the padding in all three channels. The padding is part of the view.
        masks: load masks too: for transforms that paste objects, and for students that train on masks.
        val_scale: (long edge, short edge) into which validation images are resized; by default that of ``size``.
    """

    pipeline: PipelineSpec
    count: Annotated[int, Field(ge=1, le=1024)]
    size: tuple[PositiveInt, PositiveInt]
    seed: int = 0
    pad: Annotated[int, Field(ge=0, le=255)] = 114
    masks: bool = False
    val_scale: Scale | None = None

    @model_validator(mode="after")
    def _masks_follow(self) -> "SampledSpec":
        for number, transform in enumerate(self.pipeline, start=1):
            if self.masks and kind(transform["type"]) in _LEAVE_MASKS:
                raise ValueError(
                    f"masks: {transform['type']} (pipeline.{number}) moves boxes and leaves masks where they were. Leave it out,"
                    " or set masks: false for a student that trains on boxes alone"
                )
        return self


class ViewsSpec(Spec):
    """Which views of an image exist.

    Attributes:
        scale, flip: one or several scales (long edge, short edge in pixels), with or without flip.
        sampled: instead of these, what a pipeline draws.
    """

    scale: Annotated[tuple[Scale, ...], BeforeValidator(_scales), Field(min_length=1)] | None = None
    flip: Literal["both", "none"] = "both"
    sampled: SampledSpec | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "ViewsSpec":
        if (self.scale is None) == (self.sampled is None):
            raise ValueError("views are either `scale` (with `flip`) or `sampled`: give exactly one of the two")
        if self.sampled is not None and self.flip != "both":  # the default, which a recipe that was written down has
            raise ValueError("flip belongs to `scale`; sampled views flip by a RandomFlip in their pipeline")
        return self

    @property
    def evaluation_scale(self) -> Scale:
        """(long edge, short edge) into which val images are resized: the largest scale of the views, or of sampled ones
        ``val_scale``, by default their size."""
        if self.scale is not None:
            return max(self.scale, key=lambda scale: scale[0] * scale[1])
        assert self.sampled is not None
        return self.sampled.val_scale or (max(self.sampled.size), min(self.sampled.size))

    def policy(self, ann_file: str) -> Policy:
        """The policy that gives each view its number. Sampled views depend on the annotations, whose digest is part of it."""
        if self.scale is not None:
            return ViewPolicy(self.scale, self.flip)
        assert self.sampled is not None
        record = self.sampled.model_dump(mode="json", exclude={"count", "size", "val_scale"})
        record["annotations_sha256"] = annotations_digest(ann_file)
        return SampledPolicy(self.sampled.count, self.sampled.size, record)


class CacheSpec(Spec):
    """Where targets are stored, and how.

    Attributes:
        uri: a path, or ``s3://``, ``gs://``, ``az://`` with bucket and prefix.
        compression: ``zstd`` saves little (a tenth of int8, a fifth of int4) and costs the mapped reader its speed.
        unit_rows: how many rows make a unit; by default about 128 MiB of them.
        local_dir, local_bytes: a folder on each machine that keeps what training read of a cache in object storage.
        on_damage: what training does about a row whose bytes are damaged: stop, or ``skip`` the image and count it.
        on_missing: what training does about a row that is not committed: stop before it begins, ``wait`` for it while a
            precompute runs, or have the teacher service ``compute`` it. Rows are then committed in the order in which the
            first epoch of a stage meets them.
        service: where the teacher service listens, ``http://HOST:PORT``; this machine's loopback by default.
    """

    uri: str
    precision: Precision = "int8"
    compression: Compression = "none"
    unit_rows: Annotated[int, Field(ge=1, le=2**20)] | None = None
    local_dir: str | None = None
    local_bytes: PositiveInt | None = None
    on_damage: Literal["error", "skip"] = "error"
    on_missing: Literal["error", "wait", "compute"] = "error"
    service: Annotated[str, Field(pattern=r"^http://[^/:]+:\d+$")] = "http://127.0.0.1:8000"

    @model_validator(mode="after")
    def _bound_of_a_folder(self) -> "CacheSpec":
        if self.local_bytes is not None and self.local_dir is None:
            raise ValueError("local_bytes is the bound of local_dir, which is not given")
        return self


class ActorsSpec(Spec):
    """Teacher actors: between ``min`` and ``max``, each with so many GPUs (fractions allowed) and CPUs.

    By default an actor takes one GPU if the cluster has any, and four CPUs; without GPUs the actors share all CPUs.
    """

    min: PositiveInt = 1
    max: PositiveInt = 1
    gpus: Annotated[float, Field(ge=0)] | None = None
    cpus: PositiveFloat | None = None

    @model_validator(mode="after")
    def _ordered(self) -> "ActorsSpec":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


class TeacherSpec(Spec):
    """One teacher.

    Attributes:
        capture: modules whose maps are the features, by their names in the detector.
        levels: which of the captured levels are stored; by default those that the recipe's mechanisms match.
        top_k: positions a level of which a dense head's outputs are stored, where a mechanism wants them.
        detections: whether what it detects is stored, for which its whole head runs on every view. By default (null) only if a
            mechanism of a stage wants it, or if no stage names the teacher.
        pool: levels stored as averages over windows, ``{P3: 2}`` for windows of 2 x 2; the student's map is averaged alike.
        autocast: dtype of backbone and neck; float32 where it is null. Heads are float32 always.
        batch_size: views in one forward pass.
        ap: box AP in points on the val set, for the order of teachers. By default the teacher is evaluated, which needs
            heads of the data set's classes; what is given here is believed.
    """

    config: ConfigName
    checkpoint: ExistingFile
    cfg_options: dict[str, Any] = {}
    capture: Annotated[tuple[str, ...], Field(min_length=1)] = ("neck",)
    levels: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**20)] = 512
    detections: bool | None = None
    pool: dict[str, Annotated[int, Field(ge=2, le=16)]] = {}
    autocast: Literal["bfloat16", "float16"] | None = None
    batch_size: PositiveInt = 1
    ap: Annotated[float, Field(ge=0, le=100)] | None = None


class StudentSpec(Spec):
    """The student.

    Attributes:
        checkpoint: weights to start from; with null its config's ``init_cfg`` decides.
        inherit: copy a teacher's neck and heads into the student where names and shapes agree: those of the teacher named, or
            with ``true`` of the first stage's (the first of several), as the official MTPD does.
        capture: modules whose maps are matched with the teacher's levels.
        input_scale: the student sees its views resized by this factor, in training and evaluation; the teacher's targets stay
            those of the whole view, and its maps are matched level by level with the student's, enlarged.
    """

    config: ConfigName
    cfg_options: dict[str, Any] = {}
    checkpoint: ExistingFile | None = None
    inherit: bool | str = False
    capture: Annotated[tuple[str, ...], Field(min_length=1)] = ("neck",)
    input_scale: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _one_beginning(self) -> "StudentSpec":
        if self.inherit and self.checkpoint is not None:
            raise ValueError("a student begins from its checkpoint or inherits from a teacher, not both")
        return self


class StageSpec(Spec):
    """One teacher, its mechanisms and a number of epochs. Without a teacher the student trains alone.

    Attributes:
        teacher: a name, or several for an ensemble: each mechanism's losses are averaged over them.
    """

    teacher: Annotated[str | tuple[str, ...] | None, BeforeValidator(_teachers)] = None
    mechanisms: tuple[MechanismSpec, ...] = ()
    epochs: PositiveInt = 12

    @model_validator(mode="after")
    def _teacher_and_mechanisms(self) -> "StageSpec":
        if (self.teacher is None) != (not self.mechanisms):
            raise ValueError("a stage has a teacher and mechanisms, or neither")
        if len(set(self.teachers)) < len(self.teachers):
            raise ValueError("a teacher is named twice")
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        """The names of its teachers."""
        return () if self.teacher is None else (self.teacher,) if isinstance(self.teacher, str) else self.teacher

    @property
    def label(self) -> str:
        """Its teachers for people: ``swin-t``, ``swin-t + swin-s``, ``no teacher``."""
        return " + ".join(self.teachers) or "no teacher"


class OrderSpec(Spec):
    """How the order of teachers is found, and the stages that ``stages: auto`` makes of it.

    Attributes:
        images: images whose features are compared, each in one view; half of them to fit on, half to score on.
        max_teachers: the longest sequence.
        ridge: penalty of the regression, in units of the mean variance of a channel; with less than the least, channels that
            say the same make it insoluble.
        positions: drawn of each level of each image; null takes all.
        seed: of the draw of images and positions.
        checkpoint: of a trained student, whose features are compared; by default ``student.checkpoint``. With one of its own
            the order is that of a trained student's features, while training begins as ``student`` says.
        mechanisms, epochs: of each stage that ``auto`` makes.
    """

    images: Annotated[int, Field(ge=2)] = 2000
    max_teachers: PositiveInt = 3
    ridge: Annotated[float, Field(ge=1e-12)] = 1e-4
    positions: PositiveInt | None = 512
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint: ExistingFile | None = None
    mechanisms: tuple[MechanismSpec, ...] = ()
    epochs: PositiveInt = 12


class WorkersSpec(Spec):
    """As many workers as the cluster has room for, between ``min`` and ``max``."""

    min: PositiveInt = 1
    max: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> "WorkersSpec":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        return self


def _workers(value: Any) -> Any:
    if isinstance(value, int):
        if value < 1:
            raise ValueError("at least one worker")
        return {"min": value, "max": value}
    return value


class TrainingSpec(Spec):
    """How students are trained.

    Attributes:
        workers: data-parallel workers: a number, or ``{min, max}``. The result is that of one worker up to rounding.
        gpus: of each worker; by default one if the cluster has any.
        cpus: of each worker.
        batch_size: samples of an optimiser step, of all workers together; by default what the student's config has as
            ``train_dataloader.batch_size``.
        micro_batch: the most samples of one forward pass: a share that is larger is cut, and its gradients are added up. A step
            then costs a forward pass without gradients more.
        amp: mixed precision; ``none`` is float32. By default as the student's config has it.
        checkpoint_steps: a checkpoint so often within an epoch, beside the one at each epoch's end.
        max_failures: of workers or their nodes, one after the other without a new checkpoint, until a stage is given up.
        seed: of everything that is drawn.
    """

    workers: Annotated[WorkersSpec, BeforeValidator(_workers)] = WorkersSpec(max=1)
    gpus: Annotated[float, Field(ge=0)] | None = None
    cpus: PositiveFloat | None = None
    batch_size: PositiveInt | None = None
    micro_batch: PositiveInt | None = None
    amp: Literal["none", "float16", "bfloat16"] | None = None
    checkpoint_steps: PositiveInt | None = None
    max_failures: Annotated[int, Field(ge=0)] = 3
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _enough_samples(self) -> "TrainingSpec":
        if self.batch_size is not None and self.batch_size < self.max_workers:
            raise ValueError(
                f"batch_size is that of all workers together: {self.max_workers} workers cannot share {self.batch_size} samples"
            )
        return self

    @property
    def max_workers(self) -> int:
        """The most workers that a stage is trained with."""
        return self.workers.max
