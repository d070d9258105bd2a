"""The order of teachers: how long it takes, what drawing positions costs, and what it says of trained detectors.

- speed: six models (a student and five candidates), int8 P3-P7 of 256 channels at 800 x 1344, written by the cache's own writer,
  in the page cache. Seconds an image for several numbers of positions, this process's memory that is not of files after three
  quarters and after all of the images, and what 2,000 images would take. The solving of all pairs, which does not grow with
  images, is timed apart. 2,000 images are 69 GB: where they must come from a disk, its time is added.
- detectors: the demo's two teachers, a student trained here for some epochs on generated scenes, and the same student
  trained three times as long as a third candidate. Box AP of each, the matrix of costs on all positions, what changes when
  few are drawn (over five draws: the largest and the mean difference of any pair), what changes with other images, and the
  sequence. The maps are small (18 x 24 at P3), so that 16 positions there are the share that 512 are at 800 x 1344.

Run from the repository's root::

    python -W ignore -m benchmarks.order --json order.json --dir /tmp/order
"""

import json
import logging
import resource
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer

import cache
from benchmarks.readers import HEIGHT, LEVELS, WIDTH, Payload
from services.present import say, table
from tests.trainer import precompute
from trainer import (
    STUDENT,
    OrderRows,
    Recipe,
    adaptation_costs,
    choose_rows,
    evaluate_teacher,
    generate,
    parse_recipe,
    select_teachers,
    train_stage,
    with_candidates,
)

DEMO = Path(__file__).parent.parent / "recipes" / "demo"
SCALE = (192, 144)  # what the teachers were trained at
FIRST_VAL_ID = 1_000_001  # behind every scene that they were trained on
MODELS, IMAGES = 6, 2000
DRAWS = (64, 16, 4)


def build(folder: Path, rows: int) -> dict[str, cache.TeacherCache]:
    """Six caches of random rows; those that are there already are opened."""
    nothing = cache.Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    sizes = np.full(rows, WIDTH), np.full(rows, HEIGHT)
    images = cache.Images(np.arange(rows), *sizes, [f"{i}.jpg" for i in range(rows)])
    storage, caches = cache.LocalStorage(folder), {}
    for number in range(MODELS):
        info = cache.GroupInfo(f"model-{number}", {"precision": "int8", "model": number}, LEVELS, "int8", 32)
        payload = Payload(rows, number)
        committed = cache.load_index(storage, info)
        plan = cache.make_plan(images, cache.ViewPolicy(((WIDTH, HEIGHT),), "none"), info, committed=committed)
        cache.prepare(storage, plan)
        for unit in plan.units():
            targets = []
            for row in unit.rows:
                arrays = payload.row(row.image_id)
                values = {level.name: arrays[level.name] for level in LEVELS}
                scales = {name: arrays[f"{name}_scale"] for name in values}
                targets.append(cache.RowTargets(row, values, scales, dict.fromkeys(values, 40.0), nothing, 0))
            cache.write_unit(storage, info, unit, targets)
        caches[info.teacher] = cache.TeacherCache(storage, info, cache.load_index(storage, info))
    return caches


