"""Neural encoders: what the notebooks 20 to 26 do not already assert."""

import json
import runpy

import numpy as np
import pytest
from conftest import ROOT, WORDS, refused, written_split

from sharp_distill.core import UserError
from sharp_distill.text import encoders
from sharp_distill.text.encoders import (
    ReviewConfig, download_encoder, encode_texts, encoder_revision, find_encoder, load_encoder)
from sharp_distill.text.deberta import tiny_deberta
from sharp_distill.text.reviews import encode_reviews

ODD = ["", " ", "\x00\x01", None, float("nan"), 7, "a", "🎸" * 50, "منتج رائع", "很好用", "<br><br>", "\ud800",
       "x" * 100_000, "&lt;b&gt;", "e\u0301" * 900]


@pytest.fixture(autouse=True)
def quiet_and_private(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SHARP_DISTILL_QUIET", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_deberta(tmp_path_factory.mktemp("tiny"), WORDS)


@pytest.fixture(scope="module")
def shipped():
    return load_encoder("shipped", ReviewConfig(device="cpu"))


def test_rows_without_text_are_zero_and_nothing_is_nan(tiny):
    split = written_split()
    split.train.review[split.train.item_idx == 3] = " \u200b\n"
    for finish in ("none", "center", "whiten", "within"): # one encoding, four ways to finish it
        z = encode_reviews(split, tiny, ReviewConfig(finish=finish, max_tokens=12))
        assert np.isfinite(z.user).all() and np.isfinite(z.item).all() and z.item.dtype == np.float32
        assert not z.item[[3, 58, 59]].any() and not z.user[[38, 39]].any()
        assert np.allclose(np.linalg.norm(z.item[[0, 1, 2]], axis=1), 1, atol=1e-4)


@pytest.mark.parametrize("encoder", ["tfidf", "tiny"])
def test_any_text_gives_a_finite_vector_or_none(encoder, tiny):
    split = written_split()
    split.train.review[:len(ODD)], split.train.item_idx[:len(ODD)] = ODD, 59 # an item with nothing else
    z = encode_reviews(split, encoder.replace("tiny", tiny), ReviewConfig(n_dims=8, max_tokens=12, max_chunks=4))
    assert np.isfinite(z.item).all() and np.isfinite(z.user).all() and z.item[59].any()


def test_pieces_of_a_long_text_are_averaged_by_their_tokens(tiny):
    tokenizer, model = load_encoder(tiny)
    text, cfg = "amp loud warm string neck bright cable pick " * 2, ReviewConfig(max_tokens=12, max_chunks=50)
    pieces = tokenizer(text, truncation=True, max_length=12, return_overflowing_tokens=True)["input_ids"]
    import torch
    with torch.inference_mode():
        means = [model(torch.tensor([p])).last_hidden_state.mean(1)[0].numpy() for p in pieces]
    whole = np.average(means, axis=0, weights=[len(p) for p in pieces])
    assert len(pieces) > 2
    assert np.allclose(encode_texts([text], tokenizer, model, cfg)[0], whole / np.linalg.norm(whole), atol=1e-5)
    first = encode_texts([text], tokenizer, model, cfg.replace(max_chunks=1))[0]
    assert np.allclose(first, means[0] / np.linalg.norm(means[0]), atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_near(shipped, precision):
    texts = ["the amplifier has a warm tone", "a hoppy beer with citrus aroma", "cheap"]
    a, b = (encode_texts(texts, *shipped, ReviewConfig(precision=p)) for p in ("float32", precision))
    assert b.dtype == np.float32 and ((a * b).sum(1) > .99).all() and not np.array_equal(a, b)


def test_the_shipped_encoder_reads_every_script_without_unknown_pieces(shipped):
    texts = ["Отличная гитара", "很好用的吉他", "منتج رائع جدا", "גיטרה נהדרת", "素晴らしいギター", "🎸🎸🔥", "größer, weiß"]
    tokenizer, _ = shipped
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids and len(ids) <= len(text.encode()) + 3
    v = encode_texts([*texts, "a fine guitar"], *shipped, ReviewConfig())
    assert np.isfinite(v).all() and (v[:-1] @ v[-1]).max() < .99


def test_the_shipped_encoder_tells_texts_without_spaces_and_emoji_apart(shipped):
    "Byte by byte and still readable: other texts have other vectors, and what is mixed in leaves the English part its meaning."
    tokenizer, _ = shipped
    apart = ["很好用的吉他", "音质太差了", "素晴らしいギター", "弦がすぐ切れた", "기타가 좋아요", "🎸🎸🔥", "💔😡", "👩‍👩‍👧"]
    mixed = ["a great guitar 🎸 很好用 with warm tone", "a great guitar with warm tone", "this beer smells of grapefruit and hops", "很好用 🎸"]
    for text in [*apart, *mixed, "很好用" * 4000, "🎸" * 4000]:
        ids = tokenizer(text, truncation=True, max_length=512).input_ids
        assert tokenizer.unk_token_id not in ids and 2 < len(ids) <= 512
    v = encode_texts(apart + mixed, *shipped, ReviewConfig())
    like = v @ v.T
    assert np.isfinite(v).all() and (like[:len(apart), :len(apart)] - np.eye(len(apart))).max() < .999
    english, other = like[len(apart), len(apart) + 1], like[len(apart), len(apart) + 2]
    assert english > other + .1


def test_the_hub_cache_is_used_offline(tmp_path, monkeypatch, tiny):
    import shutil

    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(tiny, tmp_path / "models--some--encoder" / "snapshots" / "abc")
    assert find_encoder("some/encoder").name == "abc"
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"): find_encoder("some/other")
    shutil.copytree(tiny, tmp_path / "models--some--encoder" / "snapshots" / "def") # another commit came meanwhile
    (refs := tmp_path / "models--some--encoder" / "refs").mkdir()
    (refs / "main").write_text("def")
    names = {n: find_encoder(n).name for n in ("some/encoder", "some/encoder@def", "some/encoder@main", "some/encoder@abc")}
    assert list(names.values()) == ["abc", "def", "def", "abc"] # a name alone means what it meant at first
    assert encoder_revision("tfidf+some/encoder@main") == "def" and encoder_revision("some/encoder") == "abc"
    assert encoder_revision("tfidf") == encoder_revision(tiny) == encoder_revision("shipped") == ""
    with pytest.raises(UserError, match="some/encoder@zzz"): find_encoder("some/encoder@zzz")


def test_the_first_commit_from_the_hub_is_pinned(tmp_path, monkeypatch, tiny, capsys):
    import huggingface_hub
    import shutil
    asked, commits = [], ["111", "222"]
    def snapshot(repo, revision, allow_patterns):
        asked.append((repo, revision))
        return shutil.copytree(tiny, tmp_path / "hub" / (commits.pop(0) if revision == "main" else revision), dirs_exist_ok=True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(encoders, "_safe_revision", lambda name: "main")
    for _ in range(2): assert download_encoder("some/new").name == "111"
    assert download_encoder("some/new@222").name == "222" and download_encoder("some/new").name == "111"
    assert asked == [("some/new", r) for r in ("main", "111", "222", "111")] and "some/new is commit 111" in capsys.readouterr().out


def test_an_encoder_decoder_is_refused(tmp_path, tiny):
    import shutil

    from transformers import T5Config
    folder = shutil.copytree(tiny, tmp_path / "t5")
    T5Config(num_layers=1, d_model=8, d_ff=8, num_heads=1, vocab_size=300).save_pretrained(folder)
    with pytest.raises(UserError, match="encoder-decoder"): load_encoder(str(folder))


def test_processes_give_the_same_pieces_and_words(shipped, monkeypatch):
    from sharp_distill.text import cores as pool, words
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 1 + i % 70)) + f" n{i % 9}x" for i in range(90)]
    cfg, parts = ReviewConfig(max_tokens=16, max_chunks=2), [texts[:50], texts[50:]]
    count = lambda: words.count_words(words.ReviewTexts(texts, np.zeros(90, int), np.zeros(90, int), 1, 1))
    cut = lambda: list(encoders.tokenise_parts(shipped[0], parts, cfg))
    asked, here = (cut(), count()), pool.in_processes
    monkeypatch.setattr(pool, "FEW_CORES", 1), monkeypatch.setattr(pool, "FEW_TEXTS", 1)
    seen = []
    for module in (encoders, pool): monkeypatch.setattr(module, "in_processes", lambda *a: seen.append(a[0]) or here(*a))
    found = cut(), count()
    assert seen == [pool.tokenise_part, pool.count_part]
    for a, b in zip(asked[0], found[0]): assert all(map(np.array_equal, a, b))
    (a, words_a), (b, words_b) = asked[1], found[1]
    assert words_a.tolist() == words_b.tolist()
    assert all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("data", "indices", "indptr"))


