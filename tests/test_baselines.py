"""Baselines against independent implementations, closed forms, and what a model may read."""
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from conftest import refused

from sharp_distill.core import UserError
from sharp_distill.data.evaluation import evaluate
from sharp_distill.data.interactions import from_frame, make_sample
from sharp_distill.data.split import Split, make_split
from sharp_distill.models import baselines as b
from sharp_distill.models import item_filter as f
from sharp_distill.models import low_rank as lr
from sharp_distill.models import neural
from sharp_distill.models import timed as t
from sharp_distill.models.hypergraphs import random_interactions
from sharp_distill.text import words as words_module
from sharp_distill.text.encoders import ReviewConfig
from sharp_distill.text.reviews import encode_reviews
from sharp_distill.text.words import item_tfidf

CLOSED = dict(itemknn=b.fit_itemknn, rp3beta=b.fit_rp3beta, gfcf=b.fit_gfcf, ease=b.fit_ease, slim=b.fit_slim,
              userknn=lr.fit_userknn, edlae=lr.fit_edlae, svd=lambda s: lr.fit_svd(s, lr.SVDConfig(emb_dim=32)))
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


def test_the_same_evidence_is_the_same_ridge(split):
    "EASE and its kin with the options of the teacher's ridge, against the ridge itself and by hand; without times there are no sessions."
    from sharp_distill.models.hypergraphs import session_hyperedges
    from sharp_distill.models.sessions import EvidenceConfig, item_evidence
    words, R, same = item_tfidf(split), split.train.to_csr(), dict(reg=50., edge_power=.5, session_weight=2.)
    told = dict(ridge=50., text_weight=2., n_neighbours=split.n_items - 1)
    ridge = f.fit_item_filter(split, encode_reviews(split, "tfidf"), session_hyperedges(split.train), 2., .5, chosen=told).B
    dense = b.fit_text_ease(split, words, b.TFIDFEASEConfig(text_weight=2., **same))
    local = b.fit_local_ease(split, b.LocalTextEASEConfig(text_weight=2., n_neighbours=4096, **same), words)
    for scorer in (dense, local): assert np.allclose(scorer(USERS), (R[USERS] @ ridge).toarray(), atol=1e-4)
    E = item_evidence(split.train, EvidenceConfig(session_weight=2.))
    S = session_hyperedges(split.train)
    assert np.allclose((E.T @ E).toarray(), (R.T @ R + 2 * S @ S.T).toarray(), atol=1e-3)
    knn = b.fit_itemknn(split, b.ItemKNNConfig(split.n_items, 0., session_weight=2.))
    G = (E.T @ E).toarray(); root = np.sqrt(np.maximum(np.diag(G), 1e-9)); G = G / root / root[:, None]; np.fill_diagonal(G, 0)
    assert np.allclose(knn(USERS), R[USERS] @ G, atol=1e-4)
    blind = replace(split, train=from_frame(split.train.to_frame().drop(columns="timestamp")))
    assert np.array_equal(b.fit_ease(blind, b.EASEConfig(**same))(USERS), b.fit_ease(blind, b.EASEConfig(50., edge_power=.5))(USERS))


def test_what_a_search_may_read_is_said():
    "A method says \"times\" under each protocol in which an option that reads them is searched, and no stored row reads more than it did."
    from sharp_distill.models.registry import method, methods
    for name in methods():
        for protocol in ("random", "temporal"):
            m = method(name).under(protocol)
            if {"session_weight", "row_half_life", "half_life", "trend_half_life"} & set(m.space): assert "times" in m.reads, (name, protocol)
    assert "times" not in method("lightgcn").under("random").reads
    for name in ("itemknn", "ease", "ease+tfidf", "ease+deberta", "local_ease", "local_ease+tfidf"):
        flat = method(name).config().flat()
        assert (flat["edge_power"], flat["session_weight"], flat.get("text_form", "full")) == (0, 0, "full") and "session_weight" in method(name).space


