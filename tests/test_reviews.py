"The encoders and the reviews: what the notebooks do not already check."
import errno
import json
import struct
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

from sharp_distill.text import encoders, reviews
from sharp_distill.core import UserError
from sharp_distill.text.encoders import ReviewConfig, clean_text, find_encoder, tiny_deberta
from sharp_distill.text.vector_cache import cached_vectors, read_vectors, write_vectors
from sharp_distill.text.reviews import encode_reviews, fuse, pooling_matrix, review_weights
from sharp_distill.text.words import item_tfidf, train_reviews

WORDS = "amp loud warm string neck bright cable pick solid cheap tone strap case tuner stand pedal".split()


@pytest.fixture(autouse=True)
def quiet_and_private(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SHARP_DISTILL_QUIET", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_deberta(tmp_path_factory.mktemp("tiny"), WORDS)


def make_part(seed, n=300, n_users=40, n_items=60, text=None):
    r = np.random.default_rng(seed)
    review = [text if text is not None else " ".join(r.choice(WORDS, 6)) for _ in range(n)]
    return SimpleNamespace(user_idx=r.integers(0, n_users - 2, n), item_idx=r.integers(0, n_items - 2, n), review=np.array(review, object),
                           timestamp=r.integers(-1, 9, n) * 86400, n_users=n_users, n_items=n_items)


def make(seed=0, **other):
    return SimpleNamespace(train=make_part(seed), valid=make_part(1, 30, **other), test=make_part(2, 60, **other), sha=f"s{seed}{other}")


@pytest.mark.parametrize("encoder", ["tfidf", "shuffled", "none", "tiny", "tfidf+tiny"])
def test_poisoned_validation_and_test_reviews_change_nothing(encoder, tiny):
    encoder, cfg = encoder.replace("tiny", tiny), ReviewConfig(n_dims=8, max_tokens=12)
    clean, poisoned = (encode_reviews(make(**o), encoder, cfg) for o in ({}, dict(text="POISON amp amp")))
    assert np.array_equal(clean.user, poisoned.user) and np.array_equal(clean.item, poisoned.item)
    touched = make()
    touched.train.review[0] = "pedal pedal pedal and something else"
    moved = encode_reviews(touched, encoder, cfg)
    assert encoder == "none" or not np.array_equal(clean.item, moved.item)


@pytest.mark.parametrize("finish", ["none", "center", "whiten", "within"])
@pytest.mark.parametrize("pooling", ["mean", "recency", "length"])
def test_rows_without_text_are_zero_and_nothing_is_nan(finish, pooling, tiny):
    split = make()
    split.train.review[split.train.item_idx == 3] = " \u200b\n"
    z = encode_reviews(split, tiny, ReviewConfig(finish=finish, review_pooling=pooling, max_tokens=12))
    assert np.isfinite(z.user).all() and np.isfinite(z.item).all()
    assert not z.item[[3, 58, 59]].any() and not z.user[[38, 39]].any()
    assert np.allclose(np.linalg.norm(z.item[[0, 1, 2]], axis=1), 1, atol=1e-4) and z.item.dtype == np.float32


def test_permuting_items_permutes_rows():
    split, projection = make(), np.random.default_rng(3).permutation(60)
    before = item_tfidf(split).toarray()
    split.train.item_idx = projection[split.train.item_idx]
    assert np.allclose(item_tfidf(split).toarray()[projection], before)


def test_recency_never_underflows():
    texts = train_reviews(make())
    texts.timestamp[:] = np.where(np.arange(len(texts)) % 2, 0, 3_000_000_000)
    w = review_weights(texts, texts.item_idx, ReviewConfig(review_pooling="recency", half_life_days=1.))
    M = pooling_matrix(texts.item_idx, texts.n_items, w)
    assert np.isfinite(M.data).all() and np.allclose(M.sum(1)[np.diff(M.indptr) > 0], 1, atol=1e-5)


def test_only_item_words_between_the_limits_are_kept():
    split = make()
    split.train.review = np.array([t + " everywhere" for t in split.train.review], object)
    split.train.review[0] += " onceonly"
    limits = dict(min_df=2, max_df=.99)
    counts, words = reviews.count_words(train_reviews(split))
    items = reviews.sum_rows(split.train.item_idx, 60, counts)
    kept = set(words[reviews.words_to_keep(items.tocsr(), ReviewConfig(**limits))])
    assert kept and "everywhere" not in kept and "onceonly" not in kept and kept <= set(WORDS)


@pytest.mark.parametrize("text", ["", " ", "\x00\x01", None, float("nan"), 7, "a", "🎸" * 50, "منتج رائع", "很好用", "<br><br>", "\ud800", "x" * 100_000, "&lt;b&gt;", "e\u0301" * 900])
def test_any_text_gives_a_finite_vector_or_none(text, tiny):
    split = make()
    split.train.review[:5] = [text] * 5
    for encoder in ("tfidf", tiny):
        z = encode_reviews(split, encoder, ReviewConfig(n_dims=8, max_tokens=12, long_reviews="chunk"))
        assert np.isfinite(z.item).all() and np.isfinite(z.user).all()
    assert clean_text(clean_text(text)) == clean_text(text) or "&" in str(text)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, keys = tmp_path / "v.safetensors", np.arange(5, dtype=np.uint64)
    write_vectors(path, keys, np.ones((5, 3)))
    real_open = open
    class Full:
        def __init__(self, f): self.f = f
        def __enter__(self): return self
        def __exit__(self, *e): self.f.close()
        def write(self, b):
            self.f.write(bytes(b)[:4])
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(encoders, "open", lambda p, mode="r", *a: Full(real_open(p, mode)) if mode == "wb" else real_open(p, mode, *a), raising=False)
    with pytest.raises(UserError, match="No room"): write_vectors(path, keys, np.ones((5, 3)))
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["v.safetensors"] and (read_vectors(path)[1] == 1).all()


def test_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "v.safetensors"
    write_vectors(path, np.arange(3, dtype=np.uint64), np.random.default_rng(0).normal(size=(3, 4)))
    whole, trusted = path.read_bytes(), read_vectors(path)[1].copy()
    for i in range(0, len(whole), 3):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1:])
        got = read_vectors(path)
        assert got is None or np.array_equal(got[1], trusted), i


