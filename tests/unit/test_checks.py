"""What an error is told by."""

import pytest

from de_ray.checks import first_line, last_line


@pytest.mark.parametrize(("error", "first", "last"), [
    (ValueError("\nhere:\n  there\n\n  this \n"), "here:", "this"),
    (ValueError("this"), "this", "this"),
    (ValueError(), "ValueError", "ValueError"),
    (ValueError(" \n"), "ValueError", "ValueError"),
])
def test_errors_are_told_by_their_first_or_last_line_or_their_type(error, first, last):
    assert first_line(error) == first and last_line(error) == last