def anonymous_mb() -> float:
    """Memory of this process that is not of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1e3


def time_costs(caches: dict[str, cache.TeacherCache], images: int, positions: int | None) -> dict[str, float]:
    """One pass over so many images, and the solving of all pairs."""
    rows = choose_rows(range(images), 1, images)
    moments: list[float] = []
    memory: list[float] = []

    def progress(done: int, _total: int) -> None:
        moments.append(time.perf_counter())
        if done in (images * 3 // 4, images):  # the buffers of both halves are in use by then
            memory.append(anonymous_mb())

    before = time.process_time()
    adaptation_costs(caches, rows, positions=positions, progress=progress)
    solved = time.perf_counter()
    seconds = (moments[-1] - moments[1]) / (images - 2)  # the first of all opens and maps shards
    return {
        "images": images,
        "seconds_per_image": seconds,
        "solve_seconds": solved - moments[-1],
        "minutes_for_2000": (seconds * IMAGES + solved - moments[-1]) / 60,
        "cpu_seconds_per_image": (time.process_time() - before) / images,
        "anonymous_mb_three_quarters": memory[0],
        "anonymous_mb_all": memory[1],
    }


def speed(folder: Path, rows: int) -> dict[str, Any]:
    """Seconds an image for several numbers of positions."""
    caches = build(folder, rows)
    results: dict[str, Any] = {}
    for positions in (128, 512, None):
        time_costs(caches, 4, positions)  # has every page in memory, and BLAS's threads started
        images = rows if positions is not None else max(4, rows // 8)
        results[str(positions or "all")] = time_costs(caches, images, positions)
    shown = [
        [
            name,
            r["images"],
            f"{r['seconds_per_image']:.3f}",
            f"{r['solve_seconds']:.1f}",
            f"{r['minutes_for_2000']:.1f}",
            f"{r['anonymous_mb_three_quarters']:.0f} / {r['anonymous_mb_all']:.0f}",
        ]
        for name, r in results.items()
    ]
    columns = ["positions a level", "images", "s an image", "s to solve", "min for 2,000", "MB after 3/4 / all"]
    table(f"{MODELS} models, {HEIGHT} x {WIDTH}, int8 P3-P7 of 256 channels", columns, shown)
    return results


def make_recipe(root: Path, stages: Sequence[dict[str, Any]], teachers: dict[str, Any], **student: Any) -> Recipe:
    """A recipe on the drawn scenes."""
    data = root / "data"
    return parse_recipe(
        {
            "dataset": {
                s: {"ann_file": data / "annotations" / f"{s}.json", "img_dir": data / s} for s in ("train", "val")
            },
            "views": {"scale": list(SCALE), "flip": "both"},
            "cache": {"uri": str(root / "cache"), "precision": "int8"},
            "teachers": teachers,
            "student": {"config": DEMO / "retinanet_r18_w16.py", **student},
            "stages": list(stages),
            "work_dir": str(root / "student"),
        },
        "order",
    )


def detectors(root: Path, images: int, val_images: int, epochs: int) -> dict[str, Any]:
    """Costs between trained detectors of rising strength."""
    if not (root / "data" / "annotations" / "val.json").exists():
        generate(root / "data", "train", images, seed=0)
        generate(root / "data", "val", val_images, seed=0, first_id=FIRST_VAL_ID)
    training = make_recipe(root, [{"epochs": epochs}, {"epochs": 2 * epochs}], {})
    with redirect_stdout(StringIO()):  # pycocotools prints
        results = [train_stage(training, stage) for stage in (1, 2)]
    teachers = {
        "longer": {"config": DEMO / "retinanet_r18_w16.py", "checkpoint": results[1].student, "batch_size": 4},
        "r18": {"config": DEMO / "retinanet_r18_w20.py", "checkpoint": DEMO / "r18_w20.pth", "batch_size": 4},
        "swin": {"config": DEMO / "retinanet_swin_w32.py", "checkpoint": DEMO / "swin_w32.pth", "batch_size": 4},
    }
    recipe = make_recipe(root, [{"epochs": 1}], teachers, checkpoint=results[0].student)
    candidates = with_candidates(recipe)
    aps = {STUDENT: 100 * results[0].metrics["bbox_mAP"], "longer": 100 * results[1].metrics["bbox_mAP"]}
    with redirect_stdout(StringIO()):
        aps |= {name: evaluate_teacher(recipe, name, root / "evaluation") for name in ("r18", "swin")}
    rows = choose_rows(range(1, images + 1), 2, images)
    for name in candidates.teachers:
        if failures := precompute.fill(candidates, name, rows):
            raise RuntimeError(f"{name}: {len(failures)} rows failed, the first: {failures[0]}")
    caches = {name: cache.TeacherCache.open(recipe.cache.uri, name) for name in candidates.teachers}
    return {"aps": aps, "images": images, **compare(caches, rows, aps)}


def compare(caches: dict[str, cache.TeacherCache], rows: OrderRows, aps: dict[str, float]) -> dict[str, Any]:
    """The matrix, the sequence, and how far both depend on what is drawn."""
    whole = adaptation_costs(caches, rows, positions=None)
    costs = {pair: cost.value for pair, cost in whole.items()}
    accuracies = {name: ap for name, ap in aps.items() if name != STUDENT}

    def sequence(values: dict[tuple[str, str], float]) -> tuple[str, ...]:
        return select_teachers({t: values[STUDENT, t] for t in accuracies}, values, accuracies, 3).sequence

    def differing(runs: list[dict[tuple[str, str], float]]) -> dict[str, Any]:
        errors = [abs(run[pair] - cost) for run in runs for pair, cost in costs.items()]
        same = sum(sequence(run) == sequence(costs) for run in runs)
        return {"largest": max(errors), "mean": float(np.mean(errors)), "same_sequence": same, "runs": len(runs)}

    def run(rows: OrderRows = rows, **options: Any) -> dict[tuple[str, str], float]:
        return {pair: cost.value for pair, cost in adaptation_costs(caches, rows, **options).items()}

    draws = {f"{n} positions": differing([run(positions=n, seed=s) for s in range(5)]) for n in DRAWS}
    fewer = [OrderRows(rows.fit[s::5], rows.score[s::5]) for s in range(5)]
    draws["a fifth of the images"] = differing([run(part, positions=None) for part in fewer])
    draws["fit and score exchanged"] = differing([run(OrderRows(rows.score, rows.fit), positions=None)])
    draws["ridge 1e-6"], draws["ridge 1e-2"] = (differing([run(positions=None, ridge=r)]) for r in (1e-6, 1e-2))
    found = select_teachers({t: costs[STUDENT, t] for t in accuracies}, costs, accuracies, 3)
    names = list(caches)
    shown = [[a, f"{aps[a]:.1f}", *("-" if a == b else f"{costs[a, b]:.3f}" for b in names)] for a in names]
    table(f"adaptation costs from the row to the column, {len(rows)} images, all positions", ["", "AP", *names], shown)
    plain = {pair: sum(c.levels[level] * c.variance[level] for level in c.levels) for pair, c in whole.items()}
    say(f"with levels not scaled to one variance: {' -> '.join(sequence(plain))}, from")
    shown = [[a, *("-" if a == b else f"{plain[a, b]:.3f}" for b in names)] for a in names]
    table("", ["", *names], shown)
    shares = {b: whole[next(a for a in names if a != b), b].variance for b in names}
    shown = [[name, *(f"{value:.3f}" for value in share.values())] for name, share in shares.items()]
    table("each level's share of a model's sum of squares", ["", *next(iter(shares.values()))], shown)
    levels = {f"{a} -> {b}": cost.levels for (a, b), cost in whole.items()}
    shown = [[pair, *(f"{value:.3f}" for value in values.values())] for pair, values in levels.items()]
    table("the same of each level", ["pair", *next(iter(levels.values()))], shown)
    shown = [
        [name, f"{d['largest']:.4f}", f"{d['mean']:.4f}", f"{d['same_sequence']} of {d['runs']}"]
        for name, d in draws.items()
    ]
    table("differences of any cost to these", ["", "largest", "mean", "same sequence"], shown)
    for name, reason in found.reasons.items():
        say(f"{name}: {reason}")
    say(f"sequence: {' -> '.join(found.sequence)}")
    matrix = {f"{a} -> {b}": value for (a, b), value in costs.items()}
    unscaled = {f"{a} -> {b}": value for (a, b), value in plain.items()}
    return {
        "costs": matrix,
        "levels": levels,
        "differences": draws,
        "selection": asdict(found),
        "variance": shares,
        "unscaled": unscaled,
    }


def main(
    root: Annotated[Path, typer.Option("--dir", help="Where caches and the student go; what is there is used again.")],
    rows: Annotated[int, typer.Option(min=8, help="Rows of each of the six caches.")] = 120,
    images: Annotated[int, typer.Option(min=20, help="Scenes to train and to compare on.")] = 300,
    val_images: Annotated[int, typer.Option(min=1, help="Scenes to evaluate on.")] = 200,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of the student.")] = 12,
    only: Annotated[str, typer.Option(help="Only `speed` or `detectors`.")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure the order of teachers."""
    logging.disable(logging.INFO)
    cv2.setNumThreads(0)
    root, results = root.absolute(), {}
    if only != "detectors":
        results["speed"] = speed(root / f"rows-{rows}", rows)
    if only != "speed":
        results["detectors"] = detectors(root / f"{images}-{val_images}-{epochs}", images, val_images, epochs)
    results["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    if json_path:
        json_path.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    typer.run(main)