def test_a_device_without_memory_says_what_to_lower(shipped):
    tokenizer, model = shipped
    def full(*a, **k): raise __import__("torch").OutOfMemoryError("Tried to allocate 9.00 GiB")
    class Full(type(model)): forward = full
    was, model.__class__ = model.__class__, Full
    try:
        with pytest.raises(UserError, match="no memory for batches of 4,096 tokens: expected a smaller batch_tokens, such as 1024"):
            encode_texts(["red ink"], tokenizer, model, ReviewConfig(batch_tokens=4096))
    finally: model.__class__ = was


def test_the_gpu_check_runs_on_a_cpu():
    rows = runpy.run_path(str(ROOT / "tools/gpu_check.py"))["measure_gpu"]("cpu", n=40, n_base=0)
    assert [r["what"].split(",")[0] for r in rows] == ["tokenising", *["tokenising"] * (len(rows) - 2), "shipped encoder"]
    assert all(r["reviews_per_s"] > 0 and r["device"] == "cpu" for r in rows) and rows[-1]["off_from_cpu"] == 0


def board_pairs(data):
    "Pairs of user and item that some leaderboard tests or chooses on in time, by their ids, from the splits themselves."
    from sharp_distill.data.split import make_split
    parts = [make_split(data, seed=s).test for s in range(5)]
    windows = [make_split(data, "temporal", cuts=3, cut=c) for c in range(3)]
    parts += [getattr(w, p) for w in windows for p in ("valid", "test")]
    return {(u, i) for p in parts for u, i in zip(p.user_ids[p.user_idx], p.item_ids[p.item_idx])}


