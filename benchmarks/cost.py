"""What targets cost online, cached and computed at the first request, and what `mtpd plan --measure` predicts of it.

Three parts; each result goes to --json at once, and what is there is not measured again.

- ``arms``: the demo's student and its trained Swin teacher, two seeds of each way, by what `mtpd precompute` and `mtpd train` call,
  on one local Ray: wall time, teacher forwards, bytes, box AP. The second student is trained for real; the fifth is arithmetic.
- ``ratios``: the same student and teachers from far cheaper to far dearer than its step, one student of each way. Their weights are
  random: what they cost is meant, AP would mean nothing and is not given.
- ``steps``: a step with PKD targets from a cache over the same step without any teacher, loader included, in one process, in turn:
  the small student, and RetinaNet R50 at 800 x 1344.

Every wall time includes the start of processes, models and data, and one evaluation; not the start of Ray. Each recipe is measured by the
planner first, on an empty cache.

    OMP_NUM_THREADS=1 python -W ignore -m benchmarks.cost --json docs/cost.json --dir work/cost
"""

import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from mmdet.registry import MODELS

from benchmarks.arms import read, record
from benchmarks.study import FIRST_VAL_ID, SCENES
from benchmarks.study_settings import DEMO
from services import cluster
from services.measure import measure_job
from services.plan import cost_record
from services.precompute import fill, plan_teacher
from services.present import duration, say, size, table
from services.train import train
from trainer import Place, Recipe, generate, measure, parse_recipe
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
SCALE, VAL_IMAGES, BATCH = (192, 144), 100, 8
TARGET_ERROR, TARGET_STEP = 0.2, 1.05


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
    """One student of one teacher in one way; cached students share a cache."""
    data, own = root / "data", root / slug(name)
    content = {
        "dataset": {
            split: {"ann_file": str(data / "annotations" / f"{split}.json"), "img_dir": str(data / split)}
            for split in ("train", "val")
        },
        "views": {"scale": list(SCALE), "flip": "both"},
        "cache": {"uri": str(own / "cache")},
        "teachers": {slug(name): teacher(root, name)},
        "student": {"config": STUDENT, "inherit": name == TRAINED},
        "stages": [{"teacher": slug(name), "mechanisms": [PKD], "epochs": epochs}],
        "training": {"seed": seed},
        "work_dir": str(own / f"{way}-{seed}"),
    }
    return parse_recipe(content, "benchmark")


def train_arm(recipe: Recipe, way: str, first: bool) -> dict[str, Any]:
    """Train one student as users do, from nothing, or from the rows that an earlier one left."""
    shutil.rmtree(recipe.work_dir, ignore_errors=True)  # an arm that was killed is measured whole
    if first and way == "cached":
        shutil.rmtree(recipe.cache.uri, ignore_errors=True)
    begin = time.perf_counter()
    forwards = written = 0
    if way == "cached":
        filled = fill(recipe, next(iter(recipe.teachers)))
        forwards, written = filled.computed, filled.written_bytes
    between = time.perf_counter()
    (result,) = train(recipe, [1], "online" if way == "online" else "cache", quiet=True)
    end = time.perf_counter()
    return {
        "seconds": end - begin,
        "precompute": between - begin,
        "training": end - between,
        "in_the_worker": result.seconds,
        "teacher_forwards": forwards + result.teacher_forwards,
        "written_bytes": written,
        "mAP": 100 * result.metrics["bbox_mAP"],
    }


def compare(json_path: Path, part: str, root: Path, names: list[str], seeds: int, settings: dict[str, int]) -> None:
    """Predict, then train, every teacher's arms."""
    draw(root / "data", settings["images"])
    for name in names:
        done = read(json_path).get(part, {})
        if name not in done.get("predictions", {}):
            recipe = make_recipe(root, name, "cached", 0, settings["epochs"])
            shutil.rmtree(recipe.cache.uri, ignore_errors=True)
            say(f"{part}: {name}: measuring what the planner asks for")
            begin = time.perf_counter()
            found = cost_record(measure_job(recipe, [plan_teacher(recipe, slug(name))]))
            found["planner_seconds"] = time.perf_counter() - begin
            record(json_path, part, settings, name, found, "predictions")
        for seed in range(seeds):
            for way in ("online", "cached"):
                arm = f"{name} {way}-{seed}"
                if arm in done.get("arms", {}):
                    continue
                result = train_arm(make_recipe(root, name, way, seed, settings["epochs"]), way, seed == 0)
                record(json_path, part, settings, arm, result)
                say(f"{part}: {arm}: {duration(result['seconds'])}, {result['teacher_forwards']} teacher forwards")


def step_recipes(root: Path) -> dict[str, Callable[[], Recipe]]:
    """The two students whose cached step is held against their plain one."""

    def large() -> Recipe:
        draw_large(root / "large")
        options = {"model.backbone.init_cfg": None, "train_dataloader.batch_size": 1}
        small = {
            "model.backbone.init_cfg": None,
            "model.backbone.depth": 18,
            "model.neck.in_channels": [64, 128, 256, 512],
        }
        shipped = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
        file = root / "large" / "r18.pth"
        if not file.exists():
            torch.save({"state_dict": MODELS.build(load_config(shipped, small, "teacher").model).state_dict()}, file)
        data = {"ann_file": str(root / "large" / "all.json"), "img_dir": str(root / "large")}
        return parse_recipe(
            {
                "dataset": {"train": data, "val": data},
                "views": {"scale": [1333, 800], "flip": "both"},
                "cache": {"uri": str(root / "unused"), "unit_rows": 2},
                "teachers": {"r18": {"config": shipped, "cfg_options": small, "checkpoint": str(file)}},
                "student": {"config": shipped, "cfg_options": options},
                "stages": [{"teacher": "r18", "mechanisms": [{"type": "PKDLoss"}]}],
                "work_dir": str(root / "unused"),
            },
            "benchmark",
        )

    return {
        "RetinaNet R18, quarter width, 144 x 192, batch 8": lambda: make_recipe(root, TRAINED, "steps", 0, 1),
        "RetinaNet R50, 800 x 1344, batch 1": large,
    }


