"""What the precision of the cached targets costs: the same student trained from online, float16, int8 and int4 targets.

One arm is one training of the demo's student (RetinaNet, ResNet-18 of 16 channels; neck and heads inherited from the
demo's Swin teacher) on generated scenes with one mechanism, one source of targets and one seed. The seed decides the
student's weights, the order of images and their views, so that arms of one seed differ in their targets alone: ``online``
is the teacher in float32 beside the student, the others are caches that are filled here first. Box AP is of the last
epoch, in points, on scenes that nobody was trained on. Runs in this one process, without ray.

Run from the repository's root. Arms that are in --json already are not trained again, an arm that was killed goes on::

    OMP_NUM_THREADS=1 python -m benchmarks.fidelity --json fidelity.json --dir /tmp/fidelity

The table's ``±`` is the sample standard deviation over seeds. A difference is paired by seed, arm minus online; it is
beyond the noise where the two-sided 95 % interval of its mean (Student's t) does not hold zero. float16 is the control:
its targets are right to 11 bits, and what it differs by is what rounding alone does to a training.
"""

import logging
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import cv2
import torch
import typer

from benchmarks.arms import Arms, by_seed, load, paired, record, spread, train, verdict
from services.present import say, table
from trainer import Recipe, SceneOptions, TargetSource, generate, parse_recipe

STUDY = "fidelity"
DEMO = Path(__file__).parent.parent / "recipes" / "demo"
SOURCES = ("online", "float16", "int8", "int4")
SCALE = (192, 144)  # what the teacher was trained at
BATCH = 4
# few, large objects: a student finds some of them after few epochs
SCENES = SceneOptions(max_objects=4, min_size=0.2, clutter=3.0)
FIRST_VAL_ID = 1_000_001  # behind every scene that the teacher was trained on
# PKD's weight is the demo's; the others' make the loss as large as PKD's after 15 iterations, 2 to 3 times the detector's own
MECHANISMS: dict[str, dict[str, Any]] = {
    "PKDLoss": {"loss_weight": 1.0},
    "MGDLoss": {"loss_weight": 1e-5},
    "FeatureMatchingLoss": {"loss_weight": 0.3, "normalize": True},
}
# more mechanisms, of which only the targets' error in losses and gradients is measured (benchmarks.codecs)
SETTINGS: dict[str, dict[str, Any]] = {**MECHANISMS, "CWDLoss": {}, "FGDLoss": {}, "FBKDLoss": {}}


def arm_name(mechanism: str, source: str, seed: int) -> str:
    """The arm's name in the results, and of its folder."""
    return f"{mechanism}-{source}-{seed}"


def draw(data: Path, images: int, val_images: int) -> None:
    """Generate the scenes, unless they are there."""
    if not (data / "annotations" / "val.json").exists():
        generate(data, "train", images, seed=0, options=SCENES)
        generate(data, "val", val_images, seed=0, first_id=FIRST_VAL_ID, options=SCENES)


def make_recipe(root: Path, mechanism: str, source: str, seed: int, epochs: int) -> Recipe:
    """The recipe of one arm."""
    data = root / "data"
    dataset = {s: {"ann_file": data / "annotations" / f"{s}.json", "img_dir": data / s} for s in ("train", "val")}
    teacher = {"config": DEMO / "retinanet_swin_w32.py", "checkpoint": DEMO / "swin_w32.pth", "batch_size": 4}
    student = {
        "config": DEMO / "retinanet_r18_w16.py",
        "inherit": True,
        "cfg_options": {"train_dataloader.batch_size": BATCH},
    }
    stage = {"teacher": "swin", "mechanisms": [{"type": mechanism, **SETTINGS[mechanism]}], "epochs": epochs}
    return parse_recipe(
        {
            "dataset": dataset,
            "views": {"scale": list(SCALE), "flip": "both"},
            "cache": {"uri": str(root / "cache" / source), "precision": "float16" if source == "online" else source},
            "teachers": {"swin": teacher},
            "student": student,
            "stages": [stage],
            "training": {"seed": seed},
            "work_dir": str(root / "arms" / arm_name(mechanism, source, seed)),
        },
        "fidelity",
    )


def show(arms: Arms) -> None:
    """Both tables: AP of every arm, and the differences to online."""
    reached = [
        [name, *(spread(list(by_seed(arms, f"{name}-{source}").values())) for source in SOURCES)] for name in MECHANISMS
    ]
    table("box AP, mean ± deviation over seeds", ["mechanism", *SOURCES], reached)
    rows = []
    for source in SOURCES[1:]:
        pairs = {name: paired(arms, f"{name}-{source}", f"{name}-online") for name in MECHANISMS}
        for name, values in {**pairs, "all": list(chain(*pairs.values()))}.items():
            rows.append([f"{name}, {source}", len(values), spread(values), *verdict(values, *arms.values())])
    table("paired by seed", ["targets", "pairs", "difference to online", "95 % interval", ""], rows)


def main(
    json_path: Annotated[Path, typer.Option("--json", help="Results; appended to.")],
    root: Annotated[Path, typer.Option("--dir", help="Scenes, caches and the arms' folders.")],
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0, 1, ... of every arm.")] = 3,
    images: Annotated[int, typer.Option(min=8, help="Scenes to train on.")] = 300,
    val_images: Annotated[int, typer.Option(min=1, help="Scenes to evaluate on.")] = 200,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of every arm.")] = 4,
    only: Annotated[str, typer.Option(help="Train arms whose name holds this, such as PKDLoss-int8.")] = "",
) -> None:
    """Train what is missing, then show all that is there."""
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    root = root.absolute() / f"{images}-{val_images}-{epochs}"
    counts = {"images": images, "val_images": val_images, "epochs": epochs, "batch": BATCH, "scale": list(SCALE)}
    settings = {**counts, "scenes": asdict(SCENES), "mechanisms": MECHANISMS}
    arms = load(json_path, STUDY, settings)
    draw(root / "data", images, val_images)
    # seed by seed, so that a study that is stopped is whole for the seeds before
    for seed in range(seeds):
        for mechanism in MECHANISMS:
            for source in SOURCES:
                name = arm_name(mechanism, source, seed)
                if name in arms or only not in name:
                    continue
                targets: TargetSource = "online" if source == "online" else "cache"
                arms[name] = train(make_recipe(root, mechanism, source, seed, epochs), targets)
                record(json_path, STUDY, settings, name, arms[name])
                say(f"{name}: AP {arms[name]['mAP']:.2f} in {arms[name]['seconds']:.0f} s")
    show(arms)


if __name__ == "__main__":
    typer.run(main)
