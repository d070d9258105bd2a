"""Caches written by any release are read by this one; caches written by anybody are data that can do no harm."""

import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache import (
    CorruptShardError,
    GroupInfo,
    LocalStorage,
    StaleCacheError,
    TeacherCache,
    find_garbage,
    list_groups,
    prepare,
    verify,
)
from cache.manifest import schema
from cache.sealed import BrokenSealError, seal, unseal
from tests.cache import make
from tests.cache.fixtures.write import EXPECTED, HERE, checksums

FIXTURES = sorted(HERE.glob("v*"))
GROUP = make.info()


@pytest.mark.parametrize("root", FIXTURES, ids=lambda path: path.name)
def test_what_each_version_wrote_is_still_read(root: Path) -> None:
    expected = json.loads((root / EXPECTED).read_text())
    assert {info.teacher for info in list_groups(LocalStorage(root))} == set(expected)
    for teacher, rows in expected.items():
        assert checksums(root, teacher) == rows


def test_version_1_is_read_but_neither_extended_nor_called_sound(tmp_path: Path) -> None:
    shutil.copytree(HERE / "v1", tmp_path / "cache")
    storage = LocalStorage(tmp_path / "cache")
    (info,) = (i for i in list_groups(storage) if i.teacher == "eight")
    with pytest.raises(StaleCacheError, match=r"format version 1, .* does not extend"):
        prepare(storage, make.plan(storage, info, make.images(5)))
    with pytest.raises(StaleCacheError, match="format version 1"):
        verify(storage, info)


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    make.fill(LocalStorage(tmp_path), GROUP, make.images(3))
    file = tmp_path / GROUP.name / "zarr.json"
    file.write_text(file.read_text().replace('"format_version": 2', '"format_version": 3'))
    with pytest.raises(StaleCacheError, match="format version 3, this release reads 1, 2"):
        TeacherCache.open(str(tmp_path), "t")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("levels", {"P3": [10**9, 8]}),
        ("levels", {"../../x": [4, 8]}),
        ("levels", {"P3": [4, 0]}),
        ("dense", {"P3": [8, 9, 80, 4, 2**40]}),
        ("dense", {"../P3": [8, 9, 80, 4, 20]}),
        ("head_sha256", "../head"),
        ("precision", "int64"),
        ("compression", "pickle"),
        ("pad_divisor", 10**12),
        ("teacher", "../t"),
        ("record", [1]),
    ],
)
def test_forged_attributes_are_refused_though_their_checksum_is_right(key: str, value: object) -> None:
    attributes = GROUP.to_attributes() | {key: value}
    attributes.pop("attributes_sha256")
    from cache.layout import fingerprint

    attributes["attributes_sha256"] = fingerprint(attributes)
    with pytest.raises(CorruptShardError):
        GroupInfo.from_attributes(attributes, "here")


def forged(**columns: list[object]) -> bytes:
    rows = {
        "image_id": [1], "view": [0], "bucket": ["64x64"], "row": [0], "unit_rows": [4], "height": [48], "width": [64],
        "source": [0], "image_crc32c": [0], "snr_P3": [1.0], "snr_P4": [1.0],
    }  # fmt: skip
    table = pa.table(rows | columns, schema=schema(GROUP))
    return seal(table, f"{GROUP.name}/manifest/part-64x64-000000.parquet", ["bucket"])


@pytest.mark.parametrize(
    "columns",
    [
        {"bucket": ["../../etc"]},
        {"bucket": ["9999999x64"]},
        {"bucket": ["64x64/../../.."]},
        {"row": [-1]},
        {"row": [2**50]},
        {"view": [2**30]},
        {"view": [-1]},
        {"unit_rows": [2**30]},
        {"unit_rows": [0]},
    ],
    ids=str,
)
def test_a_forged_manifest_gives_an_error_and_no_gigabytes(tmp_path: Path, columns: dict[str, list[object]]) -> None:
    storage = LocalStorage(tmp_path)
    make.fill(storage, GROUP, make.images(3))
    for part in (tmp_path / GROUP.name / "manifest").iterdir():
        part.unlink()
    (tmp_path / GROUP.name / "manifest" / "part-64x64-000000.parquet").write_bytes(forged(**columns))

    def use() -> None:
        cache = TeacherCache.open(str(tmp_path), "t")
        for key in cache:
            assert cache[key].features

    with pytest.raises(CorruptShardError):
        use()


