"""Say what this Python environment lacks to build and run gdfq, and how to install it without touching its torch.

    python .ci/missing_requirements.py [EXTRA]...

Exit code 0 when nothing is missing, 1 otherwise.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036  (any Python may be given)
        sys.exit(f"gdfq needs Python 3.11 or later; this is {sys.version.split()[0]}")
    import tomllib  # not before the version is known

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in sys.argv[1:]:
        required += project["project"]["optional-dependencies"][extra]
    missing = [requirement for requirement in dict.fromkeys(required) if not satisfied(requirement)]
    if not missing:
        return
    if any(requirement.startswith("torch>") for requirement in missing):
        sys.exit(f"{sys.executable} lacks {missing[0]}: install it as https://pytorch.org says for this machine")
    # Naming the installed torch keeps pip from replacing it.
    packages = [f"torch=={version('torch')}", *(pinned(requirement) for requirement in missing)]
    command = f"{sys.executable} -m pip install " + " ".join(f"'{package}'" for package in packages)
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}; install with:\n    {command}")


def satisfied(requirement: str) -> bool:
    """Whether `name` or `name>=version`, the two forms in pyproject.toml, is installed."""
    name, _, minimum = requirement.partition(">=")
    try:
        return release(version(name)) >= release(minimum)
    except PackageNotFoundError:
        return False


def release(text: str) -> list[int]:
    """`2.13.0+cpu` as [2, 13, 0]."""
    return [int(number) for number in re.findall(r"\d+", re.split(r"[+a-z]", text)[0])]


def pinned(requirement: str) -> str:
    """The version that constraints.txt pins, where it does."""
    name = requirement.partition(">=")[0]
    pins = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith(f"{name}=="))
    return next(pins, requirement)


main()
