"""Setup before libraries are imported: the `fedlq` command and Ray's workers import this module first.

Python and Ray put the working directory first in sys.path, so a file there, such as queue.py, hides Python's own module
or a library from every other library. This module moves it to the end. In programs that call `simulate`, it does
nothing.
"""

import os
import sys
from contextlib import suppress


def make_importable(folder: str) -> None:
    """Lets `module:attribute` paths find modules in `folder` (the user's working directory), after all libraries."""
    sys.path[:] = [*(path for path in sys.path if path not in ("", folder)), folder]


def _begin() -> None:
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program == "fedlq" or sys.argv and sys.argv[0].endswith(os.path.join("cli", "__main__.py")):
        if sys.getfilesystemencoding() == "ascii":  # it cannot encode all file names; UTF-8 mode can
            os.environ["PYTHONUTF8"] = "1"  # for Ray's processes
            os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
        with suppress(FileNotFoundError):  # the working directory was removed
            make_importable(os.getcwd())
    elif program == "default_worker.py":  # Ray puts its driver's working directory first
        make_importable(sys.path[0])


_begin()