def pairs_of(rows): return set(zip(rows.user_ids[rows.user_idx], rows.item_ids[rows.item_idx]))


@pytest.fixture(scope="module")
def sample(tiny):
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.text.interaction_rows import TokenConfig, token_rows
    data = make_sample(n_users=300, n_items=80)
    return data, token_rows(data, "sample", load_encoder(tiny)[0], TokenConfig(max_tokens=12))


def test_an_interaction_training_reads_no_row_that_a_leaderboard_tests(sample, tiny):
    from conftest import refused
    from sharp_distill.text.interaction_rows import check_rows_record, clean_rows, pair_keys, rows_record, token_rows
    data, s = sample
    tested = board_pairs(data)
    read = check_rows_record(s.record, data)
    assert len(s.rows) > 300 and pairs_of(s.rows) == pairs_of(read) and not pairs_of(read) & tested
    for bad in (next(k for k in range(len(data)) if not clean_rows(data)[k]), # one row of a test part, or of a window
                int(np.argmax(data.timestamp))):
        more = data.take(np.append(np.flatnonzero(np.isin(pair_keys(data), pair_keys(s.rows))), bad))
        assert len(pairs_of(more) & tested) == 1
        assert "1 of" in refused(token_rows, data, "sample", load_encoder(tiny)[0], rows=more)
        assert "clean rows are" in refused(check_rows_record, rows_record("sample", data, more), data)
    changed = data.take(np.arange(len(data) - 1))
    assert "expected the data" in refused(check_rows_record, s.record, changed)


