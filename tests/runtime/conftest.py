"""A server of the tiny model, for the tests that ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import make_service, served

from qwenq.runtime.server import Service, make_app


@pytest.fixture(scope="module")
def service(tiny: Path) -> Service:
    return make_service(tiny)


@pytest.fixture(scope="module")
def address(service: Service) -> Iterator[str]:
    with served(make_app(service)) as found:
        yield found
