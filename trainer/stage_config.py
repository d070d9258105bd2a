"""A recipe's stage -> an ordinary mmengine config: the student's own, with views, targets, mechanisms and schedule in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from mmengine.config import Config

from cache import GroupInfo, RecipeError
from trainer.annotations import Annotations, read_annotations
from trainer.asking import service_url
from trainer.classes import refuse_other_order
from trainer.config import kind, load_config, nested, plain_dict, set_classes
from trainer.groups import teacher_info
from trainer.learning_rate import follow_batch
from trainer.needs import needs_of
from trainer.pretrained import refuse_missing
from trainer.recipe import Recipe
from trainer.schedule import set_schedule
from trainer.specs import TrainingSpec
from trainer.transforms import view_config

TargetSource = Literal["cache", "online"]
# what of a student's training pipeline may stay: everything else changes pixels or boxes after the view
_LOADING = ("LoadImageFromFile", "LoadAnnotations", "FilterAnnotations")
_CLIP_NORM = 35.0


def stage_dir(recipe: Recipe, stage: int) -> Path:
    """Folder of a stage, numbered from 1."""
    return Path(recipe.work_dir) / f"stage-{stage}"


def stage_config(recipe: Recipe, stage: int, targets: TargetSource = "cache") -> Config:
    """The mmengine config of a stage: the student's own, with views, targets, mechanisms and schedule in it.

    What is taken from the student's config: model, optimiser, schedule (stretched, see `set_schedule`), loaders and hooks. The
    validation images are resized, keeping their ratio, to the largest scale of the views, or to the ``val_scale`` of sampled
    ones, times the student's input scale.

    Args:
        stage: number of the stage, from 1.
        targets: where the teacher's features come from.

    Raises:
        RecipeError: the student's config cannot be trained like this; the message names the key.
    """
    cfg = load_config(recipe.student.config, recipe.student.cfg_options, "student.config")
    train = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file")
    val = read_annotations(recipe.dataset.val.ann_file, "dataset.val.ann_file")
    if train.classes != val.classes:
        raise RecipeError("dataset: train and val have different categories; give both files the same `categories`.")
    set_classes(cfg.model, len(train.classes))
    infos = [teacher_info(recipe, name) for name in recipe.stages[stage - 1].teachers]
    _set_batches(cfg, recipe.training)
    _set_data(cfg, recipe, train, stage, infos if targets == "cache" else [])
    _set_evaluation(cfg, recipe)
    kept = _let_through(train, cfg.train_dataloader.dataset.dataset.filter_cfg)
    steps = -(-int(kept.sum()) // cfg.train_dataloader.batch_size)
    set_schedule(cfg, recipe.stages[stage - 1].epochs, steps, train.images.ids.size)
    cfg.default_hooks.checkpoint = dict(type="StageCheckpointHook", steps=recipe.training.checkpoint_steps)
    _set_model(cfg, recipe, stage, infos, targets)
    _set_visualizer(cfg, stage_dir(recipe, stage))
    cfg.custom_imports = dict(imports=["trainer"], allow_failed_imports=False)
    cfg.custom_hooks = [*_custom_hooks(cfg), dict(type="SeedStepHook", seed=recipe.training.seed)]
    cfg.randomness = dict(seed=recipe.training.seed)
    cfg.work_dir = str(stage_dir(recipe, stage))
    cfg.load_from, cfg.resume = None, False
    return cfg


def refuse_untrainable(recipe: Recipe) -> None:
    """Refuse a recipe of which a stage could not be trained, before any teacher is run for it.

    Raises:
        RecipeError: see `stage_config`.
    """
    known = recipe.model_copy(update={"stages": recipe.possible_stages})
    for stage in range(1, len(known.stages) + 1):
        stage_config(known, stage)


def student_config(cfg: Config) -> Config:
    """The student's config on its own: what stock mmdet loads the student's checkpoint with."""
    alone = Config(cfg.to_dict())
    alone.model = alone.model.student
    for key in ("custom_imports", "custom_hooks", "launcher", "model_wrapper_cfg"):
        alone.pop(key, None)
    alone.train_dataloader = alone.val_dataloader
    alone.train_cfg.type = "EpochBasedTrainLoop"
    alone.default_hooks.checkpoint = dict(type="CheckpointHook", interval=1)
    alone.resume = False
    return alone


def _set_data(cfg: Config, recipe: Recipe, train: Annotations, stage: int, cached: Sequence[GroupInfo]) -> None:
    transforms = [t for d in nested(plain_dict(cfg.train_dataloader.dataset)) for t in d.get("pipeline", ())]
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
    split, with_mask = recipe.dataset.train, bool(load_annotations.get("with_mask"))
    pipeline = [view_config(recipe.policy, split.ann_file, split.img_dir, keep_masks=with_mask)]
    if recipe.views.sampled is None:
        pipeline = [kept.get("LoadImageFromFile", dict(type="LoadImageFromFile")), load_annotations, *pipeline]
    elif with_mask and not recipe.views.sampled.masks:
        raise RecipeError("views.sampled.masks: this student trains on masks; set it to true.")
    if recipe.student.input_scale < 1:
        if recipe.stages[stage - 1].teachers and not cached:  # live ones
            pipeline += [dict(type="KeepWholeView")]
            meta = [*meta, "whole_view"]
        pipeline += [dict(type="Resize", scale_factor=recipe.student.input_scale)]
    pipeline += [kept["FilterAnnotations"]] if "FilterAnnotations" in kept else []
    pipeline += [dict(type="PackDetInputs", meta_keys=[*meta, "view"])]
    pipeline += [_load_targets(recipe, stage, info) for info in cached]
    if cached:
        _suit_loader(cfg, recipe)
    cfg.train_dataloader.dataset = dict(
        type="ViewedDataset",
        views=len(recipe.policy),
        on_damage=recipe.cache.on_damage,
        dataset=training_images(cfg, recipe, train) | dict(pipeline=pipeline),
    )


def _custom_hooks(cfg: Config) -> list[dict[str, Any]]:
    """The student's own hooks, but for those that switch to another pipeline: the pipeline is the recipe's views.

    Raises:
        RecipeError: one that looks for its detector, or its data set, where the distiller and the views are.
    """
    hooks = [hook for hook in plain_dict(cfg).get("custom_hooks") or [] if kind(hook["type"]) != "PipelineSwitchHook"]
    if any(kind(hook["type"]) == "YOLOXModeSwitchHook" for hook in hooks):
        raise RecipeError(
            "student.config: custom_hooks has a YOLOXModeSwitchHook, which changes data set and head in the midst of a "
            "training; here a stage is the same from its beginning to its end. Leave it out: student.cfg_options: "
            "{custom_hooks: []}"
        )
    return hooks


def _set_batches(cfg: Config, training: TrainingSpec) -> None:
    """Total batches, how they are shared out and cut, and in which precision they are computed."""
    loader, optimiser = cfg.train_dataloader, cfg.optim_wrapper
    if kind(optimiser.get("constructor")) == "LearningRateDecayOptimizerConstructor":
        raise RecipeError(
            "student.config: optim_wrapper.constructor: LearningRateDecayOptimizerConstructor goes by the names of a "
            "detector's parameters, which here are a part of the distiller's. Take mmengine's own: student.cfg_options: "
            "{optim_wrapper.constructor: DefaultOptimWrapperConstructor, optim_wrapper.paramwise_cfg: null}"
        )
    if optimiser.get("accumulative_counts", 1) > 1:
        raise RecipeError(
            "student.config: optim_wrapper.accumulative_counts: here the total batch is training.batch_size, which "
            "training.micro_batch cuts into what fits. Set it to 1: student.cfg_options: {optim_wrapper.accumulative_counts: 1}"
        )
    loader.batch_size = training.batch_size or loader.batch_size
    if loader.batch_size < training.max_workers:
        raise RecipeError(
            f"training.workers: {training.max_workers} workers cannot share a total batch of {loader.batch_size}. Take fewer "
            "workers, or a larger training.batch_size."
        )
    # mmdet's own kind keeps upright and lying images apart too, but in each worker's share alone
    by_shape = (loader.get("batch_sampler") or {}).get("type") == "AspectRatioBatchSampler"
    loader.sampler = dict(type="ViewSampler")
    loader.batch_sampler = dict(type="TotalBatchSampler", by_shape=by_shape)
    loader.pop("drop_last", None)
    follow_batch(cfg)
    if training.amp is not None:
        for key in ("loss_scale", "dtype"):
            optimiser.pop(key, None)
        kinds = dict(
            none=dict(type="OptimWrapper"),
            bfloat16=dict(type="OptimWrapper"),  # the distiller does it: mmengine's runs on no CPU, and heads too
            float16=dict(type="AmpOptimWrapper", dtype="float16"),
        )
        optimiser.update(kinds[training.amp])
    if optimiser.get("clip_grad") is None:
        optimiser.clip_grad = dict(max_norm=_CLIP_NORM, norm_type=2)
    cfg.model_wrapper_cfg = dict(
        type="DistributedDistiller", find_unused_parameters=cfg.get("find_unused_parameters", False)
    )


def training_images(cfg: Config, recipe: Recipe, train: Annotations) -> dict[str, Any]:
    """Config of the data set that a student trains on, without its pipeline: the images that its own config lets through.

    Args:
        cfg: the student's config as it is shipped.

    Raises:
        RecipeError: it has no data set, or lets none through.
    """
    dataset = next((d for d in nested(plain_dict(cfg.train_dataloader.dataset)) if "ann_file" in d), None)
    if dataset is None:
        raise RecipeError("student.config: train_dataloader.dataset has no data set with an ann_file.")
    left_out = dataset.get("filter_cfg", dict(filter_empty_gt=True, min_size=32))
    if not _let_through(train, left_out).any():
        raise RecipeError(
            f"dataset.train: the student's config leaves out every image (filter_cfg {left_out}: without objects, or too small). "
            "To train on them: student.cfg_options: {train_dataloader.dataset.filter_cfg: {filter_empty_gt: false, min_size: 0}}"
        )
    return dict(
        type="CocoDataset",
        metainfo=dict(classes=train.classes),
        data_root=None,
        backend_args=None,
        ann_file=recipe.dataset.train.ann_file,
        data_prefix=dict(img=recipe.dataset.train.img_dir),
        filter_cfg=left_out,
    )


def _let_through(train: Annotations, left_out: dict[str, Any] | None) -> npt.NDArray[np.bool_]:
    """(n,) bool: the images of the annotation file that are trained on, as mmdet's CocoDataset finds them."""
    rules = left_out or {}
    large = np.minimum(train.images.widths, train.images.heights) >= rules.get("min_size", 0)
    return large & train.labelled if rules.get("filter_empty_gt") else large


