"""What a job leaves in its work_dir about itself, beside the stages: the recipe it ran with, and what each precompute did."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache import open_storage
from trainer import Recipe

if TYPE_CHECKING:
    from services.precompute import FillResult

RECIPE = "recipe.json"


def keep_recipe(recipe: Recipe) -> None:
    """Write the resolved recipe to ``work_dir/recipe.json``, so that the folder says what it holds.

    Raises:
        RecipeError: the cache's URI holds credentials; nothing is written then.
    """
    open_storage(recipe.cache.uri)
    _write(recipe, RECIPE, recipe.model_dump(mode="json"))


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
