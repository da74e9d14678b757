"""The examples and the Dockerfile: read as their programs would, and run on stand-ins."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from compared_runs import losses_of
from program_runs import SMALL
from waiting import wait_until

from unicl_fast.checkpoints.files import list_checkpoints
from unicl_fast.config import TrainConfig
from unicl_fast.distributed.signals import EXIT_INTERRUPTED, EXIT_WRONG_INPUT
from unicl_fast.tools.pretrain import parse_arguments, split_config
from unicl_fast.tools.run_settings import as_yaml

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SBATCH = EXAMPLES / "slurm" / "train.sbatch"
TWO_NODES = EXAMPLES / "torchrun" / "two-nodes.sh"
STEPS = 60


def load(name: str) -> Any:
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def settings_of(words: list[str]) -> TrainConfig:
    """The settings of a command line whose file is examples/run.yaml, wherever it lies there."""
    given = [re.sub(r"(--config=|^)\S*(run\.yaml|\$settings)$", rf"\1{EXAMPLES}/run.yaml", word)
             for word in words]  # fmt: skip
    return split_config(parse_arguments(given))


@pytest.mark.parametrize("script", [SBATCH, TWO_NODES], ids=lambda path: path.name)
def test_scripts_are_bash_and_their_command_is_ours(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    text = script.read_text(encoding="utf-8").replace("\\\n", " ")
    (command,) = re.findall(r"(?:unicl-pretrain|unicl_fast\.tools\.pretrain) +(--.*)", text)
    command = re.sub(r"\$\{3.*?\}", "run.yaml", command)
    assert settings_of(shlex.split(command)).run.evaluate_every_steps == 2000


def test_slurm_starts_a_job_again_after_the_code_that_says_so():
    text = SBATCH.read_text(encoding="utf-8")
    assert f'"$code" -eq {EXIT_INTERRUPTED} ]' in text
    options = re.findall(r"^#SBATCH (--[a-z-]+)(?:=\S+)?$", text, re.MULTILINE)
    assert len(options) == text.count("#SBATCH")
    assert {"--requeue", "--signal", "--open-mode"} <= set(options)


def test_kubernetes_counts_what_would_fail_again_and_mounts_what_is_named():
    job = load("kubernetes/job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rules = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert rules == {(EXIT_WRONG_INPUT,): "FailJob", (EXIT_INTERRUPTED,): "Ignore"}
    assert pod["restartPolicy"] == "Never"  # a policy of failures needs it
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert volumes == [mount["name"] for mount in container["volumeMounts"]]
    assert container["command"] == ["unicl-pretrain"]
    config = settings_of(container["args"])
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert all(place.startswith(tuple(mounted)) for place in config.data.train)


def test_skypilot_installs_and_runs_what_there_is():
    task = load("skypilot/train.yaml")
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [EXIT_INTERRUPTED]
    program, *words = shlex.split(task["run"])
    assert program.endswith("/unicl-pretrain")
    assert settings_of(words).data.train[0].startswith("/data/")
    (extra,) = re.findall(r"'\.\[(\w+)\]'", task["setup"])
    assert extra in project()["optional-dependencies"]


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def test_the_dockerfile_copies_and_installs_what_there_is():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
                assert f"!{source}" in ignored
    extras = re.findall(r'"\$1\[(\w+)\]"', text)
    assert set(extras) == {"cpu", "cuda12", "cuda13"} <= project()["optional-dependencies"].keys()
    (program,) = re.findall(r'CMD \["([\w-]+)"\]', text)
    assert program in project()["scripts"]
    # setup.py maps these folders into the package
    assert {"unicl_fast", "pipelines", "tools"} <= {one[1:] for one in ignored}


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment in which the programs of a cluster and ours are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    helper = ROOT / "tests" / "helpers" / "stand_in_srun.py"
    for name, command in {
        "srun": f'exec {sys.executable} {helper} "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
        "unicl-pretrain": f'exec {sys.executable} -m unicl_fast.tools.pretrain "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/bash\n{command}\n")
        (folder / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "STAND_IN_SRUN": str(tmp_path / "srun"),
        "SLURM_JOB_ID": "4711",
    }


def write_settings(folder: Path, data: Path) -> Path:
    """The settings of a short run, as a user's file."""
    longer = ["--run.steps", str(STEPS), "--checkpoint.every-steps", "10"]
    words = [*SMALL, *longer, "--data.train", str(data / "labels"), "--out", "x"]
    path = folder / "run.yaml"
    path.write_text(as_yaml(split_config(parse_arguments(words))), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.dali
def test_a_job_of_slurm_that_is_told_to_stop_is_put_back_and_continues(data, tmp_path, stand_ins):
    out = tmp_path / "run"
    command = ["bash", SBATCH, write_settings(tmp_path, data), out]
    with subprocess.Popen(command, env=stand_ins) as job:
        wait_until(lambda: list_checkpoints(out / "checkpoints") or job.poll(), timeout=200)
        assert job.poll() is None
        os.kill(int((tmp_path / "srun").read_text()), signal.SIGUSR1)
        assert job.wait(timeout=200) == EXIT_INTERRUPTED
    assert (tmp_path / "scontrol").read_text() == "requeue 4711\n"
    assert len(losses_of(out)) < STEPS
    subprocess.run(command, env=stand_ins, check=True, timeout=200)
    assert len(losses_of(out)) == STEPS
    assert (tmp_path / "scontrol").read_text().count("requeue") == 1


@pytest.mark.slow
@pytest.mark.dali
def test_two_machines_that_torchrun_joins_are_one_run(data, tmp_path, stand_ins):
    out = tmp_path / "run"
    settings = write_settings(tmp_path, data)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    machines = [
        subprocess.Popen(
            ["bash", TWO_NODES, str(number), "127.0.0.1", settings, out],
            env=stand_ins | {"GPUS": "1", "PORT": str(port)},
        )
        for number in range(2)
    ]
    try:
        assert [machine.wait(timeout=200) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    assert len(losses_of(out)) == STEPS
    assert "2 ranks of 4 each" in (out / "log.txt").read_text()
