"""Grids: checked before they start, skipped when completed_trials, continued when killed, one launch at a time, the same on a cluster."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sharp_distill.core import UserError, read_json, write_json
from sharp_distill.experiments.run import RunConfig
from sharp_distill.experiments.record import check_run, runs_frame
from sharp_distill.experiments.grid import CHILD, Change, LaunchConfig, job_folder, launch, make_job
from sharp_distill.experiments.search import completed_trials
from sharp_distill.experiments.studies import (
    AblationConfig, HYPERPARAMETERS, SensitivityConfig, ablation_changes, study_jobs, swept_values)

ROOT = Path(__file__).parent.parent
QUICK = RunConfig(epochs=1, student_epochs=1, emb_dim=8, encoder="none")
SMALL = dict(job=dict(n_users=250))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    "Teachers of these tests are trained here and shared among them."
    before = os.environ.get("SHARP_DISTILL_CACHE")
    os.environ["SHARP_DISTILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("SHARP_DISTILL_CACHE") if before is None else os.environ.update(SHARP_DISTILL_CACHE=before)


@pytest.fixture(scope="module")
def grid(): return [make_job(QUICK, Change("full", **SMALL)), make_job(QUICK, Change("other", student=dict(contrast="modified"), **SMALL))]


@pytest.fixture(scope="module")
def done(grid, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    bad = make_job(QUICK.replace(dataset="smaple"))
    return out, launch([*grid, bad], LaunchConfig(workers=2, output_dir=str(out)))


def test_a_failed_run_leaves_the_others(done, grid):
    out, table = done
    assert sorted(table["status"]) == ["done", "done", "failed"]
    assert "Did you mean 'sample'?" in table.loc[table["status"] == "failed", "reason"].item()
    for job in grid: assert check_run(job_folder(job, out) / "run.json")["run_id"] == job.run_id
    assert len(runs_frame(out)) == 4                                    # teacher and student of both


def test_finished_runs_are_skipped(done, grid):
    out, _ = done
    before = {p: p.read_bytes() for p in out.rglob("run.json")}
    assert set(launch(grid, LaunchConfig(output_dir=str(out)))["status"]) == {"skipped"}
    assert before == {p: p.read_bytes() for p in out.rglob("run.json")}


def test_older_and_broken_records_are_done_again(done, grid, tmp_path):
    out, _ = done
    record = read_json(job_folder(grid[0], out) / "run.json")
    for content in (json.dumps({**record, "format": 1}), json.dumps({"dataset": "sample"}), "{", "[]"):
        path = job_folder(grid[0], tmp_path) / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        assert not completed_trials(grid[0], tmp_path) and not path.exists() and path.with_suffix(".old").exists()


def child(job, out): # A run's process, as the launcher starts it
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(out)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(job.to_dict())); process.stdin.close()
    return process


def test_killed_in_the_middle_continues(tmp_path):
    job = make_job(QUICK.replace(student_epochs=60, student_lr=1e-5), Change("long", student=dict(patience=60), **SMALL))
    process, checkpoint = child(job, tmp_path), job_folder(job, tmp_path) / "student.safetensors"
    until = time.time() + 90
    while not checkpoint.exists() and process.poll() is None and time.time() < until: time.sleep(.05)
    assert checkpoint.exists(), process.stderr.read()[-2000:]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9 and not (job_folder(job, tmp_path) / "run.json").exists()
    from safetensors import safe_open
    with safe_open(checkpoint, "pt") as f: reached = len(json.loads(f.metadata()["rows"]))
    assert reached >= 1
    assert launch([job], LaunchConfig(output_dir=str(tmp_path)))["status"].item() == "done"
    assert check_run(job_folder(job, tmp_path) / "run.json")["kind"] == "job" and not checkpoint.exists()


def test_two_launches_at_once(grid, tmp_path):
    code = f"import sys; from sharp_distill.grid import *; jobs = [Job.from_dict(j) for j in {[j.to_dict() for j in grid]!r}]; print(launch(jobs, LaunchConfig(output_dir={str(tmp_path)!r}))['status'].tolist())"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "SHARP_DISTILL_QUIET": "1"}) for _ in range(2)]
    said = [p.communicate(timeout=300)[0] for p in both]
    assert sorted(s.strip().splitlines()[-1] for s in said) == ["['done', 'done']", "['skipped', 'skipped']"], said
    assert sum("waiting" in s for s in said) == 1


def test_time_limit(grid, tmp_path):
    table = launch(grid[:1], LaunchConfig(output_dir=str(tmp_path), time_limit_s=.2))
    assert table["status"].item() == "timeout" and "0.2" in table["reason"].item()


def test_the_same_grid_on_a_cluster(done, grid, tmp_path):
    from distributed import LocalCluster
    out, _ = done
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        table = launch(grid, LaunchConfig(cluster=cluster.scheduler_address, output_dir=str(tmp_path)))
    assert table["status"].tolist() == ["done", "done"]
    for job in grid: # the same numbers as on this machine
        here, there = (read_json(job_folder(job, o) / "run.json")["models"]["student"]["metrics"] for o in (out, tmp_path))
        assert here == there


def test_bad_launches(tmp_path):
    for bad, word in ((dict(workers=0), "workers is 0"), (dict(time_limit_s=-1), "time_limit_s is -1")):
        with pytest.raises(UserError, match=word): LaunchConfig(**bad)
    with pytest.raises(UserError, match="no dask scheduler answers"): launch([make_job(QUICK)], LaunchConfig(cluster="nonsense", output_dir=str(tmp_path)))
    with pytest.raises(UserError, match="nothing can be written"): launch([make_job(QUICK)], LaunchConfig(output_dir="/dev/null/x"))


def test_every_component_and_hyperparameter_changes_the_job():
    plan = ablation_changes(AblationConfig(analysis="all"))
    for name, changes in plan.items():
        jobs = study_jobs(AblationConfig(), changes)
        assert len({j.run_id for j in jobs.values()}) == len(changes), name
    for param in HYPERPARAMETERS: assert len(swept_values(SensitivityConfig(param=param))[param]) >= 3


@pytest.mark.parametrize("options, word", [(dict(component="debreta"), "Did you mean 'deberta'"), (dict(analysis="transfer"), "analysis is 'transfer'"), (dict(component=""), "component is empty")])
def test_unknown_names(options, word):
    with pytest.raises(UserError, match=word): ablation_changes(AblationConfig(**options))


NOTEBOOKS = {
    "ablation": dict(component="soft_labels"), "sensitivity": dict(param="alpha", values="0,1"),
    "scalability": dict(shares="0.5,1", nodes="300,600"), "reproduce": dict(models="popularity,student"),
}
TINY = dict(epochs=1, student_epochs=1, emb_dim=16, encoder="none", seeds=1)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_at_small_size(tmp_path, name):
    given = [x for k, v in {**TINY, **NOTEBOOKS[name], "output_dir": str(tmp_path)}.items() for x in ("-p", k, str(v))]
    run = subprocess.run([sys.executable, "-m", "papermill", f"{name}.ipynb", str(tmp_path / "out.ipynb"), *given], cwd=ROOT / "nbs", capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    folder = tmp_path / name
    assert list(folder.glob("*.json")) and list(folder.glob("*.png")) and list(folder.glob("*.csv"))
    notebook = json.loads((tmp_path / "out.ipynb").read_text())
    assert "".join(notebook["cells"][-1]["outputs"][0]["text"]).strip()  # it says what to notice


@pytest.mark.parametrize("name, parameter, value, line", [("ablation", "component", "debreta", "Did you mean 'deberta'"), ("sensitivity", "range", "2.0,0.1", "expected rising numbers"),
                                                          ("sensitivity", "parm", "alpha", "'parm' is not an option")])
def test_mistakes_stop_in_one_line(tmp_path, name, parameter, value, line):
    run = subprocess.run([sys.executable, "-m", "papermill", f"{name}.ipynb", str(tmp_path / "out.ipynb"), "-p", parameter, value, "-p", "output_dir", str(tmp_path)], cwd=ROOT / "nbs", capture_output=True, text=True)
    last = [x for x in run.stderr.splitlines() if x.startswith("UserError")]
    assert run.returncode != 0 and last and line in last[-1], run.stderr[-1500:]
    assert not list(tmp_path.rglob("run.json"))                         # nothing was started
