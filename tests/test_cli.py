"""The command line: every parameter is an option, the forms of the README arrive, a mistake is one line."""
import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4
from typer.testing import CliRunner

import sharp_distill.app.cli as cli

ROOT = Path(__file__).parent.parent
SHELL = CliRunner(env={"COLUMNS": "160", "TERM": "dumb"})


@pytest.fixture(scope="module")
def app(): return cli.build_app()


@pytest.fixture
def calls(monkeypatch):
    noted = []
    monkeypatch.setattr(cli, "run_notebook", lambda path, given, out: noted.append((path.stem, given, out)) or "noted")
    return noted


def cli_ends(monkeypatch, *words): # -> exit status
    "Start the program with these words."
    monkeypatch.setattr(sys, "argv", ["sharp_distill", *words])
    with pytest.raises(SystemExit) as end: cli.run_cli()
    return end.value.code


@pytest.mark.parametrize("words, given", [
    ("ablation --component positional_encoding", {"component": "positional_encoding"}),
    ("sensitivity --param alpha --range 0.0,1.0", {"param": "alpha", "range": "0.0,1.0"}),
    ("scalability --time-limit-s 5 --workers 2", {"time_limit_s": 5., "workers": 2}),
    ("reproduce --dataset amazon_cds", {"datasets": "amazon_cds"})])
def test_values_arrive_in_their_types(app, calls, words, given):
    result = SHELL.invoke(app, words.split())
    assert result.exit_code == 0, result.output
    assert calls[0][:2] == (words.split()[0], given)


def test_the_executed_copy_lies_below_the_output_folder(app, calls, tmp_path):
    SHELL.invoke(app, ["run", "--output-dir", str(tmp_path)])
    SHELL.invoke(app, ["run", "--notebook", str(tmp_path / "mine.ipynb")])
    assert [c[2] for c in calls] == [tmp_path / "notebooks" / "run.ipynb", tmp_path / "mine.ipynb"]
    assert "notebook" not in calls[1][1]


def test_every_run_notebook_is_a_command_with_all_its_parameters(app):
    tagged = {p.stem for p in (ROOT / "nbs").glob("[a-z]*.ipynb") if '"parameters"' in p.read_text(encoding="utf-8")}
    assert tagged <= set(cli.run_notebooks()) | {"index"} and {"run", "explore", "train_encoder"} <= tagged
    for name, path in cli.run_notebooks().items():
        text = SHELL.invoke(app, [name, "--help"]).output
        assert cli.summary_line(path), f"{name} has no summary line"
        for p in cli.notebook_parameters(path):
            assert cli.option_names(p["name"], p["default"])[0].split("/")[0] in text, (name, p["name"])


def test_help_is_short_for_all(app):
    for words in ([], ["run"], ["datasets"]):
        short, long = (SHELL.invoke(app, [*words, h]) for h in ("-h", "--help"))
        assert short.exit_code == 0 and short.output == long.output and "-h, --help" in short.output


def test_the_script_is_declared():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    assert "sharp_distill=sharp_distill.app.cli:run_cli" in ini["DEFAULT"]["console_scripts"].split()


def test_the_module_is_the_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "sharp_distill.app.cli", "datasets"], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.returncode == 0 and "amazon_cds" in done.stdout and not done.stderr


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A folder with one run notebook, which refuses a misspelt value."
    cells = [v4.new_markdown_cell("# Toy\n\n> Is the value right?"), v4.new_code_cell("param: str = 'alpha'  # what"),
             v4.new_code_cell("from sharp_distill.core import UserError\n"
                              "if param != 'alpha': raise UserError(f'param is {param!r}: expected alpha.')")]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (tmp_path / "nbs").mkdir()
    nbformat.write(v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "nbs" / "run.ipynb")
    monkeypatch.setattr(cli, "notebook_folder", lambda: tmp_path / "nbs")
    return tmp_path


def test_a_mistake_is_one_line_and_keeps_the_earlier_run(toy, monkeypatch, capsys):
    "The one run through papermill and a kernel: what the notebook raises comes back as one line."
    kept = toy / "outputs" / "notebooks" / "run.ipynb"
    kept.parent.mkdir(parents=True)
    kept.write_text("an earlier run")
    assert cli_ends(monkeypatch, "run", "--param", "alhpa") == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sharp_distill: ")]
    assert said == ["sharp_distill: param is 'alhpa': expected alpha."]
    assert kept.read_text() == "an earlier run" and kept.with_name("run.unfinished.ipynb").exists()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    assert cli_ends(monkeypatch, "run", "--output-dir", str(tmp_path / "file")) == 1
    assert "expected one to write to" in capsys.readouterr().err


def test_installed_and_not_cloned(tmp_path):
    "Built as `pip install .` builds it, started in an empty folder: the notebooks came along, results go to that folder."
    source, lib, empty = (tmp_path / n for n in ("source", "lib", "empty"))
    source.mkdir(); empty.mkdir()
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "MANIFEST.in"): shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "sharp_distill", source / "sharp_distill", ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copytree(ROOT / "nbs", source / "nbs", ignore=lambda at, names: [n for n in names if n[0].isdigit() or n == "figures"])
    subprocess.run([sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(lib)], cwd=source, check=True, capture_output=True)
    def start(*words, program=("-m", "sharp_distill")):
        done = subprocess.run([sys.executable, *program, *words], capture_output=True, text=True, cwd=empty, env={**os.environ, "PYTHONPATH": str(lib)})
        assert done.returncode == 0, done.stderr
        return done.stdout
    commands = start("--help")
    assert all(name in commands for name in ("run", "ablation", "datasets", "lab"))
    assert "jupyter lab mine/nbs" in start("lab", "mine") and (empty / "mine" / "nbs" / "explore.ipynb").exists()
    noted = "import sharp_distill.app.cli as c; c.run_notebook = lambda path, given, out: print(path, given, out); c.run_cli()"
    said = start("leaderboard", "--build", "ease", program=("-c", noted))
    assert str(lib / "sharp_distill" / "notebooks" / "leaderboard.ipynb") in said and f"'board_dir': '{empty}/outputs/leaderboard'" in said
    assert f"{empty}/outputs/notebooks/leaderboard.ipynb" in said


def test_without_the_notebooks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.sharp_distill, "__file__", str(tmp_path / "sharp_distill" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert cli_ends(monkeypatch, "run") == 1 and "expected a clone" in capsys.readouterr().err
