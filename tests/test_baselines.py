"""Baselines against independent implementations, closed forms, and what a model may read."""
import sys
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sharp_distill.core import UserError
from sharp_distill.data.evaluation import evaluate
from sharp_distill.data.interactions import make_sample
from sharp_distill.data.split import make_split
from sharp_distill.models import baselines as b
from sharp_distill.models.hypergraphs import random_interactions
from sharp_distill.text.words import item_tfidf

CLOSED = dict(itemknn=b.fit_itemknn, rp3beta=b.fit_rp3beta, gfcf=b.fit_gfcf, ease=b.fit_ease, slim=b.fit_slim)
USERS = np.arange(40)


@pytest.fixture(scope="module")
def split(): return make_split(make_sample(seed=2, n_users=300, n_items=200), seed=0)


@pytest.fixture(scope="module")
def popular(split): return evaluate(b.fit_popularity(split), split).mean("NDCG@10")


@pytest.mark.filterwarnings("ignore:Method expects CSR")
def test_itemknn_is_implicits_cosine(split):
    pytest.importorskip("implicit")
    from implicit.nearest_neighbours import CosineRecommender
    R = split.train.to_csr()
    theirs = CosineRecommender(K=R.shape[1])
    theirs.fit(R, show_progress=False)
    theirs = theirs.similarity.toarray()
    np.fill_diagonal(theirs, 0)
    assert np.allclose(b.item_graph(R, .5, 0, .5, n_neighbours=R.shape[1]).toarray(), theirs, atol=1e-5)


def test_item_graph_keeps_the_strongest_sources_across_blocks():
    R = random_interactions(300, 4500, 9000) # 4,500 targets: more than one block
    few, d = b.item_graph(R, .5, .5, 0., 5), np.maximum(np.asarray(R.sum(1)).ravel(), 1)
    d_i = np.maximum(np.asarray(R.sum(0)).ravel(), 1)
    assert (few.getnnz(0) <= 5).all() and not few.diagonal().any()
    for i in (0, 3727, 3728, 4499): # the last block begins at 3,728
        column = (R.multiply(d_i ** -.5).T @ (R[:, [i]].toarray().ravel() * d ** -.5)).ravel()
        column[i] = 0
        assert np.allclose(np.sort(few[:, [i]].toarray().ravel())[-5:], np.sort(column)[-5:], atol=1e-6)


def test_ease_is_the_dense_inverse(split):
    R = split.train.to_csr()
    exact = np.linalg.inv((R.T @ R).toarray().astype(float) + 50 * np.eye(R.shape[1]))
    exact = -exact / np.diag(exact)
    np.fill_diagonal(exact, 0)
    assert np.allclose(b.fit_ease(split, b.EASEConfig(50.))(USERS), R[USERS] @ exact, atol=1e-4)


def test_a_ready_kernel_is_the_text_behind_it(split):
    words = item_tfidf(split)
    text, kernel = b.fit_text_ease(split, words), b.fit_kernel_ease(split, (words @ words.T).toarray())
    assert not np.allclose(text(USERS), b.fit_ease(split)(USERS), atol=.01)
    assert np.allclose(text(USERS), kernel(USERS), atol=1e-5)
    assert text.config == kernel.config == b.TextEASEConfig().to_dict()


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_beat_popularity_and_read_train_only(split, popular, name):
    scorer, empty = CLOSED[name](split), split.train.take(np.zeros(len(split.train), bool))
    assert evaluate(scorer, split).mean("NDCG@10") > 1.3 * popular
    assert scorer.n_params > 0 and scorer.n_bytes > 0 and scorer.train_s > 0
    assert np.array_equal(scorer(USERS), CLOSED[name](replace(split, valid=empty, test=empty))(USERS))


def test_every_scorer_carries_its_config(split):
    pairs = [(b.fit_popularity, b.PopularityConfig()), (b.fit_itemknn, b.ItemKNNConfig(7, 3.)),
             (b.fit_gfcf, b.GFCFConfig(9)), (b.fit_rp3beta, b.RP3betaConfig(11)), (b.fit_ease, b.EASEConfig(77.)),
             (b.fit_lightgcn, b.LightGCNConfig(epochs=0, emb_dim=4)), (b.fit_bprmf, b.BPRMFConfig(epochs=0, emb_dim=4))]
    for fit, cfg in pairs:
        scorer = fit(split, cfg)
        assert type(cfg).from_dict(scorer.config) == cfg and scorer.name in fit.__name__


