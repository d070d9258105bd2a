"""What targets cost online and cached, measured, and what `mtpd plan --measure` predicts of it.

Three parts; each result goes to --json at once, and what is there is not measured again. --seconds begins nothing new after
so many: so a long run is cut into pieces.

- ``arms``: the demo's student and its trained Swin teacher, two seeds of each way, by what `mtpd
  precompute` and `mtpd train` call, on one local Ray: wall time, teacher forwards, bytes, box AP. Two students are trained;
  five are arithmetic.
- ``ratios``: the same student and teachers from far cheaper to far dearer than its step, one student of each way. Their
  weights are random: what they cost is meant, AP would mean nothing and is not given.
- ``steps``: see `benchmarks.cost_steps`.

Every wall time includes the start of processes, models and data, and one evaluation; not the start of Ray. Each recipe is
measured by the planner first, on an empty cache.

    OMP_NUM_THREADS=1 python -W ignore -m benchmarks.cost --json docs/cost.json --dir work/cost
"""

import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from mmdet.registry import MODELS

from benchmarks.arms import read, record
from benchmarks.cost_steps import measure_steps, show_steps
from benchmarks.study_data import FIRST_VAL_ID, SCENES
from benchmarks.study_settings import DEMO
from services import cluster
from services.measure import measure_job
from services.plan import cost_record
from services.precompute import fill, plan_teacher
from services.present import duration, say, size, table
from services.serving import beside_training
from services.train import train
from trainer import WAYS, Recipe, TargetSource, Way, generate, parse_recipe
from trainer.config import load_config

STUDENT, R18, SWIN = (f"{DEMO}/retinanet_{name}.py" for name in ("r18_w16", "r18_w20", "swin_w32"))
_NARROW = {
    "model.backbone.base_channels": 8,
    "model.neck.in_channels": [8, 16, 32, 64],
    "model.bbox_head.stacked_convs": 1,
}
_R50 = {
    "model.backbone.depth": 50,
    "model.backbone.base_channels": 64,
    "model.neck.in_channels": [256, 512, 1024, 2048],
    "model.bbox_head.stacked_convs": 4,
}
_SWIN_B = {
    "model.backbone.embed_dims": 128,
    "model.backbone.depths": [2, 2, 18, 2],
    "model.backbone.num_heads": [4, 8, 16, 32],
    "model.neck.in_channels": [256, 512, 1024],
}
# from cheap to dear: config and options
TEACHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "R18, eighth width": (R18, _NARROW),
    "Swin, w32": (SWIN, {}),
    "R50": (R18, _R50),
    "Swin-B": (SWIN, _SWIN_B),
}
TRAINED = "trained Swin, w32"
PKD = {"type": "PKDLoss", "loss_weight": 2.0}
SCALE, VAL_IMAGES = (192, 144), 100
TARGET_ERROR = 0.2
# where a student's targets come from. `cached` computes every row before, `hybrid` those that the student asks for, when it
# does (`cache.on_missing: compute`), beside the student on the same machine
SOURCES: dict[Way, TargetSource] = {"online": "online", "cached": "cache", "hybrid": "cache"}
HYBRID: Way = "hybrid"
COMPARED: dict[str, tuple[Way, ...]] = {"arms": WAYS, "ratios": ("online", "cached")}


def draw(root: Path, images: int) -> None:
    """Scenes to train on and to evaluate on."""
    if not (root / "annotations" / "val.json").exists():
        generate(root, "train", images, seed=0, options=SCENES)
        generate(root, "val", VAL_IMAGES, seed=0, first_id=FIRST_VAL_ID, options=SCENES)


def teacher(root: Path, name: str) -> dict[str, Any]:
    """A teacher as a recipe says it; random weights unless it is the trained one."""
    if name == TRAINED:
        return {"config": SWIN, "checkpoint": f"{DEMO}/swin_w32.pth", "batch_size": 4}
    config, options = TEACHERS[name]
    file = root / f"{slug(name)}.pth"
    if not file.exists():
        torch.manual_seed(0)
        model = MODELS.build(load_config(config, options, "teacher").model)
        model.init_weights()
        torch.save({"state_dict": model.state_dict()}, file)
    return {"config": config, "cfg_options": options, "checkpoint": str(file), "batch_size": 4}


def slug(name: str) -> str:
    """A name as files and teachers are called."""
    return name.replace(",", "").replace(" ", "-")


