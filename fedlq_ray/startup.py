"""What must happen before libraries are imported: the `fedlq` command and Ray's workers import this module first.

Python, or Ray, puts the working directory first in sys.path, so that a file there, such as queue.py, hides Python's own
module or a library from every other library. It belongs last. In a program that calls `simulate` nothing happens here.
"""

import os
import sys
from contextlib import suppress


def make_importable(folder: str) -> None:
    """Let `module:attribute` paths find modules in `folder` (the user's working directory), after all libraries."""
    sys.path[:] = [*(path for path in sys.path if path not in ("", folder)), folder]


def _begin() -> None:
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program == "fedlq" or sys.argv and sys.argv[0].endswith(os.path.join("cli", "__main__.py")):
        if sys.getfilesystemencoding() == "ascii":  # names of files could not be written; UTF-8 mode has all
            os.environ["PYTHONUTF8"] = "1"  # for Ray's processes
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        with suppress(FileNotFoundError):  # it has been removed
            make_importable(os.getcwd())
    elif program == "default_worker.py":  # Ray has put its driver's working directory first
        make_importable(sys.path[0])


_begin()
