"""Evaluation against naive code, an independent library, and facts that hold for every model."""
import tracemalloc
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharp_distill import device
from sharp_distill.core import UserError
from sharp_distill.data.evaluation import (
    EvalResult, Scorer, bootstrap_means, compare, coverage, evaluate, holm, paired_test, popularity_bias,
    popularity_groups, rank_topk, recommend_topk, restrict, strata, t_interval)
from sharp_distill.data.interactions import from_frame, make_sample
from sharp_distill.data.protocol import (
    cold_half_life, over_cuts, read_window, refit_split, with_history, with_popularity_fallback)
from sharp_distill.data.split import make_split, split_from_parts
from sharp_distill.data.time import HALF_LIVES, decayed_popularity


@pytest.fixture(scope="module")
def split(): return make_split(make_sample(seed=3, n_users=200, n_items=150), seed=1)


@pytest.fixture(scope="module")
def noisy(split):
    "A scorer that knows half of the truth: hits at many ranks."
    truth = split.test.to_csr()
    def score(u): return truth[u].toarray() + np.random.default_rng(u[0]).normal(0, .5, (len(u), split.n_items))
    return Scorer("noisy", score)


@pytest.fixture(scope="module")
def result(split, noisy): return evaluate(noisy, split)


def naive_topk(scores, k):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(scores, order, 1) == -np.inf, -1, order)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 700), st.integers(1, 25), st.sampled_from([1, 2, 7, 10**6]), st.floats(0, 1),
       st.integers(0, 10**6))
def test_topk_equals_full_sort(n_rows, n_items, k, levels, masked, seed):
    gen, k = np.random.default_rng(seed), min(k, n_items)
    scores = gen.integers(0, levels, (n_rows, n_items)).astype(np.float32)
    scores[gen.random(scores.shape) < masked] = -np.inf
    assert np.array_equal(rank_topk(scores, k), naive_topk(scores, k))


@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_topk_of_rows_with_few_items_by_blocks(levels):
    for n_items in (5119, 5120, 9000):
        scores = np.random.default_rng(n_items).integers(0, levels, (30, n_items)).astype(np.float32)
        scores[0], scores[1, :-1], scores[2, 5:] = -np.inf, -np.inf, -np.inf
        for k in (1, 10, 20): assert np.array_equal(rank_topk(scores, k), naive_topk(scores, k))


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))])
def test_a_device_ranks_as_arrays_are_ranked(kind, monkeypatch):
    "Scores that stay on a device, this processor's memory among them, give the same lists to the last tie."
    gen = np.random.default_rng(0)
    known = sp.random(90, 6001, .01, "csr", np.float32, rng=gen)
    for levels in (2, 30, 10**6):
        table = gen.integers(0, levels, (90, 6001)).astype(np.float32)
        table[gen.random(table.shape) < .2], table[0], table[1, 4:] = -np.inf, -np.inf, -np.inf
        users = gen.permutation(90)[:70]
        lists = recommend_topk(lambda u: table[u], users, known, 20)
        there = torch.from_numpy(table).to(kind)
        with monkeypatch.context() as patch:
            patch.setattr(device, "HELD", ("cuda", "cpu"))
            scorer = Scorer("both", lambda u: pytest.fail("arrays were asked"), on_device=lambda u: there[u])
            for score in (lambda u: there[u], scorer):
                assert np.array_equal(recommend_topk(score, users, known, 20, batch_size=9), lists)
            assert np.array_equal(rank_topk(there, 7), naive_topk(table, 7))
        assert np.array_equal(there.cpu().numpy(), table), "a scorer's own table is not masked"


def test_a_device_without_memory_says_what_to_lower():
    def score(u): raise torch.OutOfMemoryError("Tried to allocate 9.00 GiB")
    with pytest.raises(UserError, match="no memory left for the scores of 3 users: lower batch_size") as e:
        recommend_topk(score, np.arange(3), sp.csr_matrix((3, 9)), 2)
    assert "\n" not in str(e.value)


def test_topk_leaves_its_input_alone_and_takes_torch():
    scores = torch.tensor([[1., 3., 3.]], requires_grad=True)
    assert rank_topk(scores, 2).tolist() == [[1, 2]] and scores.tolist() == [[1, 3, 3]]
    for k in (0, 4):
        with pytest.raises(UserError, match="expected 1 to 3"): rank_topk(scores, k)