def _set_evaluation(cfg: Config, recipe: Recipe) -> None:
    factor = recipe.student.input_scale
    scale = tuple(max(1, round(side * factor)) for side in recipe.views.evaluation_scale)
    classes = cfg.train_dataloader.dataset.dataset.metainfo
    loaders = (cfg.val_dataloader, cfg.test_dataloader)
    # both are read before one is changed: a config may name one loader twice
    found = [next(d["pipeline"] for d in nested(plain_dict(one.dataset)) if "pipeline" in d) for one in loaders]
    for loader, test_pipeline in zip(loaders, found, strict=True):
        for transform in test_pipeline:
            if kind(transform["type"]) in ("Resize", "FixScaleResize"):
                transform.pop("scale_factor", None)
                transform |= dict(scale=scale, keep_ratio=True)  # as views are resized
        loader.dataset = dict(
            type="CocoDataset",
            metainfo=classes,
            data_root=None,
            backend_args=None,
            ann_file=recipe.dataset.val.ann_file,
            data_prefix=dict(img=recipe.dataset.val.img_dir),
            test_mode=True,
            pipeline=test_pipeline,
        )
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = recipe.dataset.val.ann_file


def _load_targets(recipe: Recipe, stage: int, cached: GroupInfo) -> dict[str, Any]:
    """The transform that reads a teacher's targets."""
    cache, needs = recipe.cache, needs_of(recipe, cached.teacher, stage)
    transform = dict(
        type="LoadTeacherTargets",
        uri=cache.uri,
        teacher=cached.teacher,
        fingerprint=cached.record,
        levels=[level.name for level in cached.levels if level.name in needs.levels],
        top_k=needs.top_k,
        detections=needs.detections,
    )
    if cache.local_dir is not None:
        transform |= dict(local_dir=cache.local_dir, local_bytes=cache.local_bytes)
    if cache.on_missing != "error":
        transform |= dict(on_missing=cache.on_missing)
    if cache.on_missing == "compute":
        transform |= dict(service=service_url(recipe))
    return transform


