"""The image: linted, and its last step made of exactly the files that it copies."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

from tests.deploy.files import DEPLOY, ROOT

TEXT = (DEPLOY / "Dockerfile").read_text()
BIN = Path(sys.executable).parent


def copied() -> list[str]:
    """What the image takes from the repository."""
    lines = re.findall(r"^COPY (?!--from)(.*)$", TEXT, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_it_is_linted_and_does_not_run_as_root() -> None:
    subprocess.run([BIN / "hadolint", DEPLOY / "Dockerfile"], check=True)
    last = TEXT.rpartition("\nFROM ")[2]
    assert re.findall(r"^USER (.*)$", last, re.MULTILINE) == ["1000:1000"]
    instructions = re.sub(r"^#.*$", "", TEXT, flags=re.MULTILINE)
    assert not re.search(r"secret|password|token|AWS_", instructions, re.IGNORECASE)
    for device in ("cpu", "cuda"):
        assert f" AS build-{device}\n" in TEXT, "DEVICE names a stage"


def test_the_builder_sees_what_is_copied_and_nothing_else() -> None:
    rules = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = [rule[1:] for rule in rules if rule.startswith("!")]
    assert "*" in rules
    assert sorted(allowed) == sorted(copied())
    assert all((ROOT / source).exists() for source in copied())
    assert not any(fnmatch(source, "*.pth") for source in allowed)


def test_the_project_can_be_built_of_what_is_copied(tmp_path: Path) -> None:
    for source in copied():
        target = tmp_path / "src" / source
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, target)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, tmp_path / "src"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        entry = next(name for name in names if name.endswith("entry_points.txt"))
        assert "mtpd = services.cli:main" in content.read(entry).decode()
    tracked = subprocess.run(
        ["git", "ls-files", "cache", "trainer", "services"], cwd=ROOT, capture_output=True, check=True
    )
    assert set(tracked.stdout.decode().split()) <= names, "a file of the three floors is not in the image"


def test_the_head_can_set_up_nodes_and_a_container_sees_gpus() -> None:
    """Ray's autoscaler runs in the head's container; NVIDIA's runtime gives GPUs to containers whose environment names them."""
    last = TEXT.rpartition("\nFROM ")[2]
    packages = re.search(r"apt-get install --yes --no-install-recommends ([\w -]+?) &&", last)
    assert packages is not None
    assert {"openssh-client", "rsync"} <= set(packages[1].split())
    environment = dict(
        word.split("=", 1) for line in re.findall(r"^ENV (.*)$", last, re.MULTILINE) for word in line.split()
    )
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert {"compute", "utility"} <= set(environment["NVIDIA_DRIVER_CAPABILITIES"].split(","))


def test_what_is_installed_by_name_is_pinned_and_the_launchers_client_of_aws_is_of_it() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "requirements" / "constraints.txt").read_text(), re.MULTILINE))
    lines = re.findall(r"pip install ([^&\n]*)", TEXT.replace("\\\n", " "))
    names = {word for line in lines for word in line.split() if re.fullmatch(r"[a-z][\w-]*", word)}
    assert {"torch", "boto3"} <= names
    assert names <= pinned
    assert "PIP_CONSTRAINT=/src/requirements/constraints.txt" in TEXT


def test_its_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = re.search(r"^ARG PYTHON=(.*)$", TEXT, re.MULTILINE)
    assert python is not None
    assert project["requires-python"] == f">={python[1]}"
    tags = {tag for file in DEPLOY.rglob("*.yaml") for tag in re.findall(r"REGISTRY/mtpd:(\S+)", file.read_text())}
    assert tags == {f"{project['version']}-cuda"}
