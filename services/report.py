"""`mtpd report`: one self-contained HTML page of what a folder of runs holds."""

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import torch
import yaml

from cache import MtpdError
from services.cache_facts import cache_facts, count_forwards
from services.charts import axis_ticks, number, swatch
from services.evaluations import Evaluation, by_evaluation
from services.figures import Figure, Panel, Styles, ap_figures, ap_panels, curve_panels, measured_kinds
from services.present import duration, size
from services.runs import Run, Stage, find_runs
from services.studies import Study, read_studies
from trainer import LEAST_SCORE, Picture, Pictures, SeenObject, parse_recipe, take_pictures

_TEMPLATE = "report.html.jinja"
_METRICS = {"mAP": "AP", "mAP_50": "AP50", "mAP_75": "AP75", "mAP_s": "AP-S", "mAP_m": "AP-M", "mAP_l": "AP-L"}
_MOST_STUDENTS = 6
_LETTERS = 22  # a picture's width in the size of its letters


@dataclass(frozen=True)
class ApSection:
    """AP of the runs that were evaluated on one val set.

    Attributes:
        kinds: ``bbox`` and ``segm`` with their names, where they were measured.
        sparse: whether a stage was evaluated at its end only.
    """

    evaluation: Evaluation
    kinds: dict[str, str]
    figures: list[Figure]
    panels: list[Panel]
    sparse: bool


def write_report(
    work_dir: Path, *, study: Path | None = None, out: Path | None = None, images: int = 4, device: str | None = None
) -> Path:
    """Write the report of the runs in a folder.

    What a run lacks is named on the page, and no error.

    Args:
        work_dir: a recipe's ``work_dir``, or a folder of several.
        study: a file of results of a study, to show its arms too.
        out: the page; ``work_dir/report.html`` by default.
        images: val images to show; the detectors are run on them. 0 shows none.
        device: where; a GPU if there is one.

    Returns:
        Where the page is.

    Raises:
        RecipeError: no stage in the folder, or no results in the file.
    """
    runs = find_runs(work_dir.absolute())
    main, evaluations = _main(runs), by_evaluation(runs)
    studies = [] if study is None else read_studies(study)
    facts, missing = cache_facts(runs)
    pictures, shown, left_out = None, [], []
    if images:
        pictures, shown, left_out = _pictures(
            main, evaluations, images, device or ("cuda" if torch.cuda.is_available() else "cpu")
        )
    else:
        left_out = ["Pictures were not asked for (--images 0)."]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "labelled": _labelled,
        "duration": duration,
        "size": size,
        "data": _data_uri,
        "number": number,
        "swatch": swatch,
    }
    styles = Styles.choose([run for one in evaluations for run in one.runs])
    page = environment.get_template(_TEMPLATE).render(
        name=work_dir.absolute().name,
        folder=str(work_dir.absolute()),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        runs=runs,
        several=len(runs) > 1,
        styles=styles,
        main=main,
        students=sorted({run.student for run in runs}),
        metrics=_METRICS,
        ap_sections=[_ap_section(one, styles) for one in evaluations],
        panels=curve_panels(runs, styles),
        forwards=count_forwards(runs, facts),
        facts=facts,
        level_names=sorted({level.name for fact in facts for level in fact.levels}, key=lambda name: int(name[1:])),
        orders=[run for run in runs if _is_order(run.order)],
        studies=[(one, _scale(one)) for one in studies],
        pictures=pictures,
        shown=shown,
        least_score=LEAST_SCORE,
        letters=_LETTERS,
        recipe=yaml.safe_dump(main.recipe, sort_keys=False, allow_unicode=True) if main.recipe else "",
        missing=[*_missing(runs), *missing, *left_out],
    )
    target = work_dir.absolute() / "report.html" if out is None else out.absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(target)
    return target


def _main(runs: Sequence[Run]) -> Run:
    """The run whose stages are shown in pictures: the one with most of them, the last of several."""
    return max(reversed(runs), key=lambda run: (bool(run.recipe), len(run.done)))


def _ap_section(evaluation: Evaluation, styles: Styles) -> ApSection:
    runs = evaluation.runs
    return ApSection(
        evaluation,
        measured_kinds(runs),
        ap_figures(runs, styles),
        ap_panels(runs, styles) if len(runs) > 1 else [],
        any(_is_sparse(stage) for run in runs for stage in run.stages),
    )


def _is_sparse(stage: Stage) -> bool:
    """Whether it was evaluated at its end only."""
    return stage.epochs > 1 and bool(stage.evaluations) and max(map(len, stage.evaluations.values())) == 1


def _scale(study: Study) -> tuple[float, float, list[float]]:
    """The axis on which a study's arms are drawn: its ends and ticks, in points."""
    values = [value for arm in study.arms for value in arm.values.values()]
    margin = 0.06 * (max(values) - min(values)) or 1.0
    low, high = min(values) - margin, max(values) + margin
    return low, high, axis_ticks(low, high, 6)


