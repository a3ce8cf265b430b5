"""The front door: ids come back as they came, lists obey rules exactly, what is added is exact and stays, nothing needs torch but fit."""
import json
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
from conftest import ROOT, execute, refused
from hypothesis import given, settings, strategies as st

import sharp_distill as sd
from sharp_distill.app.bring import id_types
from sharp_distill.app.front import hold_out
from sharp_distill.data.interactions import from_frame, make_sample
from sharp_distill.serve.recommender import Recommender

pytestmark = pytest.mark.xdist_group("front") # two trainings for all


def as_numbers(frame): # The sample's rows with whole numbers for ids
    code = lambda c, first: (first + pd.factorize(frame[c], sort=True)[0]).astype(np.int32)
    return frame.assign(user_id=code("user_id", 1), item_id=code("item_id", 5001))


@pytest.fixture(scope="module")
def rows(): return as_numbers(make_sample(n_users=100, n_items=60).to_frame())


@pytest.fixture(scope="module")
def timed(rows): return sd.fit(rows, holdout=0, emb_dim=16, teacher_epochs=3, epochs=3)


@pytest.fixture(scope="module")
def untimed(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("shop") / "rows.parquet"
    rows.drop(columns="timestamp").to_parquet(path)
    new = pd.DataFrame(dict(sku=[9001, 9002, 5001], blurb=[rows["review"][0], "zzz qqq", "known"], title=["New", "Mute", "Old"]))
    return sd.fit([path], items=new, emb_dim=16, teacher_epochs=3, epochs=3)


def test_ids_come_back_as_they_came(rows, timed, untimed):
    lists = timed.recommend()
    assert lists.dtypes[["user_id", "item_id"]].tolist() == ["int32", "int32"] and list(lists) == ["user_id", "rank", "item_id", "score", "title"]
    assert set(lists["user_id"]) == set(rows["user_id"]) and (lists.groupby("user_id").size() == 10).all()
    assert not set(map(tuple, lists[["user_id", "item_id"]].to_numpy())) & set(map(tuple, rows[["user_id", "item_id"]].to_numpy()))
    for same in ("7", 7., np.int64(7), [7], pd.Series([7]), np.array(["7"])): assert timed.recommend(same).equals(timed.recommend(7))
    assert untimed.explain(7, 5003)["item_id"].dropna().map(type).eq(int).all()
    for frame, kind in ((rows, "int32"), (rows.astype(dict(user_id=str)), "str"), (rows.astype(dict(user_id="category")), "int32")):
        for table in (frame, pa.Table.from_pandas(frame)):
            assert id_types(table, None, (), ())["user_id"] == kind


def test_all_rows_are_learned_from_where_nothing_is_held_out(rows, timed, untimed):
    assert timed.recommender.train.nnz == len(rows) and set(timed.evaluate()["part"]) == {"valid"}
    assert untimed.recommender.train.nnz < len(rows) == untimed.recommender.exclude.nnz
    assert timed.about["protocol"] == "temporal" and untimed.about["protocol"] == "random"


def test_what_was_measured_is_what_is_served(rows, untimed):
    "NDCG@10 of the stored table, again from the lists of the fitted object and the rows that were held out."
    split = hold_out(from_frame(rows.drop(columns="timestamp")), "auto", None, 0)
    pairs = lambda part: [(int(part.user_ids[u]), int(part.item_ids[i])) for u, i in zip(part.user_idx, part.item_idx)]
    known, held = pd.DataFrame(pairs(split.train) + pairs(split.valid), columns=["user_id", "item_id"]), pd.DataFrame(pairs(split.test), columns=["user_id", "item_id"])
    users = sorted(set(held["user_id"]))
    lists, total = untimed.recommend(users, exclude=known, only=range(5001, 5061), exclude_seen=False), []
    for u, wanted in held.groupby("user_id")["item_id"]:
        mine = lists[lists["user_id"] == u]
        gain = (mine["item_id"].isin(wanted) / np.log2(mine["rank"] + 1)).sum()
        total.append(gain / (1 / np.log2(np.arange(2, 2 + min(10, len(wanted))))).sum())
    assert np.mean(total) == pytest.approx(untimed.evaluate().loc["student", "NDCG@10"], abs=1e-6) and len(users) == untimed.evaluate()["users"].iloc[0]


def toy_shop(seed, n_users=6, n_items=30):
    r = np.random.default_rng(seed)
    arrays = {n: r.integers(-2, 3, s).astype(np.float32) for n, s in dict(user_emb=(n_users, 3), item_emb=(n_items, 3), item_message=(n_items, 3), user_map=(2, 3), item_map=(1, 3)).items()}
    R = sp.csr_matrix((r.random((n_users, n_items)) < .1).astype(np.float32))
    names = lambda letter, n: np.array([f"{letter}{j}" for j in range(n)], object)
    return sd.FittedModel(Recommender(**arrays, item_degree=np.asarray(R.sum(0)).ravel().astype(np.int64), train=R, exclude=R.astype(bool), user_ids=names("u", n_users), item_ids=names("i", n_items)))


RULE = st.one_of(st.none(), st.sets(st.integers(0, 29), min_size=1), st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 29)), min_size=1))


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 20), exclude=RULE, only=RULE, seen=st.booleans(), users=st.lists(st.integers(0, 5), min_size=1, max_size=8), k=st.integers(1, 30), table=st.booleans())
def test_rules_are_a_full_sort_of_what_is_allowed(seed, exclude, only, seen, users, k, table):
    model = toy_shop(seed)
    rec, lists = model.recommender, []
    for u in users:
        score = {i: float(rec.user_emb[u] @ rec.item_emb[i]) for i in range(30)} # whole numbers: no rounding
        named = lambda rule: rule.get(u, set()) if isinstance(rule, dict) else rule or set()
        good = [i for i in score if i not in named(exclude) and (only is None or i in named(only)) and not (seen and rec.exclude[u, i])]
        lists += [(f"u{u}", n + 1, f"i{i}", score[i]) for n, i in enumerate(sorted(good, key=lambda i: (-score[i], i))[:k])]
    def asked(rule):
        if rule is None or not isinstance(rule, dict): return rule and [f"i{i}" for i in rule]
        if not table: return {f"u{u}": [f"i{i}" for i in items] for u, items in rule.items()}
        return pd.DataFrame([(f"u{u}", f"i{i}") for u, items in rule.items() for i in items], columns=["user_id", "item_id"])
    if table and isinstance(exclude, set): exclude_table = pd.DataFrame(dict(item_id=asked(exclude)))
    else: exclude_table = asked(exclude)
    found = model.recommend([f"u{u}" for u in users], k, exclude_table, asked(only), exclude_seen=seen)
    assert list(found.itertuples(index=False, name=None)) == lists


