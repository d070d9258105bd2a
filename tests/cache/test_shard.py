from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from cache import shard

SLOTS, CHUNK = 5, 24


def chunks(seed: int, slots: list[int]) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {slot: rng.integers(-128, 127, CHUNK).astype(np.int8) for slot in slots}


def encoded(content: dict[int, np.ndarray]) -> np.ndarray:
    return np.frombuffer(b"".join(bytes(b) for b in shard.encode(content, SLOTS)), np.uint8)


filled = st.lists(st.integers(0, SLOTS - 1), unique=True)


@given(st.integers(0, 1000), filled)
def test_what_was_written_is_read_and_the_size_is_as_planned(seed: int, slots: list[int]) -> None:
    content = chunks(seed, slots)
    data = encoded(content)
    assert data.size == shard.size(CHUNK, len(slots), SLOTS)
    index = shard.read_index(data, SLOTS)
    for slot in range(SLOTS):
        if slot in content:
            assert np.array_equal(shard.read_chunk(data, index, slot, CHUNK, verify=True).view(np.int8), content[slot])
        else:
            with pytest.raises(shard.DamagedBytesError, match="empty"):
                shard.read_chunk(data, index, slot, CHUNK, verify=True)


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_any_flipped_byte_is_found(position: int, change: int) -> None:
    content = chunks(0, [0, 1, 2, 4])
    data = encoded(content).copy()
    data[position % data.size] ^= change

    def read_all() -> None:
        index = shard.read_index(data, SLOTS)
        for slot in content:
            shard.read_chunk(data, index, slot, CHUNK, verify=True)

    with pytest.raises(shard.DamagedBytesError):
        read_all()


@given(st.integers(0, 10**6))
def test_any_truncation_is_found(length: int) -> None:
    data = encoded(chunks(0, [0, 1]))
    with pytest.raises(shard.DamagedBytesError):
        shard.read_index(data[: length % data.size], SLOTS)


def test_zarr_python_reads_it_and_a_row_of_zeros_is_stored(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "a", shape=(SLOTS, 2, 3, 4), chunks=(1, 2, 3, 4), shards=(SLOTS, 2, 3, 4), dtype="int8",
        compressors=[Crc32cCodec()], fill_value=0,
    )  # fmt: skip
    content = chunks(7, [0, 3])
    content[4] = np.zeros(CHUNK, np.int8)
    file = tmp_path / "a" / "c" / "0" / "0" / "0" / "0"
    file.parent.mkdir(parents=True)
    file.write_bytes(encoded(content).tobytes())
    for slot in range(SLOTS):
        expected = content.get(slot, np.zeros(CHUNK, np.int8)).reshape(2, 3, 4)
        assert np.array_equal(array[slot], expected)
    assert shard.read_index(encoded(content), SLOTS)[4, 0] != shard.ABSENT
