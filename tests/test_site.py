"""The documentation site: it builds without a warning, loads nothing from outside, can be searched, and is in reading order."""
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("myst_nb")
sys.path.insert(0, str(ROOT / "tools"))
import docs # noqa: E402

pytestmark = pytest.mark.xdist_group("site") # one site for all


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site") / "html"
    before = (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8")
    done = subprocess.run([sys.executable, "tools/docs.py", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    assert (ROOT / "nbs/sidebar.yml").read_text(encoding="utf-8") == before, "nbs/sidebar.yml was out of date: commit what tools/docs.py wrote"
    return out


def test_nothing_comes_from_outside(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            found = re.search(r"(?:src|href)=[\"']?((?:https?:)?//[^\"' >]+)", tag)
            assert not found, f"{path.name} loads {found[1]}"
        assert "@import" not in text


def test_every_notebook_has_its_page_in_reading_order(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    tree = text[text.index("sidebar-tree"):]
    wanted = [p.stem for paths in docs.groups().values() for p in paths if p.stem != "index"]
    places = [tree.find(f'href="{stem}.html"') for stem in wanted]
    assert -1 not in places and places == sorted(places)
    assert sorted(wanted) == sorted(p.stem for p in (ROOT / "nbs").glob("*.ipynb") if p.stem != "index")
    captions = re.findall(r'caption-text">([^<]+)', tree)
    assert captions == [*docs.groups(), "API"]


def test_search_index_knows_functions_and_words(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    for term in ("compact_gcn", "hyperedg", "retent"): assert term in index, term


def test_api_pages_carry_signature_parameters_and_source(site):
    text = re.sub(r"<[^>]+>", "", page := (site / "api/models.student.html").read_text(encoding="utf-8"))
    assert "def compact_gcn(" in text and "sparse edge weights" in text and "Return one layer of CompactGCN" in text
    for target, name in re.findall(r'href="\.\./([\w.]+)\.html#def-(\w+)"', page): assert f'id="def-{name}"' in (site / f"{target}.html").read_text(encoding="utf-8")


def test_equations_are_mathml_and_code_keeps_its_dollars(site):
    text = (site / "36_models.student.html").read_text(encoding="utf-8")
    assert text.count("<math") > 10 and "$$" not in text
    assert docs.mathml("`$x$` and $x_1$ and $HOME") == "`$x$` and " + docs.mathml("$x_1$") + " and $HOME"
    assert "<msub>" in docs.mathml("$x_1$")


HOSTILE = ["```{include} secret.txt\n```", "`{include} secret.txt`", "<script>window.pwned = 1</script>", "{download}`secret.txt`",
           "<img src=x onerror='window.pwned = 1'>", "[a](javascript:alert(1))", "| a |\n|---|\n| ``` |", "```{raw} html\n<script>window.pwned = 1</script>\n```",
           "$\\frac$", "<iframe src='secret.txt'></iframe>", "```{eval-rst}\n.. include:: secret.txt\n```", "# a heading", "`` ` ``"]


def test_names_from_data_do_not_act_on_a_page(tmp_path):
    "Whatever a data set is called, its page shows the name: it includes no file and runs no script."
    from nbformat import v4, writes
    out = lambda **data: v4.new_output("display_data", data={k.replace("_", "/"): v for k, v in data.items()})
    outputs = [o for h in HOSTILE for o in (out(text_markdown=f"First on {h} is **x**", text_plain="x"), out(text_plain=h), v4.new_output("stream", text=h),
                                            out(text_html=f"<table><tr><td>{h}</td></tr></table>", text_plain=repr(h)))]
    outputs += [out(text_markdown="[the map](map.ipynb)"), out(application_javascript="window.pwned = 1")]
    nb = v4.new_notebook(cells=[v4.new_markdown_cell("# Title\n\n> line"), v4.new_code_cell("1", outputs=outputs)])
    (tmp_path / "hostile.ipynb").write_text(writes(nb), encoding="utf-8")
    (pages := tmp_path / "pages").mkdir()
    (pages / "index.ipynb").write_text(docs.json.dumps(docs.page(tmp_path / "hostile.ipynb")), encoding="utf-8")
    for name, text in (("secret.txt", "THE-SECRET"), ("conf.py", docs.CONF), ("site.css", "")): (pages / name).write_text(text)
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(pages), str(tmp_path / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    text = (tmp_path / "html/index.html").read_text(encoding="utf-8")
    body = text[text.index("<article"):text.index("</article>")]
    assert "THE-SECRET" not in body and "First on" in body and "<strong>x</strong>" in body and 'href="map.html"' in body
    assert not re.search(r"<(script|iframe|img)\b|<[^>]*\sonerror|javascript:[^<]*\"|download=", body)
    assert body.count("window.pwned") >= 6 and "{include}" in body # shown as text


def test_sidebar_file_names_notebooks_that_exist():
    for name in re.findall(r"- (\S+\.ipynb)", docs.sidebar()): assert (ROOT / "nbs" / name).exists()
    assert docs.sidebar().count(".ipynb") == len(list((ROOT / "nbs").glob("*.ipynb")))


def test_own_data_example_runs_as_written(tmp_path):
    "The README's lines, on a small CSV."
    from sharp_distill.data.interactions import make_sample
    rows = make_sample(n_users=120, n_items=60).to_frame()[["user_id", "item_id", "review", "rating"]]
    rows.replace({"user_id": {rows["user_id"][0]: "u1"}}).to_csv(tmp_path / "my_reviews.csv", index=False)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "SHARP_DISTILL_QUIET": "1", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"u1 .*book\d{4}", done.stdout)) == 10 and (tmp_path / "student" / "student.safetensors").exists()
