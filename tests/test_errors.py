"""What of an exception's message is one line."""

import pytest

from fedlq_ray.errors import first_line


class Broken(Exception):
    def __str__(self):
        raise ValueError


@pytest.mark.parametrize(
    ("exc", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one"),
        (ValueError("either:\n  1. this\n  2. that"), "either: 1. this"),
        (ValueError("either:"), "either"),
        (ValueError("a:\nb:\n"), "a: b"),
        (ValueError(), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (ValueError(":"), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (Broken(), "Broken"),
    ],
)
def test_a_first_line_is_never_empty_and_announces_nothing(exc, line):
    assert first_line(exc) == line
