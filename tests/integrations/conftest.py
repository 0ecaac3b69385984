"""NeMo AutoModel is imported once, before the first test: its dependencies warn of each other then."""

import pytest

from support import peer


@pytest.fixture(scope="session", autouse=True)
def nemo_is_imported():
    peer.import_all()
