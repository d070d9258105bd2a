"""Results of studies, read for the report: each arm's AP over its seeds."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache import RecipeError
from services.records import read_json


@dataclass(frozen=True)
class Arm:
    """Trainings that differ in their seed alone.

    Attributes:
        values: box AP in points, by seed.
    """

    name: str
    values: dict[str, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.mean(self.values.values())

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation; None with one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Study:
    """Arms that were trained under the same settings."""

    name: str
    settings: dict[str, Any]
    arms: tuple[Arm, ...]


def read_studies(file: Path) -> list[Study]:
    """The studies of a file of results: one, ``{"settings": {...}, "arms": {"ARM-SEED": {"mAP": ...}}}``, or several by name.

    Raises:
        RecipeError: the file holds no arm with an ``mAP``.
    """
    content = read_json(file)
    named = {file.stem: content} if isinstance(content, dict) and "arms" in content else content
    studies = []
    for name, study in named.items() if isinstance(named, dict) else ():
        arms: dict[str, dict[str, float]] = {}
        results = study.get("arms") if isinstance(study, dict) else None
        for training, result in results.items() if isinstance(results, dict) else ():
            value = result.get("mAP") if isinstance(result, dict) else None
            if isinstance(value, int | float) and math.isfinite(value):
                arm, seed = split_seed(training)
                arms.setdefault(arm, {})[seed] = float(value)
        if arms:
            settings = study.get("settings")
            found = tuple(Arm(arm, values) for arm, values in arms.items())
            studies.append(Study(str(name), settings if isinstance(settings, dict) else {}, found))
    if not studies:
        raise RecipeError(
            f"--study {file}: not a file of results, which has `arms` with an `mAP` each (benchmarks/study.py)."
        )
    return studies


def split_seed(training: str) -> tuple[str, str]:
    """``ARM-SEED`` as arm and seed; a name without a seed is an arm of one training."""
    arm, _, seed = training.rpartition("-")
    return (arm, seed) if arm and seed.isdigit() else (training, "")
