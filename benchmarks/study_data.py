"""The study's images: scenes that are drawn, or a set from a folder; and the student's part of them."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.arms import lock
from benchmarks.study_options import wrong
from benchmarks.study_settings import Setting
from trainer import SceneOptions, generate

# objects of 29 pixels and more: the smaller ones of the demo's scenes are beyond every student here
SCENES = SceneOptions(max_objects=4, min_size=0.2, clutter=3.0)
FIRST_VAL_ID = 1_000_001  # behind every scene that a teacher was trained on
_SCENE_SIDE = 256  # the longer side of most scenes


def slug(name: str) -> str:
    """A name as a folder is called."""
    return name.replace(",", "").replace(" ", "-")


def study_folder(root: Path, name: str, setting: Setting) -> Path:
    """Where a study is below ``--dir``: data and teachers beside it, starts, caches and arms in it.

    The name holds a digest of all that decides data, teachers and starts: what another setting made is not found.
    """
    decides = {key: value for key, value in asdict(setting).items() if key not in ("images", "epochs")}
    text = json.dumps([decides, asdict(SCENES), enlargement(setting)], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return root.absolute() / f"{slug(name)}-{digest}" / f"{setting.images}-images-{setting.epochs}-epochs"


def enlargement(setting: Setting) -> int:
    """How much larger than usual scenes are drawn, so that none is blown up to the setting's scale."""
    return math.ceil(max(setting.scale) / _SCENE_SIDE)


def prepare(setting: Setting, root: Path, folder: Path | None) -> None:
    """Images and annotation files: ``pool`` is what teachers saw, ``train`` the student's part of it, ``val``.

    Args:
        root: the study's folder.
        folder: holds the sets of real images.

    Raises:
        SystemExit: the set is not there, or has fewer images than the setting says.
    """
    data = root.parent / "data"
    with lock(root.parent / "data.lock"):
        if not (data / "annotations" / "val.json").exists():
            if setting.data == "scenes":
                enlarge = enlargement(setting)
                generate(data, "pool", setting.teacher_images, seed=0, options=SCENES, enlarge=enlarge)
                generate(
                    data, "val", setting.val_images, seed=0, options=SCENES, first_id=FIRST_VAL_ID, enlarge=enlarge
                )
            else:
                _take(setting, data, folder)
        if not (root / "train.json").exists():
            root.mkdir(parents=True, exist_ok=True)
            _part(data / "annotations" / "pool.json", root / "train.json", setting.images)


def _take(setting: Setting, data: Path, folder: Path | None) -> None:
    """A set from a folder: its images by a link, of its annotations so many images."""
    name = setting.data
    if folder is None:
        wrong(f"--data: give the folder that holds {name}, whose images the setting {name} is about")
    needed = [folder / name / part for part in ("images", "annotations/train.json", "annotations/val.json")]
    if missing := [path for path in needed if not path.exists()]:
        wrong(f"--data: the setting {name} reads {missing[0]}, which is not there; give another folder")
    (data / "annotations").mkdir(parents=True, exist_ok=True)
    for split, source, count in (("pool", needed[1], setting.teacher_images), ("val", needed[2], setting.val_images)):
        if not (data / split).is_symlink():
            (data / split).symlink_to(needed[0].absolute())
        _part(source, data / "annotations" / f"{split}.json", count)


def _part(source: Path, target: Path, count: int) -> None:
    """So many images of an annotation file, always the same ones, with their objects."""
    content = json.loads(source.read_text())
    images = content["images"]
    if count > len(images):
        raise SystemExit(
            f"error: {source} holds {len(images)} images, the setting says {count}: give a set with as many, or say what "
            "there is in benchmarks/study_settings.py"
        )
    chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:count])
    content["images"] = [images[number] for number in chosen]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in ids]
    target.write_text(json.dumps(content))
