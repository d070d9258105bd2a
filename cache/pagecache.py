"""What the kernel is told about mapped shards, so that a row comes from a cold disk in a few large reads.

Left alone, each page fault of a mapped row waits for a small window around it, most of which belongs to other rows: measured, a
cold row took four times as long as one large read. On other systems than Linux nothing is said, and nothing breaks.
"""

import ctypes
import sys

_PAGE = 4096
_RANDOM, _WILLNEED = 1, 3
# pages so far apart are asked for, one by one, before a row counts as being in memory
_SAMPLE_BYTES = 2**21
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_answer = ctypes.create_string_buffer(1)
if _libc is not None:
    _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    _libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


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
    """Whether a few pages of a range are in memory. Much cheaper than to `fetch` what is there.

    The kernel tells the truth only of files that this process may write to; of others it says that they are.
    """
    if _libc is None:
        return True
    start, end = address & -_PAGE, address + nbytes
    pages = (*range(start, end, _SAMPLE_BYTES), (end - 1) & -_PAGE)
    return all(_libc.mincore(page, 1, _answer) == 0 and _answer.raw[0] & 1 for page in pages)
