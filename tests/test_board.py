"""Leaderboards: what is committed is possible and follows from its users; what a search may try; rows that meet, and rows that may not."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from sharp_distill.experiments import board
from sharp_distill.experiments.board import acceptance_criteria, board_tests, missing_seeds, read_board, read_users, stratum_frame, users_frame
from sharp_distill.experiments.search import Budget, _scale, first_setting
from sharp_distill.models.registry import method, methods

FOLDER = ROOT / "outputs/leaderboard"
COMMITTED = sorted(p.name.removesuffix(".users.npz") for p in FOLDER.glob("*.users.npz"))


@pytest.mark.parametrize("name", methods())
def test_the_first_setting_is_in_the_space(name):
    m = method(name)
    for option, value in first_setting(m).items():
        s = m.space[option]
        assert value in s if _scale(s) == "choice" else s[0] <= value <= s[1]
        assert type(value) is type(m.defaults()[option]) or _scale(s) == "choice"


def test_planted_means_meet_the_criteria():
    row = lambda m, v: dict(model=m, seed=0, config={}, n_params=1, bytes=1, train_s=1., metrics={"NDCG@10": v},
                            strata={"item": {"1-2": {"NDCG@10": v}}, "user": {}})
    rows = [row("ease", .08), row("ease+tfidf", .1), row("teacher", .104), row("student", .103), row("student_no_kd", .09)]
    table = acceptance_criteria(rows)
    assert list(table["against"][:4]) == ["ease+tfidf", "ease+tfidf", "teacher", "student_no_kd"]
    assert list(table["holds"]) == [False, True, True, True, True] and np.isclose(table["ratio"].iloc[0], 1.04)
    assert stratum_frame(rows).loc["ease", "1-2"] == .08


def test_a_row_of_an_older_space_is_fitted_again():
    "A leaderboard made before an option was searched says so by lacking it; it is neither an error nor a match."
    now = first_setting(method("lightgcn"))
    old = dict(model="lightgcn", seed=0, config={o: v for o, v in now.items() if o != "emb_dim"})
    assert missing_seeds([old], "lightgcn", now, Budget(n_seeds=2)) == [0, 1]
    assert missing_seeds([dict(old, config=now)], "lightgcn", now, Budget(n_seeds=2)) == [1]


WRITE = """
import sys, types, numpy as np
from sharp_distill.data.evaluation import EvalResult
from sharp_distill.experiments.board import put_row
who, folder = sys.argv[1:]
split = types.SimpleNamespace(sha="abc", protocol="random", cut=0)
for seed in range(10):
    values = np.full(5, .1 * int(who) + .01 * seed)
    put_row(folder, "small", split, dict(model="lightgcn", seed=100 * int(who) + seed, metrics={"NDCG@10": float(values.mean())}),
            EvalResult(np.arange(5), np.zeros((5, 0), int), {"NDCG@10": values}, "test", "abc"))
"""


def test_rows_of_several_processes_survive(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(w), str(tmp_path)]) for w in range(2)]
    assert [w.wait() for w in writers] == [0, 0]
    rows, users = read_board(tmp_path, "small"), read_users(tmp_path, "small")
    assert len(rows) == 20 and len(users) == 22
    assert all(np.isclose(users[f"lightgcn {r['seed']}"].mean(), r["metrics"]["NDCG@10"]) for r in rows)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_rows_are_possible(name):
    rows = read_board(FOLDER, name)
    assert len({(r["model"], r["seed"]) for r in rows}) == len(rows) and {r["model"] for r in rows} <= set(methods())
    for r in rows:
        m = r["metrics"]
        assert all(0 <= m[f"{n}@{k}"] <= 1 for n in ("P", "R", "NDCG", "HR") for k in (5, 10, 20))
        for n in ("R", "HR"): assert m[f"{n}@5"] <= m[f"{n}@10"] <= m[f"{n}@20"]
        for k in (5, 10, 20): assert m[f"HR@{k}"] <= k * m[f"P@{k}"] + 1e-9 # one hit costs at least 1/k of precision


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_tests_follow_from_the_committed_users(name):
    "Every stored test can be made again from the users file; nobody needs to fit a model to check a p-value."
    rows, facts = read_board(FOLDER, name), json.loads((FOLDER / f"{name}.tests.json").read_text())
    users = users_frame(FOLDER, name, rows)
    assert str(read_users(FOLDER, name)["split"]) == facts["split"]["sha"] and {"teacher", "student"} <= set(users)
    for against, stored in (("student", facts["tests"]), ("teacher", facts["teacher_tests"])):
        again = {t["model"]: t for t in board_tests(users, rows, against)}
        assert again and {t["model"] for t in stored} == {r["model"] for r in rows} - {against}
        for t in stored:
            assert t["p"] <= t["p_holm"] <= 1
            if t["model"] in again: assert np.allclose([t["diff"], t["p"]], [again[t["model"]]["diff"], again[t["model"]]["p"]], rtol=1e-4), t["model"]


def test_there_are_committed_leaderboards(): assert len(COMMITTED) >= 4 and Path(board.__file__).exists()