def test_ease_takes_learned_words_alone_or_beside_tfidf():
    from sharp_distill.models.registry import Fits, fit_method
    split = make_split(make_sample(n_users=300, n_items=100), seed=0)
    fits = Fits(split, encode_reviews(split, "tfidf"))
    of = {f: fit_method("ease+tfidf", split, fits.reviews, b.TFIDFEASEConfig(text_form=f), fits)(np.arange(9)) for f in ("full", "learned", "joined")}
    assert not np.allclose(of["full"], of["learned"]) and not np.allclose(of["full"], of["joined"])
    by_hand = b.fit_text_ease(split, [item_tfidf(split), fits.text("learned")], b.TFIDFEASEConfig(text_form="joined"))(np.arange(9))
    assert np.allclose(of["joined"], by_hand, atol=1e-5)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_beat_popularity_and_read_train_only(split, popular, name):
    scorer, empty = CLOSED[name](split), split.train.take(np.zeros(len(split.train), bool))
    assert evaluate(scorer, split).mean("NDCG@10") > 1.3 * popular
    assert scorer.n_params > 0 and scorer.n_bytes > 0 and scorer.train_s > 0
    assert np.array_equal(scorer(USERS), CLOSED[name](replace(split, valid=empty, test=empty))(USERS))


def test_every_scorer_carries_its_config(split):
    pairs = [(b.fit_popularity, b.PopularityConfig()), (b.fit_itemknn, b.ItemKNNConfig(7, 3.)),
             (b.fit_gfcf, b.GFCFConfig(9)), (b.fit_rp3beta, b.RP3betaConfig(11)), (b.fit_ease, b.EASEConfig(77.)),
             (b.fit_lightgcn, b.LightGCNConfig(epochs=0, emb_dim=4)), (b.fit_bprmf, b.BPRMFConfig(epochs=0, emb_dim=4)),
             (lr.fit_userknn, lr.UserKNNConfig(7, 3.)), (lr.fit_edlae, lr.EDLAEConfig(reg=77., dropout=.2)),
             (lr.fit_svd, lr.SVDConfig(emb_dim=9, source=1.)), (lr.fit_elsa, lr.ELSAConfig(epochs=0, emb_dim=4)),
             (lr.fit_low_rank, lr.LowRankConfig(epochs=0, emb_dim=4)), (lr.fit_fism, lr.FISMConfig(epochs=0, emb_dim=4)), (neural.fit_multvae, neural.MultVAEConfig(epochs=0, hidden=4)),
             (neural.fit_simplex, neural.SimpleXConfig(epochs=0, emb_dim=4)), (neural.fit_xsimgcl, neural.XSimGCLConfig(epochs=0, emb_dim=4))]
    for fit, cfg in pairs:
        scorer = fit(split, cfg)
        assert type(cfg).from_dict(scorer.config) == cfg and scorer.name in fit.__name__


def test_slim_counts_the_columns_that_did_not_converge(split, monkeypatch, capsys):
    assert b.fit_slim(split).history == dict(columns=split.n_items, not_converged=0) and not capsys.readouterr().out
    hurried = lambda R, cfg: whole(R, cfg, max_iter=1)
    whole = b.slim_weights
    monkeypatch.setattr(b, "slim_weights", hurried)
    assert b.fit_slim(split, b.SLIMConfig(.01, 1.)).history["not_converged"] > split.n_items / 2
    said = capsys.readouterr().out
    assert "did not converge" in said and said.count("\n") == 1


