"""The run notebook through papermill as the README says, every other run notebook once at small size, and mistakes in one line."""
import json
import subprocess
import sys

import pytest
from conftest import ROOT, execute

from sharp_distill.core import UserError
from sharp_distill.data.interactions import make_sample
from sharp_distill.experiments.record import check_record
from sharp_distill.experiments.run import RunConfig, prepare, run_config
from sharp_distill.serve.recommender import Recommender

SMALL = dict(teacher_epochs=3, epochs=1, emb_dim=32, n_queries=10)
TINY = dict(teacher_epochs=1, epochs=1, emb_dim=16, encoder="none", seeds=1)


def papermill(folder, out, **parameters):
    given = [x for k, v in parameters.items() for x in ("-p", k, str(v))]
    command = [sys.executable, "-m", "papermill", "nbs/run.ipynb", str(out), *given]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "Started beside nbs/, as the document's own command does: results belong into outputs/, not beside the repository."
    clone = tmp_path_factory.mktemp("run") / "clone"
    clone.mkdir()
    (clone / "nbs").symlink_to(ROOT / "nbs")
    done = papermill(clone, "out.ipynb", **SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (clone.parent / "outputs").exists()
    return next((clone / "outputs").glob("sample/*/run.json"))


@pytest.mark.xdist_group("run")
def test_the_record_is_complete_and_learned_something(run):
    record = check_record(run)
    assert record["config"]["teacher_epochs"] == 3 and record["config"]["epochs"] == 1 and record["split"]["protocol"] == "temporal"
    ndcg = {name: m["metrics"]["NDCG@10"]["mean"] for name, m in record["models"].items()}
    assert list(ndcg) == ["popularity", "ease", "lightgcn", "ease+tfidf", "popularity_decayed", "slist", "student_no_kd", "teacher", "student"]
    assert ndcg["teacher"] > 2 * ndcg["popularity"] and ndcg["student"] > 2 * ndcg["popularity"] < ndcg["ease"] < ndcg["ease+tfidf"]


@pytest.mark.xdist_group("run")
def test_figures_and_a_student_ready_to_serve(run):
    names = {p.name for p in run.parent.iterdir()}
    for figure in ("quality", "speed", "quality_against_latency", "retention", "sensitivity", "training"):
        assert {f"{figure}.png", f"{figure}.csv"} <= names
    rec, split = Recommender.load(run.parent / "student"), prepare(RunConfig(encoder="none")).split
    held = {(u, i) for p in (split.train, split.valid, split.test) for u, i in zip(split.train.user_ids[p.user_idx], split.train.item_ids[p.item_idx])}
    lists = rec.recommend(rec.user_ids[:200], k=10)
    assert len(lists) == 2000 and not held & set(zip(lists.user_id, lists.item_id)) # nobody is shown what they already have


@pytest.mark.xdist_group("run")
def test_a_misspelt_parameter_stops_before_anything_is_written(run):
    before = {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()}
    done = papermill(run.parents[3], "bad.ipynb", epocs=3)
    last = [line for line in done.stderr.splitlines() if line.startswith("UserError")]
    assert done.returncode != 0 and "'epocs' is not an option of RunConfig. Did you mean 'epochs'?" in last[-1]
    assert before == {p: p.read_bytes() for p in run.parent.rglob("*") if p.is_file()}


@pytest.mark.parametrize("options, words", [
    (dict(dataset="smaple"), "sample"), (dict(k=0), "k is 0"), (dict(encoder="no/such/encoder"), "no/such/encoder"), (dict(k_core=500), "500"),
    (dict(epocs=3), "Did you mean 'epochs'"), (dict(models="ease,studnet"), "Did you mean 'student'"), (dict(alpha=.3), "contrast")])
def test_mistakes_are_one_line(options, words):
    with pytest.raises(UserError, match=words) as e:
        cfg = run_config(options)
        cfg.model_names
        prepare(cfg)
    assert "\n" not in str(e.value)


def test_numbers_are_names_and_values_to_the_last_digit(monkeypatch, tmp_path):
    "What papermill takes for a number stays what was written, where the option is text."
    from papermill.cli import _resolve_type
    given = lambda **options: run_config({k: _resolve_type(v) for k, v in options.items()})
    cfg = given(dataset="20160901", encoder="1234567", models="ease,popularity", lr="0.0125", seed="1234567", columns="1")
    assert (cfg.data.dataset, cfg.encoder, cfg.student.lr, cfg.seed, cfg.data.columns) == ("20160901", "1234567", .0125, 1234567, "1")
    assert given(output_dir="True").place.output_dir == "True" and run_config(dict(models=["ease", "student"])).models == "ease,student"
    monkeypatch.setenv("SHARP_DISTILL_DATA", str(tmp_path))
    with pytest.raises(UserError, match="'20160901' is not a known data set"): cfg.data.load()
    make_sample(n_users=60, n_items=40).to_frame().to_csv(tmp_path / "20160901.csv", index=False)
    assert given(dataset="20160901", k_core="1").data.load().n_items > 20


ODD = "a$b^{c_<script>alert(1)<|script>`{include} x`.csv" # a formula, a script and a directive


def test_a_file_with_an_odd_name_and_columns_from_a_yaml_file(tmp_path):
    "`papermill -f params.yaml`, but for the kernel; every figure and page of the run carries the name."
    import nbformat
    import yaml
    from papermill.iorw import load_notebook_node, read_yaml_file
    from papermill.parameterize import parameterize_notebook
    frame = make_sample(n_users=150, n_items=80).to_frame().rename(columns=dict(user_id="customer", item_id="product"))
    frame.to_csv(tmp_path / ODD, index=False)
    given = dict(TINY, dataset=str(tmp_path / ODD), columns=dict(user_id="customer", item_id="product"), models=["popularity"], n_queries=10,
                 sensitivity=False, output_dir=str(tmp_path / "out"))
    given.pop("seeds")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    nb = parameterize_notebook(load_notebook_node(str(ROOT / "nbs/run.ipynb")), read_yaml_file(str(tmp_path / "params.yaml")))
    nbformat.write(nb, tmp_path / "run.ipynb")
    execute(tmp_path / "run.ipynb")
    record = check_record(next((tmp_path / "out").rglob("run.json")))
    assert record["dataset"] == ODD.removesuffix(".csv") and record["config"]["columns"] == "user_id=customer,item_id=product"


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    "A CSV of 240 users: no study of this file needs more."
    path = tmp_path_factory.mktemp("data") / "books.csv"
    make_sample(n_users=240, n_items=120).to_frame().to_csv(path, index=False)
    return str(path)


STUDIES = ("ablation", "sensitivity", "scalability", "reproduce")
OTHERS = {
    "ablation": TINY | dict(component="soft_labels"), "sensitivity": TINY | dict(param="alpha", values="0,1"),
    "scalability": TINY | dict(shares="0.5,1", nodes="300"), "reproduce": TINY | dict(models="popularity,student"),
    "speed_report": dict(preset="quick", repeats=3, budget_s=1.0, threads=1, text=False), "leaderboard": {}, "results": {}, "limits": None, "rely": None, "map": None,
    "train_encoder": dict(n_windows=300, steps=30, adapt_steps=3, vocab_size=800),
    "encoder_report": dict(encoders="none,tfidf", regs="300,600", text_weights="1,3"),
    "carry_over": dict(datasets="sample,sample_fr", encoders="", ways="chance,tfidf", questions="new,rare", n_choose=100)}


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_run_notebook(name, tmp_path, books):
    given = OTHERS[name]
    if name in (*STUDIES, "speed_report"): given = given | dict(dataset=books)
    reads = name in ("leaderboard", "results", "limits", "rely", "map") # these draw what is stored
    cells = execute(ROOT / f"nbs/{name}.ipynb", given if given is None or reads else given | dict(output_dir=str(tmp_path)))
    if not reads: assert list(tmp_path.rglob("*.json")), "the notebook left no record"
    if name in STUDIES:
        assert list((tmp_path / name).glob("*.png")) and list((tmp_path / name).glob("*.csv"))
        assert "".join(cells[-1].outputs[0]["text"]).strip() # it says what to notice
    if name == "results": assert sum("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", [])) >= 6