def test_a_long_rule_asked_again_is_the_same_rule():
    "First it is a mask, then an index of the allowed items; both are the search over all items, filtered."
    model, hidden = toy_shop(3, n_items=2500), [f"i{i}" for i in range(0, 2500, 2)]
    catalogue, every = model.recommender.catalogue, model.recommend("u1", k=2500)
    wanted = every[~every["item_id"].isin(hidden)]["item_id"].tolist()[:50]
    for asked in range(3):
        assert model.recommend("u1", k=50, exclude=hidden)["item_id"].tolist() == wanted and len(catalogue.kept) == (asked > 0)
    assert len(model.recommender.kept_rules) == 1


def test_a_short_list_is_said(capsys):
    model = toy_shop(1)
    assert len(model.recommend(["u0", "u1"], k=4, only=["i1", "i2"], exclude_seen=False)) == 4
    assert "2 of 2 lists have fewer than k = 4" in capsys.readouterr().out
    assert len(model.recommend_new(["i3"], k=4, only=["i1", "i2"])) == 2 and "1 of 1 lists have fewer than k = 4" in capsys.readouterr().out
    model.recommend(["u0", "u1"], k=2, only=["i1", "i2"], exclude_seen=False)
    assert not capsys.readouterr().out
    assert model.recommend("u0", exclude=["i1", "no", "none"], unknown_items="ignore").equals(model.recommend("u0", exclude=["i1"]))
    assert "2 of 3 item ids are unknown and left aside: 'no', 'none'" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["timed", "untimed"])