def make_recipe(root: Path, name: str, way: str, seed: int, epochs: int) -> Recipe:
    """One student of one teacher in one way; cached students share a cache, and so do hybrid ones."""
    data, own = root / "data", root / slug(name)
    beside = {"actors": {"cpus": 1}, "training": {"seed": seed, "cpus": 1}} if way == HYBRID else {}
    cache = {"uri": str(own / f"cache-{way}"), **({"on_missing": "compute"} if way == HYBRID else {})}
    content = {
        "dataset": {
            split: {"ann_file": str(data / "annotations" / f"{split}.json"), "img_dir": str(data / split)}
            for split in ("train", "val")
        },
        "views": {"scale": list(SCALE), "flip": "both"},
        "cache": cache,
        "teachers": {slug(name): teacher(root, name)},
        "student": {"config": STUDENT, "inherit": name == TRAINED},
        "stages": [{"teacher": slug(name), "mechanisms": [PKD], "epochs": epochs}],
        "training": {"seed": seed},
        "work_dir": str(own / f"{way}-{seed}"),
    }
    return parse_recipe(content | beside, "benchmark")


def train_arm(recipe: Recipe, way: str, first: bool) -> dict[str, Any]:
    """Train one student as users do, from nothing, or from the rows that an earlier one left."""
    shutil.rmtree(recipe.work_dir, ignore_errors=True)  # an arm that was killed is measured whole
    if first and way != "online":
        shutil.rmtree(recipe.cache.uri, ignore_errors=True)
    begin = time.perf_counter()
    forwards = written = 0
    if way == "cached":
        filled = fill(recipe, next(iter(recipe.teachers)))
        forwards, written = filled.computed, filled.written_bytes
    between = time.perf_counter()
    with beside_training(recipe) if way == HYBRID else nullcontext():
        (result,) = train(recipe, [1], SOURCES[way], quiet=True)
    end = time.perf_counter()
    if way == HYBRID:
        plan = plan_teacher(recipe, next(iter(recipe.teachers)))
        # every row that is there was computed once (tests hold the service to it); of the first student all are new
        forwards, written = (plan.total - plan.todo, plan.stored_bytes) if first else (0, 0)
    return {
        "seconds": end - begin,
        "precompute": between - begin,
        "training": end - between,
        "in_the_worker": result.seconds,
        "teacher_forwards": forwards + result.teacher_forwards,
        "written_bytes": written,
        "mAP": 100 * result.metrics["bbox_mAP"],
    }


def predict(root: Path, name: str, epochs: int, ways: Sequence[Way]) -> dict[str, Any]:
    """What the planner says of a recipe on an empty cache; of ``hybrid`` that of its own recipe, with its shares."""
    found: dict[str, Any] = {}
    for way in ("cached", *({HYBRID} & set(ways))):
        recipe = make_recipe(root, name, way, 0, epochs)
        shutil.rmtree(recipe.cache.uri, ignore_errors=True)
        begin = time.perf_counter()
        said = cost_record(measure_job(recipe, [plan_teacher(recipe, slug(name))]))
        said["planner_seconds"] = time.perf_counter() - begin
        if way == HYBRID:
            found[HYBRID] = said
            found["predicted"][HYBRID] = said["predicted"][HYBRID]
        else:
            found = said
    return found


def compare(
    json_path: Path, part: str, root: Path, names: list[str], seeds: int, settings: dict[str, int], deadline: float
) -> None:
    """Predict, then train, every teacher's arms, and begin none after the deadline."""
    draw(root / "data", settings["images"])
    for name in names:
        done = read(json_path).get(part, {})
        if name not in done.get("predictions", {}):
            if time.monotonic() > deadline:
                return
            say(f"{part}: {name}: measuring what the planner asks for")
            found = predict(root, name, settings["epochs"], COMPARED[part])
            record(json_path, part, settings, name, found, "predictions")
        for seed in range(seeds):
            for way in COMPARED[part]:
                arm = f"{name} {way}-{seed}"
                if arm in done.get("arms", {}):
                    continue
                if time.monotonic() > deadline:
                    return
                result = train_arm(make_recipe(root, name, way, seed, settings["epochs"]), way, seed == 0)
                record(json_path, part, settings, arm, result)
                say(f"{part}: {arm}: {duration(result['seconds'])}, {result['teacher_forwards']} teacher forwards")


def summarise(json_path: Path) -> None:
    """Tables of all that is there."""
    content = read(json_path)
    for part in ("arms", "ratios"):
        if part in content:
            _show_part(part, content[part])
    show_steps(content)