def test_implicit_missing_is_one_clear_line(split, monkeypatch):
    for name in ("implicit", "implicit.cpu", "implicit.cpu.als"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install implicit") as e: b.fit_ials(split)
    assert "\n" not in str(e.value)


# --- the item-item ridge

def local(R, words=None, n=3, ridge=1., text_weight=0., device="cpu"):
    gram = f.ItemGram(f.sparse_gram(sp.csr_matrix(R)), f.text_likeness(np.zeros((R.shape[1], 1)) if words is None else words, device), 1.)
    return f.solve_local(gram, f.nearest_items(gram, n), [dict(ridge=ridge, text_weight=text_weight)])[0]


CLONES = np.ones((50, 6), np.float32) # six items chosen by the same users


def test_more_neighbours_than_items_are_refused_and_a_default_is_cut(split):
    said = refused(local, CLONES, n=6)
    assert "n_neighbours is 6: expected 1 to 5" in said and said.endswith("the nearest good choice is 5.")
    assert refused(local, CLONES, n=0).endswith("the nearest good choice is 1.")
    reviews = encode_reviews(split, "tfidf")
    assert "n_neighbours is 200: expected 1 to 199" in refused(f.fit_item_filter, split, reviews, grid=f.FILTER_GRID | dict(n_neighbours=(50, split.n_items)))
    small = make_split(make_sample(seed=2, n_users=60, n_items=40), seed=0)
    assert f.fit_item_filter(small, encode_reviews(small, "tfidf")).options["n_neighbours"] == small.n_items - 1 # fewer items than any default
    assert b.fit_local_ease(small).n_params == small.n_items * (small.n_items - 1)


def test_an_item_without_any_neighbour_has_a_zero_column():
    R = np.zeros((30, 8), np.float32)
    R[:, :5] = np.random.default_rng(0).random((30, 5)) < .5
    R[0, 5:7] = 0, 1
    R[0, :5] = 0 # item 5 nobody chose; item 6 has one user, who chose nothing else; item 7 nobody
    B = local(R, n=4).toarray()
    assert np.isfinite(B).all() and not B[:, 5:].any() and not B[5:].any() and B[:5, :5].any()


def test_a_ridge_too_small_for_a_block_says_which_is_enough():
    for fit in (local, lambda R, **o: f.solve_ridge(f.item_gram(sp.csr_matrix(R)), o["ridge"])):
        for ridge in (1e-7, 0., -3.):
            said = refused(fit, CLONES, ridge=ridge)
            assert f"ridge is {ridge:g}: with it a block of items is singular" in said and "increase it" in said
            good = float(said.split("is about ")[1].rstrip("."))
            assert ridge < good < .1 and np.allclose(np.asarray(fit(CLONES, ridge=good).sum(0)), 1, atol=.02) # the others together are the item
    for seed in range(8): # three users cannot tell eight items apart: rounding gives half of these blocks a factor, and weights of noise
        assert "is singular" in refused(local, np.random.default_rng(seed).random((3, 8)).astype(np.float32), n=6, ridge=1e-7)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried ...")])
@pytest.mark.parametrize("where", ["linalg.cholesky_ex", "searchsorted"]) # solving; finding neighbours
def test_no_memory_says_what_to_lower(monkeypatch, error, where):
    def fail(*a, **kw): raise error
    monkeypatch.setattr(f"torch.{where}", fail)
    said = refused(local, CLONES, n=4)
    assert "with n_neighbours 4: lower n_neighbours, such as to 2, or use one with more" in said
    with pytest.raises(UserError, match="or choose device='cpu'"):
        with f.memory_for("blocks", "n", "cuda:1"): fail()
    monkeypatch.setattr(f"torch.{where}", lambda *a, **kw: (_ for _ in ()).throw(RuntimeError("size mismatch")))
    with pytest.raises(RuntimeError, match="size mismatch"): local(CLONES, n=4) # an error of another kind stays what it is


def test_words_are_counted_once(split, monkeypatch):
    calls, whole = [], words_module.count_words
    monkeypatch.setattr(words_module, "count_words", lambda texts: calls.append(1) or whole(texts))
    reviews, grid = encode_reviews(split, "tfidf"), dict(ridge=(300.,), text_weight=(1.,), n_neighbours=(50,))
    once = f.fit_item_filter(split, reviews, grid=grid)
    assert len(calls) == 1 and f.item_text(split, "tfidf", reviews) is reviews.item_words
    twice = f.fit_item_filter(split, replace(reviews, item_words=None), grid=grid) # as before they were handed along
    assert len(calls) == 2 and (once.B != twice.B).nnz == 0 and once.valid == twice.valid
    assert (reviews.item_words != item_tfidf(split)).nnz == 0 and np.array_equal(reviews.item, words_module.encode_words(split, ReviewConfig())[1])
    other = make_split(make_sample(seed=2, n_users=300, n_items=200), seed=1)
    assert (f.item_text(other, "tfidf", reviews) != item_tfidf(other)).nnz == 0 # those of another split are not taken


DENSE = """import numpy as np, scipy.sparse as sp
from sharp_distill.models import item_filter as f
from sharp_distill.models.hypergraphs import random_interactions
from sharp_distill.experiments.latency import own_peak_mib
def held(): return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
def fit(R, words=None):
    kernel = None if words is None else f.text_gram(words) # as `fit_text_ease` holds both
    return f.solve_ridge(f.item_gram(R) if words is None else f.add_gram(f.item_gram(R), kernel, 1.), 100., overwrite=True)
n = 4500
R, words = random_interactions(200, n, 20_000), sp.random(n, 400, .02, "csr", np.float32)
fit(R[:, :300], words[:300]) # libraries are loaded
for given in ((R,), (R, words)):
    before = held()
    fit(*given)
    print(own_peak_mib() - before)"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_the_memory_that_is_refused_is_the_memory_that_is_taken():
    "The gigabytes of the error lines, scaled to 4,500 items, against the peak of a process that fits the dense form."
    huge = sp.csr_matrix((3, 65_443), dtype=np.float32)
    lines = refused(f.item_gram, huge), refused(f.text_gram, huge.T.tocsr())
    stated = np.array([float(re.search(r"would take ([\d.]+) GiB", said).group(1)) for said in lines]) * 1024 * (4500 / 65_443) ** 2
    done = subprocess.run([sys.executable, "-c", DENSE], capture_output=True, text=True, check=True)
    taken = np.array(done.stdout.split(), float)
    assert stated[1] > 1.9 * stated[0] and (np.abs(taken / stated - 1) < .25).all(), (taken, stated)


def test_growth_is_fitted_and_drawn_for_each_form():
    from sharp_distill.experiments.sizes import KEY, growth_table, ridge_growth, wanted_rows
    from sharp_distill.plots.results import plot_growth
    rows = [dict(dataset=f"{size} shops", form=form, n_neighbours=n, device="cpu", n_items=size, seconds=1e-9 * size**power, peak_mib=float(size), ndcg=.1)
            for form, n, power in (("local", 100, 1), ("local", 200, 1), ("dense", 0, 3)) for size in (4362, 8724, 19_629)]
    assert np.allclose(ridge_growth(rows)["seconds_exponent"], [1, 1, 3])
    axes = plot_growth(growth_table(rows), dict(seconds="fit, s", peak_mib="MiB", ndcg="NDCG@10"), xlabel="items", log=("seconds", "peak_mib"))
    assert [len(ax.lines) >= 2 for ax in axes] == [True] * 3 and "items" in axes[0].get_xlabel()
    wanted = wanted_rows((2, 30), (100, 200), "cuda", 2181, 20_000)
    assert [tuple(r[k] for k in KEY[1:]) for r in wanted if r["shops"] == 2] == [("local", 100, "cuda"), ("local", 200, "cuda"), ("dense", 0, "cpu")]
    assert {r["form"] for r in wanted if r["shops"] == 30} == {"local"} # beyond the dense form's limit


def test_a_search_under_time_begins_with_each_half_life():
    from sharp_distill.experiments.search import first_settings
    from sharp_distill.models.registry import method
    timed = first_settings(method("lightgcn").under("temporal"))
    assert [s["row_half_life"] for s in timed] == [0., 60., 240.] and len({s["lr"] for s in timed}) == 1
    assert len(first_settings(method("lightgcn").under("random"))) == 1 and "row_half_life" not in method("lightgcn").space


def test_rows_are_drawn_by_their_age():
    split = make_split(make_sample(seed=3, n_users=150), "temporal")
    few = b.LightGCNConfig(epochs=2, emb_dim=8)
    alike, aged, again = (b.fit_lightgcn(split, few.replace(row_half_life=h)) for h in (0., 30., 30.))
    assert not np.array_equal(alike.item_emb, aged.item_emb) and np.array_equal(aged.item_emb, again.item_emb)
    blind = replace(split, train=from_frame(split.train.to_frame().drop(columns="timestamp")))
    with pytest.raises(UserError, match="needs times"): b.fit_lightgcn(blind, few.replace(row_half_life=30.))


@pytest.mark.slow # five processes, each with torch
def test_sizes_are_measured_apart_and_go_on(tmp_path):
    from sharp_distill.experiments.sizes import measure_ridge_sizes
    few = dict(shops=(1, 2), neighbours=(50,), n_users=150, n_books=120)
    rows = measure_ridge_sizes(tmp_path / "rows.json", **few)
    assert [r["form"] for r in rows] == ["local", "dense"] * 2 and all(r["seconds"] > 0 and 0 <= r["peak_mib"] < 100 and r["ndcg"] > .03 for r in rows)
    before = (tmp_path / "rows.json").read_bytes()
    assert measure_ridge_sizes(tmp_path / "rows.json", **few) == rows and (tmp_path / "rows.json").read_bytes() == before


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


# --- baselines that read time

OFF = dict(half_life=0., trend_weight=0.)


@pytest.fixture(scope="module")
def by_time(): return make_split(make_sample(seed=3, n_users=200, n_items=120), "temporal")


def refit_split(split):
    "Train and validation as train, nothing to choose on."
    both = make_split(make_sample(seed=3, n_users=200, n_items=120), "temporal", fractions=(.8, 0., .2)).train
    return replace(split, train=both, valid=both.take(np.zeros(len(both), bool)))


def test_without_decay_each_timed_baseline_is_the_one_it_extends(by_time):
    words, users = item_tfidf(by_time), np.arange(by_time.n_users)
    close = lambda x, y: np.allclose(x(users), y(users), atol=1e-4)
    ease = b.fit_text_ease(by_time, words, b.TextEASEConfig(50., 2.))
    plain = t.TimedEASEConfig(**OFF, reg=50., text_weight=2., edge_power=0.)
    assert close(t.fit_decayed_popularity(by_time, t.DecayedPopularityConfig(0.)), b.fit_popularity(by_time))
    assert close(t.fit_timed_ease(by_time, words, plain), ease)
    assert close(t.fit_timed_ease(by_time, None, plain), b.fit_ease(by_time, b.EASEConfig(50.)))
    whole = t.SLISTConfig(**OFF, reg=50., text_weight=2., edge_power=0., query_half_life=0., alpha=1.)
    assert close(t.fit_slist(by_time, words, whole), ease)
    sessions = b.fit_ease(by_time, b.EASEConfig(50., session_weight=3.))
    assert close(t.fit_timed_ease(by_time, None, plain.replace(session_weight=3.)), sessions)
    assert close(t.fit_slist(by_time, None, whole.replace(session_weight=3.)), sessions)
    assert not close(t.fit_timed_ease(by_time, None, plain), sessions)
    for changed in (dict(half_life=30.), dict(trend_weight=.5, trend_half_life=30.), dict(edge_power=.5)):
        assert not close(t.fit_timed_ease(by_time, words, plain.replace(**changed)), ease), changed
    assert not close(t.fit_slist(by_time, words, whole.replace(alpha=.9)), ease)


def test_beyond_the_dense_limit_timed_ease_is_local_and_slist_refuses(by_time, monkeypatch):
    words, users = item_tfidf(by_time), np.arange(by_time.n_users)
    cfg = t.TimedEASEConfig(half_life=200., trend_half_life=60., trend_weight=.3)
    dense, every = t.fit_timed_ease(by_time, words, cfg), by_time.n_items - 1
    monkeypatch.setattr(t, "MAX_ITEMS", 10)
    local = t.fit_timed_ease(by_time, words, cfg)
    assert local.n_params == every * by_time.n_items + by_time.n_items # N_NEIGHBOURS is more than all others
    assert np.allclose(dense(users), local(users), atol=1e-3)
    assert t.fit_timed_ease(by_time, words, cfg.replace(n_neighbours=9)).n_params == 10 * by_time.n_items
    assert "at most 10 items" in refused(t.fit_slist, by_time, words)


def test_transition_grams_are_those_of_all_pasts_and_futures(by_time):
    "Each prefix of each history written out, users weighted by their size."
    data, h, p = by_time.train, 1.5, .5
    rho, order = 2 ** (-1 / h), np.lexsort((data.item_idx, data.timestamp, data.user_idx))
    past, after = np.zeros((2, data.n_items, data.n_items))
    size = np.maximum(np.bincount(data.user_idx, minlength=data.n_users), 1)
    for u in range(data.n_users):
        items = data.item_idx[order[data.user_idx[order] == u]]
        n, steps = len(items), np.arange(len(items))
        for c in range(1, n):
            s, y = np.zeros((2, data.n_items))
            s[items[:c]], y[items[c:]] = rho ** steps[:c][::-1], rho ** steps[:n - c]
            w = (size[u] / size.mean()) ** -p
            past += w * np.outer(s, s); after += w * np.outer(s, y)
    found = [A.toarray() for A in t.transition_grams(data, h, p)]
    assert np.allclose(found[0], past, atol=5e-3 * past.max()) and np.allclose(found[1], after, atol=5e-3 * after.max())
    assert past.max() > 1 and abs(after - after.T).max() > 1 # a matrix that knows a direction


def test_what_validation_chose_fits_the_same_on_more_rows(by_time):
    words = item_tfidf(by_time)
    for fit, cfg in ((t.fit_timed_ease, t.TimedEASEConfig()), (t.fit_slist, t.SLISTConfig(trend_weight=.4))):
        first, whole = fit(by_time, words, cfg), refit_split(by_time)
        assert set(first.chosen) == {o for o, v in cfg.flat().items() if v == -1}
        told = cfg.replace(**first.chosen)
        assert np.array_equal(fit(by_time, words, told)(USERS), first(USERS)) # nothing else was chosen
        again = fit(whole, words, told)
        assert again.chosen == {} and again.config == first.config and not np.allclose(again(USERS), first(USERS))
        assert "nobody has validation rows" in refused(fit, whole, words, cfg)
        assert type(cfg).from_dict(first.config) == told


def test_a_stale_history_keeps_its_voice_beside_the_trend():
    "A user who comes back after eight years is asked about what they had, not about the trend alone."
    rows = [("old", "a", 0), ("new", "a", 0), ("new", "b", 9), ("two", "a", 0), ("two", "b", 9), ("now", "c", 3000)]
    data = from_frame(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).assign(
        timestamp=lambda f: f.timestamp * 86_400))
    none = data.take(np.zeros(len(data), bool))
    cfg = t.TimedEASEConfig(half_life=7., trend_half_life=7., trend_weight=.5, reg=1.)
    scores = t.fit_timed_ease(Split(data, none, none, "made", 0), None, cfg)(np.flatnonzero(data.user_ids == "old"))[0]
    assert scores[1] > scores[2], "b goes with a; c is only in fashion"


def test_order_alone_tells_what_comes_next():
    rows = [(f"u{v}{k}", f"v{v + j}", 10 * k + j) for v in range(6) for k in range(3) for j in range(2)]
    data = from_frame(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]))
    none, asked = data.take(np.zeros(len(data), bool)), np.flatnonzero(data.user_ids == "u20") # has read v2 and v3
    fixed = dict(**OFF, edge_power=0., query_half_life=0., reg=1., step_half_life=1.)
    ease, slit = (t.fit_slist(Split(data, none, none, "made", 0), None, t.SLISTConfig(alpha=a, **fixed))(asked)[0]
                  for a in (1., 0.))
    assert abs(ease[1] - ease[4]) < .02 < .1 < slit[4] - slit[1]


def test_timed_baselines_refuse_data_without_times(by_time):
    untimed = from_frame(by_time.train.to_frame()[["user_id", "item_id"]])
    none = untimed.take(np.zeros(len(untimed), bool))
    split = Split(untimed, none, none, "made", 0)
    assert "half_life=180 needs times" in refused(t.fit_decayed_popularity, split)
    assert "half_life=30 needs times" in refused(t.fit_timed_ease, split, None, t.TimedEASEConfig(30., 0., 0.))
    assert "order of events needs times" in refused(t.fit_slist, split, None, t.SLISTConfig(**OFF))
    assert t.fit_timed_ease(split, None, t.TimedEASEConfig(**OFF))(USERS[:2]).shape == (2, split.n_items)


# The linear models of low rank and the neural ones

def test_userknn_is_the_textbook_formula(split):
    "scikit-learn's nearest neighbours by cosine distance, and a sum over them."
    from sklearn.neighbors import NearestNeighbors
    R, k = split.train.to_csr(), 20
    far, who = NearestNeighbors(n_neighbors=k + 5, metric="cosine", algorithm="brute").fit(R).kneighbors(R[USERS])
    ours = lr.fit_userknn(split, lr.UserKNNConfig(k, 0., 0.))(USERS)
    for row, (u, at, d) in enumerate(zip(USERS, who, far)):
        at, d = at[at != u], d[at != u]
        if np.isclose(d[k - 1], d[k]): continue # a tie decides who is asked
        assert np.allclose(ours[row], ((1 - d[:k]) @ R[at[:k]]).ravel(), atol=1e-5)


def test_edlae_is_the_dense_inverse(split):
    R = split.train.to_csr()
    G = (R.T @ R).toarray().astype(float)
    P = np.linalg.inv(G + np.diag(50 + .4 / .6 * np.diag(G))) # Steck 2020, equation 10
    exact = np.eye(len(G)) - P / np.diag(P)
    np.fill_diagonal(exact, 0)
    assert np.allclose(lr.fit_edlae(split, lr.EDLAEConfig(reg=50., dropout=.4))(USERS), R[USERS] @ exact, atol=1e-4)


def test_svd_is_scikit_learns(split):
    from sklearn.decomposition import TruncatedSVD
    R = split.train.to_csr().astype(float)
    V = TruncatedSVD(16, algorithm="arpack", random_state=0).fit(R).components_.T
    ours = lr.fit_svd(split, lr.SVDConfig(emb_dim=16, source=0., target=0.)).item_emb
    held = lambda W: ((R @ W) ** 2).sum() # what the directions hold of the rows
    assert np.allclose(ours.T @ ours, np.eye(16), atol=1e-5) and .995 < held(ours) / held(V) < 1 + 1e-6


def test_elsa_ends_where_a_quasi_newton_method_ends(split):
    "SciPy's L-BFGS on the formula, written over dense matrices, finds no better place from the same start."
    from scipy.optimize import minimize
    few = make_split(make_sample(seed=3, n_users=60, n_items=20), seed=0)
    n, cfg = few.n_items, lr.ELSAConfig(emb_dim=3, lr=.02, epochs=400)
    R = few.train.to_csr().toarray().astype(float)
    unit = lambda M: M / np.maximum(np.linalg.norm(M, axis=1, keepdims=True), 1e-12)
    def error(flat):
        A = unit(flat.reshape(n, 3))
        return ((unit(np.maximum(R @ A @ A.T - R, 0)) - unit(R)) ** 2).sum()
    start = lr.ELSA(few.train.to_csr(), cfg).item.detach().numpy().astype(float).ravel()
    none = few.valid.take(np.zeros(len(few.valid), bool))
    ours = error(lr.fit_elsa(replace(few, valid=none), cfg).item_emb.astype(float).ravel())
    theirs = minimize(error, start, method="L-BFGS-B", options=dict(maxiter=60, maxfun=10**5)).fun
    assert error(start) > 1.1 * theirs and ours < 1.02 * theirs


def test_large_catalogues_get_no_table_of_items_by_items(monkeypatch):
    "What would make a dense matrix of items refuses; a catalogue that is large beside its rows is fitted without one."
    R = random_interactions(300, 2000, 5000).tocoo()
    rows = from_frame(pd.DataFrame(dict(user_id=[f"{u:03d}" for u in R.row], item_id=[f"{i:05d}" for i in R.col])))
    big = make_split(rows, seed=0)
    for module in (f, lr): monkeypatch.setattr(module, "MAX_ITEMS", 1000)
    words = sp.random(big.n_items, 50, .01, "csr", np.float32, rng=np.random.default_rng(0))
    found = [lr.fit_userknn(big), lr.fit_svd(big, lr.TextSVDConfig(emb_dim=8), [words]),
             lr.fit_elsa(big, lr.TextELSAConfig(emb_dim=8, epochs=1), [words]), lr.fit_low_rank(big, lr.TextLowRankConfig(emb_dim=8, epochs=1), [words]),
             lr.fit_fism(big, lr.FISMConfig(emb_dim=8, epochs=1)),
             neural.fit_multvae(big, neural.MultVAEConfig(hidden=8, emb_dim=4, epochs=1)),
             neural.fit_simplex(big, neural.SimpleXConfig(emb_dim=8, epochs=1))]
    assert big.n_items > 1000 and all(s(USERS).shape == (40, big.n_items) and s.n_bytes < 4 * big.n_items**2 / 2 for s in found)
    with pytest.raises(UserError, match="local form"): lr.fit_edlae(big)


TRAINED = dict(elsa=lambda s, **kw: lr.fit_elsa(s, lr.ELSAConfig(emb_dim=32, epochs=30, **kw)),
               low_rank=lambda s, **kw: lr.fit_low_rank(s, lr.LowRankConfig(emb_dim=32, epochs=15, **kw)),
               fism=lambda s, **kw: lr.fit_fism(s, lr.FISMConfig(emb_dim=16, epochs=30, lr=.02, **kw)),
               multvae=lambda s, **kw: neural.fit_multvae(s, neural.MultVAEConfig(hidden=64, emb_dim=16, batch_size=64, epochs=30, lr=.005, **kw)),
               simplex=lambda s, **kw: neural.fit_simplex(s, neural.SimpleXConfig(emb_dim=32, epochs=45, lr=.02, neg_weight=3., **kw)),
               xsimgcl=lambda s, **kw: neural.fit_xsimgcl(s, neural.XSimGCLConfig(emb_dim=16, epochs=15, **kw)))


@pytest.mark.parametrize("name", TRAINED)
def test_trained_models_beat_popularity_stop_on_validation_and_read_no_test_row(split, popular, name):
    scorer, empty = TRAINED[name](split), split.test.take(np.zeros(len(split.test), bool))
    assert evaluate(scorer, split).mean("NDCG@10") > dict(elsa=1.05, multvae=1.).get(name, 1.15) * popular # these two are weak on few rows
    assert scorer.chosen["epochs"] == scorer.history.best_epoch + 1 and scorer.n_params > 0 and scorer.n_bytes > 0
    assert np.array_equal(scorer(USERS), TRAINED[name](replace(split, test=empty))(USERS)), "the same seed, the same model"
    if name != "low_rank": assert not np.array_equal(scorer(USERS), TRAINED[name](split, seed=1)(USERS))
    alone = TRAINED[name](replace(split, valid=empty), patience=1) # a fit on all that is known: to its end
    assert len(alone.history.rows) in (15, 30, 45)
