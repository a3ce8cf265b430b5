"""The explorer: finished runs opened again, those that cannot be, one more value, other moments, and the whole in JupyterLab."""
import contextlib
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
TINY = dict(split="random", emb_dim=16, teacher_emb_dim=16, epochs=1, teacher_epochs=3, models="popularity,lightgcn")


def finish(cfg): # -> The run's folder
    "Do a run and store it, as `run.ipynb` does."
    from sharp_distill.experiments.run import RunFolder, fit_models, latency_frame, prepare, run_id, run_record
    ready = prepare(cfg)
    run = RunFolder(cfg, run_id(ready, cfg))
    fitted = fit_models(ready, cfg, run)
    record = run_record(ready, fitted, cfg, latency_frame(fitted, fitted.last.split, 10, 10), 1.)
    return run.publish(record, fitted.student, fitted.last)


@pytest.fixture(scope="module")
def finished(tmp_path_factory): # The folder of data and outputs, a user, the run's folder
    "A small data set with a hostile review and a hostile title, and one finished run of it, started on the path."
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.experiments.run import RunConfig
    folder = tmp_path_factory.mktemp("explore")
    books = make_sample(n_users=150, n_items=80).to_frame()
    books.loc[books.user_id == books.user_id.iloc[0], "review"] = HOSTILE
    books.loc[books.item_id == books.item_id.value_counts().index[0], "item_title"] = HOSTILE
    books.to_csv(folder / "books.csv", index=False)
    cfg = RunConfig.from_dict(dict(TINY, dataset=str(folder / "books.csv"), output_dir=str(folder / "outputs")))
    return folder, str(books.user_id.iloc[0]), finish(cfg)


@pytest.fixture(scope="module")
def own(tmp_path_factory): # The folder of data and outputs, the run's folder
    "A finished run in time of a file with columns and ids of one's own, started on a relative path."
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.experiments.run import RunConfig
    folder = tmp_path_factory.mktemp("own")
    shop = make_sample(seed=1, n_users=120, n_items=70).to_frame()
    table = dict(kunde=7000 + shop.user_id.factorize()[0], ware=900 + shop.item_id.factorize()[0], sterne=shop.rating,
                 wann=shop.timestamp, text=shop.review)
    shop.assign(**table)[list(table)].to_csv(folder / "mine.csv", index=False)
    columns = "user_id=kunde,item_id=ware,rating=sterne,timestamp=wann,review=text"
    with contextlib.chdir(folder):
        cfg = RunConfig.from_dict(dict(TINY, dataset="mine.csv", columns=columns, min_rating=2., split="temporal",
                                       teacher_half_life=90., models="popularity", output_dir="outputs"))
        return folder, folder / finish(cfg)


def widgets(box): # Every widget of the explorer
    yield box
    for child in getattr(box, "children", ()): yield from widgets(child)


def pages(app): return [v for w in widgets(app) if isinstance(v := getattr(w, "value", None), str)]


def test_a_finished_run_is_opened_with_its_student(finished, monkeypatch):
    "The record holds a name, not a path; this computer has noted where the file lies. Nothing from data can run."
    from sharp_distill.app import explorer as e
    from sharp_distill.serve.recommender import Recommender
    folder, user, at = finished
    monkeypatch.delenv("SHARP_DISTILL_DATA", raising=False)
    assert str(folder) not in (at / "run.json").read_text()
    strange = folder / "outputs" / "<img src=x>" / "<script>cut"
    strange.mkdir(parents=True)
    (strange / "run.json").write_text("{")
    app = e.explore(folder / "outputs")
    app.start()
    shutil.rmtree(strange.parent)
    stored, ex = Recommender.load(at / "student"), app.ex
    assert list(app.skipped) == ["<img src=x>, <script>cut"] and np.array_equal(ex.rec.user_emb, stored.user_emb)
    assert list(ex.scorers) == ["popularity", "lightgcn", "teacher", "student"]
    search = app.children[2].children[0].children[0].children[0]
    search.value = user
    assert any("&lt;script&gt;window" in p for p in pages(app)) and any("&lt;img src=x&gt;" in p for p in pages(app))
    for p in pages(app): assert "<script" not in p and "<img" not in p


