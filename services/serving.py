"""The teacher service on Ray Serve: a desk that answers, and for each teacher replicas that compute, from none up."""

import asyncio
import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any
from urllib.parse import urlsplit

from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.requests import Request

from cache import GroupInfo, RecipeError, Unit
from services import cluster, logs
from services.actor import ActorJob, UnitWorker
from services.desk import GroupDesk
from services.outcome import UnitRecord
from services.pool import PIPELINE_DEPTH
from services.precompute import needed_teachers, plan_teacher
from services.present import complain, say
from services.records import keep_recipe, record_use
from trainer import Answer, Recipe, counts, service_name, service_url, teacher_info

# a replica that nobody needs is given back after so long
_IDLE_SECONDS = 60.0
_MAX_ASKERS = 100_000


@serve.deployment
class TeacherReplica:
    """Holds one teacher, and computes and commits units."""

    def __init__(self, job: ActorJob) -> None:
        self._worker, self._loading, self._loaded = UnitWorker(job), threading.Lock(), False

    async def run(self, unit: Unit, run: str) -> UnitRecord:
        """Compute and commit a unit for the run that holds the lease.

        Raises:
            TeacherLoadError: config and checkpoint do not fit. The first unit loads the teacher, for an error on creation
                would be told to nobody.
        """
        return await asyncio.to_thread(self._run, unit, run)

    def _run(self, unit: Unit, run: str) -> UnitRecord:
        with self._loading:
            if not self._loaded:
                self._worker.load()
                self._loaded = True
        return self._worker.run(unit, run)


@serve.deployment(num_replicas=1, max_ongoing_requests=_MAX_ASKERS, ray_actor_options={"num_cpus": 0})
class Desk:
    """Answers questions over HTTP; `trainer.asking` puts them."""

    def __init__(self, recipe: Recipe, infos: Sequence[GroupInfo], *teachers: DeploymentHandle) -> None:
        self._desks = {
            info.teacher: GroupDesk(recipe, info, handle.run.remote)
            for info, handle in zip(infos, teachers, strict=True)
        }

    async def __call__(self, request: Request) -> dict[str, Any]:
        """``POST``: an answer; ``GET``: what each teacher's desk did so far."""
        if request.method != "POST":
            return {name: {"group": desk.info.name, **asdict(desk.counts)} for name, desk in self._desks.items()}
        return asdict(await self._answer(await request.body()))

    async def close(self) -> None:
        """Give the leases back."""
        await asyncio.gather(*(desk.close() for desk in self._desks.values()))

    async def _answer(self, body: bytes) -> Answer:
        try:
            question = json.loads(body)
            teacher, group = str(question["teacher"]), str(question["group"])
            row = (int(question["image_id"]), int(question["view"])) if "image_id" in question else None
        except (ValueError, KeyError, TypeError) as error:
            return Answer("refused", f"not a question: {error!r}")
        desk = self._desks.get(teacher)
        if desk is None:
            return Answer("refused", f"this service has the teachers {', '.join(self._desks)}, not {teacher}")
        if desk.info.name != group:
            return Answer("refused", f"this service computes {desk.info.name}, not {group}: its recipe is another one")
        return await (desk.open() if row is None else desk.ask(*row, look=bool(question.get("look"))))


