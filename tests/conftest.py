"""Two workers on two cores: one thread each; notebooks run inside the worker, so that libraries are imported once."""
import contextlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
if "PYTEST_XDIST_WORKER" in os.environ:  # before numpy and torch are imported
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["SHARP_DISTILL_QUIET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    "One cache for the whole session: what a test has trained or compiled, the next one finds."
    if "SHARP_DISTILL_CACHE" not in os.environ:
        os.environ["SHARP_DISTILL_CACHE"] = str(tmp_path_factory.getbasetemp().parent / "cache")


@contextlib.contextmanager
def as_it_was():
    "Undo what a notebook does to the process: its environment, working folder, figures and registered methods."
    import matplotlib.pyplot as plt
    from sharp_distill.models import registry
    from sharp_distill.plots import style
    environ, folder, methods, styles = dict(os.environ), os.getcwd(), dict(registry._METHODS), dict(style.STYLES)
    try: yield
    finally:
        os.environ.clear(); os.environ.update(environ)
        os.chdir(folder)
        for table, before in ((registry._METHODS, methods), (style.STYLES, styles)): table.clear(); table.update(before)
        plt.close("all")


def execute(path, parameters=None, folder=ROOT / "nbs"):
    "Run a notebook in this process, its parameters replaced as papermill would; return its cells with outputs."
    from fastcore.nbio import read_nb
    from execnb.shell import CaptureShell
    nb = read_nb(path)
    if parameters is not None:
        at = next(i for i, c in enumerate(nb.cells) if "parameters" in c.metadata.get("tags", []))
        nb.cells[at].source += "\n" + "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
    for cell in nb.cells:
        if cell.cell_type == "code" and "eval: false" in cell.source: cell.source = ""
    with as_it_was():
        os.chdir(folder)
        shell = CaptureShell(path)
        try: shell.run_all(nb, exc_stop=True)
        except BaseException:
            pytest.fail((shell.prettytb(fname=path) or "the notebook stopped")[-4000:], pytrace=False)
    return nb.cells


WORDS = "amp loud warm string neck bright cable pick solid cheap tone strap case tuner stand pedal".split()


def written_split(n=300, n_users=40, n_items=60):
    "What an encoder reads of a split, with drawn reviews; the last two users and items have none."
    import numpy as np
    r = np.random.default_rng(0)
    review = np.array([" ".join(r.choice(WORDS, 6)) for _ in range(n)], object)
    train = SimpleNamespace(user_idx=r.integers(0, n_users - 2, n), item_idx=r.integers(0, n_items - 2, n),
                            review=review, n_users=n_users, n_items=n_items)
    return SimpleNamespace(train=train, sha="made")


def refused(fn, *args, **kw):
    "Return the message of the UserError that must come, on one line."
    from sharp_distill.core import UserError
    with pytest.raises(UserError) as caught: fn(*args, **kw)
    said = str(caught.value)
    assert "\n" not in said and 20 < len(said) < 600, said
    return said