def test_reasons_add_up_to_the_score(which, request):
    model = request.getfixturevalue(which)
    for at in (None, *([model.recommender.at + 90 * 86_400] if which == "timed" and model.recommender.half_life else [])):
        for row in model.recommend([1, 7, 50], k=5, at=at).itertuples():
            parts = model.explain(row.user_id, row.item_id, at=at)
            assert parts["score"].sum() == pytest.approx(row.score, abs=2e-5)
            have = model.recommender.train[model.recommender.user_number[str(row.user_id)]].indices
            assert set(parts["item_id"].dropna()) == {int(model.recommender.item_ids[i]) for i in have}


def test_reasons_are_those_of_a_row_without_the_item(untimed):
    "Without an item of the user its message is gone, and the degree with it: recomputed from the formula, not from the parts."
    rec, u, i = untimed.recommender, 5, 3
    items = rec.train[u].indices
    z, n = rec.item_emb[i].astype(float), len(items) + 1
    by_hand = [rec.item_message[j].astype(float) @ z / np.sqrt(n * (rec.item_degree[j] + 1)) for j in items]
    found = untimed.explain(rec.user_ids[u], rec.item_ids[i])
    got = dict(zip(found["item_id"], found["score"]))
    np.testing.assert_allclose([got[int(rec.item_ids[j])] for j in items], by_hand, rtol=1e-6)
    same = found.set_index("because")["score"]["every user"]
    assert same == pytest.approx(rec.user_map[-1].astype(float) @ z / n, rel=1e-6)


def test_a_user_is_added_for_good(untimed, timed, rows, tmp_path):
    basket, words = [5003, 5010, 5022], " ".join(untimed.recommender.text_encoder.parts[0].words[:3])
    assert untimed.recommender.text_encoder(words).any()
    new = pd.DataFrame(dict(customer_id=700, sku=basket, review=[words, None, ""]))
    grown = untimed.add_users(new)
    rank = lambda t: list(zip(t["item_id"], t["score"].round(4)))
    assert rank(grown.recommend(700)) == rank(untimed.recommend_new(basket, reviews=words))
    assert "unknown user '700'" in refused(untimed.recommend, 700) and grown.recommend(700)["user_id"].dtype == "int32"
    again = sd.load(grown.save(tmp_path / "a"))
    assert again.recommend().equals(grown.recommend()) and again.evaluate().equals(untimed.evaluate())
    assert not set(basket) & set(again.recommend(700, k=60)["item_id"])
    later = timed.add_interactions(pd.DataFrame(dict(user_id=[1, 700], item_id=[5003, 5003], timestamp=rows["timestamp"].max())))
    assert 5003 not in later.recommend([1, 700], k=60)["item_id"].tolist() and len(later.recommend(700)) == 10
    guest = later.recommender.fold_in([], 700)[0] # the row again, from the stored history
    np.testing.assert_allclose(later.recommender.user_emb[-1], guest, atol=1e-5)


def test_items_of_a_catalogue_are_offered_from_day_one(untimed, rows, tmp_path, capsys):
    assert "9001" in untimed.recommender.item_ids and "9002" not in untimed.recommender.item_ids
    assert untimed.recommend(7, only=[9001])["title"].tolist() == ["New"]
    assert untimed.recommender.item_titles[untimed.recommender.item_number["5001"]] == "Old" # the catalogue's title
    more = untimed.add_items(pd.DataFrame(dict(item_id=[9002, 9003], words=[rows["review"][1], "zzz"])))
    assert "placed by their text: 1; left out" in capsys.readouterr().out
    assert sd.load(more.save(tmp_path / "a")).recommend(7, only=[9002])["item_id"].tolist() == [9002]
    assert "9001' is known already" in refused(untimed.add_items, pd.DataFrame(dict(item_id=[9001], words=["x"])))


