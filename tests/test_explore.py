"""The explorer as a person meets it: JupyterLab in a browser, a completed_trials run, a name typed, an item ticked, and a hostile review shown as text."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).parent.parent
HOSTILE = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'> A quiet triumph."


@pytest.fixture(scope="module")
def completed_trials(tmp_path_factory):
    "A small shop with a hostile review, a hostile title, and one completed_trials run."
    os.environ["SHARP_DISTILL_QUIET"] = "1"
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.experiments.run import RunConfig, RunFolder, fit_models, latency_frame, prepare, run_id, run_record
    folder = tmp_path_factory.mktemp("explore")
    books = make_sample(n_users=200, n_items=80).to_frame()
    books.loc[books.user_id == books.user_id.iloc[0], "review"] = HOSTILE
    books.loc[books.item_id == books.item_id.value_counts().index[0], "item_title"] = HOSTILE
    books.to_csv(folder / "books.csv", index=False)
    cfg = RunConfig(dataset=str(folder / "books.csv"), emb_dim=16, teacher_dim=16, epochs=3, student_epochs=1, output_dir=str(folder / "outputs"))
    ready = prepare(cfg)
    fitted = fit_models(ready, cfg)
    RunFolder(cfg, run_id(ready, cfg)).publish(run_record(ready, fitted, cfg, latency_frame(fitted, ready.split, 10, 10), 1.), fitted.student, ready)
    return folder, str(books.user_id.iloc[0])


@pytest.mark.parametrize("encoder", ["tfidf", "shipped", "tfidf+shipped"])
def test_new_texts_are_read_as_in_training(encoder):
    import numpy as np
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.text.reviews import encode_reviews
    from sharp_distill.text.words import train_reviews
    from sharp_distill.data.split import make_split
    split = make_split(make_sample(n_users=60, n_items=40), "random", 0)
    coded, texts = encode_reviews(split, encoder), train_reviews(split)
    for u in range(8): assert np.allclose(coded.text_encoder([texts.text[j] for j in np.flatnonzero(texts.user_idx == u)]), coded.user[u], atol=2e-3), u


def test_pages_escape_what_the_data_holds(completed_trials, monkeypatch):
    from sharp_distill.app import explorer as e
    folder, user = completed_trials
    monkeypatch.setenv("SHARP_DISTILL_DATA", str(folder))
    cfg, run = next(iter(e.choices(folder / "outputs").values()))
    ex = e.open_run(cfg, run)
    top, ms = e.cold_start_list(ex, [0], HOSTILE)
    hostile = int((ex.titles == HOSTILE).argmax())
    pages = [e.history_html(e.history(ex, user)), e.lists_html(e.side_by_side(ex, user)), e.why_html(ex, user, hostile), e.cold_start_html(top, ms), e.map_svg(e.item_map(ex))]
    assert any("&lt;script" in p for p in pages)
    for p in pages: assert "<script" not in p and "<img" not in p


@pytest.fixture(scope="module")
def lab(completed_trials):
    "JupyterLab on a copy of the notebook; yields its address."
    if not CHROMIUM: pytest.skip("no chromium on this machine: the browser test needs one")
    pytest.importorskip("playwright")
    folder, _ = completed_trials
    nb = json.loads((ROOT / "nbs/explore.ipynb").read_text(encoding="utf-8"))
    for c in nb["cells"]: c["source"] = "".join(c["source"]).replace('output_dir: str = "../outputs"', 'output_dir: str = "outputs"')
    for c in nb["cells"]: c.update(outputs=[]) if c["cell_type"] == "code" else None
    (folder / "explore.ipynb").write_text(json.dumps(nb), encoding="utf-8")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    env = {**os.environ, "SHARP_DISTILL_DATA": str(folder), "SHARP_DISTILL_QUIET": "1", "PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(folder / "config"), "IPYTHONDIR": str(folder / "ipython")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--IdentityProvider.token=t", "--allow-root", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0: break
        time.sleep(.25)
    yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?reset&token=t"
    server.terminate()
    server.wait(20)


def test_explorer_in_the_browser(lab, completed_trials, tmp_path):
    from playwright.sync_api import sync_playwright
    shots = Path(os.environ.get("SHARP_DISTILL_SHOTS", tmp_path))
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport=dict(width=1500, height=1300)), []
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" and "Failed to load resource" not in m.text else None)
        page.goto(lab)
        page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=120_000)
        page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        page.wait_for_selector(".lm-TabBar-tab:has-text('You')", timeout=240_000)
        page.wait_for_function("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status === 'idle'", timeout=240_000)
        app = page.locator(".jupyter-widgets.widget-tab").first
        app.scroll_into_view_if_needed()
        lists = app.locator(".sd table").nth(1)
        before = lists.inner_text()
        options = app.locator(".widget-select select option")
        app.locator(".widget-select select").select_option(index=options.count() - 1)
        page.wait_for_function("([old, el]) => el.innerText !== old", arg=[before, lists.element_handle()], timeout=60_000)
        app.locator(".widget-text input").first.fill(completed_trials[1])
        app.locator(".sd td", has_text="<script>window.pwned").first.wait_for(timeout=60_000)
        page.wait_for_timeout(1000)
        page.screenshot(path=shots / "explorer_person.png")
        app.locator(".lm-TabBar-tab", has_text="You").click()
        answer = app.locator(".sd table:visible").first
        answer.wait_for()
        before = answer.inner_text()
        app.locator(".widget-checkbox:visible input").nth(1).check()
        page.wait_for_function("([old, el]) => el.innerText !== old", arg=[before, app.locator(".widget-html-content:visible").last.element_handle()], timeout=60_000)
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
