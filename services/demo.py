"""`mtpd demo`: the whole job on generated data, in three arms at equal epochs."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cache import RecipeError, open_storage
from services import cluster
from services.cache_facts import bytes_on_disk
from services.filling import FillResult
from services.precompute import fill_all, plan_teacher, used_teachers
from services.present import duration, say, size, table
from services.report import write_report
from services.train import ap, train
from trainer import Recipe, SceneOptions, StageResult, generate, parse_recipe

_ROOT = Path(__file__).parent.parent
_TRAIN_SCENES, _VAL_SCENES, _SEED = 300, 200, 0
# few, large objects: a student finds some of them after few epochs
_SCENES = SceneOptions(max_objects=4, min_size=0.2, clutter=3.0)
_FIRST_VAL_ID = 1_000_001  # behind every scene that the teachers were trained on


def run(work_dir: Path) -> None:
    """Generate scenes, precompute two teachers, train the three arms, print what came out.

    Everything is kept in ``work_dir``, and a second call goes on from there.

    Raises:
        RecipeError: the demo's recipe is not where the project keeps it.
    """
    started = time.monotonic()
    work_dir = work_dir.absolute()
    cluster.connect(quiet=True)
    _draw(work_dir / "data")
    arms = _arms(work_dir)
    progressive = arms["progressive"]
    plans = {name: plan_teacher(progressive, name) for name in used_teachers(progressive)}
    for name, plan in plans.items():
        say(f"plan: teacher {name}: {plan.total:,} rows in {len(plan.buckets)} buckets, {size(plan.stored_bytes)}")
    fills = fill_all(progressive, list(plans))
    if failures := [failure for result in fills for failure in result.failures]:
        raise RecipeError(f"{len(failures)} rows failed, the first: {failures[0]}. Delete {work_dir} and begin again.")
    results = {}
    for name, recipe in arms.items():
        say(f"arm: {name}")
        results[name] = train(recipe, range(1, len(recipe.stages) + 1), quiet=True)
    _show(arms, results)
    made = sum(result.total for result in fills)
    used = sum(stage.images for stages in results.values() for stage in stages if stage.teacher)
    seconds = sum(result.seconds for result in fills)
    say(f"teacher forwards: {made:,} made ({made / len(fills):,.0f} a teacher, in {duration(seconds)}), {used:,} used")
    say(
        f"  running the teachers beside the students would have made {used:,}: {used - made:,} saved ({1 - made / used:.0%})"
    )
    say(cache_line(fills, progressive.cache.uri))
    say(f"report: {write_report(work_dir)}")
    say(f"the demo took {duration(time.monotonic() - started)}; everything is in {work_dir}")


def cache_line(fills: Sequence[FillResult], uri: str) -> str:
    """What the cache holds: what was planned, and what the report counts."""
    storage = open_storage(uri)
    shards = size(sum(result.stored_bytes for result in fills))
    on_disk = size(sum(bytes_on_disk(storage, result.group) for result in fills))
    return f"cache: {shards} of shards, {on_disk} on disk with manifests, in {uri}"


def _draw(folder: Path) -> None:
    if (folder / "annotations" / "val.json").exists():
        return
    say(f"drawing {_TRAIN_SCENES} scenes to train on and {_VAL_SCENES} to evaluate on")
    generate(folder, "train", _TRAIN_SCENES, seed=_SEED, options=_SCENES)
    generate(folder, "val", _VAL_SCENES, seed=_SEED, first_id=_FIRST_VAL_ID, options=_SCENES)


def _arms(work_dir: Path) -> dict[str, Recipe]:
    """The three arms: the shipped recipe, with the data and the folders of this demo."""
    file = _ROOT / "recipes" / "demo.yaml"
    if not file.is_file():
        raise RecipeError(
            f"{file}: the demo needs the project's checkout; install it with `pip install -e .` from there."
        )
    content: dict[str, Any] = yaml.safe_load(file.read_text())
    for detector in (*content["teachers"].values(), content["student"]):
        for key in {"config", "checkpoint"} & detector.keys():
            detector[key] = str(_ROOT / detector[key])
    data = work_dir / "data"
    content["dataset"] = {
        split: {"ann_file": str(data / "annotations" / f"{split}.json"), "img_dir": str(data / split)}
        for split in ("train", "val")
    }
    content["cache"]["uri"] = str(work_dir / "cache")
    stages = content["stages"]
    epochs = sum(stage["epochs"] for stage in stages)
    arms = {
        "student alone": ([{"epochs": epochs}], False),
        "last teacher directly": ([{**stages[-1], "epochs": epochs}], content["student"]["inherit"]),
        "progressive": (stages, content["student"]["inherit"]),
    }
    return {
        name: parse_recipe(
            {
                **content,
                "stages": arm_stages,
                "student": {**content["student"], "inherit": inherit},
                "work_dir": str(work_dir / name.split()[-1]),
            },
            str(file),
        )
        for name, (arm_stages, inherit) in arms.items()
    }


def _show(arms: dict[str, Recipe], results: dict[str, list[StageResult]]) -> None:
    rows: list[list[object]] = []
    for name, stages in results.items():
        sequence = " then ".join(f"{stage.label}, {stage.epochs}" for stage in arms[name].stages)
        reached = " -> ".join(ap(stage.metrics) for stage in stages)
        rows.append([name, sequence, reached, duration(sum(stage.seconds for stage in stages))])
    table("three arms at equal epochs", ["arm", "stages (teacher, epochs)", "val after each stage", "time"], rows)
