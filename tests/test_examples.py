"""Schedulers' scripts in examples/: run by bash with the clusters' programs replaced, they give commands that parse."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from gdfq.cli import app

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
RECORD = 'printf "%s\\n" "$@" > command'
PROGRAMS = {"srun": '"$@"', "torchrun": RECORD, "gdfq": RECORD, "scontrol": "printf 'node7\\nnode8\\n'"}
SLURM = {
    "SLURM_NNODES": "4", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_ARRAY_TASK_ID": "3",
}  # fmt: skip


def command_of(script: str, folder: Path) -> list[str]:
    """Arguments of the program that the script comes to."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **SLURM}
    subprocess.run([shutil.which("bash"), "-ceu", script], check=True, cwd=folder, env=environment, timeout=20)
    return (folder / "command").read_text().splitlines()


def options_of(arguments: list[str]) -> dict[str, object]:
    """What the command line makes of them; raises where it refuses them."""
    program = typer.main.get_command(app)
    name, *rest = arguments
    return program.commands[name].make_context(name, rest).params


def kubernetes() -> str:
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert (service["metadata"]["name"], service["spec"]["selector"]) == (pod["subdomain"], {"job-name": "gdfq"})
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    mounted = [volume["name"] for volume in pod["containers"][0]["volumeMounts"]]
    assert mounted == [volume["name"] for volume in pod["volumes"]]
    *bash, script = pod["containers"][0]["command"]
    assert bash == ["bash", "-ceu"]
    return script


def slurm() -> str:
    return (EXAMPLES / "slurm.sh").read_text()


@pytest.mark.parametrize(
    ("script", "nodes", "endpoint"), [(slurm, "4", "node7:29500"), (kubernetes, "2", "gdfq-0.gdfq:29500")]
)
def test_a_run_is_started_and_gone_on_with(tmp_path, script, nodes, endpoint):
    text = script()
    found = get_args_parser().parse_args(command_of(text, tmp_path))
    assert (found.nnodes, found.nproc_per_node, found.rdzv_backend, found.rdzv_endpoint) == (
        nodes,
        "8",
        "c10d",
        endpoint,
    )
    assert (found.module, found.training_script) == (True, "gdfq")
    options = options_of(found.training_script_args)
    assert (options["model"], options["method"], options["resume"]) == ("pytorchcv:resnet50", "gdfq", None)
    folder = tmp_path / options["out"]
    folder.mkdir(parents=True)
    (folder / "config.toml").touch()
    found = get_args_parser().parse_args(command_of(text, tmp_path))
    assert options_of(found.training_script_args)["resume"] == options["out"]


def test_tasks_of_an_array_have_a_share_each(tmp_path):
    options = options_of(command_of((EXAMPLES / "slurm_array.sh").read_text(), tmp_path))
    assert (options["name"], options["shard"], options["resume"]) == ("table1", "3/8", True)
    assert "#SBATCH --array=1-8\n" in (EXAMPLES / "slurm_array.sh").read_text()
