"""What `cache.on_missing: wait` gains: `mtpd run` of two teachers and two stages with it and without, in turn, on one machine.

The recipe is the same but for that key: one CPU for the student, one for each teacher actor, as many actors as processors.
Without it all of them compute and then the student trains alone; with it one is left beside the student. The students have to
come out equal, bit for bit. Wall time includes the start of processes, models and data, not that of Ray.

    OMP_NUM_THREADS=1 python -W ignore -m benchmarks.overlap --json docs/overlap.json --dir work/overlap
"""

import logging
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.arms import read, record
from benchmarks.cost import PKD, SCALE, STUDENT, draw, slug, teacher
from services import cluster
from services.overlap import run_job
from services.present import say, table
from trainer import Recipe, parse_recipe, stage_dir
from trainer.checkpoint import read_weights

CHAIN = ("Swin, w32", "R50")
WAYS = ("error", "wait")


def make_recipe(root: Path, on_missing: str, epochs: int) -> Recipe:
    """Both stages and their teachers, on an empty cache."""
    data, own = root / "data", root / on_missing
    content = {
        "dataset": {
            split: {"ann_file": str(data / "annotations" / f"{split}.json"), "img_dir": str(data / split)}
            for split in ("train", "val")
        },
        "views": {"scale": list(SCALE), "flip": "both"},
        "cache": {"uri": str(own / "cache"), "on_missing": on_missing},
        "teachers": {slug(name): teacher(root, name) for name in CHAIN},
        "student": {"config": STUDENT},
        "stages": [{"teacher": slug(name), "mechanisms": [PKD], "epochs": epochs} for name in CHAIN],
        "actors": {"cpus": 1, "max": os.cpu_count()},
        "training": {"cpus": 1},
        "work_dir": str(own / "work"),
    }
    return parse_recipe(content, "benchmark")


def measure(recipe: Recipe) -> float:
    """Seconds of a run from nothing."""
    shutil.rmtree(recipe.work_dir, ignore_errors=True)
    shutil.rmtree(recipe.cache.uri, ignore_errors=True)
    begin = time.perf_counter()
    fills, stages = run_job(recipe)
    seconds = time.perf_counter() - begin
    if len(stages) != len(CHAIN) or any(fill.failures for fill in fills):
        raise RuntimeError("the run is not whole")
    return seconds


def same_students(a: Recipe, b: Recipe) -> bool:
    """Whether both have the same weights after each stage."""
    for number in range(1, len(CHAIN) + 1):
        one, other = (read_weights(stage_dir(recipe, number) / "student.pth", "benchmark") for recipe in (a, b))
        if one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in one):
            return False
    return True


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; appended to.")],
    root: Annotated[Path, typer.Option("--dir", help="Data, caches and students.")],
    images: Annotated[int, typer.Option(help="Drawn scenes to train on.")] = 160,
    epochs: Annotated[int, typer.Option(help="Of each stage.")] = 10,
    rounds: Annotated[int, typer.Option(help="Runs of each way.")] = 2,
) -> None:
    """Measure what is missing, then print all that is there."""
    logging.disable(logging.WARNING)
    os.environ["RAY_ADDRESS"] = "local"
    root, json_path = root.absolute(), json_path.absolute()
    settings = {"images": images, "epochs": epochs, "teachers": list(CHAIN), "cpus": os.cpu_count()}
    draw(root / "data", images)
    cluster.connect(quiet=True)
    recipes = {way: make_recipe(root, way, epochs) for way in WAYS}
    for number in range(rounds):
        if f"round-{number}" not in read(json_path).get("overlap", {}).get("arms", {}):
            found: dict[str, Any] = {way: measure(recipe) for way, recipe in recipes.items()}
            found["students_equal"] = same_students(*recipes.values())
            record(json_path, "overlap", settings, f"round-{number}", found)
    arms = list(read(json_path)["overlap"]["arms"].values())
    rows = [[way, *(f"{arm[way]:.1f}" for arm in arms)] for way in WAYS]
    rows.append(["students", *("equal" if arm["students_equal"] else "DIFFER" for arm in arms)])
    table(f"{settings}", ["on_missing", *(f"round {n + 1}, s" for n in range(len(arms)))], rows)
    error, wait = (statistics.mean(arm[way] for arm in arms) for way in WAYS)
    say(f"wait / error: {wait / error:.2f}")


if __name__ == "__main__":
    typer.run(main)
