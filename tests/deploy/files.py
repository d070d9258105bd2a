"""The files of ``deploy/``, read as their tests need them."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RECIPE = DEPLOY / "recipe.yaml"
MANUAL = ROOT / "docs" / "operations.md"
JOBS = ("rayjob-precompute", "rayjob-train")


def documents(name: str) -> list[dict[str, Any]]:
    """The documents of a Kubernetes file."""
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / f"{name}.yaml").read_text()))


def ray_clusters() -> dict[str, dict[str, Any]]:
    """The spec of each Ray cluster, by the file that holds it."""
    jobs = {name: documents(name)[0]["spec"]["rayClusterSpec"] for name in JOBS}
    return {"raycluster": documents("raycluster")[0]["spec"], **jobs}


def pod_templates() -> dict[str, dict[str, Any]]:
    """Every pod template, by file and group."""
    found = {}
    for name, spec in ray_clusters().items():
        found[f"{name} head"] = spec["headGroupSpec"]["template"]
        found |= {f"{name} {group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
    for name in JOBS:
        found[f"{name} submitter"] = documents(name)[0]["spec"]["submitterPodTemplate"]
    return found


def launcher() -> dict[str, Any]:
    """The cluster launcher's file."""
    return yaml.safe_load((DEPLOY / "ray-cluster.yaml").read_text())


def blocks() -> list[str]:
    """The manual's shell blocks, as they can be copied."""
    return re.findall(r"^```sh\n(.*?)^```", MANUAL.read_text(), re.MULTILINE | re.DOTALL)


def commands(text: str | None = None) -> list[list[str]]:
    """Every command line of a block (by default of all), comments removed, in words."""
    lines = ("\n".join(blocks()) if text is None else text).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
