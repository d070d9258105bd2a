"""The teacher service under load: requests/s and latencies of misses and of hits, against a bare Ray Serve deployment.

``--askers`` coroutines of one process ask over HTTP at once, each one question after the other. Drawn scenes, the demo's small
R18 teacher, one replica, which is up before (its start is told apart).

- "misses": an empty cache; every row is asked for by several askers at once, in random order. What is computed twice would be
  counted: the replicas count their forwards, and the manifest its rows.
- "hits": the same rows again, all committed.
- "bare": a deployment that answers with a constant, on the same Serve, asked in the same way: the limit.
"""

import asyncio
import json
import logging
import os
import random
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import ray
import typer
import yaml
from ray import serve
from rich.console import Console
from rich.table import Table
from starlette.requests import Request

from cache import TeacherCache
from services.serving import service
from trainer import Recipe, ask, counts, generate, parse_recipe, service_url, teacher_info

TEACHER = "r18"


@serve.deployment(num_replicas=1, max_ongoing_requests=100_000, ray_actor_options={"num_cpus": 0})
class Bare:
    """Answers with a constant."""

    async def __call__(self, request: Request) -> dict[str, Any]:
        """What the desk answers to a hit."""
        await request.body()
        return {"state": "committed", "reason": "", "computed": False}


def make_recipe(root: Path, scenes: int, unit_rows: int) -> Recipe:
    """Drawn scenes, and the demo's recipe with its first teacher alone."""
    generate(root / "data", "train", scenes, seed=0)
    generate(root / "data", "val", 1, seed=0, first_id=1_000_001)
    content = yaml.safe_load(Path("recipes/demo.yaml").read_text())
    content["dataset"] = {
        split: {"ann_file": str(root / "data" / "annotations" / f"{split}.json"), "img_dir": str(root / "data" / split)}
        for split in ("train", "val")
    }
    content["stages"], content["student"]["inherit"] = content["stages"][:1], False
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    content["cache"] |= {
        "uri": str(root / "cache"),
        "on_missing": "compute",
        "unit_rows": unit_rows,
        "service": address,
    }
    content["actors"], content["training"] = {"max": 1, "cpus": 1}, {"cpus": 1}
    return parse_recipe(content | {"work_dir": str(root / "work")}, "benchmark")


async def load(url: str, questions: list[dict[str, Any]], askers: int) -> dict[str, Any]:
    """Put questions, so many at once. Returns the rate, latencies in ms, and the states of the answers."""
    seconds, states, left = [], [], iter(questions)

    async def asker(session: aiohttp.ClientSession) -> None:
        for question in left:
            begin, state = time.monotonic(), "pending"
            while state == "pending":
                async with session.post(url, json=question) as reply:
                    state = (await reply.json())["state"]
            seconds.append(time.monotonic() - begin)
            states.append(state)

    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        begin = time.monotonic()
        await asyncio.gather(*(asker(session) for _ in range(askers)))
        wall = time.monotonic() - begin
    cuts = statistics.quantiles(seconds, n=100)
    return {"requests/s": len(seconds) / wall, "p50": 1e3 * cuts[49], "p99": 1e3 * cuts[98], "states": set(states)}


def did(recipe: Recipe) -> dict[str, Any]:
    """What the desk counted."""
    found = counts(service_url(recipe))
    assert found is not None
    return found[TEACHER]


def main(
    askers: Annotated[int, typer.Option(min=1)] = 1000,
    scenes: Annotated[int, typer.Option(min=2)] = 500,
    times: Annotated[int, typer.Option(min=1, help="How often each row is asked for.")] = 5,
    unit_rows: Annotated[int, typer.Option(min=1)] = 24,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything measured here.")] = None,
) -> None:
    """Measure the teacher service under load."""
    logging.disable(logging.WARNING)
    os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory() as name:
        recipe = make_recipe(Path(name), scenes, unit_rows)
        group = teacher_info(recipe, TEACHER).name
        keys = [(image, view) for image in range(1, scenes + 1) for view in (0, 1)]
        questions = [dict(teacher=TEACHER, group=group, image_id=i, view=v) for i, v in keys * times]
        random.Random(0).shuffle(questions)
        with service(recipe, [TEACHER]):
            url, begin = service_url(recipe), time.monotonic()
            while ask(url, questions[0]).state == "pending":
                pass
            start = time.monotonic() - begin
            measured = {"misses": asyncio.run(load(url, questions, askers))}
            found = did(recipe)
            measured["hits"] = asyncio.run(load(url, questions, askers))
            after = did(recipe)
            serve.run(Bare.bind(), name="bare", route_prefix="/bare")
            measured["bare"] = asyncio.run(load(f"{recipe.cache.service}/bare", questions, askers))
        rows = len(TeacherCache.open(recipe.cache.uri, TEACHER))
    ray.shutdown()
    table = Table(
        "", "requests/s", "p50, ms", "p99, ms", "of bare", title=f"{askers} askers, {len(questions)} questions"
    )
    for key, one in measured.items():
        share = one["requests/s"] / measured["bare"]["requests/s"]
        table.add_row(key, *(f"{one[k]:.0f}" for k in ("requests/s", "p50", "p99")), f"{share:.2f}")
    Console().print(table)
    states = set().union(*(one.pop("states") for one in measured.values()))
    print(f"first answer, with the start of a replica: {start:.1f} s; answers: {', '.join(sorted(states))}")
    print(f"distinct rows asked for {len(keys)}, in the manifest {rows}")
    print(f"forwards {found['computed']}, after the hits {after['computed']}")
    once = states == {"committed"} and rows == len(keys) == found["computed"] == after["computed"]
    print(f"nothing computed twice: {once}")
    if json_path:
        json_path.write_text(
            json.dumps({"measured": measured, "start_s": start, "counts": after, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    typer.run(main)
