"""The Slurm script: linted, and run with Slurm's commands, Ray's and ours replaced by ones that note how they are called."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.deploy.files import DEPLOY, ROOT, blocks

SCRIPT = DEPLOY / "slurm.sh"
_COMMANDS = {
    "scontrol": '[[ $1 == show ]] && printf "%s\\n" node1 node2 node3; exit 0',
    # as Slurm does: the options go, the command stays
    "srun": "while [[ $1 == --* ]]; do shift; done; "
    'if [[ $1 == hostname ]]; then echo "${HEAD_IP:-10.0.0.1} fe80::1"; else exec "$@"; fi',
    "ray": '[[ $1 == start ]] && exec sleep 60; until grep -q "^ray start --head" "$(dirname "$0")/calls"; do sleep 0.02; done',
    # not before every node has joined: the script itself does not wait for them
    "mtpd": 'until [[ $(grep -c "^ray start" "$(dirname "$0")/calls") == 2 ]]; do sleep 0.02; done; '
    "[[ $2 == endless.yaml ]] && exec sleep 60; [[ $2 != bad.yaml ]]",
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A folder of commands in front of PATH."""
    for name, body in _COMMANDS.items():
        note = f'echo "{name} $* RAY_ADDRESS=$RAY_ADDRESS RAY_AUTH_MODE=$RAY_AUTH_MODE" >> {tmp_path}/calls'
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "71234", "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_CPUS_PER_TASK": "16"}
    return {
        **os.environ,
        **slurm,
        "SLURM_GPUS_ON_NODE": "2",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MTPD_VENV": "",
    }


def calls(folder: Path, *beginning: str) -> list[str]:
    lines = (folder / "calls").read_text().splitlines()
    return [line for line in lines if line.startswith(" ".join(beginning))]


def test_it_is_linted() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    subprocess.run([Path(sys.executable).parent / "shellcheck", SCRIPT], check=True)


def test_a_head_then_the_other_nodes_then_the_recipe(environment: dict[str, str], tmp_path: Path) -> None:
    subprocess.run(["bash", SCRIPT, "recipe.yaml", "precompute"], env=environment, check=True, timeout=30)
    head, others = calls(tmp_path, "ray", "start")
    assert "--head --node-ip-address=10.0.0.1 --port=21234 --include-dashboard=false --num-cpus=16 --num-gpus=2" in head
    assert "--address=10.0.0.1:21234 --num-cpus=16 --num-gpus=2" in others
    assert any("--nodes=2 --ntasks=2 --exclude=node1" in call for call in calls(tmp_path, "srun"))
    (ours,) = calls(tmp_path, "mtpd")
    assert ours == "mtpd precompute recipe.yaml RAY_ADDRESS=10.0.0.1:21234 RAY_AUTH_MODE=token"
    assert not any("AUTH_TOKEN" in call for call in calls(tmp_path)), "a command line is seen by every user of a node"


def test_what_the_recipe_ends_with_the_job_ends_with(environment: dict[str, str]) -> None:
    done = subprocess.run(["bash", SCRIPT, "bad.yaml"], env=environment, timeout=30)
    assert done.returncode == 1


def test_a_head_that_only_itself_can_reach_is_refused(environment: dict[str, str]) -> None:
    environment["HEAD_IP"] = "127.0.1.1"
    done = subprocess.run(["bash", SCRIPT, "recipe.yaml"], env=environment, capture_output=True, timeout=30)
    assert done.returncode == 1
    assert b"node1: its name stands for 127.0.1.1" in done.stderr


def running_in(group: int) -> list[str]:
    """The processes of a group, but for those that only wait for their parent to look."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
    return found


def ended_by(number: int, environment: dict[str, str], folder: Path) -> int:
    """The exit code of a job in the midst of its work that gets a signal; none of its processes is left then."""
    # a session of its own, whose process group holds all that the script starts
    process = subprocess.Popen(["bash", SCRIPT, "endless.yaml", "train"], env=environment, start_new_session=True)
    try:
        while not (folder / "calls").exists() or not calls(folder, "mtpd"):
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(number)
        code = process.wait(30)
        deadline = time.monotonic() + 10
        while left := running_in(process.pid):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return code


def test_before_its_time_limit_it_goes_back_to_the_queue(environment: dict[str, str], tmp_path: Path) -> None:
    asked = re.search(r"^#SBATCH --signal=B:(\w+)@120$", SCRIPT.read_text(), re.MULTILINE)
    assert asked is not None
    assert ended_by(signal.Signals[f"SIG{asked[1]}"], environment, tmp_path) == 0
    assert calls(tmp_path, "scontrol", "requeue", "71234")


def test_cancelled_it_ends_and_does_not_come_back(environment: dict[str, str], tmp_path: Path) -> None:
    assert ended_by(signal.SIGTERM, environment, tmp_path) == 128 + signal.SIGTERM
    assert not calls(tmp_path, "scontrol", "requeue")


def test_the_requeue_ends_the_run_by_term_which_it_does_not_answer(environment: dict[str, str], tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(scontrol.read_text().replace("exit 0", "[[ $1 == requeue ]] && kill -TERM $PPID; exit 0"))
    assert ended_by(signal.SIGUSR1, environment, tmp_path) == 0
    assert len(calls(tmp_path, "scontrol", "requeue")) == 1


def test_the_manuals_training_waits_for_its_precompute(environment: dict[str, str], tmp_path: Path) -> None:
    (block,) = (one for one in blocks() if "sbatch" in one)
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/usr/bin/env bash\necho "$* MTPD_VENV=$MTPD_VENV" >> {tmp_path}/calls; echo 4711\n')
    sbatch.chmod(0o755)
    subprocess.run(["bash", "-euc", block], env=environment, cwd=ROOT, check=True, timeout=30)
    precompute, train = calls(tmp_path)
    assert "--parsable" in precompute
    assert " deploy/slurm.sh deploy/recipe.yaml precompute MTPD_VENV=/" in precompute
    assert " --dependency=afterok:4711 " in train
    assert " deploy/slurm.sh deploy/recipe.yaml train MTPD_VENV=/" in train