def test_every_metric_against_ranx(split, result, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1") # compiling takes a minute, computing does not
    ranx = pytest.importorskip("ranx")
    truth = split.test.to_csr()
    user = [f"u{u:05d}" for u in result.user_idx]
    qrels = ranx.Qrels({q: {str(i): 1 for i in truth[[u]].indices} for q, u in zip(user, result.user_idx)})
    run = ranx.Run({q: {str(i): 100. - j for j, i in enumerate(row) if i >= 0} for q, row in zip(user, result.topk)})
    for k in (5, 10, 20):
        names = [f"precision@{k}", f"recall@{k}", f"ndcg@{k}", f"hit_rate@{k}"]
        theirs = ranx.evaluate(qrels, run, names, return_mean=False)
        for ours, values in zip(("P", "R", "NDCG", "HR"), theirs.values()):
            assert np.allclose(result.metrics[f"{ours}@{k}"], values, atol=1e-9), (ours, k)
        assert .05 < result.mean(f"NDCG@{k}") < .95 # a comparison of zeros would prove nothing


def test_known_items_are_never_shown(split):
    "A scorer that prefers what a user has: all that is left is equal, so it comes by item number."
    for part, known in (("valid", split.train.to_csr()), ("test", split.train.to_csr() + split.valid.to_csr())):
        shown = evaluate(lambda u: 1e6 * known[u].toarray() + 1., split, part)
        for u, row in zip(shown.user_idx, shown.topk):
            assert row.tolist() == np.setdiff1d(np.arange(split.n_items), known[[u]].indices)[:20].tolist()


def test_batches_and_kinds_of_arrays_do_not_matter(split):
    fixed = np.random.default_rng(0).random((split.n_users, split.n_items), dtype=np.float32)
    a = evaluate(lambda u: fixed[u], split)
    others = (evaluate(lambda u: fixed[u], split, batch_size=7), evaluate(lambda u: torch.from_numpy(fixed[u]), split),
              evaluate(lambda u: fixed[u].astype(np.float64), split))
    for other in others: assert np.array_equal(a.topk, other.topk)


def test_scores_are_not_changed(split):
    "A scorer may hand out a view of its own table, as an array or as a tensor."
    table = np.random.default_rng(0).random((split.n_users, split.n_items)).astype(np.float32)
    for view in (table, torch.from_numpy(table)):
        before = table.copy()
        evaluate(lambda u: view[u[0]:u[-1] + 1] if len(u) == u[-1] + 1 - u[0] else view[u], split, batch_size=1)
        assert np.array_equal(table, before)


def test_permuting_item_numbers_permutes_lists():
    gen = np.random.default_rng(0)
    s, perm = gen.random((5, 300)), gen.permutation(300)
    assert np.array_equal(perm[rank_topk(s[:, perm], 10)], rank_topk(s, 10))


def test_memory_is_bounded_by_the_batch():
    "Of 137 MiB of scores at most two blocks of 64 MiB are there at a time: the scorer's and our copy."
    known, row = sp.csr_matrix((900, 40_000), dtype=np.float32), np.arange(40_000, dtype=np.float32)
    tracemalloc.start()
    try:
        recommend_topk(lambda u: np.tile(row, (len(u), 1)), np.arange(900), known, 5)
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert 64 * 2**20 < peak < 132 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_cold_users_and_items():
    "Who has no train row is measured like anybody else; what has none can be shown, unless its score is -inf."
    def rows(users, items): return from_frame(pd.DataFrame(dict(user_id=list(users), item_id=list(items))))
    none = rows("a", "x").take(np.array([], int))
    cold = split_from_parts(rows("aab", "xyx"), none, rows("bcc", "yxz")) # user c and item z are not in train
    scores = np.float32([[0, 0, 0], [0, 1, 0], [1, 0, 2]])
    measured = evaluate(lambda u: scores[u], cold, ks=(1, 3))
    assert measured.user_idx.tolist() == [1, 2] and measured.topk.tolist() == [[1, 2, -1], [2, 0, 1]]
    assert measured.metrics["R@1"].tolist() == [1, .5] and measured.metrics["NDCG@3"].tolist() == [1, 1]
    scores[:, 2] = -np.inf
    unable = evaluate(lambda u: scores[u], cold, ks=(1, 3))
    assert unable.topk.tolist() == [[1, -1, -1], [0, 1, -1]] and unable.metrics["R@3"].tolist() == [1, .5]


def test_empty_part_is_refused(split):
    empty = split.test.take(np.zeros(len(split.test), bool))
    with pytest.raises(UserError, match="empty"): evaluate(lambda u: None, replace(split, test=empty))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_properties(p):
    h = holm(p)
    assert (h >= np.array(p) - 1e-12).all() and (h <= 1).all()
    assert (np.diff(h[np.argsort(p)]) >= -1e-12).all()
    assert np.isclose(h[np.argmin(p)], min(1, len(p) * min(p)))


def test_intervals_cover():
    "Of 95 % intervals about that many hold the truth: over users by bootstrap, over seeds by t."
    gen, users = np.random.default_rng(0), 0
    for trial in range(120):
        means = bootstrap_means(gen.beta(1, 5, (200, 1)), 200, seed=trial)
        low, high = np.quantile(means, [.025, .975])
        users += low <= 1 / 6 <= high
    seeds = np.array([t_interval(x)[1:] for x in gen.normal(1, .1, (1500, 3))])
    assert .90 <= users / 120 <= .985 and .935 <= ((seeds[:, 0] <= 1) & (1 <= seeds[:, 1])).mean() <= .965


def test_summary_and_interval_agree(result):
    s = result.summary()
    for m in ("NDCG@10", "R@20"): assert np.allclose(s[m]["ci95"], result.ci95(m)) and s[m]["mean"] == result.mean(m)
    assert result.to_frame().shape == (len(result.user_idx), 13)


def test_paired_test_signs(split, result):
    b = evaluate(lambda u: np.zeros((len(u), split.n_items)), split)
    t, back, same = paired_test(result, b), paired_test(b, result), paired_test(result, result)
    assert t.diff == -back.diff > 0 and t.p == back.p < 1e-6 and t.wins == back.losses > 0
    assert same.p == 1 and same.diff == 0
    table = compare(dict(a=result, b=b, c=b), "b")
    assert table.loc["a", "p_holm"] == 2 * t.p, "two comparisons"


def test_results_of_different_splits_refuse_to_meet(split, noisy, result):
    other = EvalResult(result.user_idx, result.topk, result.metrics, "test", "other")
    for b in (other, evaluate(noisy, split, "valid")):
        with pytest.raises(UserError, match="one part of one split"): paired_test(result, b)


def test_strata_partition_users_and_items(split, result):
    users = strata(result, split, "user")
    weighted = (users["mean"] * users["users measured"]).sum() / users["users measured"].sum()
    assert np.isclose(weighted, result.mean("NDCG@10"))
    group = popularity_groups(np.asarray(split.train.to_csr().sum(0)).ravel())
    hits = sum((restrict(result, split, group == g).metrics["P@10"] * 10).sum() for g in set(group))
    assert np.isclose(hits, (result.metrics["P@10"] * 10).sum()) and len(set(group)) >= 3


def test_bias_measures(split):
    n = np.asarray(split.train.to_csr().sum(0)).ravel()
    popular = evaluate(lambda u: np.tile(n, (len(u), 1)), split)
    even = evaluate(lambda u: np.random.default_rng(u[0]).random((len(u), split.n_items)), split)
    p, e = popularity_bias(popular, split), popularity_bias(even, split)
    assert p["ARP@10"] > 2 * e["ARP@10"] and p["gini@10"] > e["gini@10"]
    assert coverage(popular, split) < coverage(even, split)


# The protocol of a test in time

def fashions(n_days, n_books=60, life=100, seed=0):
    "Every day two new users buy five of the books in fashion, which last `life` days each; three regulars come every 30 days."
    gen, rows = np.random.default_rng(seed), []
    for day in range(n_days):
        books = 10 + (day // life * 8 + np.arange(8)) % (n_books - 10)
        rows += [(f"n{day:03d}{j}", f"b{b:02d}", day) for j in range(2) for b in gen.choice(books, 5, replace=False)]
        if day % 30 == 0: rows += [(f"r{j}", f"b{b:02d}", day) for j in range(3) for b in gen.choice(books, 2, replace=False)]
    rows += [(f"r{j}", f"b0{k}", n_days - 1) for j in range(3) for k in range(2)] # the regulars come on the last day, too
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "day"]).drop_duplicates(["user_id", "item_id"])
    return from_frame(frame.assign(timestamp=pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.pop("day"), "D")))


