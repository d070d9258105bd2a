"""Does it work? One student trained by several orders of teachers, at equal epochs, with several seeds.

An arm is a chain of stages, a start and a mechanism (`study_arms`). The seed decides the student's first weights, the order of
images and their views, so that arms of one seed differ in what their name says alone. Every start is a checkpoint that all
arms of the seed share: ``random`` weights; ``inherited``, the same weights with neck and head of the strongest teacher over
them; ``trained``, the student after the arm ``alone``. Distilled arms begin inherited unless their name says otherwise,
whatever their first teacher is: inheriting is worth AP of its own, and an arm that inherits from a weaker teacher would lose
by that. Box AP is of the last epoch, in points, on images that nobody was trained on. Runs without ray.

Run from the repository's root. Arms that are in --json already are not trained again, an arm that was killed goes on, and a
second process with the same command takes arms that nobody holds::

    OMP_NUM_THREADS=1 python -m benchmarks.study --json docs/study.json --dir /tmp/study --workers 2

``--tune`` trains the grid of weights with a seed that the comparison does not have; ``--summary`` trains nothing and writes
the tables and the figure from the results.
"""

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from mmdet.registry import MODELS

from benchmarks.arms import load, lock, read, record, train
from benchmarks.study_arms import CORE, Arm, arms, described, grid, mechanism
from benchmarks.study_settings import GPU, SETTINGS, Setting
from benchmarks.study_summary import summarise
from services.present import say
from trainer import (
    Recipe,
    SceneOptions,
    generate,
    parse_recipe,
    read_annotations,
    train_stage,
)
from trainer.checkpoint import inherit, read_weights, save_student
from trainer.config import load_config, set_classes
from trainer.evaluate import evaluate_teacher

# objects of 29 pixels and more: the smaller ones of the demo's scenes are beyond every student here
SCENES = SceneOptions(max_objects=4, min_size=0.2, clutter=3.0)
FIRST_VAL_ID = 1_000_001  # behind every scene that a teacher was trained on
TUNE_SEED = 100


def prepare(setting: Setting, root: Path, folder: Path | None) -> None:
    """Images and annotation files: ``pool`` is what teachers saw, ``train`` the student's part of it, ``val``."""
    data = root.parent / "data"
    with lock(root.parent / "data.lock"):
        if not (data / "annotations" / "val.json").exists():
            if setting.data == "scenes":
                generate(data, "pool", setting.teacher_images, seed=0, options=SCENES)
                generate(data, "val", setting.val_images, seed=0, first_id=FIRST_VAL_ID, options=SCENES)
            else:
                _take(setting, data, folder)
        if not (root / "train.json").exists():
            root.mkdir(parents=True, exist_ok=True)
            _part(data / "annotations" / "pool.json", root / "train.json", setting.images)


def _take(setting: Setting, data: Path, folder: Path | None) -> None:
    """A set from a folder: its images by a link, of its annotations so many images."""
    if folder is None or not (folder / setting.data).is_dir():
        raise SystemExit(f"--data: {folder} holds no folder {setting.data}, whose images this setting is about")
    (data / "annotations").mkdir(parents=True, exist_ok=True)
    for name, split, count in (("pool", "train", setting.teacher_images), ("val", "val", setting.val_images)):
        if not (data / name).is_symlink():
            (data / name).symlink_to((folder / setting.data / "images").absolute())
        _part(folder / setting.data / "annotations" / f"{split}.json", data / "annotations" / f"{name}.json", count)


def _part(source: Path, target: Path, count: int) -> None:
    """So many images of an annotation file, always the same ones, with their objects."""
    content = json.loads(source.read_text())
    images = content["images"]
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
    content["images"] = [images[number] for number in chosen]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    target.write_text(json.dumps(content))


def _recipe(setting: Setting, root: Path, train_file: Path, work_dir: Path, seed: int, **content: Any) -> Recipe:
    data = root.parent / "data"
    dataset = {
        "train": {"ann_file": train_file, "img_dir": data / "pool"},
        "val": {"ann_file": data / "annotations" / "val.json", "img_dir": data / "val"},
    }
    given = content.pop("views", {})
    if "sampled" in given:
        # padded to a square, in which scenes and images of every orientation fit
        long = max(setting.scale)
        views = {"sampled": {"size": [long, long], "val_scale": list(setting.scale)} | given["sampled"]}
    else:
        views = {"scale": list(setting.scale), "flip": "both"} | given
    cache = {"uri": str(root / "cache"), "precision": "int8"}
    common = {"dataset": dataset, "views": views, "cache": cache, "training": {"seed": seed}, "work_dir": str(work_dir)}
    return parse_recipe(common | content, "study")


