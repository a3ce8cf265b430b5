"""Evaluation against naive code, an independent library, and inequalities that hold for every model."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sharp_distill.core import UserError
from sharp_distill.data.interactions import make_sample
from sharp_distill.data.evaluation import (
    EvalResult, Scorer, bootstrap_means, compare, coverage, evaluate, hit_matrix, holm, metrics_at, paired_test,
    popularity_bias, popularity_groups, rank_topk, restrict, strata)
from sharp_distill.data.split import make_split


@pytest.fixture(scope="module")
def split(): return make_split(make_sample(seed=3, n_users=400), seed=1)


@pytest.fixture(scope="module")
def noisy(split):
    "A scorer that knows half of the truth: hits at many ranks."
    truth = split.test.to_csr()
    def score(u): return truth[u].toarray() + np.random.default_rng(u[0]).normal(0, .5, (len(u), split.n_items))
    return Scorer("noisy", score)


def naive_topk(scores, k):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(scores, order, 1) == -np.inf, -1, order)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.integers(1, 700), st.integers(1, 25), st.sampled_from([1, 2, 7, 10**6]), st.floats(0, 1), st.integers(0, 10**6))
def test_topk_equals_full_sort(n_rows, n_items, k, levels, masked, seed):
    gen, k = np.random.default_rng(seed), min(k, n_items)
    scores = gen.integers(0, levels, (n_rows, n_items)).astype(np.float32)
    scores[gen.random(scores.shape) < masked] = -np.inf
    assert np.array_equal(rank_topk(scores, k), naive_topk(scores, k))


@pytest.mark.parametrize("n_items", [5119, 5120, 5121, 5376, 9000])
@pytest.mark.parametrize("levels", [1, 3, 10**6])
def test_topk_by_blocks_equals_full_sort(n_items, levels):
    gen = np.random.default_rng(n_items)
    scores = gen.integers(0, levels, (30, n_items)).astype(np.float32)
    scores[0], scores[1, :-1], scores[2, 5:] = -np.inf, -np.inf, -np.inf
    for k in (1, 10, 20): assert np.array_equal(rank_topk(scores, k), naive_topk(scores, k))


def test_topk_leaves_its_input_alone_and_takes_torch():
    scores = torch.tensor([[1., 3., 3.]], requires_grad=True)
    assert rank_topk(scores, 2).tolist() == [[1, 2]] and scores.tolist() == [[1, 3, 3]]
    for k in (0, 4):
        with pytest.raises(UserError, match="expected 1 to 3"): rank_topk(scores, k)


def test_padding_is_never_a_hit():
    truth = sp.csr_matrix(([1.], ([0], [4])), shape=(3, 5))
    assert not hit_matrix(np.array([[-1, -1], [0, -1]]), [1, 2], truth).any()
    assert hit_matrix(np.array([[-1, 4]]), [0], truth).tolist() == [[False, True]]


def test_every_metric_against_ranx(split, noisy, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1") # compiling takes a minute, computing does not
    ranx = pytest.importorskip("ranx")
    result, truth = evaluate(noisy, split), split.test.to_csr()
    user = [f"u{u:05d}" for u in result.user_idx]
    qrels = ranx.Qrels({q: {str(i): 1 for i in truth[[u]].indices} for q, u in zip(user, result.user_idx)})
    run = ranx.Run({q: {str(i): 100. - j for j, i in enumerate(row) if i >= 0} for q, row in zip(user, result.topk)})
    for k in (5, 10, 20):
        theirs = ranx.evaluate(qrels, run, [f"precision@{k}", f"recall@{k}", f"ndcg@{k}", f"hit_rate@{k}"], return_mean=False)
        for ours, values in zip(("P", "R", "NDCG", "HR"), theirs.values()):
            assert np.allclose(result.metrics[f"{ours}@{k}"], values, atol=1e-9), (ours, k)
        assert .05 < result.mean(f"NDCG@{k}") < .95 # a comparison of zeros would prove nothing


def check_invariants(result, split, ks=(5, 10, 20)):
    m = result.metrics
    for v in m.values(): assert (v >= 0).all() and (v <= 1).all()
    for k in ks:
        assert (m[f"HR@{k}"] <= k * m[f"P@{k}"] + 1e-12).all() and (m[f"NDCG@{k}"] <= m[f"HR@{k}"] + 1e-12).all()
        assert (m[f"P@{k}"] <= m[f"HR@{k}"]).all() and (m[f"R@{k}"] <= m[f"HR@{k}"]).all()
    for a, b in zip(ks, ks[1:]):
        for name in ("R", "HR"): assert (m[f"{name}@{a}"] <= m[f"{name}@{b}"]).all()
    seen = split.train.to_csr().astype(bool) + (split.valid.to_csr().astype(bool) if result.part == "test" else 0 * split.valid.to_csr().astype(bool))
    for u, row in zip(result.user_idx, result.topk):
        shown = row[row >= 0]
        assert len(set(shown)) == len(shown) and not set(shown) & set(seen[[u]].indices[seen[[u]].data])


@pytest.mark.parametrize("part", ["valid", "test"])
def test_invariants(split, noisy, part): check_invariants(evaluate(noisy, split, part), split)


def test_a_scorer_in_love_with_seen_items_never_shows_them(split):
    seen = split.train.to_csr() + split.valid.to_csr()
    result = evaluate(lambda u: 1e6 * seen[u].toarray() + 1., split)
    check_invariants(result, split)
    free = np.setdiff1d(np.arange(split.n_items), seen[[result.user_idx[0]]].indices)
    assert result.topk[0].tolist() == free[:20].tolist() # all equal after masking: by item number


def test_batches_and_kinds_of_arrays_do_not_matter(split, noisy):
    fixed = np.random.default_rng(0).random((split.n_users, split.n_items), dtype=np.float32)
    a = evaluate(lambda u: fixed[u], split)
    for other in (evaluate(lambda u: fixed[u], split, batch_size=7), evaluate(lambda u: torch.from_numpy(fixed[u]), split),
                  evaluate(lambda u: fixed[u].astype(np.float64), split)):
        assert np.array_equal(a.topk, other.topk)


def test_scores_are_not_changed(split):
    table = np.random.default_rng(0).random((1, split.n_items)).astype(np.float32)
    before = table.copy()
    evaluate(lambda u: np.broadcast_to(table, (len(u), split.n_items)), split)
    shared = torch.from_numpy(np.tile(table, (split.n_users, 1)))
    evaluate(lambda u: shared[u[0]:u[0] + len(u)] if len(u) > 1 else shared[u], split, batch_size=10**6)
    assert np.array_equal(table, before) and np.array_equal(shared.numpy(), np.tile(before, (split.n_users, 1)))


def test_permuting_item_numbers_permutes_lists(split):
    gen = np.random.default_rng(0)
    s, perm = gen.random((5, 300)), gen.permutation(300)
    assert np.array_equal(perm[rank_topk(s[:, perm], 10)], rank_topk(s, 10))


def test_memory_is_bounded_by_the_batch():
    import tracemalloc
    from sharp_distill.data.evaluation import recommend_topk
    seen = sp.csr_matrix((3000, 40_000), dtype=np.float32)
    tracemalloc.start()
    sizes = []
    recommend_topk(lambda u: sizes.append(len(u)) or np.zeros((len(u), 40_000), np.float32), np.arange(900), seen, 5)
    tracemalloc.stop()
    assert max(sizes) * 40_000 * 4 <= 64 * 2**20


def test_cold_users_and_empty_parts(split):
    empty = split.test.take(np.zeros(len(split.test), bool))
    from dataclasses import replace
    with pytest.raises(UserError, match="empty"): evaluate(lambda u: None, replace(split, test=empty))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_properties(p):
    h = holm(p)
    assert (h >= np.array(p) - 1e-12).all() and (h <= 1).all() and h.max() <= 1
    assert (np.diff(h[np.argsort(p)]) >= -1e-12).all()
    assert np.isclose(h[np.argmin(p)], min(1, len(p) * min(p)))


def test_intervals_cover():
    gen, inside = np.random.default_rng(0), 0
    for _ in range(300):
        low, high = np.quantile(bootstrap_means(gen.beta(1, 5, (300, 1)), 300, seed=int(gen.integers(10**6))), [.025, .975])
        inside += low <= 1 / 6 <= high
    assert .90 <= inside / 300 <= .985


def test_summary_and_ci_agree(split, noisy):
    result = evaluate(noisy, split)
    s = result.summary()
    for m in ("NDCG@10", "R@20"): assert np.allclose(s[m]["ci95"], result.ci95(m)) and s[m]["mean"] == result.mean(m)
    assert result.to_frame().shape == (len(result.user_idx), 13)


def test_paired_test_signs(split, noisy):
    a, b = evaluate(noisy, split), evaluate(lambda u: np.zeros((len(u), split.n_items)), split)
    t, back, same = paired_test(a, b), paired_test(b, a), paired_test(a, a)
    assert t.diff == -back.diff > 0 and t.p == back.p < 1e-6 and t.wins == back.losses and same.p == 1 and same.diff == 0
    table = compare(dict(a=a, b=b), "b")
    assert table.loc["a", "p_holm"] == t.p and np.isnan(table.loc["b", "p"])


def test_results_of_different_splits_refuse_to_meet(split, noisy):
    a = evaluate(noisy, split)
    with pytest.raises(UserError, match="one part of one split"): paired_test(a, EvalResult(a.user_idx, a.topk, a.metrics, "test", "other"))
    with pytest.raises(UserError, match="one part of one split"): paired_test(a, evaluate(noisy, split, "valid"))


def test_strata_partition_users_and_items(split, noisy):
    result = evaluate(noisy, split)
    users = strata(result, split, "user")
    assert users["users measured"].sum() == len(result.user_idx)
    assert np.isclose((users["mean"] * users["users measured"]).sum() / users["users measured"].sum(), result.mean("NDCG@10"))
    group, truth = popularity_groups(np.asarray(split.train.to_csr().sum(0)).ravel()), split.test.to_csr()
    hits = sum((restrict(result, split, group == g).metrics["P@10"] * 10).sum() for g in set(group))
    assert np.isclose(hits, (result.metrics["P@10"] * 10).sum()) and truth.nnz == len(split.test)


def test_bias_measures(split):
    n = np.asarray(split.train.to_csr().sum(0)).ravel()
    popular = evaluate(lambda u: np.tile(n, (len(u), 1)), split)
    even = evaluate(lambda u: np.random.default_rng(u[0]).random((len(u), split.n_items)), split)
    p, e = popularity_bias(popular, split), popularity_bias(even, split)
    assert p["ARP@10"] > 3 * e["ARP@10"] and p["gini@10"] > e["gini@10"] and coverage(popular, split) < coverage(even, split)
    with pytest.raises(UserError): coverage(popular, split, k=21)
