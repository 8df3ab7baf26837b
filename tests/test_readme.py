"""The README's Python example and commands, executed as they are written."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return text


@pytest.fixture
def environment(tmp_path):
    """The folders of the source tree on Python's path, and a `gdfq` command as an installation would put there."""
    command = tmp_path / "bin" / "gdfq"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom gdfq.cli import main\nmain()\n")
    command.chmod(0o755)
    path = os.pathsep.join(map(str, (ROOT / "python", ROOT)))
    return {**os.environ, "PYTHONPATH": path, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.slow
@pytest.mark.long
def test_python_example(environment, tmp_path):
    shutil.copy(ROOT / "examples" / "custom_resnet20.py", tmp_path)
    code = "import torch; from custom_resnet20 import resnet20; torch.save(resnet20().state_dict(), 'resnet20.pth')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    done = subprocess.run(
        [sys.executable, "-c", block("python")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for words in ("W4A4", "layers at 4 bits", "data-free"):
        assert words in done.stdout
    assert (tmp_path / "runs/resnet20/model.safetensors").exists()


@pytest.mark.long
def test_commands(environment, tmp_path):
    done = subprocess.run(["bash", "-euc", block("sh")], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in ("top-1", "written      runs/trial", "10000 images", torch.__version__):
        assert words in done.stdout


def test_files_that_the_readme_links_exist():
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]
