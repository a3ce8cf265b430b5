"""Baselines against independent implementations, closed forms and planted structure."""
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from sharp_distill.models.baselines import (
    BASELINES, LightGCN, LightGCNConfig, fit_baseline, fit_ease, fit_gfcf, fit_itemknn, fit_lightgcn,
    fit_rp3beta, fit_slim, fit_text_ease, item_graph)
from sharp_distill.core import UserError
from sharp_distill.data.interactions import from_frame
from sharp_distill.data.evaluation import evaluate
from sharp_distill.text.words import item_tfidf
from sharp_distill.data.split import make_split


pytestmark = pytest.mark.usefixtures("quiet")


def with_implicit(): return pytest.importorskip("implicit")


def test_itemknn_is_implicits_cosine(split):
    with_implicit()
    from implicit.nearest_neighbours import CosineRecommender
    R = split.train.to_csr()
    theirs = CosineRecommender(K=R.shape[1])
    theirs.fit(R, show_progress=False)
    theirs = theirs.similarity.toarray()
    np.fill_diagonal(theirs, 0)
    assert np.allclose(item_graph(R, .5, 0, .5, n_neighbours=R.shape[1]).toarray(), theirs, atol=1e-5)


def test_item_graph_blocks_and_neighbours(split, monkeypatch):
    R = split.train.to_csr()
    full, few = item_graph(R, .6, .6, .2, R.shape[1]), item_graph(R, .6, .6, .2, 5)
    assert (few.tocsc().getnnz(0) <= 5).all() and (full.diagonal() == 0).all()
    for i in (0, 7, 100): # what is kept are the largest sources of each target
        assert np.allclose(np.sort(few[:, [i]].data), np.sort(full[:, [i]].toarray().ravel())[-few[:, [i]].nnz:], atol=1e-7)


def test_ease_ignores_the_order_of_users_and_follows_items(split):
    R = split.train.to_csr()
    B = fit_ease(split, 50.)(np.arange(split.n_users))
    exact = np.linalg.inv((R.T @ R).toarray().astype(float) + 50 * np.eye(R.shape[1]))
    exact = -exact / np.diag(exact)
    np.fill_diagonal(exact, 0)
    assert np.allclose(B, R @ exact, atol=1e-4)


