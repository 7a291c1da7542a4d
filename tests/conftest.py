"""What every test runs under: offline, one torch thread per xdist worker, no deadlines, a scale cache of its own."""

import os

# Read by libraries when they are imported: before the imports below.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A shared, slow CPU says nothing about correctness: no deadline. In CI the same examples every time.
settings.register_profile(
    "qvd",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("qvd")


@pytest.fixture(scope="session", autouse=True)
def qvd_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An empty scale cache for the session (one per worker), so that no test reads or writes the user's."""
    path = str(tmp_path_factory.mktemp("qvd-cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QVD_CACHE", path)
        yield path