COUNT = "import sys, numpy as np; from pathlib import Path; from sharp_distill.text.vector_cache import cached_vectors; " \
    "texts = [f'text {i}' for i in range(200)]; v, c = cached_vectors(Path(sys.argv[1]), texts, lambda ts: np.array([[float(t.split()[1]) + 1] for t in ts]), block=7); " \
    "sys.exit(v[c][:, 0].tolist() != [float(i) + 1 for i in range(200)])"


def test_four_processes_share_a_store(tmp_path):
    for trial in range(3):
        runs = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path / f"store {trial}")]) for _ in range(4)]
        assert [r.wait() for r in runs] == [0] * 4


def test_a_stored_row_of_zeros_is_repaired_and_none_is_written(tmp_path):
    encode = lambda ts: np.array([[float(t.split()[1]) + 1] for t in ts])
    v, column = cached_vectors(tmp_path / "store", ["text 0", "text 1"], encode)
    path, = (tmp_path / "store").glob("*.safetensors")
    keys, vectors = map(np.array, encoders.read_vectors(path))
    vectors[1] = 0
    n, = struct.unpack("<Q", path.read_bytes()[:8])
    head = json.loads(path.read_bytes()[8:8 + n])
    head["__metadata__"]["crc"] = str(zlib.crc32(vectors, zlib.crc32(keys))) # as the store that lost a race wrote it
    path.write_bytes(struct.pack("<Q", len(json.dumps(head))) + json.dumps(head).encode() + keys.tobytes() + vectors.tobytes())
    again, column = cached_vectors(tmp_path / "store", ["text 0", "text 1"], encode)
    assert sorted(again[:, 0].tolist()) == [1., 2.]
    with pytest.raises(UserError, match="vector of zeros"): encoders.write_vectors(tmp_path / "zero.safetensors", keys, np.zeros((2, 1)))


def test_options_that_change_a_vector_change_its_store(tiny):
    base = ReviewConfig()
    sha = lambda **kw: encoders.encoder_sha(tiny, base.replace(**kw))
    assert len({sha(), sha(max_tokens=32), sha(token_pooling="first"), sha(attention="content_only"), sha(long_reviews="chunk")}) == 5
    assert sha() == sha(batch_tokens=128, device="cpu", finish="whiten", review_pooling="length")


def test_a_missing_shard_is_named(tmp_path, tiny):
    import shutil
    folder = shutil.copytree(tiny, tmp_path / "sharded")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=dict(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"))))
    with pytest.raises(UserError, match="half downloaded: model-00002-of-00002"): find_encoder(str(folder))


def test_the_hub_cache_is_used_offline(tmp_path, monkeypatch, tiny):
    import shutil

    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "models--some--encoder" / "snapshots" / "abc")
    assert find_encoder("some/encoder").name == "abc"
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"): find_encoder("some/other")


def test_an_encoder_decoder_is_refused(tmp_path, tiny):
    import shutil

    from transformers import T5Config
    folder = shutil.copytree(tiny, tmp_path / "t5")
    T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1, vocab_size=300).save_pretrained(folder)
    with pytest.raises(UserError, match="encoder-decoder"): encoders.load_encoder(str(folder))


def test_embeddings_of_two_splits_refuse_to_meet():
    a, b = (encode_reviews(make(s), "tfidf", ReviewConfig(n_dims=4)) for s in (0, 5))
    with pytest.raises(UserError, match="encode both from one split"): fuse(a, b)
