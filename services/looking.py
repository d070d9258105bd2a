"""The commands that look at a cache or a job and change nothing. Each imports what it runs when it is run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

CacheOrRecipe = Annotated[
    str, typer.Argument(metavar="CACHE|RECIPE", help="A cache (path or URI), or a recipe (YAML).")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def status(
    target: CacheOrRecipe,
    as_json: AsJson = False,
    watch: Annotated[
        float | None,
        typer.Option(
            "--watch", min=1, metavar="SECONDS", help="Again and again, until all is done or a precompute failed."
        ),
    ] = None,
) -> None:
    """How far the precomputes are, and with a recipe its stages: from the store alone, during a run and after it."""
    from services import maintain
    from services import status as state

    place = maintain.open_target(target)
    if as_json:
        typer.echo(json.dumps(asdict(state.status(place)), indent=1))
    elif watch is not None:
        state.watch(place, watch)
    else:
        state.show(state.status(place))


def list_cache(target: CacheOrRecipe, as_json: AsJson = False) -> None:
    """What a cache holds: teachers, rows, bytes, precision, fidelity, when it was written, and which recipes need it."""
    from services import maintain, registry

    found = registry.entries(maintain.open_target(target).storage)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in found], indent=1))
    else:
        registry.show(found)


def inspect(
    target: CacheOrRecipe,
    image: Annotated[int | None, typer.Option("--image", metavar="ID", help="Every row of this image.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Only this teacher.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="PNG", help="Draw the rows of the image, or of the first.")
    ] = None,
) -> None:
    """What is in a cache, in words and pictures: shapes, scales, fidelity, detections; with a recipe the images too."""
    from services import inspection, maintain

    inspection.inspect(maintain.open_target(target), image, teacher, out)
