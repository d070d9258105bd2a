"""Recipes that share a cache: what each needs is recorded, listed by `mtpd ls`, and kept by gc of the others."""

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cache import CorruptShardError, LocalStorage, MtpdError, RecipeError, TeacherCache, Use, refer, references
from services import registry
from services.cli import app
from services.precompute import fill
from services.records import record_use
from tests import models
from tests.cache import make
from tests.trainer import precompute
from trainer import load_recipe, teacher_info, train_stage


def run(*arguments: str) -> tuple[str, MtpdError | None]:
    """Output, and the error that `main` would print."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exception is None or isinstance(result.exception, MtpdError | SystemExit), result.exception
    return result.output, result.exception if isinstance(result.exception, MtpdError) else None


def recipe_of(data: Path, folder: Path, name: str, precision: str) -> Path:
    content = models.recipe(data, folder, work_dir=str(folder / name))
    content["cache"]["precision"] = precision
    content["stages"] = content["stages"][:1]
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_gc_of_one_recipe_keeps_what_another_needs(data: Path, tmp_path: Path) -> None:
    """Three recipes: a and b share the float16 group, c has an int8 group beside it."""
    files = {n: recipe_of(data, tmp_path, n, p) for n, p in (("a", "float16"), ("b", "float16"), ("c", "int8"))}
    recipes = {name: load_recipe(file) for name, file in files.items()}
    for name in ("a", "c"):
        precompute.fill(recipes[name], "small")
    for recipe in recipes.values():
        assert fill(recipe, "small").computed == 0  # records the use
    shared, other = (teacher_info(recipes[n], "small").name for n in "ac")
    assert shared != other

    output, _ = run("gc", str(files["c"]), "--superseded", "--delete")
    assert f"{shared} is kept (superseded here): needed by a-" in output
    train_stage(recipes["a"], 1)
    output, _ = run("gc", str(files["a"]), "--finished", "--delete")
    assert "needed by b-" in output
    train_stage(recipes["b"], 1)  # from the cache that gc of a left
    record_use(recipes["b"], teacher_info(recipes["b"], "small"))
    assert not any(one.needs(shared) for one in references(LocalStorage(tmp_path / "cache")))
    run("gc", str(files["a"]), "--finished", "--delete")
    assert not (tmp_path / "cache" / shared).exists()

    # c is given up: forgetting it frees its group, and only then
    name = next(one.name for one in references(LocalStorage(tmp_path / "cache")) if one.name.startswith("c-"))
    assert "is kept" in run("gc", str(files["b"]), "--superseded", "--delete")[0]
    assert "superseded" in run("gc", str(files["b"]), "--superseded", "--forget", name)[0]
    assert (tmp_path / "cache" / other).exists()
    run("gc", str(files["b"]), "--superseded", "--forget", name, "--delete")
    assert not (tmp_path / "cache" / other).exists()
    assert [one.name[:2] for one in references(LocalStorage(tmp_path / "cache"))] == ["a-", "b-"]


def test_force_and_a_record_that_cannot_be_read(data: Path, tmp_path: Path) -> None:
    a, c = (recipe_of(data, tmp_path, name, precision) for name, precision in (("a", "float16"), ("c", "int8")))
    precompute.fill(load_recipe(a), "small")
    fill(load_recipe(a), "small")
    (record,) = (tmp_path / "cache" / "references").glob("a-*.json")
    content = record.read_text()
    record.write_text(content[:-20])
    error = run("gc", str(c), "--superseded", "--delete")[1]
    assert isinstance(error, CorruptShardError)
    assert f"--forget {record.stem} --delete" in str(error)
    assert len(TeacherCache.open(str(tmp_path / "cache"), "small")) == 40
    assert "cannot be read" not in run("gc", str(c))[0]  # what needs no record goes on
    record.write_text(content)
    run("gc", str(c), "--superseded", "--delete", "--force")
    assert not list((tmp_path / "cache").glob("small-*"))


def test_a_recipe_that_changes_its_targets_frees_the_old_and_writes_once(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    refer(storage, "/runs/a", "t-00000001", Use("t", (1, 3), ()))
    refer(storage, "/runs/a", "u-00000001", Use("u", (2,), ()))
    refer(storage, "/runs/a", "t-00000002", Use("t", (1, 3), (1,)))
    (record,) = references(storage)
    assert {group: record.needs(group) for group in ("t-00000001", "t-00000002", "u-00000001")} == {
        "t-00000001": False,
        "t-00000002": True,
        "u-00000001": True,
    }
    file = tmp_path / "references" / f"{record.name}.json"
    stamp = file.stat().st_mtime_ns
    refer(storage, "/runs/a", "t-00000002", Use("t", (1, 3), (1,)))
    assert file.stat().st_mtime_ns == stamp
    refer(storage, "/runs/a", "t-00000002", Use("t", (1, 3), (1, 3)))
    assert not references(storage)[0].needs("t-00000002")


def test_a_cache_that_may_only_be_read_is_trained_from_all_the_same(data: Path, tmp_path: Path, capsys) -> None:
    recipe = load_recipe(recipe_of(data, tmp_path, "a", "float16"))
    precompute.fill(recipe, "small")
    (tmp_path / "cache" / "references").write_text("no folder: whoever writes there is refused, the superuser too")
    record_use(recipe, teacher_info(recipe, "small"))
    assert "will not know that this one reads small-" in capsys.readouterr().out


def test_ls_says_what_each_group_holds(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "cache")
    coarse, fine = make.info(), make.info(precision="float16")
    bare = make.info("bare", detections=False)
    for group, count in ((coarse, 6), (fine, 3), (bare, 3)):
        make.fill(storage, group, make.images(count))
    refer(storage, "/runs/a", coarse.name, Use("t", (1,), ()))
    found = {one.group: one for one in registry.entries(storage)}
    one = found[coarse.name]
    assert (one.rows, one.precision, one.levels) == (12, "int8", {"P3": (4, 8, 1), "P4": (3, 16, 1)})
    assert one.bytes == sum(f.stat().st_size for f in (tmp_path / "cache" / coarse.name).rglob("*") if f.is_file())
    assert one.written == max(f.stat().st_mtime for f in (tmp_path / "cache" / coarse.name).rglob("*") if f.is_file())
    assert 30 < one.snr["P3"] < 60 < found[fine.name].snr["P3"]
    assert one.differs == ('precision: was "float16", asked for "int8"',)
    assert [(u.work_dir, u.needs) for u in one.users] == [("/runs/a", True)]
    assert not found[fine.name].users
    assert [found[group.name].detections for group in (coarse, fine, bare)] == [True, True, False]
    listed = json.loads(run("ls", str(storage.root), "--json")[0])
    assert [entry["rows"] for entry in listed] == [found[entry["group"]].rows for entry in listed]
    os.truncate(tmp_path / "cache" / fine.name / "manifest" / "part-64x64-000000.parquet", 100)
    output, _ = run("ls", str(storage.root))
    assert coarse.name in output
    assert "verify" in output  # the damaged group is told, the other listed
    with pytest.raises(RecipeError, match="known: a-"):
        raise run("gc", str(storage.root), "--forget", "b-00000000", "--delete")[1] or AssertionError
