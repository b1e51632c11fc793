import pytest


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """One folder with the tiny model and texts for all tests."""
    return tmp_path_factory.mktemp("home")
