"""The charts of runs: AP over their epochs and what was logged of their training, each with the legend that it needs."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from services.charts import COLOURS, Band, Line, line_chart, value_range
from services.runs import Run
from services.studies import split_seed

_WIDE, _NARROW, _PANEL = (1040, 340), (354, 260), (332, 170)
_KINDS = {"bbox": "box AP", "segm": "mask AP"}


@dataclass(frozen=True)
class Entry:
    """One line of a legend: a name, and the style that its line is drawn in."""

    name: str
    style: int


@dataclass(frozen=True)
class Figure:
    """A chart at the width of a desktop's page, and at that of a phone's; the legend is empty where one line needs none."""

    legend: tuple[Entry, ...]
    wide: Markup
    narrow: Markup


@dataclass(frozen=True)
class Panel:
    """A small chart of one scalar, or of one run."""

    title: str
    note: str
    chart: Markup


@dataclass(frozen=True)
class Styles:
    """How the runs of a page are drawn, the same in all its charts.

    Attributes:
        arms: per run what shares its style: itself, or where there are many runs the seeds of its arm.
        places: per arm its style.
    """

    arms: dict[str, str]
    places: dict[str, int]

    @classmethod
    def choose(cls, runs: Sequence[Run]) -> "Styles":
        """A style for each run; where there are more than colours, one for the seeds of an arm."""
        arms = {run.name: split_seed(run.name)[0] if len(runs) > COLOURS else run.name for run in runs}
        return cls(arms, {arm: place for place, arm in enumerate(dict.fromkeys(arms.values()))})

    def of(self, run: Run) -> int:
        """The number that `Line.style` takes."""
        return self.places[self.arms[run.name]]

    def legend(self, runs: Sequence[Run]) -> tuple[Entry, ...]:
        """An entry for each arm of these runs."""
        members: dict[str, list[str]] = {}
        for run in runs:
            members.setdefault(self.arms[run.name], []).append(run.name)
        return tuple(
            Entry(names[0] if len(names) == 1 else f"{arm}, {len(names)} seeds", self.places[arm])
            for arm, names in members.items()
        )


def measured_kinds(runs: Sequence[Run]) -> dict[str, str]:
    """The kinds of AP that were measured, ``bbox`` and ``segm``, each with its name for people."""
    return {kind: label for kind, label in _KINDS.items() if any(run.series(f"{kind}_mAP") for run in runs)}


def ap_figures(runs: Sequence[Run], styles: Styles) -> list[Figure]:
    """AP over the epochs of all stages in sequence: of one run with its stages, or of several that were evaluated alike."""
    axis = "epoch, all stages in sequence"
    kinds = measured_kinds(runs)
    if len(runs) == 1:
        (run,) = runs
        first = styles.of(run)
        looks = (first, (first + 1) % COLOURS + COLOURS)  # the second in another colour, and dashed
        entries = [(kind, Entry(label, look)) for (kind, label), look in zip(kinds.items(), looks, strict=False)]
        lines = [
            Line(entry.name, [run.series(f"{kind}_mAP")], entry.style, _stage_ends(run)) for kind, entry in entries
        ]
        legend = tuple(entry for _, entry in entries) if len(entries) > 1 else ()
        title = "AP over the epochs of all stages"
        return [_figure(title, legend, lines, (axis, "AP, points"), _bands(run))] if lines else []
    figures = []
    for kind, label in kinds.items():
        drawn = [(run, series) for run in runs if (series := run.series(f"{kind}_mAP"))]
        marks = len(drawn) <= COLOURS
        lines = [Line(run.name, [s], styles.of(run), [s[-1][0]] if marks else ()) for run, s in drawn]
        legend = styles.legend([run for run, _ in drawn])
        bands = [Band(0, _last_epoch(runs), "")]
        figures.append(_figure(f"{label} of {len(drawn)} runs", legend, lines, (axis, f"{label}, points"), bands))
    return figures


def ap_panels(runs: Sequence[Run], styles: Styles) -> list[Panel]:
    """Each run on its own with its stages: box AP of all on one scale, then mask AP of those that have it."""
    kinds = measured_kinds(runs)
    panels = []
    for kind, label in kinds.items():
        drawn = [(run, series) for run in runs if (series := run.series(f"{kind}_mAP"))]
        values = value_range([value for _, series in drawn for _, value in series])
        for run, series in drawn:
            chart = line_chart(
                [Line(run.name, [series], styles.of(run), _stage_ends(run))],
                title=f"{label} of {run.name}",
                size=_PANEL,
                labels=("epoch", f"{label}, points"),
                bands=_bands(run),
                y_range=values,
            )
            note = " → ".join(stage.label for stage in run.stages)
            panels.append(Panel(run.name, f"{label}: {note}" if len(kinds) > 1 else note, chart))
    return panels


def curve_panels(runs: Sequence[Run], styles: Styles) -> list[Panel]:
    """A small chart for each training scalar: the whole loss, the detector's, the mechanisms', and what drives them."""
    scalars = dict.fromkeys(name for run in runs for stage in run.stages for name in stage.curves)
    mechanisms = {f"loss_{m}" for run in runs for stage in run.stages for m in stage.mechanisms}
    notes = {"loss": "sum of all losses", "lr": "learning rate", "grad_norm": "gradient norm before clipping"}
    turns = {"loss": 0, "lr": 3, "grad_norm": 4}
    panels = []
    for name in sorted(scalars, key=lambda name: turns.get(name, 2 if name in mechanisms else 1)):
        lines = [Line(run.name, pieces, styles.of(run)) for run in runs if (pieces := run.curve(name))]
        bands = _bands(runs[0]) if len(runs) == 1 else [Band(0, _last_epoch(runs), "")]
        note = notes.get(name, "mechanism" if name in mechanisms else "detector")
        chart = line_chart(lines, title=name, size=_PANEL, labels=("epoch", ""), bands=bands, show="{:.3g}".format)
        if chart:
            panels.append(Panel(name, note, chart))
    return panels


def _figure(
    title: str, legend: tuple[Entry, ...], lines: list[Line], axes: tuple[str, str], bands: list[Band]
) -> Figure:
    wide, narrow = (line_chart(lines, title=title, size=size, labels=axes, bands=bands) for size in (_WIDE, _NARROW))
    return Figure(legend, wide, narrow)


def _bands(run: Run) -> list[Band]:
    return [Band(s.first_epoch, s.first_epoch + s.epochs, f"stage {s.number}: {s.label}") for s in run.stages]


def _stage_ends(run: Run) -> list[float]:
    return [float(stage.first_epoch + stage.epochs) for stage in run.done]


def _last_epoch(runs: Sequence[Run]) -> int:
    return max(stage.first_epoch + stage.epochs for run in runs for stage in run.stages)