def test_a_folder_that_is_replaced_while_served(untimed, tmp_path):
    served = sd.load(untimed.save(tmp_path / "a"))
    before, other = served.recommend([1, 2]), toy_shop(0)
    other.save(tmp_path / "a")
    assert served.recommend([1, 2]).equals(before) and served.similar_items(5003)["item_id"].dtype == "int32"
    assert sd.load(tmp_path / "a").recommend("u1").equals(other.recommend("u1"))


def asked_without_end(served, n=4): # threads, their answers, what went wrong, how to stop
    answers, wrong, stop = [[] for _ in range(n)], [], threading.Event()
    def ask(mine):
        while not stop.is_set():
            try: mine.append(tuple(served.model.recommend("u0", k=30, exclude_seen=False)["item_id"]))
            except Exception as e: wrong.append(e)
    threads = [threading.Thread(target=ask, args=(mine,)) for mine in answers]
    for t in threads: t.start()
    def end():
        stop.set()
        for t in threads: t.join()
    return answers, wrong, end


def test_a_served_model_is_replaced_under_running_requests(tmp_path):
    "Every answer is that of one saved model, whole; after each save the new one comes; a thread never goes back."
    models, said = [toy_shop(seed) for seed in range(5)], []
    lists = [tuple(m.recommend("u0", k=30, exclude_seen=False)["item_id"]) for m in models]
    served = sd.Served(models[0].save(tmp_path / "a"), say=said.append)
    answers, wrong, end = asked_without_end(served)
    try:
        for model, wanted in zip(models[1:], lists[1:]):
            model.save(tmp_path / "a")
            late = time.monotonic() + 20
            while not all(mine and mine[-1] == wanted for mine in answers) and not wrong and time.monotonic() < late: pass
    finally: end()
    assert not wrong and len(set(lists)) == 5 and len(said) == 4
    for mine in answers:
        order = [lists.index(a) for a in mine]
        assert order == sorted(order) and set(order) >= {1, 2, 3, 4}


def test_what_may_not_be_served_is_said_once_and_the_old_model_goes_on(untimed, tmp_path):
    folder, said = tmp_path / "a", []
    served = sd.Served(untimed.save(folder), say=said.append)
    before, file = served.model, folder / "student.safetensors"
    toy_shop(0).save(folder)
    assert served.model is before is served.model and len(said) == 1 and "another catalogue: 0 of its 30 items" in said[0]
    assert sd.Served(folder).model.recommend("u1").equals(toy_shop(0).recommend("u1")) # asked for by a new start
    file.write_bytes(file.read_bytes()[:-100])
    assert served.model is before and len(said) == 2 and "cut off" in said[1]
    file.unlink()
    assert served.model is before is served.model and len(said) == 3 and "not a saved Recommender" in said[2]
    assert not any("\n" in line for line in said) and all(str(folder) in line for line in said)
    untimed.save(folder)
    assert served.model is not before and served.model.recommend([1, 2]).equals(before.recommend([1, 2]))
    served.any_catalogue = True
    toy_shop(0).save(folder)
    assert served.model.recommend("u1").equals(toy_shop(0).recommend("u1")) and len(said) == 5


