"""Grids: checked before they start, skipped when finished, continued when killed, one launch at a time, the same on a cluster."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sharp_distill.core import UserError, read_json
from sharp_distill.experiments.grid import CHILD, Change, LaunchConfig, is_done, job_folder, launch, make_job
from sharp_distill.experiments.record import check_record
from sharp_distill.experiments.run import RunConfig

QUICK = RunConfig.from_dict(dict(split="random", teacher_epochs=1, epochs=1, emb_dim=8, encoder="none", teacher_item_filter="none"))
SMALL = dict(job=dict(n_users=200))

pytestmark = pytest.mark.xdist_group("grid") # one grid for all


@pytest.fixture(scope="module")
def grid(): return [make_job(QUICK, Change("full", **SMALL)), make_job(QUICK, Change("other", targets=dict(contrast="modified"), **SMALL))]


@pytest.fixture(scope="module")
def done(grid, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid")
    bad = make_job(QUICK.replace(dataset="smaple"))
    return out, launch([*grid, bad], LaunchConfig(workers=2, output_dir=str(out)))


def test_a_failed_run_leaves_the_others(done, grid):
    out, table = done
    assert sorted(table["status"]) == ["done", "done", "failed"]
    assert "Did you mean 'sample'?" in table.loc[table["status"] == "failed", "reason"].item()
    for job in grid: assert check_record(job_folder(job, out) / "run.json")["run_id"] == job.run_id


def test_finished_runs_are_skipped(done, grid):
    out, _ = done
    before = {p: p.read_bytes() for p in out.rglob("run.json")}
    assert set(launch(grid, LaunchConfig(output_dir=str(out)))["status"]) == {"skipped"}
    assert before == {p: p.read_bytes() for p in out.rglob("run.json")}


@pytest.mark.parametrize(("given", "workers", "each"), [(4, 2, 2), (4, 1, 4), (1, 2, 1)])
def test_runs_share_the_threads_that_were_given(given, workers, each, grid, tmp_path, monkeypatch):
    import torch

    from sharp_distill.experiments import grid as module
    seen, before = [], torch.get_num_threads()
    done = dict(run_id=grid[0].run_id, status="done", seconds=0., reason="")
    monkeypatch.setattr(module, "run_job_apart", lambda job, root, limit, threads: seen.append(threads) or done)
    torch.set_num_threads(given)
    try: launch(grid[:1], LaunchConfig(workers=workers, output_dir=str(tmp_path)))
    finally: torch.set_num_threads(before)
    assert seen == [each]


def test_older_and_broken_records_are_done_again(done, grid, tmp_path):
    record = read_json(job_folder(grid[0], done[0]) / "run.json")
    for content in (json.dumps({**record, "format": 1}), json.dumps({"dataset": "sample"}), "{", "[]"):
        path = job_folder(grid[0], tmp_path) / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        assert not is_done(grid[0], tmp_path) and not path.exists() and path.with_suffix(".old").exists()


def test_killed_in_the_middle_continues(tmp_path):
    job = make_job(QUICK.replace(epochs=60, lr=1e-5), Change("long", student=dict(patience=60), **SMALL))
    process = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdin.write(json.dumps(job.to_dict())); process.stdin.close()
    checkpoint, until = job_folder(job, tmp_path) / "student.0.safetensors", time.time() + 90
    while not checkpoint.exists() and process.poll() is None and time.time() < until: time.sleep(.02)
    assert checkpoint.exists(), process.stderr.read()[-2000:]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -9 and not (job_folder(job, tmp_path) / "run.json").exists()
    from safetensors import safe_open
    with safe_open(checkpoint, "pt") as f: assert len(json.loads(f.metadata()["rows"])) >= 1
    assert launch([job], LaunchConfig(output_dir=str(tmp_path)))["status"].item() == "done"
    assert check_record(job_folder(job, tmp_path) / "run.json")["kind"] == "job" and not checkpoint.exists()


def test_two_launches_at_once(grid, tmp_path):
    code = (f"from sharp_distill.experiments.grid import *; jobs = [Job.from_dict(j) for j in {[j.to_dict() for j in grid[:1]]!r}]; "
            f"print(launch(jobs, LaunchConfig(output_dir={str(tmp_path)!r}))['status'].tolist())")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ}) for _ in range(2)]
    said = [p.communicate(timeout=300)[0] for p in both]
    assert sorted(s.strip().splitlines()[-1] for s in said) == ["['done']", "['skipped']"], said
    assert sum("waiting" in s for s in said) == 1


def test_time_limit(grid, tmp_path):
    table = launch(grid[:1], LaunchConfig(output_dir=str(tmp_path), time_limit_s=.2))
    assert table["status"].item() == "timeout" and "0.2" in table["reason"].item()


def test_the_same_grid_on_a_cluster(done, grid, tmp_path):
    from distributed import LocalCluster
    out, _ = done
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as cluster:
        table = launch(grid[:1], LaunchConfig(cluster=cluster.scheduler_address, output_dir=str(tmp_path)))
    assert table["status"].tolist() == ["done"]
    here, there = (read_json(job_folder(grid[0], o) / "run.json")["models"]["student"]["metrics"] for o in (out, tmp_path))
    assert here == there # the same numbers as on this machine


def test_a_cluster_that_does_not_answer(grid, tmp_path):
    with pytest.raises(UserError, match="no dask scheduler answers"):
        launch(grid[:1], LaunchConfig(cluster="nonsense", output_dir=str(tmp_path)))


@pytest.mark.parametrize("model", ["student", "student_no_kd", "ease"])
def test_a_point_in_time_is_measured_as_the_run_does(model, tmp_path, monkeypatch):
    "Chosen on validation, fitted again on train and validation, each window read: the same numbers to the last digit."
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.experiments.grid import run_job
    from sharp_distill.experiments.run import fit_models, prepare
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / "cache"))
    make_sample(n_users=120, n_items=60).to_frame().to_csv(tmp_path / "shop.csv", index=False)
    cfg = QUICK.replace(dataset=str(tmp_path / "shop.csv"), split="temporal", cuts=2, eval_targets="last", epochs=3, teacher_epochs=2, models=model)
    job = make_job(cfg, Change("one", job=dict(model=model)))
    record, fitted = run_job(job, tmp_path), fit_models(prepare(cfg), cfg)
    assert [w["sha"] for w in record["split"]["windows"]] == [w.split.sha for w in fitted.windows] and job.run_id != make_job(cfg.replace(cuts=1)).run_id
    names = {"student": ["teacher", "student"], "student_no_kd": ["student_no_kd"], "ease": ["ease"]}[model]
    for name, stored in zip(names, record["models"]): # a student without a teacher is a student in a record
        metrics = {m: v["mean"] for m, v in record["models"][stored]["metrics"].items()}
        assert metrics == pytest.approx({m: fitted.results[name].mean(m) for m in metrics}, rel=1e-9), name


def test_the_student_alone_is_fitted_again_with_its_epochs():
    "Without a teacher validation picks the epoch; a last fit, which has no validation, is told."
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.data.split import make_split
    from sharp_distill.models.registry import Fits, refit
    from sharp_distill.text.reviews import encode_reviews
    split = make_split(make_sample(n_users=120, n_items=60), "temporal")
    fits = Fits(split, encode_reviews(split, "none"), {"student_no_kd": dict(epochs=12, patience=2, emb_dim=8, lr=.05)})
    first = fits.fit("student_no_kd")
    again = refit("student_no_kd", fits, first)
    assert len(again.history.rows) == first.history.best_epoch + 1 < 12
