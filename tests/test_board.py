"""Leaderboards: what is committed is possible and follows from its users; what a search may try; rows that meet, and rows that may not."""
import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, execute

from sharp_distill.core import UserError, read_json
from sharp_distill.data.evaluation import EvalResult
from sharp_distill.experiments import board
from sharp_distill.experiments.board import (
    BoardConfig, acceptance_criteria, best_of, board_tests, missing_seeds, read_board, read_users, run_board, seed_values, users_frame)
from sharp_distill.experiments.rows import board_frame, fit_row, metric_frame, stratum_frame, temporal_frame
from sharp_distill.experiments.search import Budget, _scale, first_setting
from sharp_distill.experiments.searches import marked, search_frame, searches_rows
from sharp_distill.models.registry import made_of, method, methods

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
    controls = [row("svd+tfidf", .1), row("low_rank+tfidf", .102), row("userknn", .11)] # the last is not of the student's width
    asked = acceptance_criteria([*rows, *controls]).loc["student over the best low-rank model without a teacher"]
    assert asked["against"] == "low_rank+tfidf" and np.isclose(asked["ratio"], .103 / .102) and not asked["holds"]


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
who, folder = int(sys.argv[1]), sys.argv[2]
for protocol, at in (("random", {}), ("temporal", dict(cut=who))): # a window a process
    split = types.SimpleNamespace(sha=f"abc{who * len(at)}", protocol=protocol, cuts=2, cut=who * len(at))
    for seed in range(10):
        values = np.full(5 + len(at), .1 * who + .01 * seed)
        row = dict(model="lightgcn", seed=seed if at else 100 * who + seed, metrics={"NDCG@10": float(values.mean())}, **at)
        none = np.zeros((len(values), 0), int)
        put_row(folder, f"small.{protocol}", split, row, EvalResult(np.arange(len(values)), none, {"NDCG@10": values}, "test", "abc"))