def test_text_reaches_items_without_train_rows():
    gen = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}") for u in range(60) for i in gen.choice(np.arange(10) + 10 * (u % 2), 5, replace=False)]
    split = make_split(from_frame(pd.DataFrame(rows, columns=["user_id", "item_id"])), seed=0)
    cold = int(np.flatnonzero(split.train.item_ids == "i3")[0])
    from dataclasses import replace
    split = replace(split, train=split.train.take(split.train.item_idx != cold))
    topic = np.eye(2)[[int(i[1:]) // 10 for i in split.train.item_ids]]
    group = np.array([int(u[1:]) % 2 for u in split.train.user_ids])
    ids, text = (s(np.arange(60))[:, cold] for s in (fit_ease(split, 5.), fit_text_ease(split, topic, 5., 1.)))
    assert np.allclose(ids, 0) and text[group == 0].min() > text[group == 1].max() # both groups told apart, by text alone


def test_bprmf_and_ials_learn(split):
    with_implicit()
    base = evaluate(fit_baseline("popularity", split), split).mean("NDCG@10")
    for name in ("ials", "bprmf"): assert evaluate(fit_baseline(name, split), split).mean("NDCG@10") > 1.3 * base, name


def test_implicit_missing_is_one_clear_line(split, monkeypatch):
    import builtins
    real = builtins.__import__
    import importlib
    monkeypatch.setattr(importlib, "import_module", lambda name, *a: (_ for _ in ()).throw(ImportError(name)))
    assert real
    with pytest.raises(UserError, match="pip install implicit"): fit_baseline("ials", split)


def test_lightgcn_gradient_and_permutation(split):
    R = split.train.to_csr()
    cfg = LightGCNConfig(emb_dim=8, n_layers=3)
    net, gen = LightGCN(R, cfg), np.random.default_rng(0)
    pu, pi = gen.permutation(R.shape[0]), gen.permutation(R.shape[1])
    moved = LightGCN(sp.csr_matrix(R[pu][:, pi]), cfg)
    with torch.no_grad(): moved.user.copy_(net.user[pu]); moved.item.copy_(net.item[pi])
    assert torch.allclose(moved()[0], net()[0][pu], atol=1e-6) and torch.allclose(moved()[1], net()[1][pi], atol=1e-6)


def test_lightgcn_cold_vertices_stay_finite(split):
    R = split.train.to_csr().tolil()
    R[3], R[:, 5] = 0, 0
    net = LightGCN(sp.csr_matrix(R), LightGCNConfig(emb_dim=4))
    x, y = net()
    assert torch.isfinite(x).all() and torch.isfinite(y).all() and torch.allclose(x[3], net.user[3] / 4)


def test_lightgcn_learns_and_repeats(split):
    threads = torch.get_num_threads()
    torch.set_num_threads(4) # gradients of repeated rows must not depend on which thread comes first
    try: a, b, other = (fit_lightgcn(split, LightGCNConfig(epochs=12, seed=seed)) for seed in (0, 0, 1))
    finally: torch.set_num_threads(threads)
    assert np.array_equal(a.item_emb, b.item_emb) # same seed, same model
    assert not np.allclose(a.item_emb, other.item_emb, atol=1e-2)
    popular = evaluate(fit_baseline("popularity", split), split).mean("NDCG@10")
    assert evaluate(a, split).mean("NDCG@10") > 1.3 * popular
    assert np.allclose(a(np.array([4, 2])), a.user_emb[[4, 2]] @ a.item_emb.T)


def test_lightgcn_resumes(split, tmp_path):
    cfg = LightGCNConfig(epochs=4)
    whole = fit_lightgcn(split, cfg, tmp_path / "a.safetensors")
    again = fit_lightgcn(split, cfg, tmp_path / "a.safetensors") # completed_trials: nothing is trained again
    assert np.array_equal(whole.item_emb, again.item_emb)


@pytest.mark.parametrize("name", [n for n in BASELINES if n != "ials"])
def test_every_baseline_beats_popularity_and_counts_itself(split, name):
    if name == "popularity": return
    base = evaluate(fit_baseline("popularity", split), split).mean("NDCG@10")
    scorer = fit_baseline(name, split, **(dict(item_text=item_tfidf(split)) if BASELINES[name].text else {}))
    assert evaluate(scorer, split).mean("NDCG@10") > 1.3 * base
    assert scorer.n_params > 0 and scorer.n_bytes > 0 and scorer.train_s > 0 and scorer.config
    assert set(BASELINES[name].space) <= set(scorer.config)


def test_models_read_train_only(split):
    "Poisoned validation and test rows change nothing in a closed form."
    from dataclasses import replace
    empty = split.train.take(np.zeros(len(split.train), bool))
    users = np.arange(split.n_users)
    for fit in (fit_ease, fit_itemknn, fit_rp3beta, fit_gfcf, fit_slim):
        assert np.array_equal(fit(split)(users), fit(replace(split, valid=empty, test=empty))(users)), fit.__name__


@pytest.mark.parametrize("call, words", [
    (lambda s: fit_baseline("eas", s), "Did you mean 'ease'"), (lambda s: fit_baseline("ease", s, regg=1), "Did you mean 'reg'"),
    (lambda s: fit_ease(s, -1), "expected 0.001"), (lambda s: fit_baseline("ease+text", s), "item_text"),
    (lambda s: fit_text_ease(s, np.ones((3, 2))), "one for each item"), (lambda s: fit_baseline("lightgcn", s, n_layer=2), "Did you mean 'n_layers'"),
    (lambda s: fit_gfcf(s, n_dims=0), "n_dims"), (lambda s: fit_slim(s, l1=0), "l1")])
def test_mistakes_are_one_line(split, call, words):
    with pytest.raises(UserError, match=words) as e: call(split)
    assert "\n" not in str(e.value)