def test_a_run_of_ones_own_file_is_opened_from_anywhere(own, monkeypatch, tmp_path):
    "Found by a path that was relative, read with its columns and ratings, shown with its ids; nothing is distilled again."
    from sharp_distill.app import explorer as e
    from sharp_distill.models import registry
    from sharp_distill.serve.recommender import Recommender
    folder, at = own
    monkeypatch.delenv("SHARP_DISTILL_DATA", raising=False)
    monkeypatch.setattr(registry, "distill", None)
    monkeypatch.chdir(tmp_path)
    app = e.explore(folder / "outputs")
    app.start()
    ex, stored = app.ex, Recommender.load(at / "student")
    assert app.skipped == {} and app.children[0].children[0].value == f"mine, {at.name}"
    assert ex.config.data.min_rating == 2 and ex.prepared.data.rating.min() >= 2
    assert np.array_equal(ex.rec.user_emb, stored.user_emb) and ex.prepared.split.protocol == "temporal"
    panel, user = app.children[2].children[0], str(ex.prepared.data.user_ids[3])
    panel.children[0].children[0].value = user
    assert user.startswith("7") and panel.children[0].children[1].value == user
    ids = {str(i) for i in ex.prepared.data.item_ids}
    assert all(i.startswith("9") for i in ids) and sum(f"<td>{i}</td>" in panel.children[1].value for i in ids) > 0
    app.children[2].children[1].children[0].children[2].children[0].value = True # choose an item as a new user
    assert " ms" in app.children[2].children[1].children[1].value


def test_the_notebook_opens_a_run_on_a_path(finished, monkeypatch):
    from conftest import execute
    monkeypatch.delenv("SHARP_DISTILL_DATA", raising=False)
    cells = execute(ROOT / "nbs/explore.ipynb", dict(output_dir=str(finished[0] / "outputs"), models="popularity"))
    said = "".join("".join(o.get("text", "")) for c in cells for o in c.get("outputs", []))
    assert "held-out items found in ten: popularity" in said and "left out" not in said and "no moments" in said


def cut(path, share=.5): path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


