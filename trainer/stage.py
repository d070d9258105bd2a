"""A recipe's stage -> an ordinary mmengine config -> a Runner -> a checkpoint of the student alone, and its AP."""

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint

from cache import (
    GroupInfo,
    MissingRowsError,
    RecipeError,
    StaleCacheError,
    TeacherCache,
    differences,
    find_group,
    open_storage,
)
from trainer.annotations import Annotations, read_annotations
from trainer.checkpoint import save_student
from trainer.config import load_config, nested, plain, set_classes
from trainer.recipe import Recipe, StageSpec
from trainer.teacher import describe, fingerprint_record

TargetSource = Literal["cache", "online"]
# what of a student's training pipeline may stay: everything else changes pixels or boxes after the view
_LOADING = ("LoadImageFromFile", "LoadAnnotations", "FilterAnnotations")
_CLIP_NORM = 35.0
_WARM_UP_SHARE = 0.1
_BEGUN = "stage.json"


@dataclass(frozen=True)
class StageResult:
    """What a stage gave.

    Attributes:
        stage: number of the stage, from 1.
        metrics: COCO metrics of the student on the val set, such as ``bbox_mAP``, in [0, 1].
        seconds: wall time of the training, evaluation included; of all attempts if it was resumed.
        images: samples that the student was trained on.
        teacher_forwards: images that a live teacher saw; 0 when trained from the cache.
        student: path of the student-only checkpoint; ``student.py`` beside it is its config.
    """

    stage: int
    teacher: str | None
    epochs: int
    metrics: dict[str, float]
    seconds: float
    images: int
    teacher_forwards: int
    student: str


def stage_dir(recipe: Recipe, stage: int) -> Path:
    """Folder of a stage, numbered from 1."""
    return Path(recipe.work_dir) / f"stage-{stage}"


def stage_config(recipe: Recipe, stage: int, targets: TargetSource = "cache") -> Config:
    """The mmengine config of a stage: the student's own, with views, targets, mechanisms and schedule in it.

    What is taken from the student's config: model, optimiser, schedule (stretched to the stage's epochs; a warm-up counted in
    iterations is cut to a tenth of the stage where it is longer), loaders and hooks. The validation images are resized to
    the largest scale of the views.

    Args:
        stage: number of the stage, from 1.
        targets: where the teacher's features come from.

    Raises:
        RecipeError: the student's config cannot be trained like this; the message names the key.
    """
    spec = recipe.stages[stage - 1]
    cfg = load_config(recipe.student.config, recipe.student.cfg_options, "student.config")
    train = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file")
    val = read_annotations(recipe.dataset.val.ann_file, "dataset.val.ann_file")
    if train.classes != val.classes:
        raise RecipeError("dataset: train and val have different categories; give both files the same `categories`.")
    set_classes(cfg.model, len(train.classes))
    info = None if spec.teacher is None else teacher_info(recipe, spec.teacher)
    _set_data(cfg, recipe, train, info if targets == "cache" else None)
    _set_schedule(cfg, spec, train, recipe.training.workers)
    _set_model(cfg, recipe, stage, info, targets)
    cfg.custom_imports = dict(imports=["trainer"], allow_failed_imports=False)
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="SeedEpochHook", seed=recipe.training.seed)]
    cfg.randomness = dict(seed=recipe.training.seed)
    cfg.work_dir = str(stage_dir(recipe, stage))
    cfg.load_from, cfg.resume = None, False
    return cfg


