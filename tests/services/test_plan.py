"""`mtpd plan --measure`, with the cluster that it starts."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner

from services.cli import app
from tests import models
from tests.trainer import precompute
from trainer import parse_recipe


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """The command runs in this process, whose next tests want a cluster of their own."""
    yield
    ray.shutdown()


def test_what_is_measured_says_whether_caching_pays_and_writes_nothing(data: Path, tmp_path: Path) -> None:
    content = models.recipe(data, tmp_path)
    content["stages"].append({**content["stages"][0], "epochs": 5})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    precompute.fill(parse_recipe(content, "test"), "small")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = CliRunner().invoke(app, ["plan", str(file), "--measure", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    cost = json.loads(result.stdout)["cost"]
    # 19 of 20 scenes have objects, and the last step is filled; every row of `small` is there, none of `swin`
    predicted = {way: of["1"]["total"] for way, of in cost["predicted"].items()}
    assert {way: of["teacher_forwards"] for way, of in predicted.items()} == {
        "online": 7 * 20,
        "cached": 40,
    }
    assert predicted["cached"]["written_bytes"] == next(
        plan["bytes"] for plan in json.loads(result.stdout)["teachers"] if plan["teacher"] == "swin"
    )
    # nothing is left to pay for the rows of `small`: caching pays at once, or reading is slower than such a small teacher
    assert {stage["caching_pays_from_epochs"] for stage in cost["stages"][::2]} <= {1, None}
    assert cost["cheapest"]["1"] in cost["predicted"]
    five, one = (cost["predicted"]["online"][students]["total"]["seconds"] for students in ("5", "1"))
    assert abs(five - 5 * one) < 1e-6
    assert {of["device"] for of in (cost["measured"]["student"], cost["measured"]["teacher"])} == {"cpu"}


def test_one_teacher_alone_is_not_timed(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(models.recipe(data, tmp_path)))
    result = CliRunner().invoke(app, ["plan", str(file), "--measure", "--teacher", "small"])
    assert result.exit_code == 2
    assert "--teacher" in result.output
