"""What a compiled library was built from: setup.py writes it into the library, the loader reads it there.

It is text in the file, so that a library which does not load can be asked, too. setup.py runs this file by itself: it
needs the standard library alone.
"""

import hashlib
import json
import re
from pathlib import Path

MARK = "gdfq_ext was built from "
TEXT = re.compile(MARK.encode() + rb"(\{[^\0]*\})\0")


def sources_digest(csrc: Path, with_cuda: bool) -> str:
    """Digest of the files in `csrc` that go into a library, with CUDA kernels or without."""
    suffixes = {".h", ".cpp", *((".cu", ".cuh") if with_cuda else ())}
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*.*") if path.suffix in suffixes):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def cpp_source(stamp: dict) -> str:
    """C++ that puts `stamp` into the library."""
    return f'__attribute__((used)) static const char stamp[] = R"stamp({MARK}{json.dumps(stamp)})stamp";\n'


def read_stamp(library: Path) -> dict:
    """The stamp that was built into `library`; empty without one."""
    found = TEXT.search(library.read_bytes())
    return json.loads(found[1]) if found else {}
