"""Competing models: what each may read, and that all of them learn."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from sharp_distill.core import UserError
from sharp_distill.data.evaluation import evaluate
from sharp_distill.data.interactions import from_frame, make_sample
from sharp_distill.data.split import make_split
from sharp_distill.models import competitors as c
from sharp_distill.models import sequential as q
from sharp_distill.models.baselines import EASEConfig, LightGCNConfig, fit_ease, fit_lightgcn, fit_popularity
from sharp_distill.models.training import valid_ndcg
from sharp_distill.text.reviews import encode_reviews

# name -> (fit, config class, reads text, learns from a teacher)
MODELS = {"lightgcn+text": (c.fit_text_lightgcn, LightGCNConfig, True, False),
          "alpharec": (c.fit_alpharec, c.AlphaRecConfig, True, False),
          "hccf": (c.fit_hccf, c.HCCFConfig, False, False),
          "hgatt": (c.fit_hgatt, c.HGAttConfig, False, False),
          "simrec": (c.fit_simrec, c.SimRecConfig, False, True),
          "lighthgnn": (c.fit_lighthgnn, c.LightHGNNConfig, True, True)}
TEXT, STUDENTS = ([n for n, m in MODELS.items() if m[k]] for k in (2, 3))


@pytest.fixture(scope="module")
def split(): return make_split(make_sample(seed=2, n_users=200, n_items=150), seed=0)


@pytest.fixture(scope="module")
def reviews(split): return encode_reviews(split, "tfidf")


@pytest.fixture(scope="module")
def teacher(split): return fit_lightgcn(split, LightGCNConfig(epochs=2))


@pytest.fixture(scope="module")
def fitted(split, reviews, teacher): return {n: fit(n, split, reviews, teacher) for n in MODELS}


def fit(name, split, reviews, teacher, **options):
    fn, config, text, student = MODELS[name]
    return fn(split, *[reviews] * text, *[teacher] * student, config(**{"epochs": 1, **options}))


@pytest.mark.parametrize("name", MODELS)
def test_repeats_and_reads_no_test_row(split, reviews, teacher, fitted, name):
    other = replace(split, test=split.test.take(np.arange(len(split.test)) % 2 == 0))
    again = fit(name, other, replace(reviews, split_sha=other.sha), teacher)
    assert np.array_equal(again.item_emb, fitted[name].item_emb)
    assert np.array_equal(again.user_emb, fitted[name].user_emb)
    assert fitted[name].name == name and MODELS[name][1].from_dict(again.config) == MODELS[name][1](epochs=1)


@pytest.mark.parametrize("name", MODELS)
def test_text_moves_those_that_read_it(split, reviews, teacher, fitted, name):
    other = fit(name, split, replace(reviews, item=reviews.item[::-1].copy()), teacher)
    assert np.allclose(other.item_emb, fitted[name].item_emb) == (name not in TEXT)
    if name in TEXT:
        with pytest.raises(UserError, match="encode the reviews of this split"):
            fit(name, split, replace(reviews, split_sha="x"), teacher)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_learn_from_their_teacher_only_where_they_are_told_to(split, reviews, teacher, fitted, name):
    other = replace(teacher, user_emb=-teacher.user_emb, score=lambda u: -teacher(u))
    assert not np.allclose(fit(name, split, reviews, other).item_emb, fitted[name].item_emb)
    alone = dict(kd_weight=0., align_weight=0.) if name == "simrec" else dict(kd_weight=0.)
    a, b = (fit(name, split, reviews, t, **alone) for t in (teacher, other))
    assert np.array_equal(a.item_emb, b.item_emb)


@pytest.mark.slow
def test_every_competing_model_beats_popularity():
    larger = make_split(make_sample(seed=2, n_users=500), seed=0)
    reviews, graph_teacher = encode_reviews(larger, "tfidf"), fit_lightgcn(larger, LightGCNConfig(epochs=8))
    popular = evaluate(fit_popularity(larger), larger).mean("NDCG@10")
    for name in MODELS:
        scorer = fit(name, larger, reviews, graph_teacher, epochs=25, patience=25)
        assert evaluate(scorer, larger).mean("NDCG@10") > 1.1 * popular, name


# The sequential model

TINY = q.SASRecConfig(epochs=2, emb_dim=8, n_layers=2, batch_size=16, max_len=6)


def series(n_users=80, n_items=16, n=5):
    "Each user reads `n` items in a circle's order, one a day; what comes next is validation."
    rows = [(f"u{u:03d}", f"i{(u + t) % n_items:02d}", 1_700_000_000 + 86_400 * t) for u in range(n_users) for t in range(n)]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).sample(frac=1, random_state=0)
    return make_split(from_frame(frame), "leave_last_out")


def odd_network(n_items=12, **options):
    "A network with odd numbers everywhere, dropout off."
    net, gen = q.SASRec(n_items, TINY.replace(**options)).eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for w in net.parameters(): w.add_(torch.randn(w.shape, generator=gen) * .4)
    return net


def said(net, *histories):
    "What the network says after each row of each history [T, d], all in one batch."
    n = torch.tensor([len(h) for h in histories])
    p = q.pack(n.cumsum(0) - n, n)
    with torch.no_grad(): x = net(torch.tensor(sum(histories, []))[p.row], p)
    parts = dict(zip(p.order.tolist(), x.split(n[p.order].tolist())))
    return [parts[k] for k in range(len(histories))]


def plain_network(net, items):
    "The same network on one history, by loops and formulas."
    norm = lambda x, m: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + m.eps).sqrt() * m.weight + m.bias
    linear = lambda x, m: x @ m.weight.T + m.bias
    x = torch.stack([net.item.weight[i] + net.place.weight[t] for t, i in enumerate(items)])
    d = x.shape[1]
    for b in net.blocks:
        heads, w = linear(norm(x, b.norm1), b.qkv), d // b.n_heads
        read = torch.zeros_like(x)
        for h in range(b.n_heads):
            for t in range(len(items)):
                key = [heads[s, d + h * w:d + (h + 1) * w] for s in range(t + 1)]
                share = torch.softmax(torch.stack([heads[t, h * w:(h + 1) * w] @ k for k in key]) / w ** .5, 0)
                for s in range(t + 1): read[t, h * w:(h + 1) * w] += share[s] * heads[s, 2 * d + h * w:2 * d + (h + 1) * w]
        x = x + linear(read, b.out)
        x = x + linear(F.gelu(linear(norm(x, b.norm2), b.up)), b.down)
    return norm(x, net.norm)


def test_the_network_is_its_formula():
    net, histories = odd_network(), [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3], [8, 9, 7, 0, 3]]
    with torch.no_grad(): want = [plain_network(net, h) for h in histories]
    for got, plain in zip(said(net, *histories), want): assert torch.allclose(got, plain, atol=1e-5)


def test_no_row_reads_a_later_one_or_another_history_and_order_counts():
    net = odd_network()
    a, = said(net, [1, 2, 3, 4, 5])
    later, = said(net, [1, 2, 3, 9, 10])
    assert torch.equal(a[:3], later[:3]) and not torch.allclose(a[3], later[3], atol=1e-3)
    for others in ([[7], [8, 9, 10, 11, 0, 1]], [[0, 1, 2, 3]]): # shorter and longer ones beside it, in its grid and in others
        assert torch.allclose(said(net, *others, [1, 2, 3, 4, 5])[-1], a, atol=1e-5)
    assert not torch.allclose(said(net, [2, 1, 3, 4, 5])[0][-1], a[-1], atol=1e-3)


def test_windows_predict_every_row_but_the_first_once():
    counts = np.array([0, 1, 2, 7, 8, 9, 23])
    stop = torch.as_tensor(counts.cumsum())
    h = q.Histories(torch.arange(50), torch.ones(50), stop - torch.as_tensor(counts), stop)
    start, length = q.windows(h, 4)
    assert length.min() > 0 and length.max() == 4
    targets = np.concatenate([np.arange(a + 1, a + n + 1) for a, n in zip(start.tolist(), length.tolist())])
    first = (stop - torch.as_tensor(counts))[torch.as_tensor(counts) > 0].tolist()
    assert sorted(targets) == sorted(set(range(50)) - set(first))
    user = np.repeat(np.arange(len(counts)), counts)
    assert all(user[a] == user[a + n] for a, n in zip(start.tolist(), length.tolist()))


def test_histories_are_in_time_order_with_ties_as_the_rows_stand():
    rows = [("b", "x", 20), ("a", "y", 30), ("a", "z", 10), ("b", "y", 20), ("a", "x", 10)]
    data = from_frame(pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]))
    h, names = q.histories(data), {u: k for k, u in enumerate(data.user_ids)}
    read = lambda u: [data.item_ids[i] for i in h.item[h.start[names[u]]:h.stop[names[u]]]]
    ties = [data.item_ids[i] for i, u, t in zip(data.item_idx, data.user_idx, data.timestamp) if u == names["a"] and t == 10]
    assert read("a") == [*ties, "y"] and set(read("b")) == {"x", "y"}
    with pytest.raises(UserError, match="SASRec needs times, and 5 of 5 rows have none"):
        q.histories(from_frame(pd.DataFrame(rows, columns=["user_id", "item_id", "t"]).drop(columns="t")))
    with pytest.raises(UserError, match="n_heads is 3: expected a divisor of emb_dim 8"): q.SASRec(5, TINY.replace(n_heads=3))


def test_the_softmax_in_pieces_is_the_cross_entropy(monkeypatch):
    gen = torch.Generator().manual_seed(0)
    x, E = (torch.randn(n, 5, generator=gen).requires_grad_() for n in (7, 30))
    weight, target = torch.rand(7, generator=gen), torch.tensor([0, 29, 3, 3, 1, 5, 8])
    want = (F.cross_entropy(x @ E.T, target, reduction="none") * weight).sum() / weight.sum()
    for piece in (30, 64, 10**6):
        monkeypatch.setattr(q, "PIECE", piece)
        got = q.catalogue_loss(x, E, target, weight, 0, gen)
        assert torch.isclose(got, want)
        for a, b in zip(torch.autograd.grad(3 * got, (x, E)), torch.autograd.grad(3 * want, (x, E), retain_graph=True)):
            assert torch.allclose(a, b, atol=1e-6)
    small, big = x.detach() / 4, torch.randn(500, 5, generator=gen)
    whole = F.cross_entropy(small @ big.T, target)
    sampled = torch.stack([q.catalogue_loss(small, big, target, torch.ones(7), 50, gen) for _ in range(50)])
    assert abs(sampled.mean() - whole) < .05 and sampled.std() > 0


def test_a_seed_repeats_a_sequential_training_and_a_checkpoint_continues_it(tmp_path):
    split, path = series(), tmp_path / "s.safetensors"
    torch.manual_seed(1)
    one = q.train_sasrec(split, TINY)
    torch.manual_seed(2)
    seen = []
    two = q.train_sasrec(split, TINY, watch=lambda k, v: seen.append((k, v)))
    assert np.array_equal(one.user_emb, two.user_emb) and not np.array_equal(one.item_emb, q.train_sasrec(split, TINY.replace(seed=1)).item_emb)
    assert [k for k, _ in seen] == [0, 1, 2] and seen[-1][1] == two.history.rows[-1]["valid"]

    def stop(k, v):
        if k == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): q.train_sasrec(split, TINY, path, watch=stop)
    assert np.array_equal(q.train_sasrec(split, TINY, path).user_emb, one.user_emb)
    other = replace(split, train=split.train.take(np.arange(len(split.train)) > 0))
    with pytest.raises(UserError, match="belongs to a training with other options"): q.train_sasrec(other, TINY, path)


def test_a_refit_trains_the_chosen_epochs_and_users_without_rows_score_zero():
    split = series()
    scorer = q.fit_sasrec(split, TINY)
    assert scorer.chosen == dict(epochs=scorer.history.best_epoch + 1)
    assert scorer.history.best_valid == valid_ndcg(scorer, split) or scorer.history.best_epoch < 0
    rows = split.train.take(split.train.user_idx != 4)
    alone = replace(split, train=rows, valid=split.valid.take(slice(0)))
    refitted = q.fit_sasrec(alone, TINY.replace(epochs=3))
    assert refitted.chosen == dict(epochs=3) and len(refitted.history.rows) == 3
    scores = refitted(np.array([4, 5]))
    assert not scores[0].any() and scores[1].any() and np.array_equal(scores, refitted.state.scores(np.array([4, 5])))


def test_a_series_is_learned_where_sets_cannot_tell_what_comes_next():
    split = series()
    right = lambda scorer: evaluate(scorer, split, "valid", ks=(1,)).mean("HR@1")
    assert right(fit_ease(split, EASEConfig(reg=1.))) <= .6
    cfg = TINY.replace(epochs=12, patience=12, emb_dim=32, n_layers=1, lr=5e-3, dropout=.1)
    assert right(q.fit_sasrec(split, cfg)) > .95


def test_a_half_life_weighs_the_rows_of_the_loss_by_their_age():
    data = series().train
    h, now = q.histories(data, 2.), int(data.timestamp.max()) + 1
    newest = q.histories(data).item[h.stop - 1]
    assert torch.equal(h.item[h.stop - 1], newest) and torch.equal(q.histories(data).weight, torch.ones(len(data)))
    when = torch.as_tensor(np.sort(data.timestamp.reshape(-1))).unique()
    assert torch.allclose(h.weight.unique(), torch.exp2((when - now) / (2 * 86_400)).float())
    assert (h.weight[h.stop - 1] >= h.weight[h.start]).all() and h.weight.max() < 1