def _show_part(part: str, content: dict[str, Any]) -> None:
    arms, rows, pays, errors = content["arms"], [], [], []
    for name, prediction in content.get("predictions", {}).items():
        of_teacher = {way: _arms_of(arms, name, way) for way in COMPARED[part]}
        if not all(of_teacher.values()):
            continue
        for way, trained in of_teacher.items():
            for students in range(1, len(trained) + 1):
                measured = _sum(trained[:students])
                predicted = prediction["predicted"][way][str(students)]["total"]
                error = predicted["seconds"] / measured["seconds"] - 1
                errors.append(abs(error))
                points = " ".join(f"{arm['mAP']:.1f}" for arm in trained[:students]) if part == "arms" else ""
                rows.append(
                    [
                        f"{name}, {way}, {students}",
                        f"{measured['seconds']:.1f}",
                        f"{predicted['seconds']:.1f}",
                        f"{error:+.0%}",
                        measured["teacher_forwards"],
                        f"{predicted['teacher_forwards']:.0f}",
                        size(measured["written_bytes"]),
                        points,
                    ]
                )
        pays.append([name, *_pays(prediction, of_teacher, content["settings"]["epochs"])])
    columns = [
        "teacher, way, students",
        "measured, s",
        "predicted, s",
        "error",
        "forwards",
        "predicted",
        "written",
        "AP",
    ]
    table(f"{part}: {content['settings']}", columns, rows)
    if errors:
        worst = f"errors: median {statistics.median(errors):.0%}, largest {max(errors):.0%}"
        say(f"{worst}; within {TARGET_ERROR:.0%}: {sum(e <= TARGET_ERROR for e in errors)} of {len(errors)}")
    columns = ["teacher", "teacher/student", "gain an epoch, s", "precompute, s", "pays from epochs", "predicted"]
    table("where caching starts to pay", [*columns, "1 student", "2", "5", "predicted 1", "2", "5"], pays)


def _arms_of(arms: dict[str, Any], name: str, way: str) -> list[dict[str, Any]]:
    return [arms[key] for seed in range(9) if (key := f"{name} {way}-{seed}") in arms]


def _sum(trained: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(arm[key] for arm in trained) for key in ("seconds", "teacher_forwards", "written_bytes")}


def _pays(prediction: dict[str, Any], trained: dict[str, list[dict[str, Any]]], epochs: int) -> list[object]:
    """From measured parts: online's training against cached's and the precompute; beside it what the planner said."""
    online, cached = (statistics.mean(arm["training"] for arm in trained[way]) for way in ("online", "cached"))
    precompute = trained["cached"][0]["precompute"]
    gain = (online - cached) / epochs
    job, stage = prediction["measured"], prediction["stages"][0]
    (of,), (step,) = job["teachers"].values(), job["stages"]
    ratio = of["compute"] / (step["plain"]["load"] + step["plain"]["compute"])
    from_epochs = f"{precompute / gain:.1f}" if gain > 0 else "never"
    ways = ["cached" if precompute + n * cached < n * online else "online" for n in (1, 2, 5)]
    two = [prediction["cheapest"][n] for n in "125"]
    said = stage["caching_pays_from_epochs"] or "never"
    return [f"{ratio:.2f}", f"{gain:.2f}", f"{precompute:.1f}", from_epochs, said, *ways, *two]


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; appended to.")],
    root: Annotated[Path, typer.Option("--dir", help="Data, caches and students.")],
    parts: Annotated[str, typer.Option(help="Which, with commas.")] = "arms,ratios,steps",
    seconds: Annotated[float, typer.Option(help="Begin no measurement after so many.")] = math.inf,
    images: Annotated[int, typer.Option(help="Of `arms`.")] = 160,
    epochs: Annotated[int, typer.Option(help="Of `arms`.")] = 10,
    ratio_images: Annotated[int, typer.Option(help="Of `ratios`.")] = 64,
    ratio_epochs: Annotated[int, typer.Option(help="Of `ratios`.")] = 4,
    rounds: Annotated[
        int, typer.Option(help="Timed steps of the large student; ten times as many of the small one.")
    ] = 6,
    summary: Annotated[bool, typer.Option("--summary", help="Measure nothing; print the tables.")] = False,
) -> None:
    """Measure what is missing, then print all that is there."""
    logging.disable(logging.WARNING)
    os.environ["RAY_ADDRESS"] = "local"  # a cluster that happens to run here is not what is measured
    root, json_path, chosen = root.absolute(), json_path.absolute(), parts.split(",")
    deadline = time.monotonic() + seconds
    if not summary and "steps" in chosen:
        draw(root / "steps" / "data", 64)
        small = make_recipe(root / "steps", TRAINED, "cached", 0, 1)
        measure_steps(json_path, root / "steps", small, rounds)
    if not summary and {"arms", "ratios"} & set(chosen):
        cluster.connect(quiet=True)
    if not summary and "arms" in chosen:
        compare(json_path, "arms", root / "arms", [TRAINED], 2, {"images": images, "epochs": epochs}, deadline)
    if not summary and "ratios" in chosen:
        settings = {"images": ratio_images, "epochs": ratio_epochs}
        compare(json_path, "ratios", root / "ratios", list(TEACHERS), 1, settings, deadline)
    summarise(json_path)


if __name__ == "__main__":
    typer.run(main)