"""


def test_rows_of_several_processes_survive(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(w), str(tmp_path)]) for w in range(2)]
    assert [w.wait() for w in writers] == [0, 0]
    rows, users = read_board(tmp_path, "small.random"), read_users(tmp_path, "small.random")
    assert len(rows) == 20 and len(users) == 22
    assert all(np.isclose(users[f"lightgcn {r['seed']}"].mean(), r["metrics"]["NDCG@10"]) for r in rows)
    rows, users = read_board(tmp_path, "small.temporal"), read_users(tmp_path, "small.temporal")
    assert [(r["cut"], r["seed"]) for r in rows] == [(c, s) for c in range(2) for s in range(10)] and len(users) == 25
    assert all(np.isclose(users[f"lightgcn {r['seed']} {r['cut']}"].mean(), r["metrics"]["NDCG@10"]) for r in rows)


# A temporal leaderboard

NAMES = ["popularity", "ease", "lightgcn", "popularity_decayed", "timed_ease+tfidf"] # in the order of the registry
SMALL = Budget(n_trials=4, tune_s=600., n_seeds=2)


@pytest.fixture(scope="module")
def in_time(tmp_path_factory):
    "A shop of two windows on a leaderboard of five models: (folder, config, fits, rows, what was reported)."
    from sharp_distill.data.interactions import make_sample
    folder, lines = tmp_path_factory.mktemp("board") / "leaderboard", []
    folder.mkdir()
    make_sample(n_users=150, n_items=80).to_frame().to_csv(folder.parent / "shop.csv", index=False)
    cfg = BoardConfig.from_dict(dict(dataset=str(folder.parent / "shop.csv"), split="temporal", cuts=2, board_dir=str(folder)))
    fits = cfg.fits()
    for f in fits: f.options["lightgcn"] = dict(epochs=3)
    run_board(folder, cfg.name, fits, ["ease", "lightgcn"], SMALL, only_cuts=(1,))
    assert run_board(folder, cfg.name, fits, ["popularity"], SMALL, limit_s=-1) == read_board(folder, cfg.name) # no time, nothing begun
    rows = run_board(folder, cfg.name, fits, NAMES, SMALL, report=lines.append)
    return folder, cfg, fits, rows, lines


def test_a_row_a_model_seed_and_window(in_time):
    from sharp_distill.experiments.ledger import read_ledger
    folder, cfg, fits, rows, lines = in_time
    wanted = [(m, c, s) for m in NAMES for c in range(2) for s in range(2 if m == "lightgcn" else 1)]
    assert cfg.name == "shop.temporal" and [(r["model"], r["cut"], r["seed"]) for r in rows] == sorted(wanted, key=lambda k: methods().index(k[0]))
    assert len(lines) == 10 and all("complete" in line and "cut" in line and "not" not in line for line in lines)
    did = search_frame(read_json(folder / "shop.temporal.tests.json"))
    assert did.set_index(["model", "cut"])["n_trials"].to_dict() == {(m, c): 1 if m == "popularity" else 2 for m in NAMES for c in range(2)}
    ledger = read_ledger(folder)
    assert len(ledger) == len(rows) and set(zip(ledger["cut"], ledger["split_sha"])) == {(f.split.cut, f.split.sha) for f in fits}
    before = (folder / "shop.temporal.json").read_bytes()
    assert run_board(folder, cfg.name, fits, NAMES, SMALL) == rows and (folder / "shop.temporal.json").read_bytes() == before
    assert len(read_ledger(folder)) == len(rows), "nothing is read twice"
    assert not any(g.memo for f in fits for g in (f, f.refitted))


def test_a_row_is_of_the_model_fitted_up_to_its_window(in_time):
    "What the search chose, fitted by hand on train and validation joined, gives the row; on train alone it does not."
    from sharp_distill.data.evaluation import evaluate
    from sharp_distill.data.protocol import cold_half_life, refit_split, with_history, with_popularity_fallback
    from sharp_distill.models.baselines import EASEConfig, fit_ease
    folder, cfg, fits, rows, _ = in_time
    best = search_frame(read_json(folder / "shop.temporal.tests.json")).set_index(["model", "cut"])["best"]
    for f in fits:
        cut, joined = f.split.cut, refit_split(f.split)
        row = next(r for r in rows if r["model"] == "ease" and r["cut"] == cut)
        assert row["config"]["reg"] == best["ease", cut]["reg"]
        asked = lambda on: evaluate(with_popularity_fallback(fit_ease(on, EASEConfig.from_dict(row["config"])), on, cold_half_life(f.split)), on)
        result, alone = asked(joined), asked(f.split)
        assert row["metrics"]["NDCG@10"] == result.mean() != alone.mean()
        assert row["metrics_warm"]["NDCG@10"] == with_history(result, joined).mean()
        assert np.array_equal(read_users(folder, "shop.temporal")[f"ease 0 {cut}"], result.values("NDCG@10").astype(np.float32))
    trained = [r for r in rows if r["model"] == "lightgcn"]
    assert all(1 <= r["chosen"]["epochs"] <= 3 == r["config"]["epochs"] for r in trained)
    assert "half_life" in next(r for r in rows if r["model"] == "timed_ease+tfidf")["chosen"] and "chosen" not in rows[0]
    again, _ = fit_row("lightgcn", fits[1], fits[1].config("lightgcn", seed=1))
    assert again["metrics"] == trained[-1]["metrics"]


def test_windows_count_alike(in_time):
    folder, cfg, _, rows, _ = in_time
    users, frame = users_frame(folder, cfg.name, rows), temporal_frame(rows)
    of = lambda key: {(r["cut"], r["seed"]): r[key]["NDCG@10"] for r in rows if r["model"] == "lightgcn"}
    hand, warm = (np.mean([np.mean([v[c, s] for s in range(2)]) for c in range(2)]) for v in (of("metrics"), of("metrics_warm")))
    assert np.isclose(frame.loc["lightgcn", "mean"], hand) and np.isclose(frame.loc["lightgcn", "mean with history"], warm)
    assert np.allclose(users.mean(), frame["mean"][users.columns], rtol=1e-6) and set(users) == set(NAMES)
    n = [len(read_users(folder, cfg.name)[f"user_idx {c}"]) for c in range(2)]
    assert n[0] != n[1] and len(users) > max(n)
    assert np.isclose(metric_frame(rows).loc["lightgcn", "NDCG@10"], hand) and stratum_frame(rows).notna().any(axis=None)
    tests = {t["model"]: t for t in board_tests(users, rows, "ease")}
    assert len(tests) == 4 and np.isclose(tests["lightgcn"]["diff"], frame.loc["ease", "mean"] - hand) and tests["lightgcn"]["n_users"] == len(users)


def test_a_model_that_lacks_a_window_is_marked_and_left_out(in_time):
    folder, cfg, _, rows, _ = in_time
    top = best_of(rows, ("ids", "text"))
    short = [r for r in rows if (r["model"], r["cut"]) != (top, 1)]
    assert board_frame(short)["lacks"].to_dict() == {m: "cut 1" if m == top else "" for m in NAMES}
    assert best_of(short) != top and top not in users_frame(folder, cfg.name, short) and np.isnan(temporal_frame(short).loc[top, "cut 1"])
    assert temporal_frame(short).loc[top, "mean"] == temporal_frame(rows).loc[top, "cut 0"]
    assert top not in {t["model"] for t in board_tests(users_frame(folder, cfg.name, rows), short, "popularity")}


def test_windows_of_another_division_are_refused(in_time):
    folder, cfg, fits, rows, _ = in_time
    with pytest.raises(UserError, match=r"is of cuts 2, split 0 \w+, split 1 \w+, these rows are of cuts 3, split 2 \w+:"):
        run_board(folder, cfg.name, cfg.replace(cuts=3).fits((2,)), ["popularity"], SMALL)
    with pytest.raises(UserError, match="only_cuts has 2: expected some of 0, 1"): run_board(folder, cfg.name, fits, only_cuts=(0, 2))
    with pytest.raises(UserError, match="split is 'auto'"): BoardConfig.from_dict(dict(split="auto"))
    assert read_board(folder, cfg.name) == rows


def test_what_a_model_is_made_of_is_settled_first(in_time):
    _, _, fits, _, _ = in_time
    fits[0].options["teacher"] = fits[0].config("teacher", sequence="sasrec+text")
    assert made_of("student", fits[0]) == ["sasrec+text", "teacher"] and made_of("simrec", fits[0]) == ["lightgcn"] and made_of("ease", fits[0]) == []
    random = BoardConfig.from_dict(dict(dataset="sample", split="random")).fits()[0]
    assert made_of("student", random) == ["teacher"] and made_of("teacher", random) == []


def test_a_teacher_is_trained_once_for_its_row_and_its_students(tmp_path, monkeypatch):
    from sharp_distill.models import registry
    cfg, trained, train = BoardConfig.from_dict(dict(dataset="sample", cuts=2)), [], registry.train_teacher
    monkeypatch.setattr(registry, "train_teacher", lambda *a, **k: trained.append(a) or train(*a, **k))
    (fits,), names = cfg.fits([1]), ["teacher", "student"]
    for n in names: fits.options[n] = dict(epochs=1)
    run_board(tmp_path, cfg.name, fits, names, Budget(n_trials=1, n_seeds=1))
    trained.clear()
    rows = run_board(tmp_path, cfg.name, fits, names, Budget(n_trials=1, n_seeds=2))
    assert [(r["model"], r["seed"]) for r in rows] == [("teacher", 0), ("teacher", 1), ("student", 0), ("student", 1)]
    assert len(trained) == 2 and not fits.memo # before the window and up to it, with the one new seed


def test_the_page_of_a_temporal_leaderboard(in_time):
    folder, cfg, *_ = in_time
    cells = execute(ROOT / "nbs/leaderboard.ipynb", dict(dataset=cfg.dataset, split="temporal", cuts=2, board_dir=str(folder), against="ease",
                                                         rerun="ease,timed_ease+tfidf"))
    text = json.dumps([c.get("outputs") for c in cells])
    for said in ("users_with_history", "with history", "cut 1", "mean with history", "half-life", "not measured for this leaderboard", "p_holm"):
        assert said in text, said
    again = next(c for c in cells if "refit_row" in c["source"] and "wanted" in c["source"])["outputs"][0]["data"]["text/plain"]
    rows = ["".join(again)] if isinstance(again, str) else again
    numbers = [line.split()[-2:] for line in "".join(rows).splitlines()[1:]]
    assert len(numbers) == 4 and all(a == b for a, b in numbers)


def test_a_leaderboard_from_a_shell(tmp_path, capsys):
    main = runpy.run_path(str(ROOT / "tools/boards.py"))["main"]
    given = "sample --split temporal --cuts 2 --models popularity,ease --trials 2 --only-cuts 1 --board-dir".split()
    rows, said = main([*given, str(tmp_path / "leaderboard")]), capsys.readouterr().out
    assert "sample.temporal ease, cut 1: complete" in said and "mean with history" in said
    assert [(r["model"], r["cut"]) for r in rows] == [("popularity", 1), ("ease", 1)] and rows == read_board(tmp_path / "leaderboard", "sample.temporal")
    with pytest.raises(UserError, match="Did you mean 'ease'"): main([*given, str(tmp_path), "--models", "eas"])


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_rows_are_possible(name):
    rows = read_board(FOLDER, name)
    assert len({(r["model"], r["seed"], r.get("cut", 0)) for r in rows}) == len(rows) and {r["model"] for r in rows} <= set(methods())
    for r in rows:
        m = r["metrics"]
        assert all(0 <= m[f"{n}@{k}"] <= 1 for n in ("P", "R", "NDCG", "HR") for k in (5, 10, 20))
        for n in ("R", "HR"): assert m[f"{n}@5"] <= m[f"{n}@10"] <= m[f"{n}@20"]
        for k in (5, 10, 20): assert m[f"HR@{k}"] <= k * m[f"P@{k}"] + 1e-9 # one hit costs at least 1/k of precision


WITHOUT_USERS = { # rows older than the files of every user's values; whoever fits one again takes it out
    "ratebeer": {"alpharec", "bprmf", "hccf", "hgatt", "lightgcn+text", "student_id", "student_no_kd"},
    "steam": {"alpharec", "bprmf", "hccf", "hgatt", "lightgcn+text", "lighthgnn", "simrec", "student_id"}}


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_tests_follow_from_the_committed_users(name):
    "Every stored test can be made again from the users file; nobody needs to fit a model to check a p-value."
    rows, facts = read_board(FOLDER, name), json.loads((FOLDER / f"{name}.tests.json").read_text())
    users = users_frame(FOLDER, name, rows)
    assert {r["model"] for r in rows} - set(users) == WITHOUT_USERS.get(name, set())
    found = read_users(FOLDER, name)
    shas = {f"split {w['cut']}": w["sha"] for w in facts["split"].get("windows", [])} or {"split": facts["split"]["sha"]}
    assert {k: str(found[k]) for k in shas} == shas and {"teacher", "student"} <= set(users)
    for against, stored in (("student", facts["tests"]), ("teacher", facts["teacher_tests"])):
        over = seed_values(FOLDER, name, rows) if "tested_over" in facts else None # an older one: users alone, seeds averaged
        again = {t["model"]: t for t in board_tests(users, rows, against, seeds=over)}
        assert again and {t["model"] for t in stored} == set(users) - {against}
        for t in stored:
            assert t["p"] <= t["p_holm"] <= 1
            if t["model"] in again: assert np.allclose([t["diff"], t["p"]], [again[t["model"]]["diff"], again[t["model"]]["p"]], rtol=1e-4), t["model"]


@pytest.mark.parametrize("name", COMMITTED)
def test_the_books_follow_from_the_searches_and_mark_every_edge(name):
    "No chosen value lies within 2 % of an end of its space unless its row says so, and the page prints what the row says."
    facts, books = (read_json(FOLDER / f"{name}.{kind}.json") for kind in ("tests", "searches"))
    bare = lambda rows: [{k: v for k, v in r.items() if k != "pruned_share"} for r in rows] # the shares came from the logs
    assert bare(books) == bare(searches_rows(facts)) and {r["model"] for r in books} <= {r["model"] for r in read_board(FOLDER, name)}
    for row in books:
        for option, value in row["chosen"].items():
            low, high, *scale = facts["spaces"][row["model"]][option]
            if scale not in (["linear"], ["log"], ["int"]): continue # a choice has no ends
            of = (lambda x: np.log(x)) if scale == ["log"] and low > 0 else (lambda x: x)
            along = (of(value) - of(low)) / (of(high) - of(low))
            near = min(along, 1 - along) <= .02
            assert near == (option in row["at_edge"]) and (option in marked(row)) >= near, (row["model"], option, value)
        assert ("capped" in marked(row)) == row["capped"] and row["completed"] + row["pruned"] + row["failed"] >= 1
    page = (ROOT / "nbs/leaderboard.ipynb").read_text()
    assert "marked(r) for r in book" in page and "searches_rows(facts)" in page


def test_a_test_over_seeds_sees_their_luck(tmp_path):
    "Two models whose users agree but whose seeds do not: sure over users alone, open over both; Holm counts all comparisons."
    gen = np.random.default_rng(0)
    base = gen.random(200)
    lucky = {m: base + np.array(shift)[:, None] + .02 * gen.standard_normal((3, 200)) for m, shift in
             (("student", (.1, -.05, .02)), ("ease", (.0, -.1, .05)), ("slim", (-.3, -.32, -.31)))}
    rows = []
    for m, values in lucky.items():
        for seed, v in enumerate(values):
            split = types.SimpleNamespace(sha="abc", protocol="random", cuts=1, cut=0)
            row = dict(model=m, seed=seed, metrics={"NDCG@10": float(v.mean())})
            rows = board.put_row(tmp_path, "shop", split, row, EvalResult(np.arange(200), np.zeros((200, 0), int), {"NDCG@10": v}, "test", "abc"))
    users, seeds = users_frame(tmp_path, "shop", rows), seed_values(tmp_path, "shop", rows)
    assert all(np.allclose(seeds[m], lucky[m], atol=1e-6) for m in lucky)
    alone, both = ({t["model"]: t for t in board_tests(users, rows, seeds=s)} for s in (None, seeds))
    assert alone["ease"]["p"] < 1e-3 and both["ease"]["p"] > .1 and both["slim"]["p_holm"] < 1e-3
    assert both["ease"]["ci95_percent"][0] < 0 < both["ease"]["percent"] and both["ease"]["diff"] == alone["ease"]["diff"]
    assert np.isclose(both["slim"]["p_holm"], 2 * both["slim"]["p"]) and both["ease"]["p_holm"] >= both["ease"]["p"]


def test_there_are_committed_leaderboards(): assert len(COMMITTED) >= 3 and Path(board.__file__).exists()
