"""Which runs were evaluated on the same images and objects: only their AP may be compared."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.runs import Run
from trainer import annotations_digest

_MOST_CLASSES = 8


@dataclass(frozen=True)
class Evaluation:
    """A val set, and the runs that were evaluated on it.

    Attributes:
        ann_file: its annotation file, as the first of the runs names it; None where a run does not say.
        classes: their names, in the order of labels; empty where no stage says.
        scales: the sizes (width, height) into which the runs' students were given its images, each with the names of its runs.
    """

    ann_file: str | None
    classes: tuple[str, ...]
    scales: dict[tuple[int, ...], tuple[str, ...]]
    runs: tuple[Run, ...]

    @property
    def where(self) -> str:
        """The val set for people."""
        return self.ann_file or "a val set that is not known"

    @property
    def what(self) -> str:
        """Its classes for people."""
        if not self.classes:
            return ""
        names = ", ".join(self.classes[:_MOST_CLASSES]) + (", …" if len(self.classes) > _MOST_CLASSES else "")
        return f"{len(self.classes)} class{'es' if len(self.classes) != 1 else ''}: {names}"


def by_evaluation(runs: Sequence[Run]) -> list[Evaluation]:
    """Runs grouped by what they were evaluated on, in the order of their first ones.

    Val sets are the same where their annotation files have the same images, objects and categories, wherever they lie. A file
    that cannot be read any more is taken for the same as another of its path and classes; a run that does not say what it was
    evaluated on stays alone. The size of the images does not part runs: it is a student's own, the objects are the same.
    """
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run), []).append(run)
    return [_evaluation(group) for group in groups.values()]


def _key(run: Run) -> tuple[object, ...]:
    if run.val is None:
        return (run.name,)
    try:
        return ("annotations", annotations_digest(run.val.ann_file))
    except (OSError, ValueError, TypeError, AttributeError):
        return ("path", run.val.ann_file, run.val.classes)


def _evaluation(runs: Iterable[Run]) -> Evaluation:
    found = tuple(runs)
    vals = [(run, run.val) for run in found if run.val is not None]
    scales: dict[tuple[int, ...], tuple[str, ...]] = {}
    for run, val in vals:
        if val.scale:
            scales[val.scale] = (*scales.get(val.scale, ()), run.name)
    return Evaluation(
        ann_file=vals[0][1].ann_file if vals else None,
        classes=next((val.classes for _, val in vals if val.classes), ()),
        scales=scales,
        runs=found,
    )
