"""Every notebook that exports a module runs top to bottom, each in a process of its own; run notebooks go through papermill in test_run.py."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p.stem[0].isdigit() or p.stem == "index"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    env = {**os.environ, "MPLBACKEND": "agg", "SHARP_DISTILL_QUIET": "1"}
    done = subprocess.run([Path(sys.executable).parent / "nbdev_test", path, "--n-workers", "0"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Success" in done.stdout + done.stderr, (done.stdout + done.stderr)[-3000:]