def train_stage(
    recipe: Recipe,
    stage: int,
    targets: TargetSource = "cache",
    *,
    launcher: Literal["none", "pytorch"] = "none",
    report: Callable[[dict[str, float]], None] | None = None,
) -> StageResult:
    """Train one stage, or what is left of it: a stage that is done returns its result, one that was killed goes on.

    Args:
        launcher: ``pytorch`` inside an initialised process group.
        report: called after each epoch's end with ``epoch`` and the latest losses.

    Raises:
        RecipeError: the stage before is not done, or the folder holds a stage of another recipe.
        MissingRowsError: the cache does not have every row that the stage reads.
    """
    cfg, done = open_stage(recipe, stage, targets)
    if done is not None:
        return done
    folder = stage_dir(recipe, stage)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / _BEGUN, plain(cfg.to_dict()))
    cfg.launcher = launcher
    if launcher != "none" and not torch.cuda.is_available():
        # mmengine hands DDP a GPU's number by default, which a model on the CPU refuses
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
    if find_latest_checkpoint(str(folder)) is not None:
        cfg.resume = True
    started = time.monotonic()
    runner = Runner.from_cfg(cfg)
    record = _StageRecord(folder / "progress.json", report)
    runner.register_hook(record, priority="VERY_LOW")
    runner.train()
    if record.metrics is None:  # killed between the last checkpoint and its evaluation
        runner.val()
    distiller = runner.model.module if hasattr(runner.model, "module") else runner.model
    student_file = folder / "student.pth"
    result = StageResult(
        stage=stage,
        teacher=recipe.stages[stage - 1].teacher,
        epochs=recipe.stages[stage - 1].epochs,
        metrics=_nothing_found(cfg) | (record.metrics or {}),
        seconds=record.seconds_before + time.monotonic() - started,
        images=recipe.stages[stage - 1].epochs * len(runner.train_dataloader.dataset.dataset),
        teacher_forwards=record.forwards_before + distiller.teacher_forwards * runner.world_size,
        student=str(student_file),
    )
    if runner.rank == 0:
        save_student(distiller.student, student_file, tuple(runner.train_dataloader.dataset.metainfo["classes"]))
        _student_config(cfg).dump(str(folder / "student.py"))
        _write(folder / "result.json", asdict(result))
    return result


def open_stage(recipe: Recipe, stage: int, targets: TargetSource = "cache") -> tuple[Config, StageResult | None]:
    """Check all that can be checked before a stage is trained.

    Returns:
        Its config, and its result if it is done.

    Raises:
        RecipeError: the stage before is not done, or the folder holds a stage of another recipe.
        MissingRowsError: the cache does not have every row that the stage reads.
        StaleCacheError: the cache holds targets of another fingerprint.
    """
    cfg = stage_config(recipe, stage, targets)
    folder = stage_dir(recipe, stage)
    _refuse_other_recipe(folder, cfg)
    if (folder / "result.json").exists():
        return cfg, StageResult(**json.loads((folder / "result.json").read_text()))
    if recipe.stages[stage - 1].teacher is not None and targets == "cache":
        _refuse_missing_rows(recipe, cfg)
    return cfg, None


def teacher_info(recipe: Recipe, name: str) -> GroupInfo:
    """Attributes of the group that holds, or will hold, a teacher's targets for this recipe.

    The detector is built to measure its levels only if the cache has no such group yet.
    """
    spec = recipe.teachers[name]
    record = fingerprint_record(spec, name, recipe.policy, recipe.cache.precision)
    try:
        return find_group(open_storage(recipe.cache.uri), name, record)
    except (MissingRowsError, StaleCacheError):
        return describe(spec, name, record)


