"""What unit tests of callers share."""

from collections.abc import Callable, Iterator

import pytest

from rollcall.policy import configure


@pytest.fixture
def configured() -> Iterator[Callable[..., None]]:
    """Change settings of the process' calls, as the registry may while it runs."""
    yield lambda **settings: configure(settings)
    configure({})
