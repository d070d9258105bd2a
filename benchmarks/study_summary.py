"""The study's results as tables, sentences and a figure, all from its JSON."""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from benchmarks.arms import Arms, below_rounding, by_seed, interval, paired, read, spread
from benchmarks.study_arms import MECHANISMS, arms
from benchmarks.study_origin import differing
from benchmarks.study_settings import SETTINGS
from services.present import say

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend that needs no display

MARK = "<!-- below: written by `python -m benchmarks.study --summary` -->"
_ENOUGH = 3  # seeds, for an interval
_COVERED = (
    "The intervals cover the randomness of training alone: all seeds share the images, the val set and each teacher's one "
    "checkpoint."
)
# (arm, baseline, what differs between the two alone)
COMPARISONS = (
    ("inherited", "alone", "inheriting neck and head, no distillation"),
    ("direct", "inherited", "distillation from the strongest teacher"),
    ("progressive", "inherited", "distillation from weak to strong"),
    ("progressive", "direct", "a weaker first teacher, and a restart"),
    ("twice", "direct", "a restart of the schedule"),
    ("inherited twice", "inherited", "a restart of the schedule, no distillation"),
    ("progressive", "twice", "a weaker first teacher, both restarted"),
    ("progressive", "alone, then direct", "a weaker first teacher instead of none, both restarted"),
    ("twice", "alone, then direct", "the strongest teacher first instead of none, both restarted"),
    ("r18 first", "progressive", "the first teacher: weaker, but of the student's family"),
    ("progressive", "reversed", "order: weak to strong, or strong to weak"),
    ("weakest", "inherited", "distillation from the weakest teacher"),
    ("direct", "weakest", "the teacher's strength"),
    ("reversed", "direct", "a weaker last teacher, and a restart"),
    ("ensemble", "direct", "all teachers at once instead of the strongest"),
    ("progressive", "ensemble", "one teacher after the other instead of all at once"),
    ("direct, then alone", "direct", "no teacher in the second half"),
    ("progressive, inherits from weakest", "progressive", "whose neck and head are inherited"),
    ("direct, random start", "alone", "distillation, nothing inherited"),
    ("progressive, random start", "direct, random start", "a weaker first teacher, nothing inherited"),
    ("trained, direct", "trained, alone", "distillation of a trained student"),
    ("trained, progressive", "trained, alone", "distillation of a trained student from weak to strong"),
    ("trained, progressive", "trained, direct", "a weaker first teacher, of a trained student"),
    ("online", "direct", "the live teacher instead of its cache"),
    *((f"direct, {name}", "direct", f"{name} instead of PKD") for name in MECHANISMS if name != "PKD"),
    ("direct", "views 1", "two cached views (flip) instead of one"),
    *(
        (f"sampled {count}", "sampled 1", f"{count} cached views (size, flip) instead of one")
        for count in (2, 4, 8, 16)
    ),
)