def _set_data(cfg: Config, recipe: Recipe, train: Annotations, cached: GroupInfo | None) -> None:
    dataset = next((d for d in nested(_plain_dict(cfg.train_dataloader.dataset)) if "ann_file" in d), None)
    if dataset is None:
        raise RecipeError("student.config: train_dataloader.dataset has no data set with an ann_file.")
    transforms = [t for d in nested(_plain_dict(cfg.train_dataloader.dataset)) for t in d.get("pipeline", ())]
    kept = {t["type"]: t for t in transforms if t["type"] in _LOADING}
    load_annotations = kept.get("LoadAnnotations", dict(type="LoadAnnotations", with_bbox=True))
    if load_annotations.get("with_mask") and not train.has_masks:
        raise RecipeError(
            "student.config: this student trains on masks, but dataset.train.ann_file has objects without segmentation."
        )
    pack = next((t for t in transforms if t["type"] == "PackDetInputs"), dict(type="PackDetInputs"))
    meta = pack.get(
        "meta_keys", ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
    )
    view = dict(type="ApplyView", scale=[list(scale) for scale in recipe.views.scale], flip=recipe.views.flip)
    pipeline = [kept.get("LoadImageFromFile", dict(type="LoadImageFromFile")), load_annotations, view]
    pipeline += [kept["FilterAnnotations"]] if "FilterAnnotations" in kept else []
    pipeline += [dict(type="PackDetInputs", meta_keys=[*meta, "view"])]
    if cached is not None:
        pipeline.append(
            dict(type="LoadTeacherTargets", uri=recipe.cache.uri, teacher=cached.teacher, fingerprint=cached.record)
        )
    coco = dict(type="CocoDataset", metainfo=dict(classes=train.classes), data_root=None, backend_args=None)
    cfg.train_dataloader.dataset = dict(
        type="ViewedDataset",
        views=len(recipe.policy),
        dataset=dict(
            **coco,
            ann_file=recipe.dataset.train.ann_file,
            data_prefix=dict(img=recipe.dataset.train.img_dir),
            filter_cfg=dataset.get("filter_cfg", dict(filter_empty_gt=True, min_size=32)),
            pipeline=pipeline,
        ),
    )
    cfg.train_dataloader.sampler = dict(type="ViewSampler")
    largest = max(recipe.views.scale, key=lambda scale: scale[0] * scale[1])
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        test_pipeline = [
            dict(t) for t in next(d["pipeline"] for d in nested(_plain_dict(loader.dataset)) if "pipeline" in d)
        ]
        for transform in test_pipeline:
            if transform["type"] == "Resize":
                transform["scale"] = largest
        loader.dataset = dict(
            **coco,
            ann_file=recipe.dataset.val.ann_file,
            data_prefix=dict(img=recipe.dataset.val.img_dir),
            test_mode=True,
            pipeline=test_pipeline,
        )
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = recipe.dataset.val.ann_file


