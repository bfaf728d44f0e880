"""The terminal that progress and tables are printed on; apart from output.py, because importing rich takes time."""

import rich.console


class Console(rich.console.Console):
    """A terminal or a file; printing raises BrokenPipeError if the output is no longer read."""

    def on_broken_pipe(self) -> None:
        raise  # rich would exit the program