class Difference(NamedTuple):
    """Two arms that differ in ``what`` alone: AP of the one minus the other's, by seed.

    Attributes:
        hidden: so alike over the seeds that rounding explains it.
    """

    arm: str
    baseline: str
    what: str
    values: list[float]
    hidden: bool

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of 95 %; None of too few seeds, or where rounding hides it."""
        return None if self.hidden or len(self.values) < _ENOUGH else interval(self.values)


def summarise(json_path: Path) -> None:
    """Print every study; write the figure and the document beside the results, what people wrote above `MARK` kept.

    Raises:
        SystemExit: arms of one study were trained from different teachers, starts or images.
    """
    studies = read(json_path)
    for name, study in studies.items():
        before: Arms = {}
        for key, result in study["arms"].items():
            for other, theirs in before.items():
                if what := differing(key, result, other, theirs):
                    raise SystemExit(
                        f"error: {json_path}: {name}: {what}: they cannot be compared; take one of them out"
                    )
            before[key] = result
    lines = [line for name, study in studies.items() for line in section(name, study)]
    text = "\n".join([*_unknown(studies), *lines])
    say(text)
    document = json_path.with_suffix(".md")
    written = document.read_text().split(MARK)[0] if document.exists() else ""
    document.write_text(f"{written}{MARK}\n\n{text}")
    figure(studies, json_path.with_suffix(".png"))


def section(name: str, study: dict[str, Any]) -> list[str]:
    """One study in markdown."""
    done: Arms = study["arms"]
    lines = [f"## {name}", ""]
    if teachers := study.get("teachers"):
        lines += [f"Teachers' box AP on the same images: {', '.join(f'{k} {v:.1f}' for k, v in teachers.items())}.", ""]
    compared = _compared(done)
    if tuned := sorted({key.rpartition("-")[0] for key in done} - set(compared)):
        rows = [[arm.removeprefix("tune "), _reached(done, arm)] for arm in tuned]
        lines += ["Weights, the strongest teacher directly, one seed that the comparison does not have:", ""]
        lines += _table(["mechanism and weight", "box AP"], rows)
    if not compared:
        return lines
    rows = [[arm, _chain(done, arm), *_numbers(done, arm)] for arm in compared]
    lines += _table(["arm", "stages: teacher, epochs", "box AP", "n", "after each stage", "minutes, the fastest"], rows)
    if differences := _differences(done):
        rows = [
            [f"{one.arm} vs {one.baseline}", one.what, spread(one.values), len(one.values), *_verdict(one)]
            for one in differences
        ]
        lines += _table(["difference, paired by seed", "what differs", "AP", "n", "95 % interval", ""], rows)
        lines += [_COVERED, "", *statement(differences), ""]
    return lines + _commits(done)


def statement(differences: list[Difference]) -> list[str]:
    """What is significant and what is not, in sentences."""
    clear, unclear, hidden, single = [], [], [], []
    for one in differences:
        named, mean, count = f"{one.arm} vs {one.baseline}", statistics.mean(one.values), f"n = {len(one.values)}"
        if (bounds := one.interval) is None:
            (hidden if one.hidden else single).append(f"{named} ({mean:+.1f}, {count})")
            continue
        low, high = bounds
        (unclear if low <= 0 <= high else clear).append(f"{named} ({mean:+.1f} [{low:+.1f}, {high:+.1f}], {count})")
    groups = (
        ("Significant at 5 %, each by itself", clear),
        ("Not significant", unclear),
        ("Deviations below what rounding to 0.1 AP makes, of which no interval follows", hidden),
        ("Fewer than three seeds, which say nothing about significance", single),
    )
    return [f"- **{title}**: {'; '.join(texts)}." for title, texts in groups if texts]


def _differences(done: Arms) -> list[Difference]:
    """Every comparison of which some seed is there."""
    found = []
    for arm, baseline, what in COMPARISONS:
        if values := paired(done, arm, baseline):
            results = [result for key, result in done.items() if key.rpartition("-")[0] in (arm, baseline)]
            hidden = len(values) >= _ENOUGH and below_rounding(values, *results)
            found.append(Difference(arm, baseline, what, values, hidden))
    return found


def _unknown(studies: dict[str, Any]) -> list[str]:
    """How many arms do not say what they came of."""
    arms_of = {name: list(study["arms"].values()) for name, study in studies.items()}
    without = {name: sum("origin" not in result for result in results) for name, results in arms_of.items()}
    shown = [f"{count} of {len(arms_of[name])} in `{name}`" for name, count in without.items() if count]
    if not shown:
        return []
    words = (
        "Arms that carry no digest of their teachers, start and images, for they were trained before these were kept"
    )
    return [f"{words}: {'; '.join(shown)}.", ""]


def _commits(done: Arms) -> list[str]:
    """Which code trained, where that was recorded."""
    commits = Counter((result["origin"]["commit"] or "none")[:12] for result in done.values() if "origin" in result)
    shown = [f"{commit} ({count})" for commit, count in commits.items()]
    return [f"Commits of the code that trained, and how many arms: {', '.join(shown)}.", ""] if shown else []


def _verdict(one: Difference) -> tuple[str, str]:
    if (bounds := one.interval) is None:
        return "-", "spread below rounding" if one.hidden else "too few seeds"
    low, high = bounds
    return f"{low:+.2f} to {high:+.2f}", "within the noise" if low <= 0 <= high else "**significant**"


def _reached(done: Arms, arm: str) -> str:
    return spread(list(by_seed(done, arm).values()))


def _numbers(done: Arms, arm: str) -> tuple[str, int, str, str]:
    results = [result for key, result in done.items() if key.rpartition("-")[0] == arm]
    stages = zip(*(result["stages"] for result in results), strict=True)
    after = " → ".join(f"{statistics.mean(values):.1f}" for values in stages)
    minutes = min(result["seconds"] for result in results) / 60  # others beside it, and pauses, make the rest
    return _reached(done, arm), len(results), after, f"{minutes:.1f}"


def _chain(done: Arms, arm: str) -> str:
    described = next(result["arm"] for key, result in done.items() if key.rpartition("-")[0] == arm)
    stages = []
    for teacher, epochs in described["stages"]:
        stages.append(f"{' + '.join([teacher] if isinstance(teacher, str) else teacher or ['none'])}, {epochs}")
    return "; ".join(stages) + f" (start: {described['start']})"


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [columns, ["---"] * len(columns), *rows]
    return [*("| " + " | ".join(str(cell) for cell in row) + " |" for row in cells), ""]


def figure(studies: dict[str, Any], file: Path) -> None:
    """Per study: AP of every arm, a dot a seed; and the paired differences with their intervals."""
    shown = {name: study["arms"] for name, study in studies.items() if len(_compared(study["arms"])) > 1}
    if not shown:
        return
    heights = [max(len(_compared(done)), len(_differences(done))) + 2 for done in shown.values()]
    size = (11, 0.27 * sum(heights))
    canvas, axes = plt.subplots(len(shown), 2, figsize=size, squeeze=False, height_ratios=heights, layout="constrained")
    for (name, done), (left, right) in zip(shown.items(), axes, strict=True):
        names = _compared(done)
        for row, arm in enumerate(names):
            values = list(by_seed(done, arm).values())
            left.plot(values, [row] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
            left.plot([statistics.mean(values)], [row], "|", color="black", markersize=11)
        left.set(yticks=range(len(names)), yticklabels=names, title=name, xlabel="box AP")
        differences = _differences(done)
        for row, one in enumerate(differences):
            right.plot(one.values, [row] * len(one.values), "o", color="tab:orange", alpha=0.5, markersize=4)
            if bounds := one.interval:
                right.plot(bounds, [row, row], color="black")
            right.plot([statistics.mean(one.values)], [row], "|", color="black", markersize=11)
        right.set_xscale("symlog", linthresh=3)  # differences of 1 beside differences of 25
        right.set_xticks(ticks := [-10, -3, -2, -1, 0, 1, 2, 3, 10, 30], [str(tick) for tick in ticks])
        right.axvline(0, color="grey", linewidth=0.8)
        named = [f"{one.arm} vs {one.baseline}" for one in differences]
        right.set(yticks=range(len(named)), yticklabels=named, title="paired differences, 95 % interval", xlabel="AP")
        for axis in (left, right):
            axis.invert_yaxis()
            axis.tick_params(labelsize=7)
            axis.grid(axis="x", alpha=0.3)
    canvas.savefig(file, dpi=100)
    plt.close(canvas)


def _compared(done: Arms) -> list[str]:
    """The arms of the comparison, in the order of their definition."""
    every = list(arms(SETTINGS["scenes"]))
    return sorted({key.rpartition("-")[0] for key in done} & set(every), key=every.index)
