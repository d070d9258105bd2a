"""Stages under Ray Train: each worker runs an mmengine Runner that reads the cache directly."""

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
from ray.train import ControllerError, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from cache import MtpdError
from services import cluster, logs
from services.device import given_device
from services.metrics import publish_pulse
from services.present import duration, say
from services.records import keep_recipe, record_use
from trainer import (
    Pulse,
    Recipe,
    StageResult,
    TargetSource,
    latest_checkpoint,
    open_stage,
    stage_dir,
    teacher_info,
    train_stage,
)

# of code that was asked for what it cannot do; RuntimeError and OSError may be a device's, a network's
_PROGRAM = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def train(
    recipe: Recipe, stages: Sequence[int], targets: TargetSource = "cache", *, quiet: bool = False
) -> list[StageResult]:
    """Train stages one after the other; those that are done are not trained again, one that was killed goes on.

    Args:
        stages: numbers of the stages, from 1, ascending.
        targets: the teacher's features from the cache, or from the teacher running beside the student.
        quiet: do not print what the workers print; it is in each stage's folder all the same.

    Raises:
        MtpdError: an error that the user can mend; or workers failed more often than ``training.max_failures``.
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
    fit_stage(recipe, stage, targets, name)
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


def fit_stage(recipe: Recipe, stage: int, targets: TargetSource, name: str) -> None:
    """Train a stage on the cluster that is connected; after a worker or its node died, the rest of it.

    Ray Train's own retries would try again what the user has to mend, and count failures over the whole stage, where here those
    count that come one after the other without a new checkpoint.

    Args:
        name: of the stage, for errors.

    Raises:
        MtpdError: see `train`.
    """
    folder, most, fruitless, reasons = stage_dir(recipe, stage), recipe.training.max_failures, 0, ""
    while True:
        before = latest_checkpoint(folder)
        try:
            with cluster.own_interrupts():
                _trainer(recipe, stage, targets).fit()
            return
        except ControllerError as error:
            if (fault := _users_fault(error.controller_failure)) is not None:
                raise fault from None
            raise
        except WorkerGroupError as error:
            if (fault := _users_fault(*error.worker_failures.values())) is not None:
                raise fault from None
            now = latest_checkpoint(folder)
            fruitless = 1 if now != before else fruitless + 1
            earlier, reasons = reasons, _reasons(error)
            if fruitless > 1 and reasons == earlier and (place := _programs_fault(error)):
                raise MtpdError(
                    f"{name}: twice the same, and no worker's fault: {reasons} ({place}). What the student's config or a "
                    "mechanism asks for cannot be done like this; trying again does not help."
                ) from error
            if fruitless > most:
                raise MtpdError(
                    f"{name}: workers failed {fruitless} times without a new checkpoint between, which is more than "
                    f"training.max_failures: {reasons}. For memory: training.micro_batch, or more workers. Run the "
                    f"command again to go on from {now or 'the beginning'}."
                ) from error
            say(f"{name}: a worker failed ({reasons}); goes on from {Path(now).name if now else 'the beginning'}")


def _trainer(recipe: Recipe, stage: int, targets: TargetSource) -> TorchTrainer:
    workers, each = recipe.training.workers, cluster.training_demand(recipe)
    return TorchTrainer(
        _work,
        torch_config=_Torch(),
        train_loop_config={"recipe": recipe, "stage": stage, "targets": targets, "log": logs.style()},
        scaling_config=ScalingConfig(
            num_workers=workers.max if workers.min == workers.max else (workers.min, workers.max),
            use_gpu=each.gpus > 0,
            resources_per_worker={"CPU": each.cpus, **({"GPU": each.gpus} if each.gpus else {})},
        ),
        run_config=RunConfig(name=f"stage-{stage}", storage_path=str(stage_dir(recipe, stage) / "ray")),
    )


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray's, whose own words for a GPU that torch cannot use are a page about NCCL."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(given_device, "training.gpus", "a training worker")
        super().on_start(worker_group, backend_config)


class _Torch(TorchConfig):
    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend


def _users_fault(*failures: Exception) -> MtpdError | None:
    for failure in failures:
        # the cause first: Ray's own error is of its type too, with a traceback for a message
        for cause in (getattr(failure, "cause", None), failure.__cause__, failure):
            if isinstance(cause, MtpdError):
                return cause
    return None


def _reasons(error: WorkerGroupError) -> str:
    return "; ".join(dict.fromkeys(_last_line(failure) for failure in error.worker_failures.values()))


def _programs_fault(error: WorkerGroupError) -> str | None:
    """Where the code fails, which fails again; None for what another try may mend: lost workers, memory, network, devices."""
    if not any(isinstance(failure, _PROGRAM) for failure in error.worker_failures.values()):
        return None
    # the exceptions come without their tracebacks, which Ray's own message quotes
    frames = re.findall(r'^ *File "([^"]+)", line (\d+), in', str(error), re.MULTILINE)
    return next((f"{file}:{line}" for file, line in reversed(frames) if "/torch/" not in file), "see the worker's log")


def _last_line(failure: Exception) -> str:
    lines = [line.strip() for line in str(failure).splitlines() if line.strip()]
    return f"{type(failure).__name__}: {lines[-1]}" if lines else type(failure).__name__


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
