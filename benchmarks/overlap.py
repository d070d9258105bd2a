"""Wall time of `mtpd run`: teachers first and then the stages, against both at once (``cache.on_missing: wait``).

Drawn scenes and the demo's recipe, two teachers and two stages, each time from nothing on a cluster of its own, actors and
training workers of one CPU and one thread each; in turns, ``--rounds`` times.
"""

import io
import logging
import os
import statistics
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
import yaml

from services.overlap import run_job
from trainer import generate, parse_recipe


def run(content: dict[str, Any], folder: Path, on_missing: str) -> float:
    """Seconds of a whole job."""
    cache = {**content["cache"], "uri": str(folder / "cache"), "on_missing": on_missing}
    recipe = parse_recipe({**content, "cache": cache, "work_dir": str(folder / "work")}, "benchmark")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    begin = time.monotonic()
    with redirect_stdout(io.StringIO()) as printed:
        _, stages = run_job(recipe)
    seconds = time.monotonic() - begin
    ray.shutdown()
    assert len(stages) == 2
    assert ("while the stages train" in printed.getvalue()) == (on_missing == "wait")
    return seconds


def main(
    scenes: Annotated[int, typer.Option(min=8)] = 200,
    epochs: Annotated[int, typer.Option(min=1, help="Of each stage.")] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Measure what overlapping saves."""
    logging.disable(logging.WARNING)
    os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    measured: dict[str, list[float]] = {"error": [], "wait": []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        generate(root / "data", "train", scenes, seed=0)
        generate(root / "data", "val", 8, seed=0, first_id=1_000_001)
        content = yaml.safe_load(Path("recipes/demo.yaml").read_text())
        for split in ("train", "val"):
            files = {
                "ann_file": str(root / "data/annotations" / f"{split}.json"),
                "img_dir": str(root / "data" / split),
            }
            content["dataset"][split] = files
        content["stages"] = [{**stage, "epochs": epochs} for stage in content["stages"]]
        content["actors"], content["training"] = {"max": 1, "cpus": 1}, {"cpus": 1}
        for number in range(rounds):
            for way, seconds in measured.items():
                seconds.append(run(content, root / f"{way}-{number}", way))
    first, both = (statistics.median(measured[way]) for way in ("error", "wait"))
    print(
        f"{2 * scenes} rows a teacher, {epochs} epoch(s) a stage: teachers first {first:.1f} s, at once {both:.1f} s, "
    )
    print(f"ratio {both / first:.2f}; rounds: {measured}")


if __name__ == "__main__":
    typer.run(main)
