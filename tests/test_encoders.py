"Adapting an encoder and ruling with its kernels: what the notebooks do not already check."
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sharp_distill.text.encoder_training import (
    AdaptConfig, adapt_encoder, adapted_encoder, join_kernels, sharpen, text_kernel)
from sharp_distill.text.encoders import ReviewConfig, encode_texts, load_encoder, tiny_deberta
from sharp_distill.text.reviews import finish_vectors

WORDS = "amp loud warm string neck bright cable pick solid cheap tone strap case tuner stand pedal".split()
FEW = AdaptConfig(n_steps=2, every=2, batch_size=8, max_tokens=12, n_kept_out=20)


@pytest.fixture(autouse=True)
def quiet_and_private(tmp_path, monkeypatch):
    for name, value in dict(SHARP_DISTILL_CACHE=str(tmp_path / "cache"), SHARP_DISTILL_QUIET="1", HF_HUB_OFFLINE="1").items(): monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_deberta(tmp_path_factory.mktemp("tiny"), WORDS)


def make(other="never read"):
    r, n = np.random.default_rng(0), 200
    part = lambda text: SimpleNamespace(user_idx=r.integers(0, 30, n), item_idx=np.arange(n) % 20, review=text, timestamp=np.full(n, -1), n_users=30, n_items=22)
    train = part(np.array([" ".join(r.choice(WORDS, 6)) for _ in range(n)], object))
    return SimpleNamespace(train=train, valid=SimpleNamespace(review=other), test=SimpleNamespace(review=other), sha="one split")


def weights(folder): return load_encoder(str(folder), device="cpu")[1].state_dict()


def test_poisoned_validation_and_test_reviews_adapt_to_the_same_weights(tmp_path, tiny):
    a, b = (weights(adapt_encoder(make(text), tiny, tmp_path / text, FEW)[0]) for text in ("clean", "POISON"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    moved = make(); moved.train.review[:100] = "pedal pedal pedal"
    c = weights(adapt_encoder(moved, tiny, tmp_path / "moved", FEW)[0])
    start = weights(tiny)
    assert all(torch.isfinite(v).all() for v in c.values()) and set(c) == set(start)


def test_only_the_asked_layers_are_trained_and_checkpointing_trains_the_same(tmp_path, tiny):
    from sharp_distill.text.encoder_training import adapt_step, draw_pairs, freeze_lower, groups_of
    from sharp_distill.text.words import train_reviews
    texts, grads = train_reviews(make()), {}
    for checkpointing in (False, True):
        tokenizer, model = load_encoder(tiny, device="cpu")
        freeze_lower(model, FEW.replace(train_layers=1, checkpointing=checkpointing))
        r = np.random.default_rng(0); torch.manual_seed(0) # the same dropout twice
        adapt_step(tokenizer, model.train(), texts, lambda: draw_pairs(groups_of(texts.item_idx), 8, r), FEW, r).backward()
        grads[checkpointing] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert grads[False] and all("layer.1." in k for k in grads[False]) and grads[True].keys() == grads[False].keys()
    assert all(torch.allclose(grads[True][k], g, atol=1e-6) for k, g in grads[False].items())


def test_an_adapted_encoder_belongs_to_its_split(tiny):
    one, other = make(), make(); other.sha = "another split"
    assert adapted_encoder(one, tiny, FEW)[0] == adapted_encoder(one, tiny, FEW)[0] != adapted_encoder(other, tiny, FEW)[0]


@pytest.mark.parametrize("text", ["Отличная гитара", "很好用的吉他", "منتج رائع جدا", "גיטרה נהדרת", "素晴らしいギター", "🎸🎸🔥", "größer, schöner, weiß"])
def test_the_shipped_encoder_reads_every_script_without_unknown_pieces(text):
    tokenizer, model = load_encoder("shipped", device="cpu")
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids and len(ids) <= len(text.encode()) + 3
    v = encode_texts([text, "a fine guitar"], tokenizer, model, ReviewConfig())
    assert np.isfinite(v).all() and np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-4) and v[0] @ v[1] < .99


def test_within_divides_by_the_spread_within_items():
    r = np.random.default_rng(0)
    item = np.repeat(np.arange(20), 30)
    x = (r.normal(size=(20, 4))[item] + r.normal(size=(600, 4)) * [1, 5, .2, 1]).astype(np.float32)
    mean, projection = finish_vectors(x, np.arange(600), item, "within")
    z = (x - mean) @ projection
    inside = sum(np.cov(z[item == i].T, bias=True) for i in range(20)) / 20
    assert np.abs(inside - np.diag(np.diag(inside))).max() < .1 and inside.diagonal().max() < 1.01
    doubled = finish_vectors(x[::2], np.repeat(np.arange(300), 2), item, "center")[0]
    assert np.allclose(doubled, x[::2].mean(0), atol=1e-5)


@pytest.mark.parametrize("encoder", ["tfidf_full", "tfidf", "none", "shuffled"])
def test_kernels_are_symmetric_and_silent_items_stay_silent(encoder):
    K = text_kernel(make(), encoder, ReviewConfig(n_dims=8))
    S = sharpen(K, 2.)
    assert K.shape == (22, 22) and np.allclose(K, K.T, atol=1e-5) and not K[20:].any() and not S[20:].any() and np.isfinite(S).all()
    assert np.allclose(join_kernels([K, K], .3), K, atol=1e-6) and (encoder == "none" or np.isclose(K.diagonal()[:20].mean(), 1, atol=1e-5))
