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

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import cv2
import torch
import typer
from mmdet.registry import MODELS

from benchmarks.arms import load, lock, read, record, train
from benchmarks.study_arms import CORE, Arm, arms, described, grid, mechanism
from benchmarks.study_data import prepare, slug, study_folder
from benchmarks.study_options import chosen_arms, chosen_seeds, chosen_setting, in_one_line, wrong
from benchmarks.study_origin import origin, refuse_other, teachers_and_data
from benchmarks.study_settings import SETTINGS, Setting
from benchmarks.study_summary import summarise
from services.present import say
from trainer import Recipe, parse_recipe, read_annotations, train_stage
from trainer.checkpoint import inherit, read_weights, save_student
from trainer.config import load_config, set_classes
from trainer.evaluate import evaluate_teacher

TUNE_SEED = 100


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


def trained_student(root: Path, seed: int) -> Path:
    """The student of the arm ``alone``, which others start from; there once that arm is done."""
    return root / "arms" / f"alone-{seed}" / "stage-1" / "student.pth"


def _arm_lock(root: Path, name: str, seed: int) -> Path:
    return root / "locks" / f"{slug(name)}-{seed}"


def start(setting: Setting, root: Path, kind: str, seed: int) -> Path:
    """The checkpoint that every arm with this start and seed begins with."""
    if kind == "trained":
        with lock(_arm_lock(root, "alone", seed)):  # another process may be at it
            trained = trained_student(root, seed)
        if not trained.exists():
            raise SystemExit(
                f"error: {trained} is missing, from which others start: the arm alone-{seed} was not trained"
            )
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
                f"error: {name}-{seed} was trained as {result['arm']}, not as {described(arm)}: take it out or rename it."
            )
    return left


def refuse_without_start(todo: list[tuple[str, Arm, int]], root: Path, done: dict[str, Any], json_path: Path) -> None:
    """What starts from the student of ``alone`` needs that student, or ``alone`` trained before it.

    Raises:
        SystemExit: it is not there, and nobody asked for it.
    """
    asked = {seed for name, _, seed in todo if name == "alone"}
    for name, arm, seed in todo:
        if arm.start != "trained" or seed in asked or trained_student(root, seed).exists():
            continue
        if f"alone-{seed}" in done:
            wrong(
                f"--only: {name}-{seed} starts from the student of alone-{seed}, which is in {json_path} but not in --dir: "
                f"{trained_student(root, seed)} is missing; copy it there, or choose another --json"
            )
        wrong(
            f"--only: {name}-{seed} starts from the student of alone-{seed}, which is not trained: add alone to --only"
        )


@in_one_line()
def work(study: str, setting: Setting, root: Path, json_path: Path, todo: list[tuple[str, Arm, int]]) -> None:
    """Train what nobody holds, one arm after the other."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    settings = asdict(setting)
    for name, arm, seed in todo:
        with lock(_arm_lock(root, name, seed), wait=False) as ours:
            # another process may have done it since
            if not ours or not missing([(name, arm, seed)], done := load(json_path, study, settings)):
                continue
            recipe = recipe_of(setting, root, name, arm, seed)
            about = {"arm": described(arm), "origin": origin(recipe)}
            refuse_other(f"{name}-{seed}", about, done, f"{json_path}: {study}")
            result = train(recipe, arm.source)
            record(json_path, study, settings, f"{name}-{seed}", result | about)
            say(f"{name}-{seed}: AP {result['mAP']:.1f} in {result['seconds']:.0f} s")


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; appended to.")],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Data, teachers, caches and the arms' folders; not for --summary.")
    ] = None,
    name: Annotated[str, typer.Option("--setting", help=f"Data and detectors: {', '.join(SETTINGS)}.")] = "scenes",
    gpu: Annotated[
        bool, typer.Option(help="R18-class student, R50- and Swin-T-class teachers, thousands of scenes.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Folder that holds bccd, nuclei and robocup.")] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of every arm, with commas.")] = "0,1,2",
    only: Annotated[str, typer.Option(help=f"Arms to train, with semicolons; else {'; '.join(CORE)}.")] = "",
    images: Annotated[int, typer.Option(min=0, help="Images the student is trained on; 0: the setting's.")] = 0,
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of every arm; 0: the setting's.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each of one thread.")] = 1,
    tune: Annotated[bool, typer.Option(help="Train the grid of weights, with a seed of its own.")] = False,
    summary: Annotated[bool, typer.Option(help="Train nothing; write tables and figure beside --json.")] = False,
) -> None:
    """Train what is missing, then show all that is there."""
    if summary:
        if not json_path.exists():
            wrong(f"--json: there is no {json_path} to summarise")
        summarise(json_path)
        return
    if folder is None:
        wrong("--dir: say where data, teachers, caches and the arms' folders are kept")
    setting = chosen_setting(name, gpu, images, epochs)
    study = f"{name}{' gpu' if gpu else ''}, {setting.images} images, {setting.epochs} epochs"
    root = study_folder(folder, name + " gpu" * gpu, setting)
    every = grid(setting) if tune else arms(setting)
    wanted = chosen_arms(only, every, list(every if tune else CORE))
    numbers = [TUNE_SEED] if tune else chosen_seeds(seeds)
    done = load(json_path, study, asdict(setting))
    # seed by seed, so that a study that is stopped is whole for the seeds before
    todo = missing([(arm, every[arm], seed) for seed in numbers for arm in wanted], done)
    refuse_without_start(todo, root, done, json_path)
    logging.disable(logging.INFO)
    with in_one_line():
        prepare(setting, root, data)
        _measure_teachers(study, setting, root, json_path, todo)
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn: Callable[..., Any] = multiprocessing.get_context("spawn").Process
    processes = [spawn(target=work, args=(study, setting, root, json_path, todo)) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("error: a worker failed; once what it says above is mended, the same command goes on")
    summarise(json_path)


def _measure_teachers(
    study: str, setting: Setting, root: Path, json_path: Path, todo: list[tuple[str, Arm, int]]
) -> None:
    """Record the AP of the teachers that are needed, which are trained if they are not there, before any arm is trained."""
    names = list(dict.fromkeys(used for _, arm, _ in todo for used in arm.teachers))
    checkpoints = {name: checkpoint(setting, root, name) for name in names}
    shared = teachers_and_data(checkpoints, root / "train.json", root.parent / "data" / "annotations" / "val.json")
    settings = asdict(setting)
    # here already: the workers' arms may be hours away
    refuse_other("this command", {"origin": shared}, load(json_path, study, settings), f"{json_path}: {study}")
    for name in names:
        if name not in read(json_path).get(study, {}).get("teachers", {}):
            reached = evaluate(setting, root, name)
            record(json_path, study, settings, name, reached, "teachers")
            say(f"teacher {name}: AP {reached:.1f}")


if __name__ == "__main__":
    typer.run(main)
