"""The fake console behind a real router, and its visitors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from .fakes import FakeConsole, demo
from .harness import OWN, application


@pytest.fixture
def console(tmp_path: Path) -> FakeConsole:
    return demo(tmp_path)


@pytest.fixture
def browse(console: FakeConsole) -> Callable[[str], TestClient]:
    """A client signed in as the named account ("" for nobody); forms are sent as our own pages send them."""

    def signed_in(user: str) -> TestClient:
        client = TestClient(application(console), base_url="http://127.0.0.1", headers=OWN, follow_redirects=False)
        if user:
            client.cookies.set("murmur", console.session(user))
        return client

    return signed_in


@pytest.fixture
def admin(browse: Callable[[str], TestClient]) -> TestClient:
    return browse("ada")


@pytest.fixture
def viewer(browse: Callable[[str], TestClient]) -> TestClient:
    return browse("vera")


@pytest.fixture
def stranger(browse: Callable[[str], TestClient]) -> TestClient:
    return browse("")