def test_no_one_is_found_by_his_own_review(sample):
    from sharp_distill.core import rng
    from sharp_distill.text.interaction_rows import make_look
    from sharp_distill.text.interaction_training import InteractionTrainingConfig, draw_items, draw_texts
    _, s = sample
    cfg, n = InteractionTrainingConfig(batch_users=60, batch_items=40), 0
    for k in range(30):
        r = rng(k)
        users, items = draw_items(s, cfg, r)
        piece, place = draw_texts(s, users, items, 3, r)
        n += len(piece)
        assert not np.isin(s.user[piece], users).any()
        assert not np.isin(s.item[piece], s.held).any()
    assert n > 1000
    look = make_look(s)
    pairs = look.documents[look.n_other + look.n_held:].tocoo()
    assert len(look.user) > 50 and not (s.user[look.pieces[pairs.col]] == look.users[look.user[pairs.row]]).any()


@pytest.mark.parametrize("at", ["a step", "a checkpoint"])
def test_a_training_that_died_goes_on_to_the_same_bits(at, sample, tiny, tmp_path, monkeypatch):
    from sharp_distill.text import encoder_training, interaction_training as it
    from sharp_distill.text.interaction_rows import TokenConfig
    cfg = it.InteractionTrainingConfig(steps=6, batch_users=60, batch_items=24, n_looks=3, device="cpu", texts=TokenConfig(max_tokens=12))
    s = sample[1]
    whole, log = it.train_on_interactions([s], tiny, tmp_path / "whole", cfg)
    name, last = {"a step": ("step_loss", 5), "a checkpoint": ("write_json", 2)}[at]
    module = it if name == "step_loss" else encoder_training # where it is called
    real, calls = getattr(module, name), []
    def dies(*a, **kw):
        calls.append(1)
        if len(calls) == last: raise KeyboardInterrupt
        return real(*a, **kw)
    with monkeypatch.context() as m:
        m.setattr(module, name, dies)
        with pytest.raises(KeyboardInterrupt): it.train_on_interactions([s], tiny, tmp_path / "died", cfg)
    assert not (tmp_path / "died/model.safetensors").exists() and len(list((tmp_path / "died").glob("checkpoint.json"))) == 1
    died, again = it.train_on_interactions([s], tiny, tmp_path / "died", cfg)
    assert (died / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert again.drop(columns="seconds").equals(log.drop(columns="seconds"))
    assert not [p for p in died.iterdir() if p.suffix in (".bin", ".pt", ".pkl") or p.name.startswith((".", "checkpoint"))]


def test_interactions_train_any_encoder_with_both_losses(sample, tmp_path):
    from sharp_distill.text.interaction_rows import TokenConfig, token_rows
    from sharp_distill.text.interaction_training import InteractionTrainingConfig, train_on_interactions
    old = tiny_deberta(tmp_path / "v1", WORDS, version=1)
    for loss in ("softmax", "elsa"):
        cfg = InteractionTrainingConfig(steps=2, batch_users=60, batch_items=24, n_looks=1, device="cpu", loss=loss,
                                        checkpointing=True, texts=TokenConfig(max_tokens=12))
        s = token_rows(sample[0], "sample", load_encoder(old)[0], cfg.texts)
        folder, log = train_on_interactions([s], old, tmp_path / loss, cfg)
        assert np.isfinite(log["sample"]).all() and load_encoder(str(folder))[1].config.model_type == "deberta"


@pytest.mark.slow
def test_a_tool_trains_an_encoder_without_the_shop_it_will_be_a_stranger_to(tmp_path):
    main = runpy.run_path(str(ROOT / "tools/interaction_encoders.py"))["main"]
    words = [str(tmp_path), "sample,sample_fr", "--steps", "1", "--looks", "1"]
    (log,) = main([*words, "--only", "without_sample"]).values()
    seen = json.loads((tmp_path / "without_sample/interactions.json").read_text())["rows"]
    assert [r["dataset"] for r in seen] == ["sample_fr"] and "sample_fr" in log and "sample" not in log and len(log) == 2
    assert "expected some of all, without_sample, without_sample_fr" in refused(main, [*words, "--only", "without_sampel"])
    assert "expected two or more" in refused(main, [str(tmp_path), "sample"])
