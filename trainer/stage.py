"""A stage's config -> a Runner -> a checkpoint of the student alone, and its AP."""

import json
import re
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, barrier, broadcast_object_list, get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from cache import MissingRowsError, MtpdError, RecipeError, TeacherCache, await_first_row, differences
from trainer.annotations import read_annotations
from trainer.asking import await_group
from trainer.checkpoint import save_student
from trainer.config import nested, plain, plain_dict
from trainer.pulse import Pulse, PulseHook
from trainer.recipe import Recipe
from trainer.stage_config import TargetSource, stage_config, stage_dir, student_config

_BEGUN = "stage.json"
# the same targets may come from a group that stores more or less of them, be waited for or not, kept on a local disk or not;
# what is done about damage, how often a checkpoint is written, and in how many pieces a share is trained on, is free too; so is
# for which batch a learning rate is made, for the rate that follows from it is compared itself
_FREE = re.compile(
    r"\.fingerprint\.(levels|dense|head|detections)[:.]|\.head\.fingerprint\b|default_hooks\.checkpoint\b|model\.micro_batch\b"
    r"|\.(on_missing|service|on_damage|local_dir|local_bytes)\b|^auto_scale_lr\b"
)


@dataclass(frozen=True)
class StageResult:
    """What a stage gave.

    Attributes:
        stage: number of the stage, from 1.
        teacher: its teachers, joined by `` + ``; None without one.
        metrics: COCO metrics of the student on the val set, such as ``bbox_mAP``, in [0, 1].
        seconds: wall time of the training, evaluation included; of all attempts if it was resumed.
        images: samples that the student was trained on.
        teacher_forwards: images that a live teacher saw; 0 when trained from the cache.
        damaged_rows: rows of the cache that were skipped, for their bytes were damaged (``cache.on_damage: skip``).
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
    damaged_rows: int = 0


def train_stage(
    recipe: Recipe,
    stage: int,
    targets: TargetSource = "cache",
    *,
    launcher: Literal["none", "pytorch"] = "none",
    report: Callable[[dict[str, float]], None] | None = None,
    listen: Callable[[Pulse], None] | None = None,
) -> StageResult:
    """Train one stage, or what is left of it: a stage that is done returns its result, one that was killed goes on.

    Args:
        launcher: ``pytorch`` inside an initialised process group.
        report: called after each epoch's end with ``epoch`` and the latest losses.
        listen: given a pulse every few seconds.

    Raises:
        RecipeError: the stage before is not done, or the folder holds a stage of another recipe; or the student's weights are not
            finite any more.
        MissingRowsError: the cache does not have every row that the stage reads, and (``cache.on_missing``) it is not to be
            waited for, or in vain.
    """
    cfg, done = open_stage(recipe, stage, targets)
    if done is not None:
        return done
    for load in _loads(cfg):
        if recipe.cache.on_missing == "wait":
            await_first_row(load["uri"], load["teacher"], load["fingerprint"], partial(print_log, logger="current"))
        elif recipe.cache.on_missing == "compute":
            await_group(load["uri"], load["service"], load["teacher"], load["fingerprint"])
    folder = stage_dir(recipe, stage)
    folder.mkdir(parents=True, exist_ok=True)
    if get_rank() == 0:
        _write(folder / _BEGUN, plain(cfg.to_dict()))
    # formatting its text takes a second, and mmengine asks for it in the log, in every backend and at every checkpoint
    cfg = Config(cfg.to_dict(), filename=cfg.filename, format_python_code=False)
    cfg.launcher = launcher
    if torch.cuda.is_available() and recipe.stages[stage - 1].teachers and targets == "cache":
        cfg.train_dataloader.pin_memory = True
    # of one worker: what each saw of a shared folder might differ
    chosen = [latest_checkpoint(folder)]
    broadcast_object_list(chosen)
    cfg.load_from = chosen[0]
    cfg.resume = cfg.load_from is not None
    started = time.monotonic()
    runner = Runner.from_cfg(cfg)
    record = _StageRecord(folder / "progress.json", report)
    runner.register_hook(record, priority="VERY_LOW")
    runner.register_hook(PulseHook(folder, listen), priority="VERY_LOW")
    try:
        runner.train()
    except MtpdError as error:
        raise _in_own_words(error) from error
    distiller = runner.model.module if hasattr(runner.model, "module") else runner.model
    student_file = folder / "student.pth"
    result = StageResult(
        stage=stage,
        teacher=recipe.stages[stage - 1].label if recipe.stages[stage - 1].teachers else None,
        epochs=recipe.stages[stage - 1].epochs,
        metrics=_nothing_found(cfg) | (record.metrics or {}),
        seconds=record.seconds_before + time.monotonic() - started,
        images=runner.max_iters * cfg.train_dataloader.batch_size,
        teacher_forwards=record.forwards_before + _over_ranks(distiller.teacher_forwards),
        damaged_rows=record.damaged_before + _over_ranks(distiller.damaged_rows),
        student=str(student_file),
    )
    if runner.rank == 0:
        with _evaluated_weights(runner):
            save_student(distiller.student, student_file, tuple(runner.train_dataloader.dataset.metainfo["classes"]))
        student_config(cfg).dump(str(folder / "student.py"))
        _write(folder / "result.json", asdict(result))
    barrier()  # whoever looks afterwards finds it
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
    folder, before = stage_dir(recipe, stage), stage_dir(recipe, stage - 1)
    if stage > 1 and not (before / "student.pth").is_file():
        raise RecipeError(
            f"stage {stage}: stage {stage - 1} is not done: {before / 'student.pth'} is missing. Run `mtpd train` on it first."
        )
    _refuse_other_recipe(folder, cfg)
    if (folder / "result.json").exists():
        return cfg, StageResult(**json.loads((folder / "result.json").read_text()))
    if recipe.stages[stage - 1].teachers and targets == "cache" and recipe.cache.on_missing == "error":
        _refuse_missing_rows(recipe, cfg)
    return cfg, None


def latest_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a stage: what a kill cut short is passed over, which mmengine's own record may name."""
    written = {int(number): file for file in folder.glob("iter_*.pth") if (number := file.stem[5:]).isdigit()}
    # a zip's directory is at its end
    return next((str(written[n]) for n in sorted(written, reverse=True) if zipfile.is_zipfile(written[n])), None)


