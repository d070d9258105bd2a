from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

from trainer import CLASSES, generate


def test_scenes_are_valid_coco_of_several_shapes_with_and_without_objects(tmp_path: Path) -> None:
    file = generate(tmp_path, "train", 150, seed=3)
    coco = COCO(str(file))
    shapes = {(i["width"], i["height"]) for i in coco.dataset["images"]}
    assert len(shapes) == 4
    sizes, with_objects = [], set()
    for annotation in coco.dataset["annotations"]:
        image = coco.imgs[annotation["image_id"]]
        mask = coco.annToMask(annotation)
        ys, xs = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        assert mask.shape == (image["height"], image["width"])
        assert (xs.min(), ys.min(), xs.max() + 1 - xs.min(), ys.max() + 1 - ys.min()) == (x, y, w, h)
        assert annotation["area"] == mask.sum() >= 16
        sizes.append(max(w, h))
        with_objects.add(annotation["image_id"])
    assert {a["category_id"] for a in coco.dataset["annotations"]} == set(range(1, len(CLASSES) + 1))
    assert max(sizes) / min(sizes) > 8
    assert 0 < 150 - len(with_objects) < 30


def test_masks_of_one_scene_do_not_overlap_and_some_objects_are_hidden_in_part(tmp_path: Path) -> None:
    coco = COCO(str(generate(tmp_path, "train", 40, seed=4)))
    for image_id in coco.imgs:
        masks = [coco.annToMask(a) for a in coco.imgToAnns[image_id]]
        assert not masks or np.sum(masks, axis=0).max() == 1


def test_a_larger_set_begins_with_the_smaller_and_another_seed_gives_another(tmp_path: Path) -> None:
    generate(tmp_path / "a", "train", 3, seed=1)
    generate(tmp_path / "b", "train", 5, seed=1)
    generate(tmp_path / "c", "train", 3, seed=2)
    read = lambda folder: [f.read_bytes() for f in sorted((tmp_path / folder / "train").iterdir())]  # noqa: E731
    assert read("a") == read("b")[:3]
    assert read("a") != read("c")
