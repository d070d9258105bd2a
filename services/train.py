"""Stages under Ray Train: each worker runs an mmengine Runner that reads the cache directly."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
from ray.train import RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchTrainer

from cache import MtpdError
from services import cluster, logs
from services.metrics import publish_pulse
from services.present import duration, say
from services.records import keep_recipe, record_use
from trainer import Pulse, Recipe, StageResult, TargetSource, open_stage, stage_dir, teacher_info, train_stage


def train(
    recipe: Recipe, stages: Sequence[int], targets: TargetSource = "cache", *, quiet: bool = False
) -> list[StageResult]:
    """Train stages one after the other; those that are done are not trained again, one that was killed goes on.

    Args:
        stages: numbers of the stages, from 1, ascending.
        targets: the teacher's features from the cache, or from the teacher running beside the student.
        quiet: do not print what the workers print; it is in each stage's folder all the same.

    Raises:
        MtpdError: an error that the user can mend.
    """
    cluster.refuse_temporary_paths(recipe)
    keep_recipe(recipe)
    return [_train_stage(recipe, stage, targets, quiet) for stage in stages]


def _train_stage(recipe: Recipe, stage: int, targets: TargetSource, quiet: bool) -> StageResult:
    _, done = open_stage(recipe, stage, targets)
    spec = recipe.stages[stage - 1]
    name = f"stage {stage} of {len(recipe.stages)} ({spec.label}, {spec.epochs} epochs)"
    if done is not None:
        say(f"{name}: done before, {ap(done.metrics)}")
        return done
    say(f"{name}: training; log in {stage_dir(recipe, stage)}")
    cached = [teacher_info(recipe, teacher) for teacher in spec.teachers] if targets == "cache" else []
    for info in cached:
        record_use(recipe, info)
    cluster.connect(quiet=quiet)
    workers = recipe.training.workers
    cpus = cluster.share(recipe.training.cpus, "CPU", workers)
    gpus = cluster.share(recipe.training.gpus, "GPU", workers)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"recipe": recipe, "stage": stage, "targets": targets, "log": logs.style()},
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpus > 0, resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})}
        ),
        run_config=RunConfig(name=f"stage-{stage}", storage_path=str(stage_dir(recipe, stage) / "ray")),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        for failure in error.worker_failures.values():
            for cause in (failure, failure.__cause__, getattr(failure, "cause", None)):
                if isinstance(cause, MtpdError):
                    raise cause from None
        raise
    _, result = open_stage(recipe, stage, targets)
    if result is None:
        raise MtpdError(
            f"{stage_dir(recipe, stage)}: the worker finished, but its result is not there. work_dir must lie on storage that "
            "every node sees."
        )
    for info in cached:  # that it is done with
        record_use(recipe, info)
    say(f"{name}: {ap(result.metrics)} after {duration(result.seconds)}")
    return result


def ap(metrics: dict[str, float]) -> str:
    """COCO AP in points, boxes and (where there are any) masks."""
    kinds = {"bbox_mAP": "box AP", "segm_mAP": "mask AP"}
    return ", ".join(f"{label} {100 * metrics[key]:.1f}" for key, label in kinds.items() if key in metrics)


def _work(config: dict[str, Any]) -> None:
    """One training worker. Ray Train has initialised the process group."""
    logs.set_up(config["log"])
    name = f"{Path(config['recipe'].work_dir).name}/stage-{config['stage']}"

    def listen(pulse: Pulse) -> None:
        publish_pulse(pulse, name)
        logs.event("training", stage=name, **asdict(pulse))

    world = ray.train.get_context().get_world_size()
    train_stage(
        config["recipe"],
        config["stage"],
        config["targets"],
        launcher="pytorch" if world > 1 else "none",
        report=lambda metrics: ray.train.report(metrics),
        listen=listen,
    )