@contextmanager
def _evaluated_weights(runner: Runner) -> Iterator[None]:
    """The weights that were evaluated: an EMAHook averages them beside the training, and takes its averages in for that."""
    averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    for hook in averages:
        hook.before_val_epoch(runner)
    try:
        yield
    finally:
        for hook in averages:
            hook.after_val_epoch(runner)


def _nothing_found(cfg: Config) -> dict[str, float]:
    """The metrics of a student that detects nothing at all, for which mmdet's CocoMetric gives none."""
    kinds = cfg.val_evaluator.metric
    return {f"{kind}_mAP": 0.0 for kind in ([kinds] if isinstance(kinds, str) else kinds)}


def _refuse_missing_rows(recipe: Recipe, cfg: Config) -> None:
    images = read_annotations(recipe.dataset.train.ann_file, "dataset.train.ann_file").images
    for transform in _loads(cfg):
        cache = TeacherCache.open(transform["uri"], transform["teacher"], fingerprint=transform["fingerprint"])
        committed = cache.index.committed(images.ids, len(recipe.policy))
        if not committed.all():
            missing = images.ids[~committed.all(axis=1)]
            shown = ", ".join(str(i) for i in missing[:10])
            raise MissingRowsError(
                f"{recipe.cache.uri}: teacher {cache.info.teacher!r} lacks {int((~committed).sum())} of {committed.size} rows, "
                f"of {missing.size} images (ids {shown}{', ...' if missing.size > 10 else ''}). Resume with `mtpd precompute "
                f"RECIPE --teacher {cache.info.teacher}`; if it cannot read these images, take them out of the annotation "
                "file."
            )


def _loads(cfg: Config) -> list[dict[str, Any]]:
    """The transforms that read a teacher's targets."""
    transforms = (t for d in nested(plain_dict(cfg.train_dataloader)) for t in d.get("pipeline", ()))
    return [transform for transform in transforms if transform["type"] == "LoadTeacherTargets"]


def _in_own_words(error: MtpdError) -> MtpdError:
    """An error as it was raised: a loader's worker hands it over with its traceback for a message."""
    _, worker, words = str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")
    return type(error)(words.strip()) if worker else error


def _refuse_other_recipe(folder: Path, cfg: Config) -> None:
    """A folder goes on with the stage that began in it, and with no other."""
    file = folder / _BEGUN
    if not file.exists():
        return
    found = differences(json.loads(file.read_text()), plain(cfg.to_dict()))
    if differing := [line for line in found if not _FREE.search(line)]:
        shown = "\n  ".join(differing[:8])
        raise RecipeError(
            f"work_dir: {folder} holds a stage that was begun with another recipe:\n  {shown}\nChoose another work_dir, "
            "or delete that folder to begin again."
        )


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    temporary.replace(path)


def _over_ranks(count: int) -> int:
    total = torch.tensor(count)
    all_reduce(total)
    return int(total)


class _StageRecord(Hook):
    """Keep what a stage's result needs across a kill: seconds, forwards, and the metrics of the last evaluation."""

    def __init__(self, file: Path, report: Callable[[dict[str, float]], None] | None) -> None:
        self._file, self._report = file, report
        self._started = time.monotonic()
        self.metrics: dict[str, float] | None = None
        self.seconds_before, self.forwards_before, self.damaged_before = 0.0, 0, 0
        if file.exists():
            before = json.loads(file.read_text())
            self.seconds_before, self.forwards_before = before["seconds"], before["teacher_forwards"]
            self.damaged_before = before["damaged_rows"]

    def after_train_epoch(self, runner: Runner) -> None:
        model = runner.model.module if hasattr(runner.model, "module") else runner.model
        damaged = self.damaged_before + _over_ranks(model.damaged_rows)
        forwards = self.forwards_before + _over_ranks(model.teacher_forwards)
        if runner.rank == 0:
            seconds = self.seconds_before + time.monotonic() - self._started
            _write(self._file, dict(seconds=seconds, teacher_forwards=forwards, damaged_rows=damaged))
        if self._report is not None:
            scalars = runner.message_hub.log_scalars
            losses = {k.removeprefix("train/"): float(v.mean(50)) for k, v in scalars.items() if "loss" in k}
            self._report({"epoch": runner.epoch + 1, **losses})

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metrics = {key.removeprefix("coco/"): float(value) for key, value in (metrics or {}).items()}
