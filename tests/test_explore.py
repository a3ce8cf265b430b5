"""The explorer: a finished run opened again, one whose data are gone, and the whole in JupyterLab."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.xdist_group("explore") # one training for all
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parent.parent
HOSTILE = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> A quiet triumph."
TINY = dict(emb_dim=16, teacher_emb_dim=16, epochs=1, teacher_epochs=3, models="popularity,lightgcn")


@pytest.fixture(scope="module")
def finished(tmp_path_factory): # The folder of data and outputs, a user, the run's folder
    "A small data set with a hostile review and a hostile title, and one finished run of it, started on the path."
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.experiments.run import (
        RunConfig, RunFolder, fit_models, latency_frame, prepare, run_id, run_record)
    folder = tmp_path_factory.mktemp("explore")
    books = make_sample(n_users=150, n_items=80).to_frame()
    books.loc[books.user_id == books.user_id.iloc[0], "review"] = HOSTILE
    books.loc[books.item_id == books.item_id.value_counts().index[0], "item_title"] = HOSTILE
    books.to_csv(folder / "books.csv", index=False)
    cfg = RunConfig.from_dict(dict(TINY, dataset=str(folder / "books.csv"), output_dir=str(folder / "outputs")))
    ready = prepare(cfg)
    fitted = fit_models(ready, cfg)
    record = run_record(ready, fitted, cfg, latency_frame(fitted, ready.split, 10, 10), 1.)
    at = RunFolder(cfg, run_id(ready, cfg)).publish(record, fitted.student, ready)
    return folder, str(books.user_id.iloc[0]), at


def test_a_finished_run_is_opened_with_its_student(finished, monkeypatch):
    "The record holds a name, not a path; this computer has noted where the file lies."
    from sharp_distill.app import explorer as e
    from sharp_distill.serve.recommender import Recommender
    folder, user, at = finished
    monkeypatch.delenv("SHARP_DISTILL_DATA", raising=False)
    assert str(folder) not in (at / "run.json").read_text()
    app = e.explore(folder / "outputs")
    app.start()
    stored, ex = Recommender.load(at / "student"), app.ex
    assert app.skipped == {} and np.array_equal(ex.rec.user_emb, stored.user_emb)
    assert list(ex.scorers) == ["popularity", "lightgcn", "teacher", "student"]
    search = app.children[1].children[0].children[0].children[0]
    search.value = user
    pages = [w.value for w in app.children[1].children[0].children[1:] if isinstance(w.value, str)]
    pages += [app.children[1].children[1].children[1].value, app.children[1].children[2].value]
    assert any("&lt;script" in p for p in pages)
    for p in pages: assert "<script" not in p and "<img" not in p


def test_the_notebook_opens_a_run_on_a_path(finished, monkeypatch):
    from conftest import execute
    monkeypatch.delenv("SHARP_DISTILL_DATA", raising=False)
    cells = execute(ROOT / "nbs/explore.ipynb", dict(output_dir=str(finished[0] / "outputs"), models="popularity"))
    said = "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))
    assert "held-out items found in ten: popularity" in said and "left out" not in said


@pytest.mark.parametrize("what, word", [("gone", "'books' is not a known data set"), ("changed", "no longer those of this run")])
def test_a_run_without_its_data_is_skipped_with_a_word(finished, monkeypatch, what, word):
    from sharp_distill.app import explorer as e
    from sharp_distill.experiments.record import check_record
    from sharp_distill.experiments.run import remember_file
    folder, _, at = finished
    monkeypatch.delenv("SHARP_DISTILL_DATA", raising=False)
    path, content = folder / "books.csv", (folder / "books.csv").read_bytes()
    (folder / "same.csv").write_bytes(content)
    try:
        if what == "gone": path.unlink()
        else: path.write_bytes(content[:content[:-1].rfind(b"\n") + 1])
        found = e.choices(folder / "outputs")
        first = next(iter(found))
        here = found[first][0].replace(dataset=str(folder / "same.csv"), models="popularity")
        monkeypatch.setattr(e, "choices", lambda output_dir: {first: found[first], "here": (here, at)})
        app = e.explore(folder / "outputs")
        app.start()
    finally:
        path.write_bytes(content)
        remember_file(check_record(at / "run.json")["data_sha"], str(path)) # the other file was noted meanwhile
    assert list(app.skipped) == [first] and word in app.skipped[first]
    assert app.ex is not None and app.children[0].children[0].value == "here"


@pytest.fixture(scope="module")
def lab(finished):
    "JupyterLab on a copy of the notebook; yields its address."
    if not CHROMIUM: pytest.skip("no chromium on this machine: the browser test needs one")
    pytest.importorskip("playwright")
    folder = finished[0]
    nb = json.loads((ROOT / "nbs/explore.ipynb").read_text(encoding="utf-8"))
    for c in nb["cells"]:
        c["source"] = "".join(c["source"]).replace('output_dir: str = "../outputs"', 'output_dir: str = "outputs"')
        if c["cell_type"] == "code": c["outputs"] = []
    (folder / "explore.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {**os.environ, "SHARP_DISTILL_DATA": str(folder), "SHARP_DISTILL_QUIET": "1", "PYTHONPATH": str(ROOT),
           "JUPYTER_CONFIG_DIR": str(folder / "config"), "IPYTHONDIR": str(folder / "ipython")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--IdentityProvider.token=t",
               "--allow-root", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0: break
        time.sleep(.25)
    yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?reset&token=t"
    server.terminate()
    server.wait(20)


IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
CHANGED = "([old, el]) => el.innerText !== old"


@pytest.mark.slow # a browser
def test_explorer_in_the_browser(lab, finished, tmp_path):
    from playwright.sync_api import sync_playwright
    shots = Path(os.environ.get("SHARP_DISTILL_SHOTS", tmp_path))
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport=dict(width=1500, height=1300)), []
        page.on("pageerror", lambda e: errors.append(str(e)))
        unwanted = lambda m: m.type == "error" and "Failed to load resource" not in m.text
        page.on("console", lambda m: errors.append(m.text) if unwanted(m) else None)
        page.goto(lab)
        page.wait_for_function(IDLE, timeout=120_000)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_selector(".lm-TabBar-tab:has-text('You')", timeout=240_000)
        page.wait_for_function(IDLE, timeout=240_000)
        app = page.locator(".jupyter-widgets.widget-tab").first
        app.scroll_into_view_if_needed()
        lists = app.locator(".sd table").nth(1)
        before = lists.inner_text()
        options = app.locator(".widget-select select option")
        app.locator(".widget-select select").select_option(index=options.count() - 1)
        page.wait_for_function(CHANGED, arg=[before, lists.element_handle()], timeout=60_000)
        app.locator(".widget-text input").first.fill(finished[1])
        app.locator(".sd td", has_text="<script>window.pwned").first.wait_for(timeout=60_000)
        page.wait_for_timeout(1000)
        page.screenshot(path=shots / "explorer_user.png")
        app.locator(".lm-TabBar-tab", has_text="You").click()
        answer = app.locator(".sd table:visible").first
        answer.wait_for()
        before = answer.inner_text()
        app.locator(".widget-checkbox:visible input").nth(1).check()
        shown = app.locator(".widget-html-content:visible").last.element_handle()
        page.wait_for_function(CHANGED, arg=[before, shown], timeout=60_000)
        page.wait_for_timeout(500)
        assert " ms" in app.locator(".sd table:visible").first.inner_text()
        page.screenshot(path=shots / "explorer_you.png")
        for tab in ("Map", "Hyperparameters"):
            app.locator(".lm-TabBar-tab", has_text=tab).click()
            page.wait_for_timeout(500)
            page.screenshot(path=shots / f"explorer_{tab.lower()}.png")
        assert page.evaluate("() => window.pwned") is None
        assert not errors, errors
        browser.close()
