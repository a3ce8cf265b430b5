"""Every notebook that exports a module runs top to bottom, and its lessons hold."""
import pytest
from conftest import ROOT, execute

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if p.stem[0].isdigit())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path): execute(path)
