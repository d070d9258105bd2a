"""What a job leaves about itself: in its work_dir the recipe and what each precompute did, in the cache what it needs."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import GroupInfo, MtpdError, Use, open_storage, refer
from services.present import say
from trainer import Recipe, stage_dir

if TYPE_CHECKING:
    from services.filling import FillResult

RECIPE = "recipe.json"


def keep_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe to ``work_dir/recipe.json``, so that the folder says what it holds.

    Raises:
        RecipeError: the cache's URI holds credentials; nothing is written then.
    """
    open_storage(recipe.cache.uri)
    _write(recipe, RECIPE, recipe.model_dump(mode="json"))


def record_use(recipe: Recipe, info: GroupInfo) -> None:
    """Record in the cache that this recipe needs a group, and which of the stages that read it are trained.

    A role that only reads the cache is refused that; then the group is not kept for this recipe, and a line says so.
    """
    stages = tuple(n for n, stage in enumerate(recipe.stages, start=1) if info.teacher in stage.teachers)
    done = tuple(n for n in stages if (stage_dir(recipe, n) / "result.json").exists())
    storage = open_storage(recipe.cache.uri)
    try:
        refer(storage, recipe.work_dir, info.name, Use(info.teacher, stages, done))
    except (MtpdError, OSError):
        say(
            f"{storage.where()} cannot be written to: `mtpd gc` of other recipes will not know that this one reads {info.name}"
        )


def record_fill(recipe: Recipe, result: "FillResult") -> None:
    """Add what a precompute did to ``work_dir/precompute-TEACHER.json``, one entry of ``runs`` each, the oldest first."""
    if not (result.computed or result.failures):
        return  # interrupted before anything was done
    name = f"precompute-{result.teacher}.json"
    content = read_json(Path(recipe.work_dir) / name)
    runs = content.get("runs", []) if isinstance(content, dict) else []
    run = asdict(result) | {"failures": len(result.failures), "ended": datetime.now(UTC).isoformat(timespec="seconds")}
    _write(recipe, name, {"teacher": result.teacher, "runs": [*runs, run]})


def read_json(file: Path) -> Any:
    """A JSON file's content; None if there is none, or if it is no JSON."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _write(recipe: Recipe, name: str, content: dict[str, Any]) -> None:
    open_storage(recipe.work_dir).write(name, [json.dumps(content, indent=1).encode()], durable=False)
