"""The whole job: teachers first and then students, or both at once where the recipe lets students wait and there is room.

Together, one thread fills the teachers' groups in the order of the stages, and the main thread trains: stage 1 as soon as its
teachers' first rows are committed, and while stage k trains, what stage k + 1 reads is filled.
"""

import threading
import time

from cache import MtpdError, load_index, open_storage
from services import cluster
from services.filling import Filling, FillResult, Turn
from services.precompute import fill_all, needed_teachers, show_fill
from services.present import complain, say
from services.train import train
from trainer import Recipe, StageResult, first_epoch, stage_dir, teacher_info

_LOOK_SECONDS = 0.5
# training may learn from the store that a precompute ended before its own thread has told
_LAST_WORDS_SECONDS = 5.0


def run_job(recipe: Recipe, *, force: bool = False) -> tuple[list[FillResult], list[StageResult]]:
    """Precompute every teacher and train every stage; what is done already is not done again.

    Args:
        force: begin even if the plan does not fit the disk.

    Returns:
        What the precomputes did, and the stages; none of these where rows failed and the students do not wait.

    Raises:
        MtpdError: an error that the user can mend. Checkpoints of the stage that was trained meanwhile are kept.
    """
    stages = range(1, len(recipe.stages) + 1)
    teachers = needed_teachers(recipe)
    if recipe.cache.on_missing == "wait" and teachers:
        cluster.connect()
        room = cluster.room_beside_training(recipe)
        if room.actors:
            return _together(recipe, room, force)
        say(
            "the cluster has no room for a teacher beside the training: teachers first, then the stages. They overlap where "
            "actors.cpus, actors.gpus, training.cpus, training.gpus leave room for both"
        )
    fills = fill_all(recipe, teachers, force=force)
    for result in fills:
        show_fill(result)
    if any(result.failures for result in fills):
        return fills, []
    return fills, train(recipe, stages)


def _together(recipe: Recipe, room: cluster.Room, force: bool) -> tuple[list[FillResult], list[StageResult]]:
    fills, stages = _Fills(recipe, room, force), []
    say(
        f"{' then '.join(fills.teachers)}: filled by {room.actors} of {recipe.actors.max} actors while the stages train"
    )
    fills.start()
    try:
        for number in range(1, len(recipe.stages) + 1):
            fills.await_rows(number)
            try:
                stages += train(recipe, [number])
            except MtpdError:
                fills.join(_LAST_WORDS_SECONDS)
                fills.raise_error(number)  # that is why; training tells only that a row will not come
                raise
        if fills.is_alive():
            say("every stage is trained; the views that no epoch asked for yet are still being computed")
        fills.join()
    finally:
        fills.stop.set()  # Ctrl-C ends both
        fills.join()
    fills.raise_error()
    return fills.results, stages


class _Fills(threading.Thread):
    """Fills the recipe's teachers, one after the other.

    Attributes:
        teachers: whose groups, in that order.
        results: of those that are done.
        stop: set it to end the run; what is committed stays.
    """

    def __init__(self, recipe: Recipe, room: cluster.Room, force: bool) -> None:
        super().__init__(daemon=True, name="fills")
        self._recipe, self._room, self._force = recipe, room, force
        self._first = first_epoch(recipe)
        self.teachers = needed_teachers(recipe)
        self.results: list[FillResult] = []
        self.stop = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        """Fill all; an error ends it, and is kept."""
        try:
            for name in self.teachers:
                with Filling(self._recipe, name, force=self._force, room=self._room, first=self._first) as filling:
                    self.results.append(filling.run(turn=Turn(self.stop)))
                show_fill(self.results[-1])
        except KeyboardInterrupt:
            return  # told to stop
        except Exception as error:  # noqa: BLE001 - whatever it is, the main thread raises it
            self._error = error
            complain(f"the precompute ended: {error}\nA stage that has all it reads goes on to its end.")

    def await_rows(self, stage: int) -> None:
        """Until every teacher of a stage has a row, so that training does not hold workers that have nothing to do.

        Raises:
            MtpdError: the precompute ended before it was done with these teachers.
        """
        if (stage_dir(self._recipe, stage) / "result.json").exists():
            return
        storage = open_storage(self._recipe.cache.uri)
        for name in self._recipe.stages[stage - 1].teachers:
            info = teacher_info(self._recipe, name)
            while name not in self._done() and not len(load_index(storage, info)):
                self.raise_error(stage)
                time.sleep(_LOOK_SECONDS)
            self.raise_error(stage)

    def raise_error(self, stage: int | None = None) -> None:
        """Raise what ended the precompute, if it did not finish a teacher of this stage; of any stage by default."""
        needed = self.teachers if stage is None else self._recipe.stages[stage - 1].teachers
        if self._error is not None and not set(needed) <= self._done():
            raise self._error

    def _done(self) -> set[str]:
        return {result.teacher for result in self.results}