def test_users_without_history_see_what_is_popular_now():
    split = make_split(fashions(300), "temporal")
    joined, half_life = refit_split(split), cold_half_life(split)
    assert half_life in HALF_LIVES and 0 < half_life <= 30 # ten days before validation other books came into fashion
    zeros = Scorer("zeros", lambda u: np.zeros((len(u), split.n_items), np.float32))
    now, always = (evaluate(with_popularity_fallback(zeros, joined, h), joined) for h in (half_life, 0.))
    assert now.mean() > 2 * always.mean()
    shown = with_popularity_fallback(zeros, joined, half_life)(np.arange(split.n_users))
    new = np.bincount(joined.train.user_idx, minlength=split.n_users) == 0
    assert (shown[new] == decayed_popularity(joined.train, half_life)).all() and not shown[~new].any()


def test_every_model_is_asked_alike_and_users_with_history_apart():
    "What a model says of users without history changes nothing; the users with history are those with a joined row."
    split = make_split(fashions(120), "temporal", cuts=2, cut=1)
    joined, gen = refit_split(split), np.random.default_rng(0)
    new = np.bincount(joined.train.user_idx, minlength=split.n_users) == 0
    table = gen.random((split.n_users, split.n_items)).astype(np.float32)
    other = np.where(new[:, None], -table, table) # another opinion of users that nothing is known of
    window = read_window({n: Scorer(n, lambda u, t=t: t[u]) for n, t in (("a", table), ("b", other))}, split, joined)
    assert np.array_equal(window.results["a"].topk, window.results["b"].topk)
    warm = window.warm["a"]
    assert len(warm.user_idx) == 3 and set(warm.user_idx) == set(window.results["a"].user_idx[~new[window.results["a"].user_idx]])
    assert np.array_equal(warm.topk, with_history(evaluate(lambda u: table[u], joined), joined).topk)
    assert window.facts()["users_with_history"] == 3 < window.facts()["users"]
    with pytest.raises(UserError, match="expected one of it"): with_history(window.results["a"], split)


