"""The `mtpd` command. Exit codes: 0 done, 1 a fault that the message explains, 2 wrong usage.

Each command imports what it runs when it is run: detectors and Ray take seconds that help and wrong usage need not wait for.
"""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services import logs, looking
from services.present import complain, duration, say, table

if TYPE_CHECKING:
    from trainer import Recipe, StageResult

app = typer.Typer(
    help="Distil light detectors from many heavy teachers, each run once per image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (YAML).")]
TeacherName = Annotated[str | None, typer.Option("--teacher", help="Only this teacher.")]
Online = Annotated[
    Literal["cache", "online"],  # trainer's TargetSource
    typer.Option("--targets", help="Read the cache, or run the teacher beside the student."),
]
CacheOrRecipe = Annotated[
    str, typer.Argument(metavar="CACHE|RECIPE", help="A cache (path or URI), or a recipe (YAML).")
]
Force = Annotated[bool, typer.Option("--force", help="Go on even if the plan does not fit the disk.")]


@app.command()
def plan(
    recipe: RecipeFile,
    teacher: TeacherName = None,
    timed: Annotated[
        bool,
        typer.Option(
            "--measure", help="Time a few batches: does caching pay here, from how many epochs and students on?"
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: Force = False,
) -> None:
    """Images, views, buckets, units and bytes of each teacher; exit code 1 if they do not fit the disk. Writes nothing."""
    from cache import open_storage
    from services.order import decided_if_known
    from services.plan import plan_record, show_plans
    from services.precompute import plan_teacher, refuse_too_large
    from trainer import load_recipe, refuse_untrainable

    content = decided_if_known(load_recipe(recipe))
    if timed and teacher is not None:
        raise typer.BadParameter("--measure times the whole recipe; leave out --teacher")
    refuse_untrainable(content)
    plans = [plan_teacher(content, name) for name in _teachers(content, teacher)]
    cost = None
    if timed:
        from services.measure import measure_job

        cost = measure_job(content, plans)
    if as_json:
        typer.echo(json.dumps(plan_record(plans, cost), indent=1))
    else:
        show_plans(plans, cost)
        _note_batch(content)
    if not force:
        refuse_too_large(open_storage(content.cache.uri), plans)


@app.command()
def precompute(
    recipe: RecipeFile,
    teacher: TeacherName = None,
    force: Force = False,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write when the actors did what, as a Chrome trace.")
    ] = None,
) -> None:
    """Fill the cache on the Ray cluster (a local one if there is none). Resumes by itself."""
    from services.order import decided
    from services.precompute import fill_all, show_fill
    from services.trace import Trace
    from trainer import load_recipe, refuse_untrainable

    content = decided(load_recipe(recipe))
    refuse_untrainable(content)
    with nullcontext() if trace is None else Trace(trace) as traced:
        results = fill_all(content, _teachers(content, teacher), force=force, trace=traced)
    for result in results:
        show_fill(result)
    if any(result.failures for result in results):
        raise typer.Exit(1)


@app.command()
def order(
    recipe: RecipeFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: Force = False,
) -> None:
    """Adaptation costs between student and teachers, the chosen sequence of teachers, and why. Computes what is missing."""
    from services.order import find_order, show_order
    from trainer import load_recipe

    content = load_recipe(recipe)
    if not as_json:
        show_order(find_order(content, force=force))
        return
    with redirect_stdout(sys.stderr):  # how far the work is
        found = find_order(content, force=force)
    typer.echo(json.dumps(asdict(found), indent=1))


@app.command("train")
def train_command(
    recipe: RecipeFile,
    stage: Annotated[int | None, typer.Option("--stage", min=1, help="Only this stage, counted from 1.")] = None,
    targets: Online = "cache",
) -> None:
    """Train the student through its stages, evaluate after each. Resumes by itself."""
    from cache import RecipeError
    from services import serving
    from services.order import decided
    from services.train import train
    from trainer import load_recipe

    content = decided(load_recipe(recipe))
    if stage is not None and stage > len(content.stages):
        raise RecipeError(f"--stage {stage}: {recipe} has {len(content.stages)} stages.")
    _note_batch(content)
    stages = [stage] if stage is not None else list(range(1, len(content.stages) + 1))
    with serving.beside_training(content, stages) if targets == "cache" else nullcontext():
        _show_stages(train(content, stages, targets))


@app.command()
def serve(
    recipe: RecipeFile,
    teacher: TeacherName = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; whoever reaches it can have teachers run.")
    ] = "127.0.0.1",
) -> None:
    """Compute rows that students ask for and the cache lacks (cache.on_missing: compute), until Ctrl-C."""
    from services import serving
    from services.order import decided
    from trainer import load_recipe

    content = decided(load_recipe(recipe))
    with serving.service(content, _teachers(content, teacher), host):
        serving.until_stopped()


@app.command()
def run(recipe: RecipeFile, force: Force = False) -> None:
    """The whole job: find the order of teachers if it is asked for, precompute them, train every stage, evaluate, report."""
    from services.order import decided
    from services.overlap import run_job
    from services.report import write_report
    from trainer import load_recipe, refuse_untrainable

    content = load_recipe(recipe)
    refuse_untrainable(content)
    _note_batch(content)  # before anything that takes hours
    content = decided(content, compute=True, force=force)
    fills, results = run_job(content, force=force)
    if not results:
        raise typer.Exit(1)
    _show_stages(results)
    say(f"report: {write_report(Path(content.work_dir))}")
    if any(result.failures for result in fills):
        raise typer.Exit(1)


