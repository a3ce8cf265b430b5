"""Two workers on two cores: one thread each, and tests that share a costly fixture stay on one worker."""
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before numpy and torch are imported
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem != "test_notebooks": item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="module")
def quiet(): # No progress speed_criteria
    with pytest.MonkeyPatch.context() as m:
        m.setenv("SHARP_DISTILL_QUIET", "1")
        yield


@pytest.fixture(scope="module")
def split(): # Five hundred readers of the generated bookshop
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.data.split import make_split
    return make_split(make_sample(seed=2, n_users=500), seed=0)
