"""The run notebook through papermill at small size: a complete record, and mistakes that stop it in one line."""
import subprocess
import sys
from pathlib import Path

import pytest

from sharp_distill.experiments.record import check_run

ROOT = Path(__file__).parent.parent
SMALL = ["-p", "epochs", "3", "-p", "student_epochs", "1", "-p", "emb_dim", "32", "-p", "n_queries", "10"]


def papermill(out, *parameters):
    "Run the notebook with the environment's own papermill."
    command = [sys.executable, "-m", "papermill", "run.ipynb", str(out), *parameters]
    return subprocess.run(command, cwd=ROOT / "nbs", capture_output=True, text=True)


@pytest.fixture(scope="module")
def completed_trials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = papermill(folder / "out.ipynb", "-p", "output_dir", str(folder / "outputs"), *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    return next((folder / "outputs").glob("sample/*/run.json"))


def test_record_is_complete(completed_trials):
    record = check_run(completed_trials)
    assert record["config"]["epochs"] == 3 and record["split"]["protocol"] == "random"
    ndcg = {name: m["metrics"]["NDCG@10"]["mean"] for name, m in record["models"].items()}
    assert ndcg["teacher"] > 2 * ndcg["popularity"] and ndcg["student"] > 2 * ndcg["popularity"]


def test_figures_and_student_are_there(completed_trials):
    names = {p.name for p in completed_trials.parent.iterdir()}
    for figure in ("quality", "speed", "quality_against_latency", "retention", "sensitivity", "training"): assert {f"{figure}.png", f"{figure}.csv"} <= names
    from sharp_distill.serve.recommender import load_recommender, recommend
    rec = load_recommender(completed_trials.parent / "student")
    assert len(recommend(rec, [rec.user_ids[0]], k=5)) == 5


def test_a_failing_run_leaves_earlier_outputs(completed_trials):
    before = {p: p.read_bytes() for p in completed_trials.parent.rglob("*") if p.is_file()}
    out = completed_trials.parent.parent.parent
    done = papermill(out / "bad.ipynb", "-p", "output_dir", str(out), "-p", "epocs", "3")
    assert done.returncode != 0 and "'epocs' is not an option of RunConfig. Did you mean 'epochs'?" in done.stderr
    assert before == {p: p.read_bytes() for p in completed_trials.parent.rglob("*") if p.is_file()}


@pytest.mark.parametrize("parameter, value, line", [("dataset", "smaple", "sample"), ("k", "0", "k is 0"), ("encoder", "no/such/encoder", "no/such/encoder"), ("k_core", "500", "500")])
def test_mistakes_stop_in_one_line(tmp_path, parameter, value, line):
    done = papermill(tmp_path / "out.ipynb", "-p", "output_dir", str(tmp_path), "-p", parameter, value)
    last = [x for x in done.stderr.splitlines() if x.startswith("UserError")]
    assert done.returncode != 0 and last and line in last[-1], done.stderr[-1500:]


def test_parameters_are_documented():
    done = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", "run.ipynb"], cwd=ROOT / "nbs", capture_output=True, text=True)
    for name in ("dataset: str", "epochs: int", "lr: float"): assert name in done.stdout


OTHERS = {"speed_report": dict(preset="quick", repeats=3, budget_s=3.0, text=False),
          "train_encoder": dict(n_windows=300, n_steps=10, adapt_steps=3, vocab_size=800),
          "encoder_report": dict(encoders="none,tfidf", regs="300,600", text_weights="1,3")}


@pytest.mark.parametrize("name", [n for n in OTHERS if (ROOT / "nbs" / f"{n}.ipynb").exists()])
def test_other_run_notebooks_at_small_size(tmp_path, name):
    given = [x for k, v in {**OTHERS[name], "output_dir": str(tmp_path)}.items() for x in ("-p", k, str(v))]
    done = subprocess.run([sys.executable, "-m", "papermill", f"{name}.ipynb", str(tmp_path / "out.ipynb"), *given], cwd=ROOT / "nbs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.rglob("*.json")), "the notebook left no record"


def test_started_beside_nbs_it_writes_into_outputs(tmp_path):
    "The document's own command has no --cwd: its results belong into outputs/, not beside the repository."
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone/nbs").symlink_to(ROOT / "nbs")
    command = [sys.executable, "-m", "papermill", "nbs/run.ipynb", "out.ipynb", "-p", "encoder", "none", "-p", "epochs", "1", "-p", "student_epochs", "1", "-p", "sensitivity", "False", "-p", "emb_dim", "8"]
    done = subprocess.run(command, cwd=tmp_path / "clone", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "clone/outputs/sample").glob("*/run.json")) and not (tmp_path / "outputs").exists()
