"""Hypergraphs and the student's edges against dense formulas, with rows of every age; sessions by time; no look ahead."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from conftest import refused

from sharp_distill.data.dates import NO_TIME
from sharp_distill.data.interactions import load_interactions
from sharp_distill.data.time import DAY, decayed_matrix, known_before, query_time
from sharp_distill.models import dynamic as d
from sharp_distill.models import hypergraphs as h


def history(n=400, n_users=25, n_items=60, days=300, seed=0, second=0):
    "Random rows to the second over some days, one a pair."
    draw = np.random.default_rng(seed)
    pairs = np.unique(draw.integers(0, (n_users, n_items), (n, 2)), axis=0)
    when = second + draw.integers(0, days * DAY, len(pairs))
    return load_interactions(pd.DataFrame(pairs, columns=["user", "item"]).astype(str).assign(timestamp=when))


def dense_operator(H, w_e):
    "The operator entry by entry, with a vertex or hyperedge of degree 0 left out."
    D_v, D_e = H @ w_e, H.sum(0)
    over = lambda x: np.divide(1, x, out=np.zeros_like(x), where=x > 0)
    return np.einsum("ue,e,ve,u,v->uv", H, w_e * over(D_e), H, over(D_v) ** .5, over(D_v) ** .5)


def test_students_edges_by_the_formula_and_as_blocks_of_the_normalised_adjacency():
    data = history()
    R = data.to_csr()
    twice = sp.coo_matrix((np.ones(2 * len(data)), (np.tile(data.user_idx, 2), np.tile(data.item_idx, 2))), R.shape)
    for rows in (R, R * 5, twice): # ratings and repeats are ones
        edges, user_loop, item_loop = h.student_edges(rows)
        plain = h.normalised_adjacency(R)
        n = R.shape[0]
        assert np.allclose(edges.toarray(), plain[:n, n:].toarray(), atol=1e-7)
        assert np.allclose(np.r_[user_loop, item_loop], plain.diagonal(), atol=1e-7)
        assert all(a.dtype == np.float32 for a in (edges, user_loop, item_loop))
    a = decayed_matrix(data, 60)
    edges, user_loop, item_loop = h.student_edges(a)
    A, count = a.toarray().astype(float), np.diff(R.tocsc().indptr)
    assert A[A > 0].min() < .1 < .9 < A.max(), "rows of every age"
    d_u = A.sum(1)[:, None]
    assert np.allclose(edges.toarray(), A / np.sqrt((d_u + 1) * (count + 1)), atol=1e-6)
    assert np.allclose(user_loop, 1 / (d_u[:, 0] + 1)) and np.allclose(item_loop, 1 / (count + 1))


@pytest.mark.parametrize("bad", [-1., np.nan])
def test_weights_of_rows_that_are_none_are_refused(bad):
    R = history().to_csr()
    R.data[7] = bad
    assert "smallest weight of a row" in refused(h.student_edges, R)


@pytest.mark.parametrize("ages", [(0, 0), (40, 0), (0, 40), (40, 150)])
def test_dynamic_hypergraphs_are_the_dense_formula(ages):
    data = history().take(slice(5, None)) # some vertices may be without a row
    now = query_time(data) + 3 * DAY
    age = (now - data.timestamp) / DAY
    H, newest = np.zeros((data.n_users, data.n_items)), [np.full(n, np.inf) for n in (data.n_users, data.n_items)]
    for u, i, a in zip(data.user_idx, data.item_idx, age):
        H[u, i] = 2 ** -(a / ages[0]) if ages[0] else 1
        newest[0][u], newest[1][i] = min(newest[0][u], a), min(newest[1][i], a)
    w_u, w_i = (2 ** -(np.where(np.isfinite(n), n, 0) / ages[1]) if ages[1] else np.ones(len(n)) for n in newest)
    users, items = d.build_dynamic_hypergraphs(data, *ages, now)
    assert np.allclose(users.apply(np.eye(data.n_users)), dense_operator(H, w_i), atol=1e-5)
    assert np.allclose(items.apply(np.eye(data.n_items)), dense_operator(H.T, w_u), atol=1e-5)
    assert np.linalg.eigvalsh(users.apply(np.eye(data.n_users))).max() < 1 + 1e-5


def test_without_ages_nothing_changes_and_no_time_is_read():
    data = history()
    data = replace(data, timestamp=np.full(len(data), NO_TIME))
    for plain, aged in zip(h.build_hypergraphs(data.to_csr()), d.build_dynamic_hypergraphs(data)):
        same = [(plain.w_e, aged.w_e)] + [(getattr(plain.factor, k), getattr(aged.factor, k))
                                          for k in ("data", "indices", "indptr")]
        assert all(a.dtype == b.dtype and (a == b).all() for a, b in same) and plain.side == aged.side
    assert "needs times" in refused(d.build_dynamic_hypergraphs, data, 30)
    assert "needs times" in refused(d.build_dynamic_hypergraphs, data, 0, 30)


def test_rows_after_the_moment_are_refused_and_change_nothing_when_left_out():
    data = history()
    at = int(np.quantile(data.timestamp, .7))
    for ages in ((30, 0), (0, 30)):
        assert "at or after the query time" in refused(d.build_dynamic_hypergraphs, data, *ages, at)
    late = data.timestamp >= at
    other = replace(data, item_idx=np.where(late, 0, data.item_idx), timestamp=data.timestamp + late * 90 * DAY)
    for a, b in zip(*(d.build_dynamic_hypergraphs(known_before(x, at), 30, 60, at) for x in (data, other))):
        assert (a.factor != b.factor).nnz == 0


def kernel_gram(data, tau):
    "The double sum over rows of one user."
    t, u, i, G = data.timestamp / DAY, data.user_idx, data.item_idx, np.zeros((data.n_items,) * 2)
    K = np.exp(-np.abs(t[:, None] - t) / tau) * (u[:, None] == u) * data.has_time * data.has_time[:, None]
    np.add.at(G, (i[:, None], i), K)
    return G


@pytest.mark.parametrize("second", [0, -200 * DAY, 1_700_000_000])
@pytest.mark.parametrize("tau", [.5, 5, 40, 3000])
def test_kernel_hyperedges_have_the_kernel_as_their_gram(tau, second):
    data = history(second=second)
    S, exact = d.kernel_hyperedges(data, tau), kernel_gram(data, tau)
    off = np.abs((S @ S.T).toarray() - exact)
    pairs = kernel_gram(data, 1e9) # how many pairs of rows stand behind an entry
    assert (off <= pairs * (1 / d.KERNEL_STEPS + .02)).all(), "a step of the time, and the cut"
    assert (off.diagonal() <= 4e-4 * pairs.diagonal()).all(), "a row with itself counts 1"
    assert S.data.min() > 0 and S.data.max() <= 1 + 1e-6 and S.nnz <= (d.KERNEL_REACH + 1) * len(data)


def test_kernel_keeps_users_apart_and_leaves_rows_without_time_out():
    data = history()
    unknown = np.arange(len(data)) % 3 == 0
    some = replace(data, timestamp=np.where(unknown, NO_TIME, data.timestamp))
    assert (d.kernel_hyperedges(some, 7) != d.kernel_hyperedges(data.take(~unknown), 7)).nnz == 0
    alone = replace(data, user_idx=np.arange(len(data)), user_ids=np.arange(len(data)).astype(str).astype(object))
    assert (np.diff(d.kernel_hyperedges(alone, 7).tocsc().indptr) == 1).all(), "one row a user: nobody to join with"
    order = np.random.default_rng(1).permutation(len(data))
    a, b = (d.kernel_hyperedges(data.take(o), 7) for o in (order, slice(None)))
    assert np.allclose((a @ a.T).toarray(), (b @ b.T).toarray(), atol=1e-6), "the order of rows says nothing"


def test_kernel_refuses_what_would_not_fit_and_what_is_no_time(monkeypatch):
    data = history()
    for tau in (-1, np.nan, np.inf):
        assert "expected more than 0" in refused(d.time_sessions, data, tau)
    monkeypatch.setattr(d, "MOST_MEMBERSHIPS", 1000)
    assert "memberships, expected at most 1,000; a shorter tau" in refused(d.time_sessions, data, 90)
    assert (d.time_sessions(data) != h.session_hyperedges(data)).nnz == 0
