"""What studies of many trainings share: arms that are trained once, results in one JSON, statistics by seed.

An arm is one training: a recipe and a seed, under the name ``ARM-SEED``. Several processes may work on one study: each takes
arms that nobody holds (a lock on a file, which a killed process gives back), and the results' file is changed under a lock.
"""

import fcntl
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student_t

from benchmarks.box_ap import box_ap
from tests.trainer import precompute
from trainer import Recipe, TargetSource, stage_dir, train_stage

Arms = dict[str, dict[str, Any]]
# AP, in points: so much differences of two that are rounded to a tenth deviate by that alone (0.1 / sqrt(6)), and some more
_ROUNDING = 0.05


@contextmanager
def lock(file: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a file's lock. Yields False where another process holds it and ``wait`` is off."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def train(recipe: Recipe, source: TargetSource) -> dict[str, Any]:
    """Train every stage of an arm, or what is left of it, its caches filled first where rows are missing, on a GPU
    if there is one.

    Returns:
        Box AP and AP50 in points, of the last stage, not rounded, and AP after each (``stages``; to a tenth of a point after
        the earlier ones), the teachers' forwards beside the student, and seconds of training, of all attempts.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = dict.fromkeys(name for stage in recipe.stages for name in stage.teachers)
    for name in names if source == "cache" else ():
        with lock(Path(f"{recipe.cache.uri}.{name}.lock")):
            if failures := precompute.fill(recipe, name, device=device):
                raise RuntimeError(f"teacher {name}: {len(failures)} rows failed, the first: {failures[0]}")
    with redirect_stdout(StringIO()):  # pycocotools prints
        results = [train_stage(recipe, number, source) for number in range(1, len(recipe.stages) + 1)]
    metrics = box_ap(stage_dir(recipe, len(results)))
    return {
        **metrics,
        "rounded": False,
        "stages": [*(100 * result.metrics["bbox_mAP"] for result in results[:-1]), metrics["mAP"]],
        "teacher_forwards": sum(result.teacher_forwards for result in results),
        "seconds": sum(result.seconds for result in results),
    }


def load(file: Path, study: str, settings: dict[str, Any]) -> Arms:
    """A study's arms that are done, which must have been trained under the same settings."""
    content = read(file).get(study)
    if content is None:
        return {}
    settings = json.loads(json.dumps(settings))  # tuples are lists in there
    if differing := [key for key in settings if content["settings"].get(key) != settings[key]]:
        shown = ", ".join(f"{key}: {content['settings'].get(key)}, not {settings[key]}" for key in differing)
        raise SystemExit(f"error: {file}: {study} was measured with {shown}. Choose another --json.")
    return dict(content["arms"])


def read(file: Path) -> dict[str, Any]:
    """All studies of a file of results: by name their ``settings`` and ``arms``."""
    return json.loads(file.read_text()) if file.exists() else {}


def record(file: Path, study: str, settings: dict[str, Any], name: str, result: Any, kind: str = "arms") -> None:
    """Add one arm's result, or one of another kind; a kill leaves the file before or the file after."""
    with lock(file.with_suffix(".lock")):
        content = read(file)
        content.setdefault(study, {"settings": settings, "arms": {}}).setdefault(kind, {})[name] = result
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(file)


def by_seed(arms: Arms, arm: str) -> dict[int, float]:
    """Box AP of the trainings of an arm that are done, by seed."""
    named = {name.rpartition("-")[::2]: result["mAP"] for name, result in arms.items()}
    return {int(seed): value for (of, seed), value in named.items() if of == arm}


def paired(arms: Arms, arm: str, baseline: str) -> list[float]:
    """AP of one arm minus AP of another, for every seed of which both are done."""
    ours, theirs = by_seed(arms, arm), by_seed(arms, baseline)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def below_rounding(values: Sequence[float], *results: dict[str, Any]) -> bool:
    """Whether differences of AP deviate no more than by rounding: then their deviation and interval are not the trainings'.

    Args:
        values: two differences at least.
        results: what they are differences of. Those without ``rounded: false`` were recorded to a tenth of a point.
    """
    return any(result.get("rounded", True) for result in results) and statistics.stdev(values) < _ROUNDING


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return "-"
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The two-sided 95 % interval of the mean of at least two values, by Student's t."""
    mean = statistics.mean(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def verdict(values: Sequence[float], *results: dict[str, Any]) -> tuple[str, str]:
    """The interval of a mean difference, and what it says; ``results`` as in `below_rounding`."""
    if len(values) < 2:
        return "-", "one seed says nothing"
    if below_rounding(values, *results):
        return "-", "spread below rounding"
    low, high = interval(values)
    return f"{low:+.2f} .. {high:+.2f}", "within the noise" if low <= 0 <= high else "BEYOND the noise"
