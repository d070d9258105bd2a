import threading
from pathlib import Path

import pytest

from cache import LocalStorage, RecipeError, open_storage


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("a/b", [b"old"])

    def buffers():
        yield b"new"
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError):
        storage.write("a/b", buffers())
    assert storage.read("a/b") == b"old"
    assert storage.names("a") == ["a/b"]
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_of_many_swaps_at_once_one_wins(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    barrier = threading.Barrier(8)
    wins = []

    def swap(number: int) -> None:
        barrier.wait()
        if storage.swap("x", None, str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=swap, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1
    assert storage.read("x") == str(wins[0]).encode()


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"cache\.uri: ftp:// is not supported"):
        open_storage("ftp://x")


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecipeError, match=r"cache\.uri: .*/file/cache cannot be written to"):
        LocalStorage(tmp_path / "file" / "cache").swap("g/lease.json", None, b"x")