def test_ids_that_come_later_are_those_of_the_fit(timed, capsys):
    "Blanks and decimal points name nobody new, and no id is shown as another."
    at = timed.recommender.at + 86_400
    grown = timed.add_interactions(pd.DataFrame(dict(user_id=["7 ", 7.0], item_id=["5001", " 5002"], timestamp=at)))
    assert len(grown.recommender.user_ids) == len(timed.recommender.user_ids)
    assert {5001, 5002} & set(grown.explain(7, 5009)["item_id"].dropna())
    for text in ("007", "+7", "1_0"):
        with pytest.raises(sd.UserError, match="would be shown as"): timed.add_users(pd.DataFrame(dict(user_id=[text], item_id=[5001], timestamp=at)))
    with pytest.raises(sd.UserError, match="no user or no item"): timed.add_interactions(pd.DataFrame(dict(user_id=["", 3], item_id=[5001, 5002], timestamp=at)))
    timed.add_interactions(pd.DataFrame(dict(user_id=[7], item_id=[5003], timestamp=["05/12/2031"])))
    assert "could be read in two ways" in capsys.readouterr().out


def test_moments_are_one_however_written(timed):
    at = timed.recommender.at + 30 * 86_400
    same = [timed.recommend([7], 3, at=form) for form in (at, str(at), np.int64(at), pd.Timestamp(at, unit="s", tz="UTC"), str(np.datetime64(at, "s")))]
    assert all(t.equals(same[0]) for t in same) and not same[0].equals(timed.recommend([7], 3))
    for late in (1000 * at, str(1000 * at), 10**30):
        with pytest.raises(sd.UserError, match="before the year 2200"): timed.recommend([7], 3, at=late)


def test_without_histories_nothing_is_added_and_nothing_is_guessed(timed, tmp_path):
    timed.save(tmp_path / "bare", histories=False)
    bare, row = sd.load(tmp_path / "bare"), pd.DataFrame(dict(user_id=[999], item_id=[5001], timestamp=timed.recommender.at + 1))
    for call in (bare.add_users, bare.add_interactions):
        with pytest.raises(sd.UserError, match="saved without users"): call(row)
    assert bare.recommend_new([5001]).equals(timed.recommend_new([5001]))


def test_new_items_come_with_a_vector_and_a_title_each(untimed):
    rec, vector = untimed.recommender, np.ones(untimed.recommender.item_map.shape[0], np.float32)
    for vectors, titles in (([vector], None), ([vector, vector], ["one"])):
        with pytest.raises(sd.UserError, match="one of each"): rec.with_items(["9101", "9102"], vectors, titles)
    assert rec.with_items(["9101", "9102"], [vector, vector], np.array(["a", "b"])).item_titles[-1] == "b"


def test_lists_never_clear_what_is_not_theirs(timed, tmp_path):
    made = tmp_path / "made"
    timed.recommend_all(made, 3)
    before = {p.name: p.read_bytes() for p in made.iterdir()}
    with pytest.raises(sd.UserError, match="before"): timed.recommend_all(made, 3, at="1990-01-01")
    assert {p.name: p.read_bytes() for p in made.iterdir()} == before
    for name in ("part-0.parquet", "part-000000000000.parquet", "manifest.json"):
        other = tmp_path / name.replace(".", "-")
        other.mkdir()
        if name.endswith("json"): (other / name).write_text('{"mine": 1}')
        else: pd.DataFrame(dict(a=[1])).to_parquet(other / name)
        with pytest.raises(sd.UserError, match="no part of lists"): timed.recommend_all(other, 3)
        assert (other / name).exists()


def test_types_of_ids_are_those_of_all_files(rows, tmp_path):
    one, two = tmp_path / "one.parquet", tmp_path / "two.parquet"
    rows.to_parquet(one); rows.astype(dict(user_id=str)).to_parquet(two)
    assert id_types([one, one], None, ["1"], ["5001"])["user_id"] == "int32"
    assert id_types([one, two], None, ["1", "x1"], ["5001"])["user_id"] == "str"
    assert id_types(rows.set_index("user_id", drop=False), None, (), ())["user_id"] == "int32"


