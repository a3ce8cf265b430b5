"""Rivals: what each may read, what it must equal, and that all of them learn."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from sharp_distill.models.baselines import LightGCN, LightGCNConfig, fit_baseline, fit_lightgcn
from sharp_distill.core import UserError
from sharp_distill.data.evaluation import evaluate
from sharp_distill.text.reviews import encode_reviews
from sharp_distill.models.competitors import (
    COMPETITORS, Edges, HGAtt, HGAttConfig, TextLightGCN, _EdgeSum, fit_competitor)


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def reviews(split): return encode_reviews(split, "tfidf")


@pytest.fixture(scope="module")
def teacher(split): return fit_lightgcn(split, LightGCNConfig(epochs=8))


@pytest.mark.parametrize("name", list(COMPETITORS))
def test_every_rival_beats_popularity_and_repeats(split, reviews, teacher, name):
    base = evaluate(fit_baseline("popularity", split), split).mean("NDCG@10")
    a, b = (fit_competitor(name, split, reviews, teacher, epochs=2) for _ in range(2))
    assert np.array_equal(a.item_emb, b.item_emb)
    a = fit_competitor(name, split, reviews, teacher, epochs=25, patience=25)
    assert evaluate(a, split).mean("NDCG@10") > 1.1 * base
    assert set(COMPETITORS[name].space) <= set(a.config)


@pytest.mark.parametrize("name", [n for n, m in COMPETITORS.items() if not m.text])
def test_only_text_models_change_with_text(split, reviews, teacher, name):
    other = replace(reviews, item=reviews.item[::-1].copy())
    a, b = (fit_competitor(name, split, r, teacher, epochs=1) for r in (reviews, other))
    assert np.array_equal(a.item_emb, b.item_emb)


@pytest.mark.parametrize("name", [n for n, m in COMPETITORS.items() if m.text])
def test_text_models_do_change_with_text(split, reviews, teacher, name):
    other = replace(reviews, item=reviews.item[::-1].copy())
    a, b = (fit_competitor(name, split, r, teacher, epochs=1) for r in (reviews, other))
    assert not np.allclose(a.item_emb, b.item_emb)
    with pytest.raises(UserError, match="encode the reviews of this split"): fit_competitor(name, split, replace(reviews, split_sha="x"), teacher)


def test_text_lightgcn_without_maps_is_lightgcn(split, reviews):
    cfg = LightGCNConfig(emb_dim=8)
    with_text, plain = TextLightGCN(split, reviews, cfg), LightGCN(split.train.to_csr(), cfg)
    with torch.no_grad():
        for m in with_text.maps: m.zero_()
    assert torch.allclose(with_text()[1], plain()[1])


def test_learned_sparse_product_equals_dense(split):
    e = Edges(split.train.to_csr())
    w, x = torch.rand(len(e.col), requires_grad=True), torch.rand(split.n_items, 3, requires_grad=True)
    dense = torch.zeros(e.shape).index_put((e.row, e.col), w)
    assert torch.allclose(_EdgeSum.apply(w, x, e), dense @ x, atol=1e-4)
    back = _EdgeSum.apply(w[e.order], torch.ones(e.shape[0], 1), e.T)
    assert torch.allclose(back[:, 0], dense.sum(0), atol=1e-4)


def test_attention_sums_to_one(split):
    net = HGAtt(split.train.to_csr(), HGAttConfig(emb_dim=8))
    in_user, in_item = net.weights(net.user, net.item, 0)
    R = split.train.to_csr()
    assert np.isclose(float(in_user.sum().detach()), (R.getnnz(1) > 0).sum(), rtol=1e-4)
    assert np.isclose(float(in_item.sum().detach()), (R.getnnz(0) > 0).sum(), rtol=1e-4)