@contextmanager
def service(
    recipe: Recipe,
    teachers: Sequence[str],
    host: str = "127.0.0.1",
    room: cluster.Room | None = None,
    *,
    quiet: bool = False,
) -> Iterator[None]:
    """The service of a recipe, as long as the context is open.

    Args:
        host: address to listen on; the port is that of ``cache.service``.
        room: for each teacher's replicas; by default that of ``actors`` in the recipe.
        quiet: do not say where it listens.

    Raises:
        RecipeError: it cannot listen there.
    """
    cluster.refuse_temporary_paths(recipe)
    infos = [teacher_info(recipe, name) for name in teachers]
    keep_recipe(recipe)
    for info in infos:
        record_use(recipe, info)
    cluster.connect()
    name, port = service_name(recipe), urlsplit(recipe.cache.service).port
    logging = LoggingConfig(log_level="WARNING", enable_access_log=False)
    app = Desk.bind(recipe, infos, *(_replica(recipe, info, room, logging) for info in infos))
    desk: DeploymentHandle | None = None
    try:
        try:
            serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=logging)
            desk = serve.run(app, name=name, route_prefix=f"/{name}", logging_config=logging)
        except (RuntimeError, OSError, ValueError) as error:
            raise RecipeError(
                f"cache.service: cannot serve at {host}:{port}: {str(error).strip().splitlines()[-1]}"
            ) from error
        if counts(f"http://{host}:{port}/{name}") is None:
            raise RecipeError(
                f"cache.service: Ray Serve runs on this cluster already, and does not listen at {host}:{port}. Give the address "
                "that it listens at, or end it (`serve shutdown`)."
            )
        if not quiet:
            say(f"teacher service of {', '.join(teachers)}: {service_url(recipe)}")
        yield
    finally:
        _end(name, desk)


def _end(name: str, desk: DeploymentHandle | None) -> None:
    """Take the application off the cluster, whatever became of its desk: nobody would do it later."""
    try:
        if desk is not None:
            desk.close.remote().result(timeout_s=600)
    except Exception as error:  # noqa: BLE001 - it must not hide why the context is left
        complain(f"the teacher service did not end as it should; its leases are free in half a minute: {error!r}")
    finally:
        serve.delete(name)
        if not serve.status().applications:
            serve.shutdown()


@contextmanager
def beside_training(recipe: Recipe, stages: Sequence[int] | None = None) -> Iterator[None]:
    """The service that a recipe's students ask, if rows are missing and if it does not run already.

    Args:
        stages: numbers of the stages that are to be trained; all by default.

    Raises:
        RecipeError: the service is elsewhere and does not answer, or the cluster has no room for a teacher beside the training
            and rows are missing.
    """
    teachers = needed_teachers(recipe, stages)
    if recipe.cache.on_missing != "compute" or not teachers or counts(service_url(recipe)) is not None:
        yield
        return
    if not any(plan_teacher(recipe, name).todo for name in teachers):
        say("every row is in the cache: no teacher service")
        yield
        return
    if not starts_here(recipe):
        raise RecipeError(
            f"cache.service: nothing answers at {service_url(recipe)}. Run `mtpd serve RECIPE` there, or leave cache.service "
            "out: training then starts the service on its own cluster."
        )
    cluster.connect()
    room = cluster.room_beside_training(recipe)
    if not room.actors:
        raise RecipeError(
            "cache.on_missing: compute: rows are missing, and the cluster has no room for a teacher beside the training. "
            "Give actors.cpus, actors.gpus, training.cpus, training.gpus that leave room for both, or run `mtpd precompute`."
        )
    with service(recipe, teachers, room=room):
        yield


def starts_here(recipe: Recipe) -> bool:
    """Whether training starts the service itself where none answers: not at an address elsewhere."""
    return urlsplit(recipe.cache.service).hostname in ("127.0.0.1", "localhost")


def until_stopped() -> None:
    """Until Ctrl-C, or a signal to end."""
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    while not stopped.wait(1.0):
        pass


def _replica(recipe: Recipe, info: GroupInfo, room: cluster.Room | None, quiet: LoggingConfig) -> Any:
    spec = recipe.teachers[info.teacher]
    job = ActorJob(recipe.cache.uri, "", info, spec, recipe.policy, recipe.dataset.train, logs.style())
    if room is None:
        at_most = recipe.actors.max
        room = cluster.Room(at_most, cluster.demand(recipe.actors.cpus, recipe.actors.gpus, at_most))
    return TeacherReplica.options(
        name=f"teacher-{info.teacher}",
        max_ongoing_requests=PIPELINE_DEPTH,
        autoscaling_config=AutoscalingConfig(
            min_replicas=0,
            max_replicas=room.actors,
            target_ongoing_requests=PIPELINE_DEPTH,
            upscale_delay_s=2.0,
            downscale_delay_s=_IDLE_SECONDS,
        ),
        ray_actor_options={"num_cpus": room.each.cpus, "num_gpus": room.each.gpus},
        logging_config=quiet,
    ).bind(job)
