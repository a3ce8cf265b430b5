"""The console script: the forms of the user's document, help from the notebooks, one line for a mistake."""
import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sharp_distill.cli as cli
from sharp_distill.data.interactions import make_sample

ROOT = Path(__file__).parent.parent
SHELL = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})


def shell(*words, cwd=ROOT): return subprocess.run([sys.executable, "-c", "from sharp_distill.app.cli import main; main()", *words], capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def app(): return cli.build_app()


@pytest.fixture
def calls(monkeypatch):
    noted = []
    monkeypatch.setattr(cli, "run_notebook", lambda name, given, out: noted.append((name, given)) or "noted")
    return noted


@pytest.mark.parametrize("words, given", [
    ("ablation --component deberta", {"component": "deberta"}), ("ablation --component positional_encoding", {"component": "positional_encoding"}),
    ("ablation --analysis knowledge_transfer", {"analysis": "knowledge_transfer"}), ("sensitivity --param temperature --range 0.1,2.0", {"param": "temperature", "range": "0.1,2.0"}),
    ("sensitivity --param embedding_dim --values 64,128", {"param": "embedding_dim", "values": "64,128"}), ("reproduce --dataset yelp", {"datasets": "yelp"}),
    ("run --dataset yelp", {"dataset": "yelp"}), ("scalability --time-limit-s 5 --workers 2", {"time_limit_s": 5., "workers": 2})])
def test_forms_of_the_document(app, calls, words, given):
    result = SHELL.invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert calls == [(words.split()[0], given)]


def test_help_lists_every_parameter(app):
    for name in ("run", "reproduce", "ablation", "sensitivity", "scalability"):
        text = SHELL.invoke(app, [name, "--help"]).output
        for p in cli.notebook_parameters(ROOT / "nbs" / f"{name}.ipynb"):
            assert cli.option_names(p["name"], p["default"])[0].split("/")[0] in text, (name, p["name"])
        assert "<int>" in text and "default" in text


def test_script_is_declared_and_answers(tmp_path):
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    assert "sharp_distill=sharp_distill.cli:main" in ini["DEFAULT"]["console_scripts"].split()
    done = shell("datasets", cwd=tmp_path)
    assert done.returncode == 0 and "amazon_cds" in done.stdout and "made on the spot" in done.stdout


def test_a_run_from_the_shell(tmp_path):
    done = shell("ablation", "--component", "soft_labels", "--epochs", "1", "--student-epochs", "1", "--encoder", "none", "--emb-dim", "8", "--output-dir", "here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest loss" in done.stdout and list((tmp_path / "here" / "ablation").glob("sample-components.*"))
    executed = json.loads((tmp_path / "here" / "notebooks" / "ablation.ipynb").read_text())
    assert any("soft_labels" in "".join(c["source"]) for c in executed["cells"])


def test_a_table_of_ones_own_from_the_shell(tmp_path):
    data = make_sample(seed=1, n_users=150)
    rows = [f"{data.user_ids[u]};{data.item_ids[i]};{4 if row else 'vier'};d\u00e9j\u00e0 lu" for row, (u, i) in enumerate(zip(data.user_idx, data.item_idx))]
    (tmp_path / "mine.csv").write_text("\n".join(["who;what;rating;review", *rows]), encoding="cp1252")
    given = ["ablation", "--component", "soft_labels", "--epochs", "1", "--student-epochs", "1", "--encoder", "none", "--emb-dim", "8", "--output-dir", "here", "--dataset", "mine.csv"]
    done = shell(*given, cwd=tmp_path)
    assert done.returncode == 1 and "columns='user_id=NAME,item_id=NAME'" in done.stderr
    done = shell(*given, "--columns", "user_id=who,item_id=what", "--encoding", "cp1252", "--bad-rows", "skip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "here" / "ablation").glob("mine-components.json"))


def test_mistakes(app, tmp_path):
    assert SHELL.invoke(app, ["ablation", "--componnet", "deberta"]).exit_code == 2 and SHELL.invoke(app, ["run", "--epochs", "many"]).exit_code == 2
    kept = tmp_path / "notebooks" / "sensitivity.ipynb"
    kept.parent.mkdir()
    kept.write_text("an earlier run")
    done = shell("sensitivity", "--param", "temprature", "--output-dir", str(tmp_path))
    assert kept.read_text() == "an earlier run" and kept.with_name("sensitivity.unfinished.ipynb").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("sharp_distill: ")] # a dying kernel may add noise of its own
    assert done.returncode == 1 and len(said) == 1 and said[0].startswith("sharp_distill: param is 'temprature'") and "PapermillExecutionError" not in done.stderr
    (tmp_path / "file").write_text("in the way")
    done = shell("run", "--output-dir", str(tmp_path / "file"))
    assert done.returncode == 1 and "expected a folder you can write to" in done.stderr and "Traceback" not in done.stderr


def test_a_file_name_with_a_comma_is_one_data_set(tmp_path, monkeypatch):
    path = tmp_path / "reviews, mine.csv"
    path.write_text("user_id,item_id,review")
    monkeypatch.chdir(tmp_path)
    assert cli._absolute("dataset", path.name) == str(path.resolve())
