from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec

from cache import shard

SLOTS, CHUNK = 5, 24


Content = dict[int, np.ndarray]


def chunks(seed: int, slots: list[int]) -> Content:
    rng = np.random.default_rng(seed)
    return {slot: rng.integers(-128, 127, CHUNK).astype(np.int8) for slot in slots}


def encoded(content: Content, compression: str = "none") -> np.ndarray:
    rows = {slot: shard.Chunk(shard.compress(row, compression), slot * 31 + 5) for slot, row in content.items()}  # type: ignore[arg-type]
    return np.frombuffer(b"".join(bytes(b) for b in shard.encode(rows, SLOTS)), np.uint8).copy()


def read(data: np.ndarray, slot: int, label: int | None = None, compression: str = "none") -> np.ndarray:
    tail = shard.tail_of(data, SLOTS, CHUNK, compression, 2)  # type: ignore[arg-type]
    offset, length = tail.find(slot, slot * 31 + 5 if label is None else label)
    chunk = shard.read_chunk(data[offset : offset + length], verify=True)
    return shard.decompress(chunk, CHUNK, compression).view(np.int8)  # type: ignore[arg-type]


filled = st.lists(st.integers(0, SLOTS - 1), unique=True)


@given(st.integers(0, 1000), filled, st.sampled_from(["none", "zstd"]))
def test_what_was_written_is_read_and_the_size_is_as_planned(seed: int, slots: list[int], compression: str) -> None:
    content = chunks(seed, slots)
    data = encoded(content, compression)
    if compression == "none":
        assert data.size == shard.size(CHUNK, len(slots), SLOTS)
    for slot in range(SLOTS):
        if slot in content:
            assert np.array_equal(read(data, slot, compression=compression), content[slot])
        else:
            with pytest.raises(shard.DamagedBytesError, match="empty"):
                read(data, slot, compression=compression)


@settings(max_examples=300)
@given(st.integers(0, 10**6), st.integers(1, 255), st.sampled_from(["none", "zstd"]))
def test_any_flipped_byte_is_found(position: int, change: int, compression: str) -> None:
    content = chunks(0, [0, 1, 2, 4])
    data = encoded(content, compression)
    data[position % data.size] ^= change
    with pytest.raises(shard.DamagedBytesError):
        assert [read(data, slot, compression=compression) for slot in content]


@given(st.integers(0, 10**6), st.sampled_from(["cut", "grown"]))
def test_any_other_length_is_found(length: int, how: str) -> None:
    data = encoded(chunks(0, [0, 1]))
    changed = data[: length % data.size] if how == "cut" else np.append(data, np.zeros(1 + length % 64, np.uint8))
    with pytest.raises(shard.DamagedBytesError):
        read(changed, 0)


def test_an_intact_shard_in_another_place_is_noticed() -> None:
    with pytest.raises(shard.DamagedBytesError, match="not where it belongs"):
        read(encoded(chunks(0, [1])), 1, label=99)


def test_an_index_that_points_elsewhere_is_refused_though_its_checksum_is_right() -> None:
    whole = encoded(chunks(0, [0, 1]))
    start = whole.size - shard.tail_bytes(SLOTS, labelled=True)
    for offset, length in ((2**63, CHUNK + 4), (2**64 - 2, 8), (0, 2**40), (start, CHUNK + 4), (0, 4)):
        index = np.full((SLOTS, 2), shard.ABSENT, "<u8")
        index[0] = offset, length
        table = index.reshape(-1).view(np.uint8)
        crc = int(google_crc32c.value(table.tobytes())).to_bytes(4, "little")
        forged = np.concatenate([whole[: -(table.size + 4)], table, np.frombuffer(crc, np.uint8)])
        with pytest.raises(shard.DamagedBytesError):
            read(forged, 0)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_zarr_python_reads_it_and_a_row_of_zeros_is_stored(tmp_path: Path, compression: str) -> None:
    array = zarr.create_array(
        tmp_path / "a", shape=(SLOTS, 2, 3, 4), chunks=(1, 2, 3, 4), shards=(SLOTS, 2, 3, 4), dtype="int8",
        compressors=[*([ZstdCodec()] if compression == "zstd" else []), Crc32cCodec()], fill_value=0,
    )  # fmt: skip
    content = chunks(7, [0, 3])
    content[4] = np.zeros(CHUNK, np.int8)
    file = tmp_path / "a" / "c" / "0" / "0" / "0" / "0"
    file.parent.mkdir(parents=True)
    file.write_bytes(encoded(content, compression).tobytes())
    for slot in range(SLOTS):
        expected = content.get(slot, np.zeros(CHUNK, np.int8)).reshape(2, 3, 4)
        assert np.array_equal(array[slot], expected)
    assert not read(encoded(content, compression), 4, compression=compression).any()
