"""The readers that `benchmarks.local_reads` compares: each holds the same rows, set up as its own documentation advises."""

import importlib
import io
import math
import os
import sys
import time
import types
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

import cache

Arrays = dict[str, npt.NDArray[Any]]

HEIGHT, WIDTH, CHANNELS = 800, 1344, 256
LEVELS = tuple(cache.Level(f"P{n}", CHANNELS, 2**n) for n in range(3, 8))
TEACHER = cache.GroupInfo("teacher", {"precision": "int8"}, LEVELS, "int8", 32)
UNIT_ROWS = 23  # about 128 MiB, the cache's default
POOL_BYTES = 64 * 2**20
# a row as one run of bytes: the maps, then their scales
MAPS = [(level.name, np.int8, (CHANNELS, *level.map_size(HEIGHT, WIDTH))) for level in LEVELS]
ROW = np.dtype([*MAPS, *((f"{level.name}_scale", np.float32, (CHANNELS,)) for level in LEVELS)])
NAMES = ROW.names or ()


class Payload:
    """The rows: every map a window, at a place of its own, of one pool of normally distributed int8."""

    def __init__(self, rows: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        pool = draw.standard_normal(POOL_BYTES, dtype=np.float32)
        self._pool = np.rint(np.multiply(pool, 30, out=pool), out=pool).clip(-127, 127, out=pool).astype(np.int8)
        self._starts = draw.integers(POOL_BYTES - ROW.itemsize, size=(rows, len(LEVELS)))
        self._scales = draw.uniform(0.01, 0.1, (rows, len(LEVELS), CHANNELS)).astype(np.float32)
        self.rows = rows

    def row(self, row: int) -> Arrays:
        """The arrays of a row, in the order of NAMES."""
        windows = [
            self._pool[start : start + math.prod(shape)].reshape(shape)
            for start, (_, _, shape) in zip(self._starts[row], MAPS, strict=True)
        ]
        return dict(zip(NAMES, [*windows, *self._scales[row]], strict=True))

    def joined(self, row: int) -> bytes:
        """A row as one run of bytes."""
        return b"".join(array.tobytes() for array in self.row(row).values())


def split(joined: npt.NDArray[np.uint8]) -> Arrays:
    """The arrays of a row that is a run of bytes; views, not copies."""
    record = joined.view(ROW)[0]
    return {name: record[name] for name in NAMES}


def checksum(arrays: Arrays) -> int:
    """CRC32C over a row's arrays; their shapes and dtypes must be those of ROW."""
    crc = 0
    for name in NAMES:
        array = arrays[name]
        if np.dtype((array.dtype, array.shape)) != ROW[name]:
            raise RuntimeError(f"{name}: {array.dtype} {array.shape}, not {ROW[name]}")
        data = array.reshape(-1).view(np.uint8)
        data.flags.writeable = False  # the C function takes no other buffer
        crc = google_crc32c.extend(crc, data)
    return int(crc)


class Contender(ABC):
    """One way to store the rows and to read them. Those of one ``folder`` read the same files."""

    name: str
    setup: str
    folder: str
    package = module = ""  # what it needs beside this project: as pip calls it, as Python does

    def __init__(self, root: Path) -> None:
        self.root = root / self.folder
        self.rounds: list[float] = []  # milliseconds a row
        self.processor: list[float] = []  # of them on the processor
        self.library: Any = importlib.import_module(self.module) if self.module else None

    def arrays(self, row: Any) -> Arrays:
        """What `row` gave, as numpy arrays by the names of ROW."""
        return row

    @abstractmethod
    def build(self, payload: Payload) -> None:
        """Write every row; called once for each ``folder``."""

    @abstractmethod
    def open(self) -> None:
        """All that is done once before reading."""

    def row(self, row: int) -> Any:
        """One row, in memory of its own, as the reader hands it out."""
        raise NotImplementedError(f"{self.name} reads from the beginning only")

    def read(self, order: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Rows with their numbers, in the order that is asked for."""
        return ((row, self.row(row)) for row in order)

    def run(self, order: list[int]) -> None:
        """One round: the rows are read twice and the second time counts, for a system may drop pages at any time."""
        for _ in range(2):
            begin, used = time.perf_counter(), time.process_time()
            for _ in self.read(order):
                pass
            seconds, used = time.perf_counter() - begin, time.process_time() - used
        self.rounds.append(seconds * 1e3 / len(order))
        self.processor.append(used * 1e3 / len(order))


class Preadv(Contender):
    name, folder, setup = "preadv", "flat", "one flat file per unit, into one buffer that is used again: the yardstick"

    def build(self, payload: Payload) -> None:
        for row in range(payload.rows):
            with (self.root / f"{row // UNIT_ROWS:06d}").open("ab") as file:
                file.write(payload.joined(row))

    def open(self) -> None:
        self._files = [os.open(path, os.O_RDONLY) for path in sorted(self.root.iterdir())]
        self._buffer = np.empty(ROW.itemsize, np.uint8)

    def row(self, row: int) -> Arrays:
        os.preadv(self._files[row // UNIT_ROWS], [self._buffer.data], row % UNIT_ROWS * ROW.itemsize)
        return split(self._buffer)


class OurStore(Contender):
    folder = "cache"

    def build(self, payload: Payload) -> None:
        n = payload.rows
        images = cache.Images(np.arange(n), np.full(n, WIDTH), np.full(n, HEIGHT), [f"{i}.jpg" for i in range(n)])
        plan = cache.make_plan(images, cache.ViewPolicy(((WIDTH, HEIGHT),), "none"), TEACHER, unit_rows=UNIT_ROWS)
        storage = cache.LocalStorage(self.root)
        cache.prepare(storage, plan)
        nothing = cache.Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
        for unit in plan.units():
            targets = []
            for place in unit.rows:
                arrays = payload.row(place.image_id)
                values = {level.name: arrays[level.name] for level in LEVELS}
                scales = {level.name: arrays[f"{level.name}_scale"] for level in LEVELS}
                targets.append(cache.RowTargets(place, values, scales, dict.fromkeys(values, 40.0), nothing, place.row))
            cache.write_unit(storage, TEACHER, unit, targets)


class Ours(OurStore):
    name, setup = "this cache", "TeacherCache.open(verify=False)[key].copy(), its tensors"
    verify = False

    def open(self) -> None:
        self._cache = cache.TeacherCache.open(str(self.root), TEACHER.teacher, verify=self.verify)

    def row(self, row: int) -> Any:
        targets = self._cache[row, 0].copy()
        return targets.features, targets.scales

    def arrays(self, row: Any) -> Arrays:
        features, scales = row
        maps = {name: tensor.numpy() for name, tensor in features.items()}
        return maps | {f"{name}_scale": tensor.numpy() for name, tensor in scales.items()}


class OursVerified(Ours):
    name, setup, verify = "this cache, verified", "the same with verify=True: CRC32C of every chunk at every read", True


class TensorStore(OurStore):
    name, package, module = "tensorstore", "tensorstore", "tensorstore"
    setup = "this cache's store; files mapped, a cache_pool for the shards' indices alone, a row's ten reads at once"

    def open(self) -> None:
        # a megabyte holds the indices and no map: no row is ever found in memory
        context = self.library.Context({"cache_pool": {"total_bytes_limit": 2**20}, "file_io_mode": {"mode": "memmap"}})
        bucket = self.root / TEACHER.name / f"{HEIGHT}x{WIDTH}"
        specs = {name: {"driver": "zarr3", "kvstore": f"file://{bucket / name}/"} for name in NAMES}
        options = {"read": True, "recheck_cached": "open", "context": context}
        self._arrays = {name: self.library.open(spec, **options).result() for name, spec in specs.items()}

    def row(self, row: int) -> Arrays:
        futures = {name: array[row].read() for name, array in self._arrays.items()}
        return {name: future.result() for name, future in futures.items()}


class ZarrPython(OurStore):
    name, package, module = "zarr-python", "zarr", "zarr"
    setup = "this cache's store; arrays opened once, default configuration, one array after the other"

    def open(self) -> None:
        bucket = self.library.open_group(self.root, path=f"{TEACHER.name}/{HEIGHT}x{WIDTH}", mode="r")
        self._arrays = {name: bucket[name] for name in NAMES}

    def row(self, row: int) -> Arrays:
        return {name: array[row] for name, array in self._arrays.items()}


class Lmdb(Contender):
    name, folder, package, module = "LMDB", "lmdb", "lmdb", "lmdb"
    setup = "one value a row; readonly, lock=False, readahead=False, buffers=True, then one copy"

    def build(self, payload: Payload) -> None:
        with self.library.open(str(self.root), map_size=2 * ROW.itemsize * payload.rows + 2**24) as environment:
            for row in range(payload.rows):
                with environment.begin(write=True) as transaction:
                    transaction.put(row.to_bytes(8, "big"), payload.joined(row), append=True)

    def open(self) -> None:
        self._environment = self.library.open(str(self.root), readonly=True, lock=False, readahead=False)

    def row(self, row: int) -> Arrays:
        with self._environment.begin(buffers=True) as transaction:
            return split(np.frombuffer(transaction.get(row.to_bytes(8, "big")), np.uint8).copy())


class Hdf5(Contender):
    name, folder, package, module = "HDF5", "hdf5", "h5py", "h5py"
    setup = (
        "h5py; a dataset per array, chunk = row, no filter, no chunk cache (it never hits), libver latest; dataset[i]"
    )

    def build(self, payload: Payload) -> None:
        with self.library.File(self.root / "rows.h5", "w", libver="latest") as file:
            for name in NAMES:
                shape = ROW[name].shape
                file.create_dataset(name, (payload.rows, *shape), ROW[name].base, chunks=(1, *shape))
            for row in range(payload.rows):
                for name, array in payload.row(row).items():
                    file[name][row] = array

    def open(self) -> None:
        file = self.library.File(self.root / "rows.h5", "r", libver="latest", rdcc_nbytes=0)
        self._datasets = {name: file[name] for name in NAMES}

    def row(self, row: int) -> Arrays:
        return {name: dataset[row] for name, dataset in self._datasets.items()}


class WebDataset(Contender):
    name, folder, package, module = "webdataset, SEQUENTIAL", "tar", "webdataset", "webdataset"
    setup = "has no random access: tars of a unit's rows as .ten, shards shuffled, each read from its beginning"

    def build(self, payload: Payload) -> None:
        with self.library.ShardWriter(str(self.root / "%06d.tar"), maxcount=UNIT_ROWS, verbose=0) as writer:
            for row in range(payload.rows):
                writer.write({"__key__": f"{row:08d}", "row.ten": list(payload.row(row).values())})

    def open(self) -> None:
        tars = sorted(map(str, self.root.iterdir()))
        self._samples = iter(self.library.WebDataset(tars, shardshuffle=len(tars), seed=0).decode().repeat())

    def read(self, order: Iterable[int]) -> Iterator[tuple[int, Arrays]]:
        """As many rows as are asked for, in the order of the tars."""
        for _, sample in zip(order, self._samples, strict=False):
            yield int(sample["__key__"]), dict(zip(NAMES, sample["row.ten"], strict=True))


class Mosaic(Contender):
    name, folder, package, module = "MosaicML Streaming", "mds", "mosaicml-streaming", "streaming"
    setup = "MDS, an ndarray column of fixed dtype and shape per array, shards of 64 MiB, LocalDataset[i]"

    def __init__(self, root: Path) -> None:
        # the package imports torchvision for its image data sets, which are not used here
        sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))
        super().__init__(root)

    def build(self, payload: Payload) -> None:
        columns = {n: f"ndarray:{ROW[n].base}:{','.join(map(str, ROW[n].shape))}" for n in NAMES}
        with self.library.MDSWriter(out=str(self.root / "rows"), columns=columns) as writer:
            for row in range(payload.rows):
                writer.write(payload.row(row))

    def open(self) -> None:
        self._dataset = self.library.LocalDataset(str(self.root / "rows"))

    def row(self, row: int) -> Arrays:
        return dict(self._dataset[row])


class LitData(Mosaic):
    name, folder, package, module = "LitData", "litdata", "litdata", "litdata"
    setup = "optimize() to chunks of 512 MB, which it advises for samples of a few MB; StreamingDataset[i]"

    def build(self, payload: Payload) -> None:
        os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(self.root / "work")
        options = {"num_workers": 1, "reorder_files": False, "keep_data_ordered": True, "verbose": False}
        with redirect_stdout(io.StringIO()):
            rows, target = list(range(payload.rows)), str(self.root / "rows")
            self.library.optimize(payload.row, rows, target, chunk_bytes="512MB", **options)

    def open(self) -> None:
        self._dataset = self.library.StreamingDataset(str(self.root / "rows"))


PEERS = (TensorStore, ZarrPython, Lmdb, Hdf5, WebDataset, Mosaic, LitData)
CONTENDERS: tuple[type[Contender], ...] = (Preadv, Ours, OursVerified, *PEERS)