def test_lists_for_everyone_are_those_of_recommend(untimed, tmp_path):
    manifest = untimed.recommend_all(tmp_path / "lists", k=7, exclude=[5003, 5004], only={1: [5003, 5005], 2: [5006]})
    lists = pd.read_parquet(tmp_path / "lists" / manifest["parts"][0]["file"])
    wanted = untimed.recommend(k=7, exclude=[5003, 5004], only={1: [5003, 5005], 2: [5006]})
    assert lists[list(wanted)].astype(dict(rank="int64")).equals(wanted) and manifest["users"] == 100


@pytest.mark.parametrize("call, says", [
    (lambda m, r: m.recommend(7, k="10"), "k is '10'"), (lambda m, r: m.recommend_new([5001], k=0), "nearest good choice is 1"), (lambda m, r: m.similar_items(5001, k=0), "nearest good choice is 1"),
    (lambda m, r: m.recommend_new(reviews=5), "expected a text"), (lambda m, r: m.recommend(7, exclude={7: [1, 5001]}), r"unknown item '1' \(1 of 2\)"),
    (lambda m, r: m.recommend(np.nan), "nan is not an id"), (lambda m, r: m.recommend(None, exclude=[pd.NA]), "not an id"), (lambda m, r: m.recommend(2.5), "unknown user '2.5'"),
    (lambda m, r: m.recommend(pd.Series([], dtype=object)), "empty"), (lambda m, r: m.recommend(7, exclude=pd.DataFrame()), "without item_id"), (lambda m, r: m.recommend(7, only=pd.DataFrame(dict(item_id=[]))), "only names no item"),
    (lambda m, r: m.add_interactions(pd.DataFrame()), "no row"), (lambda m, r: m.add_items(pd.DataFrame()), "no row"), (lambda m, r: m.save(None), "expected the path"), (lambda m, r: sd.load(5), "expected the path"), (lambda m, r: sd.Served("nowhere"), "not a saved"),
    (lambda m, r: m.recommend(7, k=0), "nearest good choice is 1"), (lambda m, r: m.recommend([]), "empty"),
    (lambda m, r: m.recommend([np.nan]), "nan is not an id"), (lambda m, r: m.recommend([[7]]), "not an id"),
    (lambda m, r: m.recommend("seven"), "unknown user 'seven'"), (lambda m, r: m.recommend("seven", unknown="popular"), "expected whole numbers"),
    (lambda m, r: m.recommend(7, exclude=[5001, 1, 2]), r"unknown item '1', '2' \(2 of 3\)"), (lambda m, r: m.recommend(7, exclude=[None]), "not an id"),
    (lambda m, r: m.recommend(7, only=[]), "only names no item"), (lambda m, r: m.recommend(7, only={8000: [5001]}), "unknown user '8000'"),
    (lambda m, r: m.recommend(7, only=r[["user_id"]]), "without item_id"), (lambda m, r: m.recommend(r[["user_id"]]), "a table was given"), (lambda m, r: m.recommend_new([5001], exclude={7: [5002]}), "user by user"),
    (lambda m, r: m.recommend(7, at="2030-01-01"), "reads no time"), (lambda m, r: m.explain([7, 8], 5001), "2 users and 1 items"),
    (lambda m, r: m.add_users(r.head(3)), "known already"), (lambda m, r: m.add_users(r[:0]), "no row"), (lambda m, r: m.add_users(7), "no table"),
    (lambda m, r: m.add_users(pd.DataFrame(dict(user_id=["x"], item_id=[5001]))), "expected whole numbers"),
    (lambda m, r: m.add_interactions(pd.DataFrame(dict(user_id=[1], item_id=[77]))), "unknown item '77'"),
    (lambda m, r: sd.fit(r[:0]), "no row"), (lambda m, r: sd.fit(r, holdout=.9), "nearest good choice is 0.5"), (lambda m, r: sd.fit(r, emb_dimm=8), "Did you mean 'emb_dim'"),
    (lambda m, r: sd.fit(r.astype(dict(user_id=object)).assign(user_id=["1", *r["user_id"][1:]])), "two spellings of one id"),
    (lambda m, r: sd.fit(r.assign(user_id=[[1]] * len(r))), "a list"), (lambda m, r: sd.fit(r[r["item_id"] < 5010]), "expected more than 20"),
    (lambda m, r: sd.fit(r, items=r[["review"]]), "no column for item_id")])
