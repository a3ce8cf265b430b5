"""Boards: one budget, searches that resume, nothing of test in a choice, rows that can be fitted again."""
import json
from dataclasses import replace

import numpy as np
import pytest

from sharp_distill.experiments import board as tuning
from sharp_distill.core import UserError
from sharp_distill.data.interactions import make_sample
from sharp_distill.data.evaluation import evaluate
from sharp_distill.text.reviews import encode_reviews
from sharp_distill.data.split import make_split
from sharp_distill.models.registry import BOARD, BoardData, Entry, board_name
from sharp_distill.experiments.search import Budget, chosen, completed_trials, first_setting, tune
from sharp_distill.experiments.board import (
    acceptance_criteria, board_frame, missing_seeds, put_rows, put_users, read_board, read_users, refit_row,
    run_board, stratum_frame, users_frame)

BUDGET = Budget(n_trials=5, tune_s=600., n_seeds=2)
MODELS = ["popularity", "ease", "ease+tfidf", "ials", "student_no_kd"]


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("SHARP_DISTILL_QUIET", "1")
        m.setenv("SHARP_DISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data():
    split = make_split(make_sample(seed=1, n_users=150), seed=0)
    return BoardData("small", split, encode_reviews(split, "tfidf"), "tfidf")


@pytest.fixture(scope="module")
def board(data, tmp_path_factory):
    pytest.importorskip("implicit")
    folder = tmp_path_factory.mktemp("leaderboard")
    return folder, run_board(data, MODELS, BUDGET.replace(n_trials=2), folder)


@pytest.mark.parametrize("name", list(BOARD))
def test_first_setting_is_in_the_space(name):
    entry = BOARD[name]
    assert set(entry.space) == set(entry.defaults)
    for option, value in first_setting(entry).items():
        s = entry.space[option]
        assert value in s if tuning._scale(s) == "choice" else s[0] <= value <= s[1]
        assert type(value) is type(entry.defaults[option]) or tuning._scale(s) == "choice"


def test_interrupted_search_is_the_same_search(data, tmp_path):
    whole = tune("itemknn", data, BUDGET, tmp_path / "a")
    for n in (1, 3, 5): parts = tune("itemknn", data, BUDGET.replace(n_trials=n), tmp_path / "b")
    assert [(t.params, t.value) for t in completed_trials(whole)] == [(t.params, t.value) for t in completed_trials(parts)]
    assert completed_trials(whole)[0].params == first_setting(BOARD["itemknn"])


def test_budget_is_what_the_file_says(data, tmp_path):
    assert len(completed_trials(tune("rp3beta", data, BUDGET.replace(tune_s=0.), tmp_path))) == 1
    assert len(completed_trials(tune("rp3beta", data, BUDGET, tmp_path))) == 5 == len(completed_trials(tune("rp3beta", data, BUDGET, tmp_path)))


def test_choice_never_reads_test(data, tmp_path):
    other = BoardData("blind", replace(data.split, test=data.split.valid), data.reviews, "tfidf")
    a, b = (tune("ease", d, BUDGET, tmp_path / d.name) for d in (data, other))
    assert [t.value for t in completed_trials(a)] == [t.value for t in completed_trials(b)]


def test_weak_trainings_are_cut_and_failures_count(data, tmp_path, monkeypatch):
    def fit(d, options, seed, watch):
        for epoch in range(6): watch(epoch, -abs(options["x"]))
        if options["x"] > .9: raise UserError("the loss became inf")
        return BOARD["popularity"].fit(d, {}, seed, None)
    monkeypatch.setitem(BOARD, "planted", Entry(fit, dict(x=(0., 1., "linear")), dict(x=.5)))
    states = [t.state.name for t in completed_trials(tune("planted", data, BUDGET.replace(n_trials=14), tmp_path))]
    assert len(states) == 14 and "PRUNED" not in states[:3] and "PRUNED" in states[3:]


def test_rows_say_all_and_can_be_fitted_again(data, board):
    folder, rows = board
    assert json.loads((folder / "small.json").read_text()) == rows
    for row in rows:
        assert set(row) == {"model", "seed", "config", "n_params", "bytes", "train_s", "metrics", "strata"}
        assert {f"{m}@{k}" for m in ("P", "R", "NDCG", "HR") for k in (5, 10, 20)} | {"coverage@10", "gini@10"} <= set(row["metrics"])
        assert set(row["strata"]) == {"user", "item"}
    row = next(r for r in rows if r["model"] == "student_no_kd" and r["seed"] == 1)
    assert refit_row(data, row)["metrics"] == row["metrics"]


def test_a_finished_board_is_not_fitted_again(data, board, monkeypatch):
    folder, rows = board
    monkeypatch.setattr(tuning, "board_row", lambda *a: pytest.fail("fitted again"))
    assert run_board(data, MODELS, BUDGET.replace(n_trials=2), folder) == rows
    row = next(r for r in rows if r["model"] == "ease")
    assert missing_seeds(rows, "ease", row["config"], BUDGET) == [] and missing_seeds(rows, "ease", {"reg": 1.}, BUDGET) == [0]


def test_tests_are_paired_and_corrected(data, board):
    folder, rows = board
    users = users_frame(folder, "small", rows)
    tests = tuning.board_tests(users, rows, "student_no_kd")
    assert {t["model"] for t in tests} == set(MODELS) - {"student_no_kd"}
    mean = board_frame(rows)["mean"]
    for t in tests:
        assert t["p"] <= t["p_holm"] <= min(1, len(tests) * t["p"]) + 1e-12
        assert np.isclose(t["diff"], mean["student_no_kd"] - mean[t["model"]])
    least = min(tests, key=lambda t: t["p"])
    assert np.isclose(least["p_holm"], min(1, len(tests) * least["p"])) # Holm: the smallest counts for all of them
    facts = json.loads((folder / "small.tests.json").read_text())
    assert set(facts["searches"]) == set(MODELS) and facts["split"]["sha"] == data.split.sha


def test_users_are_those_of_the_rows(data, board, tmp_path):
    folder, rows = board
    users, mean = users_frame(folder, "small", rows), board_frame(rows)["mean"].astype(float)
    assert list(users) == list(mean[users.columns].index) and set(users) == set(MODELS) and np.allclose(users.mean(), mean[users.columns], rtol=1e-6)
    changed = [dict(r, metrics=r["metrics"] | {"NDCG@10": .9}) if r["model"] == "ease" else r for r in rows]
    assert set(users_frame(folder, "small", changed)) == set(MODELS) - {"ease"} # the file speaks of another row
    assert not len(users_frame(tmp_path, "small", rows).columns) and read_users(tmp_path, "small") == {}


def test_users_of_another_split_are_dropped(data, tmp_path):
    fit = lambda d, name: put_users(tmp_path, d, dict(model=name, seed=0), evaluate(BOARD[name].fit(d, {}, 0, None), d.split, "test"))
    fit(data, "popularity"); fit(data, "ease")
    assert {"popularity 0", "ease 0"} <= set(read_users(tmp_path, data.name))
    fit(BoardData(data.name, replace(data.split, seed=1, train=data.split.train.take(np.arange(len(data.split.train)) % 9 > 0)), data.reviews), "ease")
    assert "popularity 0" not in read_users(tmp_path, data.name)


def test_stale_tests_leave_and_valid_ones_stay(data, board):
    folder, rows = board
    users = users_frame(folder, "small", rows)
    old = tuning.board_tests(users, rows, "student_no_kd")
    assert tuning.board_tests(users[[]], rows, "student_no_kd", old) == old
    changed = [dict(r, metrics=r["metrics"] | {"NDCG@10": .9}) if r["model"] == "ease" else r for r in rows]
    left = tuning.board_tests(users[[]], changed, "student_no_kd", old)
    assert {t["model"] for t in left} == set(MODELS) - {"student_no_kd", "ease"} and all(t["p_holm"] <= o["p_holm"] for t in left for o in old if o["model"] == t["model"])
    moved = [dict(r, metrics=r["metrics"] | {"NDCG@10": .9}) if r["model"] == "student_no_kd" else r for r in rows]
    assert tuning.board_tests(users[[]], moved, "student_no_kd", old) == []


def test_a_taught_model_is_fitted_again_with_its_teachers_options(data):
    rows = [dict(model="lightgcn", seed=0, config={"lr": .5, "emb_dim": 32}), dict(model="teacher", seed=0, config={"reg": .25, "unsearched": 1})]
    fresh = replace(data, best={})
    tuning.recall(fresh, rows)
    assert fresh.best == {"lightgcn": {"lr": .5, "emb_dim": 32}, "teacher": {"reg": .25}}


def test_verdicts_on_planted_means():
    row = lambda m, v: dict(model=m, seed=0, config={}, n_params=1, bytes=1, train_s=1., metrics={"NDCG@10": v},
                            strata={"item": {"1-2": {"NDCG@10": v}}, "user": {}})
    rows = [row("ease", .08), row("ease+tfidf", .1), row("teacher", .104), row("student", .103), row("student_no_kd", .09)]
    table = acceptance_criteria(rows)
    assert list(table["against"][:4]) == ["ease+tfidf", "ease+tfidf", "teacher", "student_no_kd"]
    assert list(table["holds"]) == [False, True, True, True, True] and np.isclose(table["ratio"].iloc[0], 1.04)
    assert stratum_frame(rows).loc["ease", "1-2"] == .08


def test_put_rows_replaces_and_orders(tmp_path):
    row = lambda m, s, v: dict(model=m, seed=s, value=v)
    put_rows(tmp_path, "b", [row("ease", 0, 1), row("popularity", 0, 1)])
    rows = put_rows(tmp_path, "b", [row("ease", 0, 2), row("ials", 1, 3)])
    assert [(r["model"], r["value"]) for r in rows] == [("popularity", 1), ("ease", 2), ("ials", 3)] and read_board(tmp_path, "b") == rows


@pytest.mark.parametrize("call, words", [
    (lambda d, f: run_board(d, ["eese"], BUDGET, f), "Did you mean 'ease'"), (lambda d, f: read_board(f, "nothing"), "none yet"),
    (lambda d, f: stratum_frame([], "brand"), "'user' or 'item'"), (lambda d, f: Budget(n_trials=0), "expected 1 or more")])
def test_mistakes_are_one_line(data, tmp_path, call, words):
    with pytest.raises(UserError, match=words) as e: call(data, tmp_path)
    assert "\n" not in str(e.value)


def test_names(): assert board_name("a/b/steam.parquet") == "steam" and board_name("steam", "temporal") == "steam.temporal"


@pytest.mark.parametrize("path", sorted((tuning.Path(__file__).parent.parent / "outputs/leaderboard").glob("*.json")), ids=lambda p: p.stem)
def test_committed_boards_are_possible(path):
    content = json.loads(path.read_text())
    if path.stem.endswith(".tests"):
        assert all(t["p"] <= t["p_holm"] <= 1 for t in content["tests"]) and content["metric"] == "NDCG@10"
        return
    if not isinstance(content, list): return
    assert len({(r["model"], r["seed"]) for r in content}) == len(content)
    for r in content:
        m = r["metrics"]
        assert all(0 <= m[f"{n}@{k}"] <= 1 for n in ("P", "R", "NDCG", "HR") for k in (5, 10, 20))
        for n in ("R", "HR"): assert m[f"{n}@5"] <= m[f"{n}@10"] <= m[f"{n}@20"]
        for k in (5, 10, 20): assert m[f"HR@{k}"] <= k * m[f"P@{k}"] + 1e-9 # at least one hit costs at least 1/k of precision


@pytest.mark.parametrize("path", sorted((tuning.Path(__file__).parent.parent / "outputs/leaderboard").glob("*.users.npz")), ids=lambda p: p.name)
def test_committed_tests_follow_from_the_committed_users(path):
    "Every stored test can be made again from the users file; nobody needs to fit a model to check a p-value."
    name = path.name.removesuffix(".users.npz")
    rows, facts = read_board(path.parent, name), json.loads((path.parent / f"{name}.tests.json").read_text())
    users = users_frame(path.parent, name, rows)
    assert str(read_users(path.parent, name)["split"]) == facts["split"]["sha"] and {"teacher", "student"} <= set(users)
    for against, stored in (("student", facts["tests"]), ("teacher", facts["teacher_tests"])):
        again = {t["model"]: t for t in tuning.board_tests(users, rows, against)}
        assert set(again) <= {t["model"] for t in stored} and {t["model"] for t in stored} == {r["model"] for r in rows} - {against}
        for t in stored:
            if t["model"] in again: assert np.allclose([t["diff"], t["p"]], [again[t["model"]]["diff"], again[t["model"]]["p"]], rtol=1e-4), t["model"]


def test_a_row_of_an_older_space_is_fitted_again():
    "A board made before an option was searched says so by lacking it; it is neither an error nor a match."
    from sharp_distill.experiments.search import first_setting
    from sharp_distill.models.registry import entry_of
    from sharp_distill.experiments.board import missing_seeds
    now = first_setting(entry_of("lightgcn"))
    old = dict(model="lightgcn", seed=0, config={o: v for o, v in now.items() if o != "emb_dim"})
    assert missing_seeds([old], "lightgcn", now, Budget(n_seeds=2)) == [0, 1]
    assert missing_seeds([dict(old, config=now)], "lightgcn", now, Budget(n_seeds=2)) == [1]
