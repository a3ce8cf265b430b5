"""Words and the vector cache: what the notebooks 21 to 23 and 26 do not already assert. Nothing here needs torch."""
import json
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import written_split

from sharp_distill.text.kernels import sharpen, text_kernel
from sharp_distill.text.learned_words import LearnedWordsConfig, WordRows, WordTask, learn_step, learn_words, learned_words
from sharp_distill.text.vector_cache import cached_vectors, read_vectors, write_vectors
from sharp_distill.text.words import count_words, item_tfidf, train_reviews


@pytest.fixture(autouse=True)
def quiet(monkeypatch): monkeypatch.setenv("SHARP_DISTILL_QUIET", "1")


def test_words_need_neither_torch_nor_transformers():
    code = """
import sys, numpy as np
from types import SimpleNamespace
from sharp_distill.text.reviews import encode_reviews
train = SimpleNamespace(user_idx=np.array([0]), item_idx=np.array([0]), review=["red ink"], n_users=1, n_items=1)
z = encode_reviews(SimpleNamespace(train=train, sha="s"), "tfidf")
assert z.text_encoder("red").any()
loaded = {"torch", "transformers", "tokenizers", "huggingface_hub"} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_permuting_items_permutes_rows():
    split, order = written_split(), np.random.default_rng(3).permutation(60)
    before = item_tfidf(split).toarray()
    split.train.item_idx = order[split.train.item_idx]
    assert np.allclose(item_tfidf(split).toarray()[order], before) and before.any()


@pytest.mark.parametrize("encoder", ["tfidf_full", "learned", "tfidf"])
def test_items_without_text_are_like_nothing(encoder):
    K = text_kernel(written_split(), encoder)
    S = sharpen(K, 2.)
    assert not K[58:].any() and not S[58:].any() and (S[:58, :58] > 0).sum() > (K[:58, :58] > 0).sum() - 1
    assert np.isfinite(S).all() and np.isclose(K.diagonal()[:58].mean(), 1, atol=.05)


def test_learned_words_start_as_tfidf_and_stay_finite():
    "Items without text, or with none once a fold is hidden, must not spoil the gradient: the root of 0 has none."
    split = written_split()
    idx = split.train.item_idx
    idx[np.setdiff1d(np.flatnonzero(idx < 10), np.unique(idx, return_index=True)[1])] = 20 # ten items have one review each
    tfidf, start = item_tfidf(split), learned_words(split, LearnedWordsConfig(steps=0))
    assert start.shape == tfidf.shape and abs(start - tfidf).max() < 1e-6
    found, rows = learn_words(split, LearnedWordsConfig(steps=4, every=2, l2=.1, flops=.1))
    assert len(found.log) == 3 and np.isfinite(found.log.loss[:2]).all() and np.isfinite(found.log.held).all()
    own = np.asarray(rows.multiply(rows).sum(1)).ravel()
    assert not own[58:].any() and np.allclose(own[own > 0], 1, atol=1e-5) and np.array_equal(own > 0, tfidf.getnnz(1) > 0)


def test_a_users_own_review_neither_helps_nor_hurts():
    "While a fold is hidden its reviews are as good as unwritten: the loss is the same whatever they say."
    import torch
    split, cfg = written_split(), LearnedWordsConfig()
    task, losses = WordTask(split.train, texts := train_reviews(split), cfg), []
    hidden = task.review_fold == 0
    for said in (texts.text, ["amp loud pick warm" if h else t for t, h in zip(texts.text, hidden)]):
        counts, words = count_words(type(texts)(said, texts.user_idx, texts.item_idx, texts.n_users, texts.n_items))
        rows = WordRows(counts, texts.item_idx, 60, np.ones(len(words)))
        X, Y, users = task.ask(0)
        state = dict(a=torch.linspace(-1, 1, len(words)), scale=torch.tensor(2.))
        losses.append(float(learn_step(rows, task, state, 0, X[users], Y[users])))
        whole = rows.to_csr(rows.values(state["a"]))
    assert hidden.sum() > 20 and np.isclose(*losses, atol=1e-5) and np.isfinite(losses).all()
    assert abs(whole - rows.to_csr(rows.values(state["a"], read=torch.as_tensor(~hidden)))).max() > .01 # it is left out


def test_learned_words_read_the_train_part_alone():
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.data.split import make_split
    split = make_split(make_sample(n_users=80, n_items=50), seed=0)
    before = learned_words(split, cfg := LearnedWordsConfig(steps=4))
    for part in (split.valid, split.test): part.review[:] = "zebra amp"
    assert abs(learned_words(split, cfg) - before).max() == 0


def test_any_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "v.safetensors"
    write_vectors(path, np.arange(3, dtype=np.uint64), np.random.default_rng(0).normal(size=(3, 4)))
    whole, trusted, refused = path.read_bytes(), read_vectors(path)[1].copy(), 0
    for i in range(0, len(whole), 3):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x55]) + whole[i + 1:])
        got = read_vectors(path)
        refused += got is None
        assert got is None or np.array_equal(got[1], trusted), i
    assert refused > len(whole) / 6 # a blank of the header may change without harm


SECOND = """
import sys, numpy as np
from pathlib import Path
from sharp_distill.text.vector_cache import cached_vectors
folder = Path(sys.argv[1])
def encode(texts):
    (folder / "encoded").touch()
    return np.array([[float(t.split()[1]) + 1] for t in texts])
