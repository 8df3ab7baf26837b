"""What LibTorch's stable ABI has, as its headers name it.

    python tests/csrc/binding/stable_names.py INCLUDE > tests/csrc/binding/torch-2.11.txt

INCLUDE is the include folder of a torch of the version that the extension is built for (TORCH_TARGET in setup.py).
"""

import re
import sys
import textwrap
from pathlib import Path

# What the binding includes, and what that includes.
HEADERS = ("torch/csrc/stable/**/*.h", "torch/headeronly/**/*.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
INCLUDED = re.compile(r"#\s*include\s*<(torch/[^>]+)>")
NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|#\s*include[^\n]*|"(?:\\.|[^"\\\n])*"', re.DOTALL)
NAME = re.compile(r"\b[A-Za-z_]\w*\(?")


def names_in(source: str) -> set[str]:
    """The identifiers of C++ code: `name(` where one is called or declared as a function or a macro, else `name`."""
    return set(NAME.findall(NOT_CODE.sub(" ", source)))


def torch_headers_in(source: str) -> set[str]:
    """The headers of torch that C++ code includes."""
    return set(INCLUDED.findall(source))


def stable_abi(include: Path) -> set[str]:
    """The stable ABI's headers in torch's include folder, and the names in them."""
    headers = [header for pattern in HEADERS for header in include.glob(pattern)]
    if not headers:
        raise FileNotFoundError(f"{include} has no headers of the stable ABI; give the include folder of a torch")
    names = (names_in(header.read_text()) for header in headers)
    return {str(header.relative_to(include)) for header in headers}.union(*names)


if __name__ == "__main__":
    print(textwrap.fill(" ".join(sorted(stable_abi(Path(sys.argv[1])))), 120, break_on_hyphens=False))