def _suit_loader(cfg: Config, recipe: Recipe) -> None:
    """A loader for samples with targets from a cache."""
    loader = cfg.train_dataloader
    if "://" in recipe.cache.uri and loader.get("num_workers", 0):
        loader.multiprocessing_context = "forkserver"  # the client of an object storage does not survive a fork


def _set_model(cfg: Config, recipe: Recipe, stage: int, infos: Sequence[GroupInfo], targets: TargetSource) -> None:
    spec, student = recipe.stages[stage - 1], recipe.student
    checkpoint = student.checkpoint if stage == 1 else str(stage_dir(recipe, stage - 1) / "student.pth")
    if (cfg.model.get("data_preprocessor") or {}).get("batch_augments"):
        raise RecipeError(
            "student.config: its data_preprocessor has batch_augments, which change the pixels after the view. "
            "Switch them off: student.cfg_options: {model.data_preprocessor.batch_augments: null}"
        )
    if checkpoint is None:
        refuse_missing(plain_dict(cfg.model))
    distiller: dict[str, Any] = dict(
        type="Distiller",
        student=cfg.model,
        mechanisms=[dict(m) for m in spec.mechanisms],
        capture=list(student.capture),
        checkpoint=checkpoint,
        input_scale=student.input_scale,
        batch_size=cfg.train_dataloader.batch_size,
        micro_batch=recipe.training.micro_batch,
        precision="bfloat16" if recipe.training.amp == "bfloat16" else None,
    )
    distiller["teachers"] = {}
    for info in infos:
        teacher, needs = recipe.teachers[info.teacher], needs_of(recipe, info.teacher, stage)
        stored = [level for level in info.levels if level.name in needs_of(recipe, info.teacher).levels]
        given: dict[str, Any] = dict(
            levels={level.name: [level.channels, level.stride, level.pool] for level in stored}, top_k=needs.top_k
        )
        if targets == "online":
            given["live"] = teacher.model_dump(mode="json", exclude={"ap", "detections"})
        elif needs.head:
            model = plain_dict(
                load_config(teacher.config, teacher.cfg_options, f"teachers.{info.teacher}.config").model
            )
            given["head"] = dict(
                config=dict(model["bbox_head"], train_cfg=None, test_cfg=model.get("test_cfg")),
                uri=recipe.cache.uri,
                fingerprint=info.record,
            )
        distiller["teachers"][info.teacher] = given
    if stage == 1 and recipe.inherit_from is not None:
        distiller["inherit_from"] = inherited = recipe.teachers[recipe.inherit_from].checkpoint
        refuse_other_order(inherited, cfg.train_dataloader.dataset.dataset.metainfo["classes"], "student.inherit")
    cfg.model = distiller


def _set_visualizer(cfg: Config, folder: Path) -> None:
    """Scalars go to mmengine's local file and to TensorBoard, beside the backends of the student's config."""
    visualizer = plain_dict(cfg.visualizer) if cfg.get("visualizer") else dict(type="DetLocalVisualizer")
    backends = visualizer.get("vis_backends") or []
    backends = [backends] if isinstance(backends, dict) else list(backends)
    present = {kind(backend["type"]) for backend in backends}
    backends += [dict(type=name) for name in ("LocalVisBackend", "TensorboardVisBackend") if name not in present]
    # a process has one visualizer of a name: under a common one the second stage would write into the first one's folder
    cfg.visualizer = visualizer | dict(vis_backends=backends, name=str(folder))
