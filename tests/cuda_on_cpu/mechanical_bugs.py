"""Bugs of mechanical kinds everywhere in the CUDA kernels, chosen by nobody: `mutations.py mechanical` tries them.

In every file of csrc/kernels: comparisons turned and shifted by one, whole numbers moved by one, barriers and early
exits removed, 64-bit integers narrowed, streams replaced.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "csrc/kernels"

TURNED = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}
SHIFTED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
WIDE = "int64_t"


@dataclass(frozen=True)
class Bug:
    """`old` at `start` in a file of csrc/kernels becomes `new`."""

    file: str
    start: int
    old: str
    new: str
    name: str
    """File, line, place in the line, and what becomes of it: the same as long as the line is."""

    def text(self) -> str:
        """The file with the bug."""
        right = (KERNELS / self.file).read_text()
        return right[: self.start] + self.new + right[self.start + len(self.old) :]


def mechanical_bugs() -> Iterator[Bug]:
    """All bugs in the order of files and lines."""
    for path in sorted(KERNELS.iterdir()):
        yield from _bugs_of(path.name, path.read_text())


def _bugs_of(file: str, text: str) -> Iterator[Bug]:
    found = []
    code = _without_comments(text)
    for match in re.finditer(r"(?<= )(<=|>=|==|!=|<|>)(?= )", code):
        found += [(match, table[match[0]]) for table in (TURNED, SHIFTED) if match[0] in table]
    found += [(match, str(int(match[0]) + 1)) for match in re.finditer(r"(?<![\w.])\d+(?![\w.])", code)]
    found += [(match, ";") for match in re.finditer(r"__syncthreads\(\);", code)]
    found += [(match, ";") for match in re.finditer(r"(?<=\) )(return\b[^;]*|continue|break);|\breturn;", code)]
    found += [(match, match[0].replace("64", "32")) for match in re.finditer(rf"std::u?{WIDE}", code)]
    found += [(match, "nullptr") for match in re.finditer(r"device\.stream", code)]
    names: dict[str, int] = {}
    for match, new in sorted(found, key=lambda pair: pair[0].start()):
        start = match.start()
        begin = text.rfind("\n", 0, start) + 1
        line = text[begin : text.index("\n", start)]
        column = start - begin - (len(line) - len(line.lstrip()))
        name = f"{file}: {line.strip()} [{column}: {match[0]} -> {new}]"
        names[name] = names.get(name, 0) + 1
        yield Bug(file, start, match[0], new, name if names[name] == 1 else f"{name} ({names[name]})")


def _without_comments(text: str) -> str:
    """The same length, with blanks for comments, strings, preprocessor lines and static assertions."""
    pattern = r'//[^\n]*|"[^"\n]*"|^#[^\n]*|^ *static_assert[^\n]*'
    return re.sub(pattern, lambda match: " " * len(match[0]), text, flags=re.MULTILINE)