def test_the_front_page_is_made_from_what_is_stored():
    "The table and the sentences of the README are outputs of index.ipynb, executed here."
    cells = execute(ROOT / "nbs/index.ipynb")
    made = [o["data"]["text/markdown"] for c in cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert made and all("".join(m).strip() in readme for m in made)


def test_a_run_over_two_windows(tmp_path):
    "Chosen on validation, fitted again, each window read once; the student of the last one is saved and shows nothing known."
    import numpy as np
    from sharp_distill.data.interactions import load_interactions
    from sharp_distill.data.protocol import refit_split
    from sharp_distill.data.split import make_split
    from sharp_distill.experiments.ledger import count_readings, read_ledger
    make_sample(n_users=150, n_items=80).to_frame().to_csv(tmp_path / "shop.csv", index=False)
    given = dict(TINY, dataset=str(tmp_path / "shop.csv"), models="popularity", n_queries=10, sensitivity=False, split="temporal", cuts=2,
                 eval_targets="last", output_dir=str(tmp_path / "out"))
    given.pop("seeds")
    cells = execute(ROOT / "nbs/run.ipynb", given)
    record = check_record(path := next((tmp_path / "out").rglob("run.json")))
    assert (record["split"]["cuts"], record["split"]["targets"], record["split"]["same_day"]) == (2, "last", 0)
    splits = [make_split(load_interactions(str(tmp_path / "shop.csv")), "temporal", cuts=2, cut=c, targets="last") for c in range(2)]
    assert [w["sha"] for w in record["split"]["windows"]] == [s.sha for s in splits] and record["split"]["sha"] == splits[1].sha
    for m in record["models"].values():
        for metrics in ("metrics", "metrics_warm"):
            assert np.isclose(m[metrics]["NDCG@10"]["mean"], np.mean([w[metrics]["NDCG@10"] for w in m["windows"]]))
    ledger = read_ledger(tmp_path / "out")
    assert ledger["split_sha"].tolist() == [s.sha for s in splits] and set(ledger["why"]) == {"run"}
    assert ledger["models"].tolist() == [3, 3] and count_readings(tmp_path / "out").loc["shop", "readings"] == 2
    rec, last = Recommender.load(path.parent / "student"), refit_split(splits[1])
    assert rec.facts["split_sha"] == last.sha and rec.train.nnz == len(last.train), "fitted on all that was known"
    text = json.dumps([c.get("outputs") for c in cells])
    assert "users_with_history" in text and "image/png" in text


@pytest.mark.parametrize("options, words", [
    (dict(split="random", cuts=3), "cuts is 3 under protocol 'random'"), (dict(split="temporal", cuts=0), "cuts is 0"),
    (dict(split="temporal", eval_targets="lst"), "Did you mean 'last'"), (dict(split="temporl"), "Did you mean 'temporal'")])
def test_windows_that_are_refused(options, words):
    with pytest.raises(UserError, match=words): prepare(run_config(dict(options, encoder="none")))


def test_a_temporal_record_without_users_with_history_is_refused(tmp_path):
    from sharp_distill.core import read_json, write_json
    record = read_json(ROOT / "outputs/results/million.json")
    record["split"]["protocol"] = "temporal"
    with pytest.raises(UserError, match="users with history"): check_record(write_json(tmp_path / "run.json", record))


def test_the_ledger_holds_what_is_stored():
    "Every split whose numbers stand in the repository has been read, and the ledger says so."
    from sharp_distill.experiments.ledger import read_ledger
    ledger, read = read_ledger(ROOT / "outputs"), lambda path: json.loads(path.read_text(encoding="utf-8"))
    splits = [read(p)["split"] for folder in ("results", "leaderboard") for p in (ROOT / "outputs" / folder).glob("*.json")
              if folder == "results" or p.name.endswith(".tests.json")]
    stored = {w["sha"] for split in splits for w in split.get("windows", [split])}
    assert len(stored) >= 4 and stored <= set(ledger["split_sha"]) and ledger["models"].min() >= 1


def test_papermill_shows_the_help():
    done = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", "run.ipynb"], cwd=ROOT / "nbs", capture_output=True, text=True)
    for name in ("dataset: str", "epochs: int", "lr: float", "cuts: int"): assert name in done.stdout


NEWER = dict(cuts=1, eval_targets="all", half_life=-1., teacher_half_life=-1., teacher_trend_half_life=-1., teacher_ridge=0.,
             teacher_text_weight=-1., teacher_n_neighbours=0, teacher_weights="", teacher_sequence="none", teacher_row_half_life=-1., teacher_filter_session_weight=-1.) # options that runs did not have when these were stored: what they did without them


def test_stored_results_are_records_of_the_default_run():
    for path in sorted((ROOT / "outputs/results").glob("*.json")):
        record = check_record(path)
        record["config"] = NEWER | record["config"] | dict(teacher_sequence="none")
        default = RunConfig.from_dict(dict(dataset=record["dataset"])).flat() | dict(output_dir=None, dataset=record["dataset"])
        more, usual = set(record["config"].pop("models").split(",")), set(default.pop("models").split(","))
        if record["config"]["split"] == "random": default, usual = default | dict(split="random"), usual - {"popularity_decayed", "slist"}
        assert usual <= more and len(more - usual) <= 1, path.name # a baseline may stand beside the usual ones
        assert json.loads(json.dumps(default)) == record["config"], path.name


def test_a_half_life_that_is_said_is_taken():
    from sharp_distill.experiments import measure, run
    cfg = RunConfig.from_dict(dict(dataset="sample", split="temporal", teacher_row_half_life=30, teacher_epochs=1, teacher_item_filter="none"))
    fits = run.run_fits(run.prepare(cfg), cfg)
    assert measure.fit_on_grid("teacher", fits).chosen["row_half_life"] == 30
