"""What files and manual tell people and machines to run: each command line by its tool's parser, the plan for real."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from ray.dashboard.modules.job.cli import submit
from ray.runtime_env import RuntimeEnv
from typer.testing import CliRunner

from services.cli import app
from tests.cache.object_store import Bucket, bucket, request  # noqa: F401 - a fixture
from tests.deploy.files import DEPLOY, JOBS, MANUAL, RECIPE, ROOT, blocks, commands, documents
from tests.trainer.test_recipes import CLASSES, checkpoint
from trainer import load_recipe


def parse_ours(words: list[str]) -> None:
    """Parse a command line of ours without running it; what is not known is an error."""
    assert words[0] == "mtpd"
    group: Any = typer.main.get_command(app)
    with group.make_context("mtpd", words[1:], resilient_parsing=True) as context:
        name, command, rest = group.resolve_command(context, words[1:])
    assert command is not None
    command.make_context(name, rest)


def test_the_jobs_entry_points_are_commands_on_the_recipe_that_is_mounted() -> None:
    for name in JOBS:
        spec = documents(name)[0]["spec"]
        words = spec["entrypoint"].split()
        parse_ours(words)
        head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        (mount,) = (one for one in head["containers"][0]["volumeMounts"] if one["name"] == "recipe")
        assert Path(words[-1]) == Path(mount["mountPath"]) / "recipe.yaml"
    with pytest.raises(Exception, match="No such option"):
        parse_ours(["mtpd", "precompute", "recipe.yaml", "--resume"])


def test_the_manuals_jobs_are_submitted_to_loopback_with_the_environment_of_the_file() -> None:
    submitted = [words for words in commands() if "submit" in words]
    assert len(submitted) >= 3
    for words in submitted:
        assert words[0] == "RAY_AUTH_MODE=token"
        parsed = submit.make_context("submit", words[words.index("submit") + 1 :]).params
        assert parsed["address"] == "http://127.0.0.1:8265"
        assert (ROOT / parsed["runtime_env"]).is_file()
        parse_ours(list(parsed["entrypoint"]))
    environment = yaml.safe_load((DEPLOY / "runtime-env.yaml").read_text())
    made = RuntimeEnv(**environment)
    assert made["env_vars"]["AWS_REGION"]
    assert not any("KEY" in name or "TOKEN" in name for name in made["env_vars"])


def test_a_job_of_the_manual_begins_when_the_one_above_it_has_ended() -> None:
    together = [
        jobs for block in blocks() if len(jobs := [words for words in commands(block) if "submit" in words]) > 1
    ]
    assert together
    for jobs in together:
        for words in jobs[:-1]:
            parsed = submit.make_context("submit", words[words.index("submit") + 1 :]).params
            assert not parsed["no_wait"], f"the next job finds what {parsed['entrypoint']} has not done yet"


def test_the_manuals_other_commands_are_ours_and_every_file_it_names_is_there() -> None:
    ours = [words for words in commands() if words[0] == "mtpd"]
    assert ours
    for words in ours:
        parse_ours(words)
    for file in (MANUAL, *(path for path in DEPLOY.rglob("*") if path.is_file())):
        for name in re.findall(r"\b(?:deploy|docs|recipes)/[\w./-]*\w", file.read_text()):
            if not name.startswith("recipes/NAME"):
                assert (ROOT / name).exists(), f"{file}: {name}"


def test_no_file_holds_a_credential_or_opens_a_door() -> None:
    for file in (path for path in DEPLOY.rglob("*") if path.is_file()):
        text = file.read_text()
        assert not re.search(r"AKIA|aws_secret|SECRET_ACCESS_KEY|BEGIN [A-Z ]*PRIVATE KEY", text), file
        assert not re.search(
            r"(?<![\d.])0\.0\.0\.0|dashboard-host(?!=127\.0\.0\.1)|privileged: true|hostNetwork", text
        ), file


def adapted(folder: Path) -> Path:
    """The deployed recipe with this machine's folders: the annotations of two images of a common shape, real teachers."""
    for split in ("train", "val"):
        (folder / "data/coco" / f"{split}2017").mkdir(parents=True)
        content: dict[str, Any] = {
            "images": [{"id": n, "file_name": f"{n}.jpg", "width": 1333, "height": 800} for n in (1, 2)],
            "annotations": [
                {"id": n, "image_id": n, "category_id": n, "bbox": [9, 9, 99, 99], "area": 9801, "iscrowd": 0}
                for n in (1, 2)
            ],
            "categories": [{"id": n + 1, "name": name} for n, name in enumerate(CLASSES)],
        }
        target = folder / "data/coco/annotations" / f"instances_{split}2017.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(content))
    text = RECIPE.read_text().replace("/mnt/", f"{folder}/")
    (folder / "data/checkpoints").mkdir()
    for teacher in yaml.safe_load(text)["teachers"].values():
        checkpoint(teacher["config"], Path(teacher["checkpoint"]))
    (folder / "data/checkpoints/resnet50-0676ba61.pth").touch()
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_the_recipe_is_planned_in_its_bucket_with_the_bytes_of_the_manual(
    bucket: Bucket,  # noqa: F811
    tmp_path: Path,
) -> None:
    recipe = adapted(tmp_path)
    loaded = load_recipe(recipe)
    assert loaded.cache.uri == "s3://mtpd-cache/coco"
    request("PUT", "/mtpd-cache")
    try:
        result = CliRunner().invoke(app, ["plan", os.fspath(recipe), "--json"], catch_exceptions=False)
    finally:
        request("DELETE", "/mtpd-cache")
    assert result.exit_code == 0
    plans = json.loads(result.output)["teachers"]
    assert [plan["teacher"] for plan in plans] == list(loaded.teachers)
    for plan in plans:
        assert (plan["rows_to_compute"], list(plan["levels"])) == (4, ["P3", "P4", "P5"])
        assert f"{plan['bytes_per_row'] / 1e6:.2f} MB" == "5.65 MB"
    assert "int8, 800 x 1344 | 5.65 MB" in MANUAL.read_text()
    # on nodes that come from none the defaults would ask for no GPU
    for spec in (loaded.actors, loaded.training):
        assert spec.gpus
        assert spec.cpus