def checkpoint(setting: Setting, root: Path, name: str) -> str:
    """A teacher's checkpoint; trained first where the setting says so: mmdet's own training, as a stage without a teacher."""
    detector = (setting.teachers | setting.others)[name]
    if not detector.epochs:
        return str(detector.checkpoint)
    base, stages = root.parent, [{"epochs": detector.epochs}]
    student = {"config": detector.config, "cfg_options": detector.options, "checkpoint": detector.checkpoint}
    pool = base / "data" / "annotations" / "pool.json"
    recipe = _recipe(setting, root, pool, base / "teachers" / name, 0, student=student, stages=stages)
    with lock(base / "teachers" / f"{name}.lock"), redirect_stdout(StringIO()):
        return train_stage(recipe, 1).student


def teacher(setting: Setting, root: Path, name: str) -> dict[str, Any]:
    """A teacher as a recipe says it."""
    detector, classes = (
        (setting.teachers | setting.others)[name],
        read_annotations(root / "train.json", "study").classes,
    )
    options = detector.options | {"model.bbox_head.num_classes": len(classes)}
    return {
        "config": detector.config,
        "cfg_options": options,
        "checkpoint": checkpoint(setting, root, name),
        "batch_size": 4,
    }


def evaluate(setting: Setting, root: Path, name: str) -> float:
    """A teacher's box AP in points on the images that students are evaluated on."""
    teachers, stages = {name: teacher(setting, root, name)}, [{"epochs": 1}]
    work_dir = root / "evaluated" / name
    file = root / "train.json"
    recipe = _recipe(setting, root, file, work_dir, 0, student=student(setting), teachers=teachers, stages=stages)
    with redirect_stdout(StringIO()):
        return evaluate_teacher(recipe, name, work_dir)


def student(setting: Setting) -> dict[str, Any]:
    """The student as a recipe says it."""
    options = setting.student.options | {"train_dataloader.batch_size": setting.batch}
    return {"config": setting.student.config, "cfg_options": options}


def start(setting: Setting, root: Path, kind: str, seed: int) -> Path:
    """The checkpoint that every arm with this start and seed begins with."""
    if kind == "trained":
        trained = root / "arms" / f"alone-{seed}" / "stage-1" / "student.pth"
        if not trained.exists():
            raise SystemExit(f"the arm alone-{seed} is not done, from whose student others start; train it first")
        return trained
    file = root / "starts" / f"{slug(kind)}-{seed}.pth"
    with lock(file.with_suffix(".lock")):
        if file.exists():
            return file
        spec, classes = student(setting), read_annotations(root / "train.json", "study").classes
        config = load_config(spec["config"], spec["cfg_options"], "student")
        set_classes(config.model, len(classes))
        torch.manual_seed(seed)
        model = MODELS.build(config.model)
        model.init_weights()
        if kind != "random":
            names = list(setting.teachers)
            source = checkpoint(setting, root, names[0] if kind == "inherited from weakest" else names[-1])
            inherit(model, read_weights(source, "inherit"))
        save_student(model, file, classes)
    return file


def recipe_of(setting: Setting, root: Path, name: str, arm: Arm, seed: int) -> Recipe:
    """The recipe of one arm with one seed."""
    stages: list[dict[str, Any]] = [
        {"epochs": epochs}
        if at_once is None
        else {"epochs": epochs, "teacher": at_once, "mechanisms": [mechanism(arm)]}
        for at_once, epochs in arm.stages
    ]
    return _recipe(
        setting,
        root,
        root / "train.json",
        root / "arms" / f"{slug(name)}-{seed}",
        seed,
        views=arm.views,
        teachers={one: teacher(setting, root, one) for one in arm.teachers},
        student=student(setting) | {"checkpoint": start(setting, root, arm.start, seed)},
        stages=stages,
    )


def slug(name: str) -> str:
    """A name as a folder is called."""
    return name.replace(",", "").replace(" ", "-")