def test_a_parquet_file_that_unfolds_is_refused() -> None:
    sink = io.BytesIO()
    table = pa.table({"row": pa.array(np.zeros(30_000_000, np.int64))})
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"mtpd.name": "x", "mtpd.crc32c": "00000000"})
    data = bytearray(sink.getvalue())
    at = data.rindex(b"mtpd.crc32c\x18\x08") + len(b"mtpd.crc32c\x18\x08")
    data[at : at + 8] = b"%08x" % google_crc32c.value(bytes(data))
    assert len(data) < 200_000
    with pytest.raises(BrokenSealError, match="claims 30000000 rows"):
        list(unseal(bytes(data), "x", table.schema, ["row"]))


def test_links_out_of_the_cache_are_not_followed(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "cache")
    make.fill(storage, GROUP, make.images(3))
    outside = tmp_path / "outside"
    shards = tmp_path / "cache" / GROUP.name / "64x64" / "P3" / "c"
    shutil.move(shards, outside)
    shards.symlink_to(outside)
    cache = TeacherCache.open(str(tmp_path / "cache"), "t")
    with pytest.raises(CorruptShardError, match="leads out of the cache"):
        cache[1, 0]
    # nor does the collector of garbage see, let alone remove, what lies there
    for part in (tmp_path / "cache" / GROUP.name / "manifest").iterdir():
        part.unlink()
    names = [name for garbage in find_garbage(storage, GROUP) for name in garbage.names]
    assert names
    assert not any("/P3/c/" in name for name in names)


_FUZZ = """
import sys, random, resource, shutil
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
from cache import LocalStorage, MtpdError, TeacherCache, find_group, verify
root, seed = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(seed)
files = sorted(f for f in root.rglob("*") if f.is_file() and f.suffix in (".json", ".parquet"))
for _ in range(80):
    file = rng.choice(files)
    before = file.read_bytes()
    content = bytearray(before)
    for _ in range(rng.choice((1, 3, 20))):
        kind = rng.randrange(4)
        at = rng.randrange(len(content))
        if kind == 0: content[at] = rng.randrange(256)
        elif kind == 1: del content[at : at + rng.randrange(1, 40)]
        elif kind == 2: content[at:at] = rng.randbytes(rng.randrange(1, 40))
        else: content[at : at + 1] = rng.choice((b"99999999999", b"-1", b"null", b"{", b"[[[[[[[", b"1e999", b'""'))
        if not content: content = bytearray(b"{")
    file.write_bytes(content)
    try:
        cache = TeacherCache.open(str(root), "t")
        for key in cache:
            cache[key].dequantize(), cache[key].detections
    except MtpdError:
        pass
    try:
        verify(LocalStorage(root), find_group(LocalStorage(root), "t"))
    except MtpdError:
        pass
    file.write_bytes(before)
print("survived")
"""


def test_fuzzed_metadata_and_parts_give_errors_of_ours_only(tmp_path: Path) -> None:
    make.fill(LocalStorage(tmp_path), GROUP, make.images(5))
    ran = subprocess.run(
        [sys.executable, "-c", _FUZZ, str(tmp_path), str(random.randrange(2**32))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.stdout.strip() == "survived", ran.stderr[-2000:]


def test_nothing_in_a_cache_is_code() -> None:
    # no unpickler on this floor: a cache is read by json, pyarrow, zstd and our own index
    for file in (Path(__file__).parents[2] / "cache").glob("*.py"):
        text = file.read_text()
        assert "import pickle" not in text
        assert "torch.load" not in text
        assert "eval(" not in text