@app.command()
def report(
    work_dir: Annotated[
        Path, typer.Argument(metavar="WORK_DIR", help="A recipe's work_dir, or a folder of several to compare.")
    ],
    study: Annotated[Path | None, typer.Option("--study", help="Results of a study (JSON), to show its arms.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The page; WORK_DIR/report.html by default.")] = None,
    images: Annotated[int, typer.Option("--images", min=0, help="Val images to run the detectors on.")] = 4,
) -> None:
    """One self-contained HTML page: AP of each stage, curves, cache, teacher forwards saved, pictures."""
    from services.report import write_report

    say(f"report: {write_report(work_dir, study=study, out=out, images=images)}")


@app.command()
def config(
    recipe: RecipeFile, stage: Annotated[int, typer.Option("--stage", min=1)], targets: Online = "cache"
) -> None:
    """Print a stage's resolved mmengine config, which mmdet's tools/train.py runs as it is."""
    from cache import RecipeError
    from services.order import decided
    from trainer import load_recipe, stage_config

    content = decided(load_recipe(recipe))
    if stage > len(content.stages):
        raise RecipeError(f"--stage {stage}: {recipe} has {len(content.stages)} stages.")
    typer.echo(stage_config(content, stage, targets).pretty_text)


@app.command()
def verify(
    target: CacheOrRecipe,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take damaged units out of the manifest; with a recipe compute them again.")
    ] = False,
    sample: Annotated[
        int | None,
        typer.Option("--sample", min=1, help="Run the live teacher on so many rows and compare. Needs a recipe."),
    ] = None,
) -> None:
    """Check every byte of a cache. With a recipe: of its teachers, and against the live teacher if a sample is asked for."""
    from cache import CorruptShardError
    from services import maintain
    from services.precompute import show_fill

    place = maintain.open_target(target)
    reports, unreadable = maintain.check(place)
    damaged, failed = any(report.damages for report in reports), False
    if repair:
        mended = maintain.mend(place, reports)
        for result in mended:
            show_fill(result)
        failed = any(result.failures for result in mended)
    elif damaged:
        raise CorruptShardError(
            f"{place.storage.where()}: damaged. Run `mtpd verify {target} --repair`; rows that are not damaged stay."
        )
    if sample is not None and (error := maintain.disagreement(maintain.sample(place, sample))):
        raise error
    if unreadable:
        raise unreadable[0]
    if failed:
        raise typer.Exit(1)


@app.command()
def gc(
    target: CacheOrRecipe,
    superseded: Annotated[
        bool, typer.Option("--superseded", help="Also groups under other fingerprints than the recipe's.")
    ] = False,
    finished: Annotated[
        bool, typer.Option("--finished", help="Also teachers of which every stage of the recipe is trained.")
    ] = False,
    delete: Annotated[
        bool, typer.Option("--delete/--dry-run", help="Remove it; by default it is only listed.")
    ] = False,
    forget: Annotated[
        str | None,
        typer.Option("--forget", metavar="NAME", help="A recipe, as `mtpd ls` names it, needs nothing any more."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also groups that other recipes need.")] = False,
) -> None:
    """What no manifest covers, and (if asked for) groups that the recipe does not need. Lists it; removes it on demand."""
    from services import maintain

    place = maintain.open_target(target)
    found = maintain.garbage(place, superseded=superseded, finished=finished, forgotten=forget, force=force)
    maintain.show_garbage(found)
    if delete:
        maintain.delete(place, found, forgotten=forget, force=force)
    elif found or forget:
        say("nothing was removed; --delete does")


@app.command()
def demo(
    work_dir: Annotated[Path, typer.Option("--work-dir", help="Where data, cache and students go.")] = Path(
        "work/demo"
    ),
) -> None:
    """The whole job on generated data, from nothing, on this machine: three arms at equal epochs."""
    from services import demo as demonstration

    demonstration.run(work_dir)


app.command()(looking.status)
app.command("ls")(looking.list_cache)
app.command()(looking.inspect)


def main() -> None:
    """Entry point: errors that the user can mend end in one message, without a traceback."""
    logs.set_up(logs.style())
    try:
        app()
    except Exception as error:
        from cache import MtpdError

        if not isinstance(error, MtpdError):
            raise
        complain(f"error: {error}")
        sys.exit(1)


def _teachers(recipe: "Recipe", only: str | None) -> list[str]:
    from cache import RecipeError
    from services.precompute import used_teachers

    if only is None:
        used = used_teachers(recipe)
        if not used:
            complain("no stage of this recipe has a teacher: nothing is stored")
        return used
    if only not in recipe.teachers:
        raise RecipeError(f"--teacher {only}: not in `teachers` ({', '.join(recipe.teachers) or 'none'}).")
    return [only]


def _note_batch(recipe: "Recipe") -> None:
    from trainer import batch_note

    if (note := batch_note(recipe)) is not None:
        say(f"note: {note}")


def _show_stages(results: "list[StageResult]") -> None:
    from services.train import ap

    rows = [
        [r.stage, r.teacher or "-", r.epochs, ap(r.metrics), duration(r.seconds), f"{r.teacher_forwards:,}", r.student]
        for r in results
    ]
    table("stages", ["stage", "teacher", "epochs", "val", "time", "teacher forwards", "student"], rows)
    if damaged := sum(r.damaged_rows for r in results):
        complain(
            f"{damaged:,} times a row of the cache was damaged and its image skipped: `mtpd verify RECIPE --repair`"
        )