def missing(todo: Iterable[tuple[str, Arm, int]], done: dict[str, Any]) -> list[tuple[str, Arm, int]]:
    """What is not trained yet.

    Raises:
        SystemExit: an arm of that name was trained, but otherwise: with another weight, say.
    """
    left = []
    for name, arm, seed in todo:
        result = done.get(f"{name}-{seed}")
        if result is None:
            left.append((name, arm, seed))
        elif result["arm"] != described(arm):
            raise SystemExit(
                f"{name}-{seed} was trained as {result['arm']}, not as {described(arm)}: take it out or rename it."
            )
    return left


def work(study: str, setting: Setting, root: Path, json_path: Path, todo: list[tuple[str, Arm, int]]) -> None:
    """Train what nobody holds, one arm after the other."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    settings = asdict(setting)
    for name, arm, seed in todo:
        with lock(root / "locks" / f"{slug(name)}-{seed}", wait=False) as ours:
            # another process may have done it since
            if not ours or not missing([(name, arm, seed)], load(json_path, study, settings)):
                continue
            result = train(recipe_of(setting, root, name, arm, seed), arm.source)
            record(json_path, study, settings, f"{name}-{seed}", result | {"arm": described(arm)})
            say(f"{name}-{seed}: AP {result['mAP']:.1f} in {result['seconds']:.0f} s")


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; appended to.")],
    root: Annotated[Path, typer.Option("--dir", help="Data, teachers, caches and the arms' folders.")],
    name: Annotated[str, typer.Option("--setting", help=f"Data and detectors: {', '.join(SETTINGS)}.")] = "scenes",
    gpu: Annotated[
        bool, typer.Option(help="R18-class student, R50- and Swin-T-class teachers, thousands of images.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Folder that holds bccd, nuclei and robocup.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of every arm, with commas.")] = "0,1,2",
    only: Annotated[str, typer.Option(help=f"Arms to train, with semicolons; else {'; '.join(CORE)}.")] = "",
    images: Annotated[int, typer.Option(help="Images the student is trained on; 0: the setting's.")] = 0,
    epochs: Annotated[int, typer.Option(help="Epochs of every arm; 0: the setting's.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each of one thread.")] = 1,
    tune: Annotated[bool, typer.Option(help="Train the grid of weights, with a seed of its own.")] = False,
    summary: Annotated[bool, typer.Option(help="Train nothing; write tables and figure beside --json.")] = False,
) -> None:
    """Train what is missing, then show all that is there."""
    if summary:
        summarise(json_path)
        return
    setting = replace(SETTINGS[name], **(GPU if gpu else {}))
    setting = replace(setting, images=images or setting.images, epochs=epochs or setting.epochs)
    study = f"{name}{' gpu' if gpu else ''}, {setting.images} images, {setting.epochs} epochs"
    root = root.absolute() / slug(name + " gpu" * gpu) / f"{setting.images}-images-{setting.epochs}-epochs"
    every = grid(setting) if tune else arms(setting)
    wanted = [part.strip() for part in only.split(";")] if only else list(every if tune else CORE)
    if unknown := set(wanted) - every.keys():
        raise SystemExit(f"--only: no arm {', '.join(unknown)}; there are {'; '.join(every)}")
    numbers = [TUNE_SEED] if tune else [int(seed) for seed in seeds.split(",")]
    # seed by seed, so that a study that is stopped is whole for the seeds before
    todo = missing(
        [(arm, every[arm], seed) for seed in numbers for arm in wanted], load(json_path, study, asdict(setting))
    )
    logging.disable(logging.INFO)
    prepare(setting, root, data)
    for teacher_name in dict.fromkeys(used for _, arm, _ in todo for used in arm.teachers):
        if teacher_name not in read(json_path).get(study, {}).get("teachers", {}):
            reached = evaluate(setting, root, teacher_name)
            record(json_path, study, asdict(setting), teacher_name, reached, "teachers")
            say(f"teacher {teacher_name}: AP {reached:.1f}")
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn: Callable[..., Any] = multiprocessing.get_context("spawn").Process
    processes = [spawn(target=work, args=(study, setting, root, json_path, todo)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a worker failed; run the same command again to go on")
    summarise(json_path)


if __name__ == "__main__":
    typer.run(main)
