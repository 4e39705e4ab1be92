"""One run, judged by several tests."""

import pytest
from judged import Judged, make_judged


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    return make_judged(tmp_path_factory.mktemp("judged"))