def test_windows_count_alike_and_a_user_once():
    gen = np.random.default_rng(0)
    def result(users, sha): return EvalResult(np.array(users), np.zeros((len(users), 1), int), {"NDCG@10": gen.random(len(users))}, "test", sha)
    each = [result(range(4), "a"), result(range(2, 40), "b"), result([1, 50], "c")]
    both = over_cuts(each)
    assert np.isclose(both.mean(), np.mean([r.mean() for r in each])) and len(both.user_idx) == 41
    assert over_cuts(each[:1]) is each[0] and both.split_sha not in "abc"
    low, high = both.ci95()
    assert low < both.mean() < high
    nobody = result([], "d")
    assert np.isclose(over_cuts([*each, nobody]).mean(), both.mean()), "a window without such users says nothing"
    better = over_cuts([replace(r, metrics={"NDCG@10": r.values("NDCG@10") + .01}) for r in each])
    assert np.isclose(paired_test(better, both).diff, .01)


@pytest.mark.parametrize("target", ["all", "last", "first"])
def test_only_the_rows_that_are_asked_count(target):
    split = make_split(fashions(120), "temporal", targets=target)
    for part in ("valid", "test"):
        asked = split.held_out(part)
        hit = asked.to_csr()
        perfect = evaluate(lambda u: hit[u].toarray(), split, part)
        assert perfect.mean("NDCG@10") == perfect.mean("R@10") == 1 and set(perfect.user_idx) == set(getattr(split, part).user_idx)
        assert (len(asked) == len(perfect.user_idx)) == (target != "all")
        assert np.isclose(restrict(perfect, split, np.ones(split.n_items)).mean("NDCG@10"), 1)