def _set_schedule(cfg: Config, spec: StageSpec, train: Annotations, workers: int) -> None:
    before = cfg.train_cfg.get("max_epochs")
    if before is None:
        raise RecipeError("student.config: its training is not counted in epochs (train_cfg.max_epochs).")
    cfg.train_cfg = dict(
        type="EpochBasedTrainLoop", max_epochs=spec.epochs, val_interval=cfg.train_cfg.get("val_interval", 1)
    )
    ratio = spec.epochs / before
    images = train.images.ids.size
    iterations = spec.epochs * max(1, images // (cfg.train_dataloader.batch_size * workers))
    for scheduler in cfg.param_scheduler:
        if not scheduler.get("by_epoch", True):
            scheduler.end = min(scheduler.get("end", iterations), max(1, int(iterations * _WARM_UP_SHARE)))
            continue
        for key in ("begin", "end", "T_max"):
            if key in scheduler:
                scheduler[key] = round(scheduler[key] * ratio)
        if "milestones" in scheduler:
            scheduler.milestones = [round(m * ratio) for m in scheduler.milestones]
    cfg.optim_wrapper.setdefault("clip_grad", None)
    if cfg.optim_wrapper.clip_grad is None:
        cfg.optim_wrapper.clip_grad = dict(max_norm=_CLIP_NORM, norm_type=2)
    cfg.default_hooks.checkpoint = dict(type="CheckpointHook", interval=1, max_keep_ckpts=1)


def _set_model(cfg: Config, recipe: Recipe, stage: int, info: GroupInfo | None, targets: TargetSource) -> None:
    spec, student = recipe.stages[stage - 1], recipe.student
    checkpoint = student.checkpoint if stage == 1 else str(stage_dir(recipe, stage - 1) / "student.pth")
    if stage > 1 and not Path(checkpoint).is_file():
        raise RecipeError(
            f"stage {stage}: stage {stage - 1} is not done: {checkpoint} is missing. Run `mtpd train` on it first."
        )
    distiller: dict[str, Any] = dict(
        type="Distiller",
        student=cfg.model,
        mechanisms=[dict(m) for m in spec.mechanisms],
        capture=list(student.capture),
        checkpoint=checkpoint,
    )
    if info is not None and spec.teacher is not None:
        teacher = recipe.teachers[spec.teacher]
        distiller["teacher_levels"] = {level.name: [level.channels, level.stride] for level in info.levels}
        if stage == 1 and student.inherit:
            distiller["inherit_from"] = teacher.checkpoint
        if targets == "online":
            distiller["live_teacher"] = dict(name=spec.teacher, **teacher.model_dump(mode="json"))
    cfg.model = distiller


def _nothing_found(cfg: Config) -> dict[str, float]:
    """The metrics of a student that detects nothing at all, for which mmdet's CocoMetric gives none."""
    kinds = cfg.val_evaluator.metric
    return {f"{kind}_mAP": 0.0 for kind in ([kinds] if isinstance(kinds, str) else kinds)}


def _student_config(cfg: Config) -> Config:
    """The student's config on its own: what stock mmdet loads the student's checkpoint with."""
    alone = Config(_plain_dict(cfg))
    alone.model = alone.model.student
    for key in ("custom_imports", "custom_hooks", "launcher"):
        alone.pop(key, None)
    alone.train_dataloader = alone.val_dataloader
    alone.resume = False
    return alone


def _refuse_missing_rows(recipe: Recipe, cfg: Config) -> None:
    transform = next(
        t
        for d in nested(_plain_dict(cfg.train_dataloader))
        for t in d.get("pipeline", ())
        if t["type"] == "LoadTeacherTargets"
    )
    cache = TeacherCache.open(transform["uri"], transform["teacher"], fingerprint=transform["fingerprint"])
    images = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images
    committed = cache.index.committed(images.ids, len(recipe.policy))
    if not committed.all():
        missing = images.ids[~committed.all(axis=1)]
        shown = ", ".join(str(i) for i in missing[:10])
        raise MissingRowsError(
            f"{recipe.cache.uri}: teacher {cache.info.teacher!r} lacks {int((~committed).sum())} of {committed.size} rows, "
            f"of {missing.size} images (ids {shown}{', ...' if missing.size > 10 else ''}). Resume with `mtpd precompute "
            f"RECIPE --teacher {cache.info.teacher}`; if it cannot read these images, take them out of the annotation file."
        )


def _refuse_other_recipe(folder: Path, cfg: Config) -> None:
    """A folder goes on with the stage that began in it, and with no other."""
    file = folder / _BEGUN
    if not file.exists():
        return
    if differing := list(differences(json.loads(file.read_text()), plain(cfg.to_dict()))):
        shown = "\n  ".join(differing[:8])
        raise RecipeError(
            f"work_dir: {folder} holds a stage that was begun with another recipe:\n  {shown}\nChoose another work_dir, "
            "or delete that folder to begin again."
        )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def _plain_dict(config: Any) -> Any:
    """A config as plain dicts, a copy; tuples stay, for some of mmdet's transforms take no list."""
    return copy.deepcopy(config.to_dict())


@HOOKS.register_module()
class SeedEpochHook(Hook):
    """Seed torch's generator before each epoch, so that a resumed stage draws what an undisturbed one draws."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_train_epoch(self, runner: Runner) -> None:
        torch.manual_seed(self.seed * 1_000_003 + runner.epoch)


class _StageRecord(Hook):
    """Keep what a stage's result needs across a kill: seconds, forwards, and the metrics of the last evaluation."""

    def __init__(self, file: Path, report: Callable[[dict[str, float]], None] | None) -> None:
        self._file, self._report = file, report
        self._started = time.monotonic()
        self.metrics: dict[str, float] | None = None
        self.seconds_before, self.forwards_before = 0.0, 0
        if file.exists():
            before = json.loads(file.read_text())
            self.seconds_before, self.forwards_before = before["seconds"], before["teacher_forwards"]

    def after_train_epoch(self, runner: Runner) -> None:
        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        if runner.rank == 0:
            seconds = self.seconds_before + time.monotonic() - self._started
            forwards = self.forwards_before + model.teacher_forwards * runner.world_size
            _write(self._file, dict(seconds=seconds, teacher_forwards=forwards))
        if self._report is not None:
            scalars = runner.message_hub.log_scalars
            losses = {k.removeprefix("train/"): float(v.mean(50)) for k, v in scalars.items() if "loss" in k}
            self._report({"epoch": runner.epoch + 1, **losses})

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metrics = {key.removeprefix("coco/"): float(value) for key, value in (metrics or {}).items()}