def draw_large(root: Path, images: int = 8) -> None:
    """Images that the view 1333 x 800 pads to 800 x 1344, with twelve boxes each."""
    root.mkdir(parents=True, exist_ok=True)
    rng, entries, objects = np.random.default_rng(0), [], []
    for number in range(images):
        coarse = rng.integers(256, size=(48, 80, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f"{number}.jpg"), cv2.resize(coarse, (640, 384), interpolation=cv2.INTER_CUBIC))
        entries.append({"id": number, "width": 640, "height": 384, "file_name": f"{number}.jpg"})
        for x, y in rng.uniform(0, (500, 250), size=(12, 2)).tolist():
            box = [x, y, *rng.uniform(20, 130, size=2).tolist()]
            kind = {"image_id": number, "category_id": 1, "iscrowd": 0, "area": box[2] * box[3], "bbox": box}
            objects.append({"id": len(objects), **kind})
    thing = {"images": entries, "categories": [{"id": 1, "name": "thing"}], "annotations": objects}
    (root / "all.json").write_text(json.dumps(thing))


def steps(json_path: Path, root: Path, rounds: tuple[int, int]) -> None:
    """Cached over plain steps."""
    draw(root / "data", 200)
    torch.set_num_threads(1)
    for (name, make), count in zip(step_recipes(root).items(), rounds, strict=True):
        if name in read(json_path).get("steps", {}).get("arms", {}):
            continue
        place = Place("cpu", cores=1, threads=1)
        (found,) = measure(make(), place, place, rounds=count).stages
        result = {
            kind: {"load": step.load, "compute": step.compute}
            for kind, step in (("plain", found.plain), ("cached", found.cached), ("online", found.online))
        }
        result |= {"read": found.read, "read_bytes": found.read_bytes, "rounds": count}
        result["ratio"] = found.cached.seconds / found.plain.seconds
        record(json_path, "steps", {}, name, result)


def summarise(json_path: Path) -> None:
    """Tables of all that is there."""
    content = read(json_path)
    for part in ("arms", "ratios"):
        if part in content:
            _show_part(part, content[part])
    rows = [
        [name, *(f"{1000 * sum(arm[kind].values()):,.1f}" for kind in ("plain", "cached"))]
        + [f"{1000 * arm['read']:.2f}", size(arm["read_bytes"]), f"{arm['ratio']:.3f}", arm["ratio"] <= TARGET_STEP]
        for name, arm in content.get("steps", {}).get("arms", {}).items()
    ]
    columns = [
        "student",
        "plain step, ms an image",
        "cached",
        "of it reading",
        "bytes",
        "ratio",
        f"at most {TARGET_STEP}",
    ]
    table("a cached step over the same without any teacher", columns, rows)


def _show_part(part: str, content: dict[str, Any]) -> None:
    arms, rows, pays, errors = content["arms"], [], [], []
    for name, prediction in content.get("predictions", {}).items():
        of_teacher = {way: _arms_of(arms, name, way) for way in ("online", "cached")}
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
                    [f"{name}, {way}, {students}", f"{measured['seconds']:.1f}", f"{predicted['seconds']:.1f}"]
                    + [f"{error:+.0%}", measured["teacher_forwards"], f"{predicted['teacher_forwards']:.0f}"]
                    + [size(measured["written_bytes"]), points]
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
    two = [
        min(("online", "cached"), key=lambda way: prediction["predicted"][way][n]["total"]["seconds"]) for n in "125"
    ]
    said = stage["caching_pays_from_epochs"] or "never"
    return [f"{ratio:.2f}", f"{gain:.2f}", f"{precompute:.1f}", from_epochs, said, *ways, *two]


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; appended to.")],
    root: Annotated[Path, typer.Option("--dir", help="Data, caches and students.")],
    parts: Annotated[str, typer.Option(help="Which, with commas.")] = "arms,ratios,steps",
    images: Annotated[int, typer.Option(help="Of `arms`.")] = 160,
    epochs: Annotated[int, typer.Option(help="Of `arms`.")] = 10,
    ratio_images: Annotated[int, typer.Option(help="Of `ratios`.")] = 64,
    ratio_epochs: Annotated[int, typer.Option(help="Of `ratios`.")] = 4,
    rounds: Annotated[
        int, typer.Option(help="Timed steps of the large student; ten times as many of the small one.")
    ] = 5,
    summary: Annotated[bool, typer.Option("--summary", help="Measure nothing; print the tables.")] = False,
) -> None:
    """Measure what is missing, then print all that is there."""
    logging.disable(logging.WARNING)
    os.environ["RAY_ADDRESS"] = "local"  # a cluster that happens to run here is not what is measured
    root, json_path, chosen = root.absolute(), json_path.absolute(), parts.split(",")
    if not summary and "steps" in chosen:
        steps(json_path, root / "steps", (10 * rounds, rounds))
    if not summary and {"arms", "ratios"} & set(chosen):
        cluster.connect(quiet=True)
    if not summary and "arms" in chosen:
        compare(json_path, "arms", root / "arms", [TRAINED], 2, {"images": images, "epochs": epochs})
    if not summary and "ratios" in chosen:
        settings = {"images": ratio_images, "epochs": ratio_epochs}
        compare(json_path, "ratios", root / "ratios", list(TEACHERS), 1, settings)
    summarise(json_path)


if __name__ == "__main__":
    typer.run(main)
