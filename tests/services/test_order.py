"""`mtpd order` and `stages: auto`, from order.json and on a cluster."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from typer.testing import CliRunner

from cache import MtpdError, RecipeError, TeacherCache
from services.cli import app
from services.order import decided, find_order
from tests import models
from tests.trainer import precompute
from trainer import STUDENT, choose_rows, parse_recipe, teacher_info, with_candidates


def run(*arguments: str) -> tuple[int, str, MtpdError | None]:
    """Exit code, standard output, and the error that `main` would print."""
    result = CliRunner().invoke(app, list(arguments))
    error = result.exception if isinstance(result.exception, MtpdError) else None
    assert error is not None or result.exit_code in (0, 1), result.exception
    return result.exit_code, result.stdout, error


def auto(data: Path, folder: Path, **order: Any) -> dict[str, Any]:
    """A recipe whose stages are left to the order of two teachers of given AP."""
    content = models.recipe(data, folder, stages="auto")
    content["student"]["checkpoint"] = str(models.checkpoint("retinanet-r18", data, seed=1))
    content["order"] = {"images": 8, "mechanisms": [{"type": "PKDLoss", "loss_weight": 1.0}], "epochs": 1, **order}
    content["teachers"]["small"]["ap"], content["teachers"]["swin"]["ap"] = 10, 20
    return content


def write(content: dict[str, Any], folder: Path) -> str:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "recipe.yaml")


def test_the_order_is_kept_and_found_again_when_what_it_follows_from_changes(data: Path, tmp_path: Path) -> None:
    content = auto(data, tmp_path)
    file = write(content, tmp_path)
    for command in (("train",), ("precompute",), ("config", "--stage", "1")):
        code, _, error = run(command[0], file, *command[1:])
        assert code == 1
        assert "order of teachers is not known yet. Run `mtpd order RECIPE`" in str(error)
    candidates = with_candidates(parse_recipe(content, "test"))
    for name in candidates.teachers:  # what the command would do on a cluster
        precompute.fill(candidates, name, choose_rows(range(1, 21), 2, 8))
    code, output, _ = run("order", file, "--json")
    assert code == 0
    order = json.loads(output)
    assert order == {
        k: v for k, v in json.loads((tmp_path / "work/order.json").read_text()).items() if k != "evaluated"
    }
    assert order["images"] == 8
    assert order["aps"] == {"small": 10, "swin": 20}
    assert {(a, b) for a, row in order["costs"].items() for b in row} == {
        (a, b) for a in ("small", "swin", STUDENT) for b in ("small", "swin", STUDENT) if a != b
    }
    assert order["sequence"][-1] == "swin"
    assert all(name in order["reasons"] for name in ("small", "swin"))
    code, output, _ = run("order", file)
    assert code == 0
    assert "swin: taken as the last: the most accurate, 20.0 AP" in output
    assert f"{order['costs'][STUDENT]['swin']:.3f}" in output
    first = order["sequence"][0]
    code, output, _ = run("config", file, "--stage", "1")
    assert code == 0
    assert f"teacher='{first}'" in output
    # another accuracy, another sequence: known features and costs, nothing to compute
    content["teachers"]["small"]["ap"], content["order"]["max_teachers"] = 30, 1
    file = write(content, tmp_path)
    code, _, error = run("config", file, "--stage", "1")
    assert "aps.small: was 10.0, asked for 30.0" in str(error)
    assert "order.max_teachers: was 3, asked for 1" in str(error)
    assert run("order", file)[0] == 0
    code, output, _ = run("config", file, "--stage", "1")
    assert "teacher='small'" in output
    assert "has 1 stages" in str(run("config", file, "--stage", "2")[2])


def test_a_known_order_stays_when_a_larger_group_that_served_it_is_removed(data: Path, tmp_path: Path) -> None:
    content = auto(data, tmp_path)
    crosskd = [{"teacher": "small", "mechanisms": [{"type": "CrossKDLoss"}], "epochs": 1}]
    larger = parse_recipe({**content, "stages": crosskd}, "test")
    precompute.fill(larger, "small")
    recipe = parse_recipe(content, "test")
    candidates = with_candidates(recipe)
    serving = teacher_info(larger, "small").name
    assert teacher_info(candidates, "small").name == serving
    for name in ("swin", STUDENT):
        precompute.fill(candidates, name, choose_rows(range(1, 21), 2, 8))
    order = find_order(recipe)
    shutil.rmtree(tmp_path / "cache" / serving)
    assert decided(recipe) == recipe.with_sequence(order.sequence)
    content["teachers"]["small"]["detections"] = True  # beside the same features
    recipe = parse_recipe(content, "test")
    assert decided(recipe) == recipe.with_sequence(order.sequence)


def test_auto_needs_teachers_and_mechanisms(data: Path, tmp_path: Path) -> None:
    for order, teachers in (({"mechanisms": []}, None), ({}, {})):
        content = auto(data, tmp_path, **order)
        content |= {} if teachers is None else {"teachers": teachers}
        with pytest.raises(RecipeError, match=r"stages: auto needs `teachers` to choose from, and `order\.mechanisms`"):
            parse_recipe(content, "test")
    with pytest.raises(RecipeError, match="test: stages: at least one stage, or auto"):
        parse_recipe({**auto(data, tmp_path), "stages": []}, "test")
    with pytest.raises(RecipeError, match=r"test: order\.mechanisms\.1: type 'PKD' is not a mechanism"):
        parse_recipe(auto(data, tmp_path, mechanisms=[{"type": "PKD"}]), "test")


@pytest.fixture
def cluster() -> Iterator[None]:
    """The command starts a local cluster; it must not outlive the test."""
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_run_finds_the_order_by_itself_and_measures_what_is_not_given(data: Path, tmp_path: Path) -> None:
    content = auto(data, tmp_path, max_teachers=1, mechanisms=[{"type": "PKDLoss", "levels": ["P4", "P5"]}])
    # compared as it was trained, it begins anew, with the head of whoever comes first
    content["order"]["checkpoint"] = content["student"].pop("checkpoint")
    content["student"]["inherit"] = True
    demo = Path(__file__).parents[2] / "recipes" / "demo"
    content["views"] = {"scale": [192, 144], "flip": "none"}
    content["teachers"] = {
        "small": {**content["teachers"]["small"], "ap": 0.0},
        "r18": {"config": str(demo / "retinanet_r18_w20.py"), "checkpoint": str(demo / "r18_w20.pth")},
    }
    file = write(content, tmp_path)
    code, output, error = run("run", file)
    assert code == 0, error
    assert output.count("teacher r18: box AP") == 1
    order = json.loads((tmp_path / "work/order.json").read_text())
    assert order["sequence"] == ["r18"]
    assert order["aps"]["r18"] > 1
    result = json.loads((tmp_path / "work/stage-1/result.json").read_text())
    assert result["teacher"] == "r18"
    model = json.loads((tmp_path / "work/stage-1/stage.json").read_text())["model"]
    assert model["inherit_from"] == content["teachers"]["r18"]["checkpoint"]
    assert model["checkpoint"] is None
    cache = content["cache"]["uri"]
    assert [len(TeacherCache.open(cache, name)) for name in ("small", "r18", STUDENT)] == [8, 20, 8]
    # a measured accuracy is not measured again when the order is found anew, now from a larger group
    more = [{"teacher": "r18", "mechanisms": [{"type": "PKDLoss"}], "epochs": 1}]
    own = teacher_info(recipe := parse_recipe(content, "test"), "r18").name
    larger = parse_recipe({**content, "stages": more}, "test")
    precompute.fill(larger, "r18")
    shutil.rmtree(Path(cache) / own)
    assert teacher_info(recipe, "r18") == teacher_info(larger, "r18")
    content["order"]["ridge"] = 1e-3
    code, output, _ = run("order", write(content, tmp_path))
    assert code == 0
    assert "evaluating" not in output
    assert json.loads((tmp_path / "work/order.json").read_text())["aps"] == order["aps"]