BROKEN = {"gone": ("its data are not here", lambda data, run: data.rename(data.with_name("moved.csv"))),
          "changed": ("no longer those of this run", lambda data, run: data.write_text(
              data.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")[0], encoding="utf-8")),
          "unreadable": ("books.csv", lambda data, run: data.write_bytes(b"\xff\x00" * 50)),
          "no model": ("holds no student", lambda data, run: shutil.rmtree(run / "student")),
          "a cut model": ("student", lambda data, run: cut(run / "student" / "student.safetensors")),
          "a cut record": ("not valid JSON", lambda data, run: cut(run / "run.json")),
          "a strange record": ("not as a run leaves it", lambda data, run: (run / "run.json").write_text(
              json.dumps(json.loads((run / "run.json").read_text()) | dict(config=[]))))}


@pytest.mark.parametrize("case", BROKEN)
def test_a_run_that_cannot_be_opened_is_skipped_with_a_line(finished, own, monkeypatch, tmp_path, case):
    "It is the newest, so it is tried first; the other one opens."
    from sharp_distill.app import explorer as e
    (word, spoil), (folder, _, at), (_, other) = BROKEN[case], finished, own
    monkeypatch.delenv("SHARP_DISTILL_DATA", raising=False)
    path, content = folder / "books.csv", (folder / "books.csv").read_bytes()
    bad, good = tmp_path / "books" / at.name, tmp_path / "mine" / other.name
    shutil.copytree(at, bad); shutil.copytree(other, good)
    try:
        spoil(path, bad)
        os.utime(good / "run.json", (1, 1))
        app = e.explore(tmp_path, "popularity")
        app.start()
    finally:
        path.write_bytes(content)
        (folder / "moved.csv").unlink(missing_ok=True)
    why = app.skipped[f"books, {at.name}"]
    assert len(app.skipped) == 1 and word in why and "\n" not in why and len(why) < 400, why
    assert app.ex.config.data.dataset_name == "mine" and f"books, {at.name}" in app.children[1].value


@pytest.mark.parametrize("split", ["random", "temporal"])
def test_one_more_value_joins_the_curve_and_stays(finished, own, tmp_path, split):
    "The button trains it on validation alone; the ledger and the test part are left as they are."
    from sharp_distill.app import explorer as e
    class Closed: # A part of which no more than its times can be read
        def __init__(self, rows): self.timestamp = rows.timestamp
        def __len__(self): return len(self.timestamp)
        def __getattr__(self, name): raise AssertionError(f"test.{name} was read")
    out, at = (finished[0] / "outputs", finished[2]) if split == "random" else (own[0] / "outputs", own[1])
    run = tmp_path / at.parent.name / at.name
    shutil.copytree(at, run); (tmp_path / "leaderboard").mkdir(); shutil.copy(out / "leaderboard/ledger.json", tmp_path / "leaderboard")
    ledger = (tmp_path / "leaderboard/ledger.json").read_text()
    app = e.explore(tmp_path, "popularity")
    app.start()
    split = app.ex.fits.split
    object.__setattr__(split, "test", Closed(split.test))
    panel = app.children[2].children[3].children[0]
    (option, value, go, bar, said), _, numbers = panel.children[0].children, *panel.children[1:]
    for name, text in (("emb_dim", "24"), ("teacher_n_layers", "1")):
        option.value, value.value = name, text
        before = numbers.value
        go.click()
        assert "trained in" in said.value and bar.value == 1 and numbers.value.count("<tr") == before.count("<tr") + 1
    option.value, value.value = "emb_dim", "many"
    go.click()
    assert "whole numbers" in said.value and not go.disabled
    assert (tmp_path / "leaderboard/ledger.json").read_text() == ledger
    again = e.explore(tmp_path, "popularity")
    again.start()
    assert again.children[2].children[3].children[0].children[2].value == numbers.value
    kept = json.loads((run / "values.json").read_text())["points"]
    assert [(p["option"], p["value"]) for p in kept] == [("emb_dim", 24), ("teacher_n_layers", 1)]


def test_the_slider_asks_the_student_at_a_moment(finished, own):
    "Rows before the moment count and are shown with their dates, rows at or after it do not; without moments it is grey."
    from dataclasses import replace
    from sharp_distill.app import explorer_data as d
    from sharp_distill.app.explorer import user_panel
    label, (cfg, folder) = next(iter(d.choices(own[0] / "outputs")[0].items()))
    ex = d.open_run(cfg, folder, "popularity")
    test = ex.prepared.split.test
    buyer = str(test.user_ids[np.bincount(test.user_idx).argmax()])
    def ask(ex, k):
        panel = user_panel(ex)
        panel.children[0].children[0].value = buyer
        at, then = panel.children[0].children[2], panel.children[2]
        at.index = k
        return panel.children[1].value, then.value
    moments = d.moments(ex)
    start, half, end = (ask(ex, k) for k in (0, len(moments) // 2, len(moments) - 1))
    assert len({start, half, end}) == 3 and d.day(moments[-1]) in end[1]
    dates = [d.day(t) for t in test.timestamp[test.user_idx == d.user_number(ex, buyer)]]
    assert all(f'<td class="day">{t}</td>' in end[0] for t in dates) and end[0].count('<tr class="new">') == len(dates)
    late = test.timestamp >= moments[len(moments) // 2]
    assert 0 < late.sum() < len(test)
    other = replace(test, item_idx=np.where(late, (test.item_idx + 7) % test.n_items, test.item_idx))
    poisoned = replace(ex, prepared=replace(ex.prepared, split=replace(ex.prepared.split, test=other)))
    bare = lambda page: page[1].replace(" <b>chosen later</b>", "").replace('class="hit"', 'class=""')
    same = lambda a, b: [r.split("<td>")[2] for r in bare(a).split("<tr")[2:]] == [r.split("<td>")[2] for r in bare(b).split("<tr")[2:]]
    assert same(ask(poisoned, len(moments) // 2), half) and not same(ask(poisoned, len(moments) - 1), end)
    random = d.open_run(*next(iter(d.choices(finished[0] / "outputs")[0].values())), "popularity")
    panel = user_panel(random)
    at, then = panel.children[0].children[2], panel.children[2]
    assert at.disabled and "split is random" in then.value


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
