"""What a result of the study came of: digests of teachers, start and annotation files, and the code's commit.

A study that goes on in another folder or on another machine may do so with teachers of the same name and other weights.
Results that do not carry an origin, for they are older, are taken as they are.
"""

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.arms import Arms
from trainer import Recipe
from trainer.checkpoint import sha256

Origin = dict[str, Any]


def teachers_and_data(teachers: dict[str, str], train: Path | str, val: Path | str) -> Origin:
    """The part of an origin that all arms of a study share: SHA-256 of each teacher's checkpoint and of both annotation files."""
    return {
        "teachers": {name: sha256(checkpoint) for name, checkpoint in teachers.items()},
        "train": sha256(train),
        "val": sha256(val),
    }


def origin(recipe: Recipe) -> Origin:
    """What an arm is about to be trained from: that part, and ``start``, its first weights, and ``commit``, None outside git."""
    teachers = {name: spec.checkpoint for name, spec in recipe.teachers.items()}
    shared = teachers_and_data(teachers, recipe.dataset.train.ann_file, recipe.dataset.val.ann_file)
    return shared | {"start": sha256(recipe.student.checkpoint), "commit": commit()}


@cache  # of the code that was imported, whatever is checked out while it trains
def commit() -> str | None:
    """The commit of the code that runs, with a ``+`` if Python files were changed since; None if that is unknown."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ":(top)*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def differing(name: str, one: dict[str, Any], other_name: str, other: dict[str, Any]) -> str | None:
    """In what two results of a study came of other things, in words; None if in nothing that both say.

    Args:
        name, other_name: ``ARM-SEED``.
        one, other: results: ``origin``, or a part of one, and ``arm``, if the start is to be compared.
    """
    ours, theirs = one.get("origin", {}), other.get("origin", {})
    for teacher, digest in ours.get("teachers", {}).items():
        if theirs.get("teachers", {}).get(teacher, digest) != digest:
            return f"teacher {teacher} is another checkpoint for {name} than it was for {other_name}"
    for split in ("train", "val"):
        if ours.get(split) != theirs.get(split, ours.get(split)):
            return f"the {split} images are others for {name} than they were for {other_name}"
    same = ours.get("start") and theirs.get("start") and one["arm"]["start"] == other["arm"]["start"]
    if same and name.rpartition("-")[2] == other_name.rpartition("-")[2] and ours["start"] != theirs["start"]:
        return f"the start {one['arm']['start']} is another checkpoint for {name} than it was for {other_name}"
    return None


def refuse_other(name: str, result: dict[str, Any], done: Arms, where: str) -> None:
    """An arm belongs to a study only if its teachers, images and start are those of the arms that are there.

    Args:
        result: with an ``origin`` or a part of one.
        where: file and study, for the message.

    Raises:
        SystemExit: they are others.
    """
    for other, theirs in done.items():
        if what := differing(name, result, other, theirs):
            raise SystemExit(f"error: {where}: {what}: choose another --json and --dir")