def _is_order(order: Any) -> bool:
    return isinstance(order, dict) and all(isinstance(order.get(key), dict) for key in ("costs", "aps", "reasons"))


def _pictures(
    main: Run, evaluations: Sequence[Evaluation], count: int, device: str
) -> tuple[Pictures | None, list[str], list[str]]:
    """Pictures of the main run's val images, by the students that were evaluated on them: to others they mean nothing.

    Returns:
        The pictures if there are any, the detectors whose feature energy is shown, and what is left out, and why.
    """
    if not main.recipe or not main.done:
        return None, [], ["No pictures: no run has both its recipe.json and a stage that is done."]
    alike = next(one for one in evaluations if main in one.runs)
    runs = alike.runs
    trained = [(main, stage) for stage in (*main.done[:1], *main.done[1:][-1:])]
    trained += [(run, run.done[-1]) for run in runs if run is not main and run.done]
    names = [
        f"{run.name}, stage {stage.number} ({stage.label})"
        if len(runs) > 1 or len(evaluations) > 1
        else f"student after stage {stage.number} ({stage.label})"
        for run, stage in trained
    ]
    students = {name: stage.folder for name, (_, stage) in zip(names[:_MOST_STUDENTS], trained, strict=False)}
    last = names[1] if len(main.done) > 1 else names[0]
    left_out = [
        f"No pictures of {', '.join(run.name for run in one.runs)}: evaluated on {one.where}; the pictures are of "
        f"{alike.where}."
        for one in evaluations
        if one is not alike
    ]
    if len(trained) > _MOST_STUDENTS:
        left_out.append(f"Pictures show {_MOST_STUDENTS} of {len(trained)} students.")
    teacher = main.teachers[-1] if main.teachers else None
    try:
        recipe = parse_recipe(main.recipe, str(main.folder / "recipe.json"))
        pictures = take_pictures(recipe, teacher, students, count, device=device)
    except MtpdError as error:
        return None, [], [f"No pictures: {error}"]
    except Exception as error:  # noqa: BLE001 - detectors raise what they like; the rest of the page is worth having
        return None, [], [f"No pictures: a detector failed: {type(error).__name__}: {error}"]
    return pictures, [name for name in (teacher, last) if name], left_out


@dataclass(frozen=True)
class _Label:
    """An object's class and score, and where they are written, unless they would cover those of a better one."""

    text: str
    x: float
    y: float
    anchor: str
    written: bool


def _labelled(
    objects: Sequence[SeenObject], picture: Picture, classes: Sequence[str]
) -> list[tuple[SeenObject, _Label]]:
    """Objects with their labels, in pixels of the image; the labels of the best are written first."""
    font = picture.width / _LETTERS
    taken: list[tuple[float, float, float]] = []
    labelled = []
    for seen in sorted(objects, key=lambda seen: -(seen.score or 0)):
        name = classes[seen.label] if seen.label < len(classes) else f"class {seen.label}"
        text = name if seen.score is None else f"{name} {seen.score:.2f}"
        x1, y1, x2, _ = seen.box
        width = 0.6 * font * len(text)
        at_right = x1 + width > picture.width
        left = min(x2, picture.width) - width if at_right else max(x1, 0)
        y = y1 - font / 4 if y1 > 1.3 * font else y1 + font
        free = all(abs(y - other) > font or left > end or left + width < start for start, end, other in taken)
        if free:
            taken.append((left, left + width, y))
        labelled.append(
            (seen, _Label(text, left + width if at_right else left, y, "end" if at_right else "start", free))
        )
    return labelled[::-1]  # the best lie on top


def _missing(runs: Sequence[Run]) -> list[str]:
    """A sentence on everything that runs lack."""
    found = []
    for run in runs:
        where = f"{run.name}: " if len(runs) > 1 else ""
        if not run.recipe:
            found.append(f"{where}No recipe.json, so what was planned, the cache and pictures cannot be shown.")
        for stage in run.stages:
            name = f"{where}Stage {stage.number} ({stage.label})"
            if not stage.begun:
                found.append(f"{name} was not trained yet.")
                continue
            if stage.result is None:
                found.append(
                    f"{name} was begun and is not done: its curves go as far as it came, and it has no result."
                )
            if not stage.curves:
                found.append(f"{name} has no training scalars ({stage.folder.name}/*/vis_data/scalars.json).")
            for scalar, times in stage.not_finite.items():
                found.append(
                    f"{name}: {scalar} was NaN or infinite in {times} of the lines logged; they are not drawn."
                )
            if damaged := (stage.result or {}).get("damaged_rows"):
                found.append(f"{name}: {damaged:,} times a damaged row of the cache was skipped.")
    if not any(_is_order(run.order) for run in runs):
        found.append("No order.json, so adaptation costs are not known (mtpd order finds them).")
    return found


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