def test_bad_input_is_one_line(untimed, rows, call, says):
    assert re.search(says, refused(call, untimed, rows))


def test_serving_needs_no_more_than_the_page_says(untimed, tmp_path):
    "Every requirement that csv_to_lists does not name is blocked, torch first of all; then all that a loaded model does."
    import configparser
    untimed.save(tmp_path / "a")
    (ini := configparser.ConfigParser(delimiters=["="])).read(ROOT / "settings.ini", encoding="utf-8")
    needs = set(re.search(r'needs = \\"([\w ]+)\\"', (ROOT / "nbs/csv_to_lists.ipynb").read_text(encoding="utf-8"))[1].split())
    every = {re.match(r"[\w-]+", r)[0] for r in ini["DEFAULT"]["requirements"].split()}
    blocked = {"sklearn" if n == "scikit-learn" else n for n in every - needs}
    assert needs < every and {"torch", "transformers", "sklearn", "typer"} <= blocked
    code = """import sys
for name in sys.argv[2:]: sys.modules[name] = None # as if they were not installed
import pandas as pd, sharp_distill as sd
m = sd.load(sys.argv[1])
m.recommend(k=3, exclude=[5001]), m.recommend([1, 2], only={1: [5004]}), m.similar_items(5001), m.explain(1, 5002), m.evaluate()
m.recommend_new([5001], reviews="a fine tale", exclude=[5002])
m = m.add_users(pd.DataFrame(dict(user_id=[700], item_id=[5001], review=["a fine tale"]))).add_interactions(pd.DataFrame(dict(user_id=[1], item_id=[9001])))
m = m.add_items(pd.DataFrame(dict(item_id=[9100], text=[m.recommender.text_encoder.parts[0].words[0]])))
m.recommend_all(sys.argv[1] + "_lists", k=4)
assert 9100 in set(sd.load(m.save(sys.argv[1])).recommend(700, k=70)["item_id"])"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a"), *sorted(blocked)], check=True, cwd=tmp_path)


@pytest.mark.slow # four trainings on a toy
def test_the_page_about_your_own_runs(): execute(ROOT / "nbs" / "bring_your_own.ipynb")


@pytest.mark.xdist_group("pages")
def test_from_a_csv_to_served_lists(tmp_path):
    "The page on a CSV of its own; what is stored stays, and says what the page promises."
    stored = ROOT / "outputs/speed/csv_to_lists.json"
    before = stored.read_bytes()
    execute(ROOT / "nbs/csv_to_lists.ipynb")
    kept = json.loads(before)
    assert stored.read_bytes() == before and kept["file"] == "Gift_Cards_5.json.gz" and kept["machine"] and kept["versions"]
    assert len(kept["seconds"]) == 9 and not {"torch", "transformers", "scikit-learn"} & set(kept["bare"]["packages"])


@pytest.mark.xdist_group("pages")
def test_behind_a_web_service(tmp_path):
    "A real service on the loopback address; measured small, into another folder, with the columns that are stored."
    pytest.importorskip("fastapi")
    cells = execute(ROOT / "nbs/web_service.ipynb", dict(measure=True, n_users=60, n_items=80, emb_dim=8, n_requests=10, output_dir=str(tmp_path)))
    made, kept = (json.loads((at / "speed/web_service.json").read_text()) for at in (tmp_path, ROOT / "outputs"))
    assert made.keys() == kept.keys() and [list(r) for r in made["records"]] == [list(r) for r in kept["records"]]
    assert all(r["failed"] == 0 for r in made["records"] + kept["records"]) and kept["size"]["items"] == 65_000
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.get("outputs", []))
