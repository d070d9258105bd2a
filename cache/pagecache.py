"""What the kernel is told about shards, so that a row comes from a cold disk in a few large reads and a new shard is there soon.

Left alone, each page fault of a mapped row waits for a small window around it, most of which belongs to other rows: measured, a
cold row took four times as long as one large read. On other systems than Linux nothing is said, and nothing breaks.
"""

import ctypes
import os
import sys

_PAGE = os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 4096
_RANDOM, _WILLNEED = 1, 3
_BEGIN_WRITING = 2
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_answer = ctypes.create_string_buffer(1)
if _libc is not None:
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    _libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def expect_random_reads(address: int, nbytes: int) -> None:
    """Nothing beside what is asked for is to be read of a map."""
    if _libc is not None:
        _libc.madvise(address, nbytes, _RANDOM)


def fetch(address: int, nbytes: int) -> None:
    """Begin to read a range of a map from the disk, all of it at once; returns before it is there."""
    if _libc is not None:
        start = address & -_PAGE
        _libc.madvise(start, address + nbytes - start, _WILLNEED)


def seems_resident(address: int, nbytes: int) -> bool:
    """Whether two pages inside a range are in memory. Much cheaper than to `fetch` what is there.

    They lie a third from the ends: the ends' pages may be kept for the sake of what lies beside the range. The kernel tells
    the truth only of files that this process may write to; of others it says that they are.
    """
    if _libc is None:
        return True
    near, far = (address + nbytes // 3) & -_PAGE, (address + nbytes // 3 * 2) & -_PAGE
    if _libc.mincore(near, 1, _answer) or not _answer.raw[0] & 1:
        return False
    return not _libc.mincore(far, 1, _answer) and bool(_answer.raw[0] & 1)


def begin_writing(file: int, offset: int, nbytes: int) -> None:
    """Begin to write a range of a file to the disk, so that there is less to wait for when it is flushed."""
    if _libc is not None:
        _libc.sync_file_range(file, offset, nbytes, _BEGIN_WRITING)