def test_slim_counts_the_columns_that_did_not_converge(split, monkeypatch):
    assert b.fit_slim(split).history == dict(columns=split.n_items, not_converged=0)
    hurried = lambda R, cfg: whole(R, cfg, max_iter=1)
    whole = b.slim_weights
    monkeypatch.setattr(b, "slim_weights", hurried)
    assert b.fit_slim(split, b.SLIMConfig(.01, 1.)).history["not_converged"] > split.n_items / 2


def test_implicit_missing_is_one_clear_line(split, monkeypatch):
    for name in ("implicit", "implicit.cpu", "implicit.cpu.als"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install implicit") as e: b.fit_ials(split)
    assert "\n" not in str(e.value)


# --- models trained on pairs

def net_of(R, **options): return b.LightGCN(R, b.LightGCNConfig(emb_dim=8, **options))


@pytest.mark.parametrize("loss", ["bpr", "softmax", "mse"])
def test_a_batch_pulls_its_items_pushes_others_and_leaves_train_items_alone(split, loss):
    "The gradient of every item's score, where candidates are sampled: the signs of the loss, and the mask."
    R = split.train.to_csr()
    user = int(np.argmax(R.getnnz(1)))
    own, n = R[user].indices, R.shape[1]
    net = net_of(R, n_layers=0, reg=0., loss=loss, n_negatives=n - 1)
    total, _ = b.pair_loss(net, R, torch.tensor([user]), torch.tensor([int(own[0])]), torch.Generator().manual_seed(0))
    total.backward()
    along = (net.item.grad @ net.user[user]).detach().numpy() # how the loss moves with each item's score
    assert along[own[0]] < 0
    assert not along[own[1:]].any()
    others = np.delete(along, own)
    assert (others >= 0).all() and (others > 0).sum() >= len(others) - 1 # one candidate is left out by the draw


def test_lightgcn_follows_renumbering_and_cold_rows_stay_finite(split):
    R, gen = split.train.to_csr(), np.random.default_rng(0)
    net, pu, pi = net_of(R), gen.permutation(R.shape[0]), gen.permutation(R.shape[1])
    moved = net_of(sp.csr_matrix(R[pu][:, pi]))
    with torch.no_grad(): moved.user.copy_(net.user[pu]); moved.item.copy_(net.item[pi])
    assert torch.allclose(moved()[0], net()[0][pu], atol=1e-6) and torch.allclose(moved()[1], net()[1][pi], atol=1e-6)
    cold = R.tolil()
    cold[3], cold[:, 5] = 0, 0
    net = net_of(sp.csr_matrix(cold))
    assert all(torch.isfinite(e).all() for e in net()) and torch.allclose(net()[0][3], net.user[3] / 4)


def test_a_seed_is_a_model_whatever_the_threads(split):
    threads = torch.get_num_threads()
    torch.set_num_threads(4) # gradients of repeated rows must not depend on which thread comes first
    try: first, again, other = (b.fit_lightgcn(split, b.LightGCNConfig(epochs=2, seed=s)) for s in (0, 0, 1))
    finally: torch.set_num_threads(threads)
    assert np.array_equal(first.item_emb, again.item_emb) and not np.allclose(first.item_emb, other.item_emb, atol=1e-2)
    assert first.n_params == (split.n_users + split.n_items) * 64 and first.config["batch_size"] == 0


def test_lightgcn_resumes_where_it_was_stopped(split, tmp_path):
    cfg, path, validations = b.LightGCNConfig(epochs=5, patience=5), tmp_path / "a.safetensors", []
    def stop(n, ndcg):
        if n == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): b.fit_lightgcn(split, cfg, path, watch=stop)
    resumed = b.fit_lightgcn(split, cfg, path, watch=lambda n, ndcg: validations.append(n))
    whole = b.fit_lightgcn(split, cfg)
    assert len(validations) == 3 # two epochs were done, three were left
    assert np.array_equal(resumed.item_emb, whole.item_emb) and len(resumed.history.rows) == 5


def test_test_rows_reach_no_training(split):
    other = replace(split, test=split.test.take(np.arange(len(split.test)) % 2 == 0))
    first, second = (b.fit_lightgcn(s, b.LightGCNConfig(epochs=2)) for s in (split, other))
    validations = [[row["valid"] for row in s.history.rows] for s in (first, second)]
    assert np.array_equal(first.item_emb, second.item_emb) and validations[0] == validations[1]


@pytest.mark.slow
@pytest.mark.parametrize("fit", [b.fit_lightgcn, b.fit_bprmf, b.fit_ials])
def test_trained_models_beat_popularity(fit):
    if fit is b.fit_ials: pytest.importorskip("implicit")
    larger = make_split(make_sample(seed=2, n_users=500), seed=0)
    trained, popular = (evaluate(f(larger), larger).mean("NDCG@10") for f in (fit, b.fit_popularity))
    assert trained > 1.3 * popular