texts = [f"text {i}" for i in range(20)]
(folder / "ready").touch()
v, column = cached_vectors(folder / "store", texts, encode, block=5)
assert v[column][:, 0].tolist() == [i + 1. for i in range(20)]
"""


def test_a_second_process_waits_and_finds_every_vector(tmp_path):
    second = []
    def encode(texts): # While the first process encodes, a second one wants the same texts
        if not second:
            second.append(subprocess.Popen([sys.executable, "-c", SECOND, str(tmp_path)]))
            while not (tmp_path / "ready").exists() and second[0].poll() is None: time.sleep(.01)
            stop = time.monotonic() + .3
            while time.monotonic() < stop and not (tmp_path / "encoded").exists(): time.sleep(.01)
        return np.array([[float(t.split()[1]) + 1] for t in texts])
    v, column = cached_vectors(tmp_path / "store", [f"text {i}" for i in range(20)], encode, block=5)
    assert second[0].wait(60) == 0 and not (tmp_path / "encoded").exists()
    assert v[column][:, 0].tolist() == [i + 1. for i in range(20)] and not list(tmp_path.glob("store/block-*"))


def test_a_stored_row_of_zeros_is_repaired(tmp_path):
    encode = lambda ts: np.array([[float(t.split()[1]) + 1] for t in ts])
    cached_vectors(tmp_path, ["text 0", "text 1"], encode)
    path, = tmp_path.glob("*.safetensors")
    keys, vectors = map(np.array, read_vectors(path))
    vectors[1] = 0
    n, = struct.unpack("<Q", path.read_bytes()[:8])
    head = json.loads(path.read_bytes()[8:8 + n])
    head["__metadata__"]["crc"] = str(zlib.crc32(vectors, zlib.crc32(keys))) # as a store that lost a race wrote it
    head = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + keys.tobytes() + vectors.tobytes())
    again, _ = cached_vectors(tmp_path, ["text 0", "text 1"], encode)
    assert sorted(again[:, 0].tolist()) == [1., 2.]


def shop(review=None, n_users=60, n_items=50, seed=0):
    "A shop whose items arrive one after the other; reviews of drawn words, or of a function of user, item and day."
    import pandas as pd
    from conftest import WORDS
    from sharp_distill.data.interactions import from_frame
    r = np.random.default_rng(seed)
    rows = [(f"u{u:02d}", f"i{i:02d}", d) for d in range(200) for u, i in zip(r.integers(0, n_users, 6), r.integers(max(0, d // 5 - 12), 10 + d // 5, 6))]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "day"]).drop_duplicates(["user_id", "item_id"])
    frame["timestamp"] = 1_600_000_000 + 86_400 * frame.day + np.arange(len(frame))
    frame["review"] = [(review or (lambda u, i, d: " ".join(r.choice(WORDS, 5))))(*row) for row in frame[["user_id", "item_id", "day"]].itertuples(index=False)]
    return from_frame(frame.drop(columns="day"))


@pytest.fixture(scope="module")
def two_widths(tmp_path_factory):
    "Two tiny encoders, 32 and 48 wide."
    from conftest import WORDS
    from transformers import AutoConfig, AutoModel
    from sharp_distill.text.deberta import tiny_deberta
    narrow, wide = (tiny_deberta(tmp_path_factory.mktemp("tiny"), WORDS) for _ in range(2))
    config = AutoConfig.from_pretrained(wide)
    config.hidden_size = config.pooler_hidden_size = 48
    AutoModel.from_config(config).save_pretrained(wide)
    return narrow, wide


ODD_SHOPS = {
    "one word": lambda u, i, d: "warm", "no letter": lambda u, i, d: "? !", "a letter": lambda u, i, d: "a",
    "half the users write": lambda u, i, d: "warm loud amp" if int(u[1:]) % 2 else "",
    "half the items have text": lambda u, i, d: f"warm {'loud' if int(i[1:]) % 3 else 'soft'} amp" if int(i[1:]) % 2 else " \u200b",
    "another language later": lambda u, i, d: "a warm loud amp" if d < 120 else "un ampli chaud et fort 很好用",
    "emoji": lambda u, i, d: "🎸" * (1 + int(i[1:]) % 3)}


@pytest.mark.parametrize("kind", ODD_SHOPS)
def test_every_way_answers_whatever_people_wrote(kind, two_widths):
    from sharp_distill.experiments.carry_over import CarryOverConfig, carry_over
    from sharp_distill.text.encoders import ReviewConfig
    cfg = CarryOverConfig(encoders=f"tiny={two_widths[0]}", n_choose=20, reviews=ReviewConfig(max_tokens=8))
    rows = carry_over(shop(ODD_SHOPS[kind]), kind, cfg.replace(questions="new,unseen" if kind != "a letter" else "rare,unseen"))[0]["rows"]
    assert {r["way"] for r in rows} >= {"chance", "tfidf", "svd", "bm25", "tiny", "words+tiny"}
    for r in rows: assert 0 <= r["ndcg"] <= 1 and np.isfinite(r.get("p_holm", 0)) and r["ci95"][0] <= r["ndcg"] <= r["ci95"][1], r


def test_vectors_of_another_width_are_never_mixed(two_widths, tmp_path):
    "A folder whose encoder is replaced by a wider one is read anew, whatever is stored."
    import shutil
    from sharp_distill.experiments.asking import Corpus, open_window
    from sharp_distill.data.split import make_split
    from sharp_distill.text.encoders import ReviewConfig
    window, folder, cfg, seen = open_window(make_split(shop(), "temporal"), "valid"), tmp_path / "encoder", ReviewConfig(max_tokens=8), []
    for source in (*two_widths, two_widths[0]):
        shutil.rmtree(folder, ignore_errors=True); shutil.copytree(source, folder)
        seen.append(np.asarray(Corpus(window).vectors(str(folder), cfg, 2)[0]))
    assert [v.shape[1] for v in seen] == [32, 48, 32] and np.array_equal(seen[0], seen[2])


def test_nothing_written_or_chosen_later_moves_an_answer():
    "At every moment: rows at or after it may be anything."
    from dataclasses import replace
    from sharp_distill.data.split import make_split
    from sharp_distill.experiments.asking import Corpus, ask, open_window
    from sharp_distill.experiments.carry_over import WAYS, Likeness
    window = open_window(make_split(shop(), "temporal"), "test")
    question = ask("new", window)
    assert len(question.asks) > 3
    for a in question.asks[1:]:
        late = window.rows.timestamp >= a.at
        other = replace(window, rows=replace(window.rows, review=np.where(late, "poison", window.rows.review), rating=np.where(late, 1, window.rows.rating)))
        for name in ("tfidf", "bm25"):
            o = dict(half_life=30., sharpness=2., centre=1, k1=1.2, b=.75)
            one, two = (Likeness(Corpus(w), WAYS[name].make, WAYS[name].fitted_by)(a, o) for w in (window, other))
            assert np.allclose(one, two, atol=1e-5) and one.any()
