from pathlib import Path

import pytest
import yaml

from cache import RecipeError
from tests import models
from trainer import load_recipe, parse_recipe


def edited(content: dict, key: str, value: object) -> dict:
    *path, last = key.split(".")
    target = content
    for part in path:
        target = target[int(part) - 1] if isinstance(target, list) else target[part]
    target[last] = value
    return content


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("dataset.train.ann_file", "nowhere.json", r"dataset\.train\.ann_file: no such file: .*nowhere\.json"),
        ("dataset.val.img_dir", "nowhere", r"dataset\.val\.img_dir: no such folder"),
        ("views.flip", "vertical", r"views\.flip: .*'both' or 'none'.*got 'vertical'"),
        ("views.scale", [0, 800], r"views\.scale\.0\.0: .*greater than 0.*got 0"),
        ("cache.precision", "int3", r"cache\.precision: .*'float16', 'int8' or 'int4'.*got 'int3'"),
        ("teachers.small.config", "mmdet.py", r"teachers\.small\.config: no such config file"),
        ("teachers.small.checkpoint", "x.pth", r"teachers\.small\.checkpoint: no such file"),
        ("teachers.small.autocast", "int8", r"teachers\.small\.autocast: .*'bfloat16' or 'float16'"),
        ("stages.2.teacher", "swim", r"stages\.2\.teacher: 'swim' is not in `teachers` \(small, swin\)"),
        ("stages.1.epochs", 0, r"stages\.1\.epochs: .*greater than 0"),
        ("stages.1.mechanisms", [{"type": "PKD"}], r"stages\.1\.mechanisms\.1: type 'PKD' is not a mechanism"),
        ("stages.1.mechanisms", [], r"stages\.1: a stage has a teacher and mechanisms, or neither"),
        ("stages.1.teacher", [], r"stages\.1\.teacher: a teacher's name, or a list of names \(got \[\]\)"),
        (
            "stages.1.mechanisms",
            [{"type": "MGDLoss", "loss_weight": "much"}],
            r"stages\.1\.mechanisms\.1: MGDLoss\.loss_weight: .*number",
        ),
        (
            "stages.2.mechanisms",
            [{"type": "PKDLoss"}, {"type": "CWDLoss", "tau": 0}],
            r"stages\.2\.mechanisms\.2: CWDLoss\.tau: .*greater than 0 \(got 0\)",
        ),
        (
            "stages",
            [{"teacher": "small", "mechanisms": [{"type": "PKDLoss"}, {"type": "DetectionLoss"}]}],
            r"teachers\.small\.detections: false, but DetectionLoss learns from them\. Leave the key out",
        ),
        ("stages.1.epoch", 3, r"stages\.1\.epoch: no such key"),
        ("student", {}, r"student\.config: required, but missing"),
        ("student.inherit", "swim", r"student\.inherit: 'swim' is not in `teachers` \(small, swin\)"),
        ("student.input_scale", 2, r"student\.input_scale: .*less than or equal to 1.*got 2"),
        ("actors", {"min": 3, "max": 2}, r"actors: min 3 is more than max 2"),
        ("training", {"workers": 0}, r"training\.workers: at least one worker \(got 0\)"),
        ("training", {"workers": {"min": 3, "max": 2}}, r"training\.workers: min 3 is more than max 2"),
        ("training", {"seed": -1}, r"training\.seed: .*greater than or equal to 0.*got -1"),
        ("training", {"workers": 4, "batch_size": 2}, r"training: batch_size .*: 4 workers cannot share 2 samples"),
    ],
)
def test_each_fault_names_file_key_and_value(
    data: Path, tmp_path: Path, key: str, value: object, expected: str
) -> None:
    file = tmp_path / "recipe.yaml"
    content = models.recipe(data, tmp_path)
    content["teachers"]["small"]["detections"] = False
    file.write_text(yaml.safe_dump(edited(content, key, value)))
    with pytest.raises(RecipeError, match=f"^{file}: {expected}"):
        load_recipe(file)


def test_all_faults_are_told_at_once(data: Path, tmp_path: Path) -> None:
    content = edited(edited(models.recipe(data, tmp_path), "views.flip", "x"), "stages.1.epochs", -1)
    with pytest.raises(RecipeError) as error:
        parse_recipe(content, "r")
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("text", ["a: [", "just text", ""])
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=str(file)):
        load_recipe(file)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


def test_one_scale_or_several_and_paths_made_absolute(data: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = models.recipe(data, tmp_path)
    content["cache"]["uri"], content["work_dir"] = "c", "w"
    one = parse_recipe(content, "r")
    assert one.views.scale == ((128, 96),)
    assert (one.cache.uri, one.work_dir) == (str(tmp_path / "c"), str(tmp_path / "w"))
    content["views"]["scale"] = [[128, 96], [96, 64]]
    assert len(parse_recipe(content, "r").policy) == 4
