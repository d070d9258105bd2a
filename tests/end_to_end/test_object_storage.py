"""A teacher's targets in a bucket, and a student trained from there by a loader with a worker."""

from pathlib import Path

import pytest

from cache import TeacherCache
from tests import models
from tests.cache.object_store import KEY, SECRET, Bucket, bucket, new_forkserver  # noqa: F401 - fixtures
from tests.trainer import precompute
from trainer import Pulse, parse_recipe, stage_config, stage_dir, train_stage

LOCAL_BYTES = 2 * 2**20


@pytest.mark.usefixtures("new_forkserver")
def test_a_stage_trains_from_a_bucket_and_keeps_its_rows_on_the_local_disk(
    bucket: Bucket,  # noqa: F811
    data: Path,
    tmp_path: Path,
) -> None:
    content = models.recipe(data, tmp_path)
    content["cache"] |= {"uri": bucket.uri, "local_dir": str(tmp_path / "rows"), "local_bytes": LOCAL_BYTES}
    content["student"]["cfg_options"]["train_dataloader.num_workers"] = 1
    content["stages"] = content["stages"][:1]
    recipe = parse_recipe(content, "test")
    assert precompute.fill(recipe, "small") == []
    assert len(TeacherCache.open(bucket.uri, "small")) == 40
    assert stage_config(recipe, 1).train_dataloader.multiprocessing_context == "forkserver"
    pulses: list[Pulse] = []
    result = train_stage(recipe, 1, listen=pulses.append)
    assert result.teacher_forwards == result.damaged_rows == 0
    assert result.images > 15
    assert Path(result.student).exists()
    fetched, kept = (sum(getattr(p, f"{how}_rows") for p in pulses) for how in ("fetched", "kept"))
    # the last step is filled with samples that the epoch began with: their rows are on the disk by then
    assert fetched + kept == result.images
    assert kept == -fetched % 4
    again: list[Pulse] = []
    other = parse_recipe({**content, "work_dir": str(tmp_path / "other")}, "test")
    train_stage(other, 1, listen=again.append)  # in the same order: every row is on the disk now
    assert (sum(p.fetched_rows for p in again), sum(p.kept_rows for p in again)) == (0, result.images)
    rows = [path for path in (tmp_path / "rows").rglob("*x*/*") if path.is_file()]
    assert len(rows) == fetched, "one view of each image was read, and kept"
    assert sum(path.stat().st_size for path in rows) <= LOCAL_BYTES
    written = [path.read_bytes() for path in stage_dir(recipe, 1).rglob("*") if path.is_file()]
    assert len(written) > 3
    assert not any(secret.encode() in one for secret in (KEY, SECRET) for one in written)
