"""Stress tests of serving: exact search against a full sort, damaged files, races, kills, unknown ids, no torch."""
import contextlib
import dataclasses
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp
from conftest import written_split
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load_file, save_file

from sharp_distill.core import Config, UserError, option
from sharp_distill.data.interactions import Interactions
from sharp_distill.models.student import StudentState
from sharp_distill.serve import compiler, native, store, topk
from sharp_distill.serve.recommender import Recommender, build_recommender
from sharp_distill.serve.topk import exact_topk, full_sort_topk, index_items
from sharp_distill.text.encoders import ReviewConfig
from sharp_distill.text.reviews import TextEncoder
from sharp_distill.text.words import WordEncoder, encode_words

ENGINES = ("numpy", "torch", "int8") if native.find_library() else ("numpy", "torch")
needs_compiler = pytest.mark.skipif("int8" not in ENGINES, reason="no C compiler")


def draw_case(seed, n_items, n_users, d, kind, share_excluded):
    gen = np.random.default_rng(seed)
    normal = lambda n: gen.normal(size=(n, d)).astype(np.float32)
    if kind == "ties": u, i = (gen.integers(-1, 2, size=(n, d)).astype(np.float32) for n in (n_users, n_items))
    elif kind == "copies":
        n_rows = max(1, n_items // 7)
        u, i = normal(n_users), normal(n_rows)[gen.integers(0, n_rows, n_items)]
    elif kind == "zeros": u, i = np.zeros((n_users, d), np.float32), normal(n_items)
    else: u, i = normal(n_users), normal(n_items)
    if kind == "lengths": i = (i * np.exp(2 * gen.normal(size=(n_items, 1)))).astype(np.float32)
    if kind == "tiny": u, i = u * np.float32(1e-18), i * np.float32(1e-18)
    if kind == "large": u, i = u * np.float32(1e8), i * np.float32(1e8)
    exclude = None if share_excluded is None else sp.csr_matrix(gen.random((n_users, n_items)) < share_excluded)
    return u, i, exclude


def assert_exact(u, i, k, exclude=None, engines=ENGINES, **options):
    wanted = full_sort_topk(u, i, k, exclude)
    for engine in engines:
        got = exact_topk(u, i, k, exclude, engine, **options)
        np.testing.assert_array_equal(got[0], wanted[0], err_msg=engine)
        np.testing.assert_array_equal(got[1], wanted[1], err_msg=engine)
    return wanted


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n_users=st.integers(1, 20), d=st.integers(1, 33),
       share_excluded=st.sampled_from([None, 0., .02, .5, .98, 1.]),
       n_items=st.one_of(st.integers(1, 40), st.integers(1000, 1100), st.integers(2000, 9000)),
       kind=st.sampled_from(["normal", "ties", "copies", "zeros", "lengths", "tiny", "large"]),
       length=st.sampled_from(["small", "middle", "all", "all but one"]))
def test_exact_topk_is_a_full_sort(seed, n_items, n_users, d, kind, share_excluded, length):
    if kind == "zeros" and n_items > 2000: n_users = min(n_users, 2)
    u, i, exclude = draw_case(seed, n_items, n_users, d, kind, share_excluded)
    k = {"small": min(10, n_items), "middle": n_items // 3, "all": n_items, "all but one": n_items - 1}[length]
    assert_exact(u, i, max(1, k), exclude, n_threads=3)


def test_many_tiles_pruned_by_length():
    u, i, _ = draw_case(3, 40_000, 20, 16, "lengths", None)
    assert_exact(u, i, 10)


def test_padding_never_counts_when_all_scores_are_negative():
    u, i, _ = draw_case(1, 1500, 9, 5, "normal", None)
    for k in (1, 10, 700): assert_exact(np.abs(u), -np.abs(i), k)


def test_pruning_keeps_short_items_that_point_the_right_way():
    gen, n = np.random.default_rng(0), 40_000
    i = (.001 * gen.normal(size=(n, 4))).astype(np.float32)
    i[:2048] += np.float32([1, 9, 0, 0])     # long, but sideways: score 1
    i[2048:] += np.float32([1.05, 0, 0, 0])  # short, and ahead: score 1.05
    assert assert_exact(np.float32([[1, 0, 0, 0]] * 3), i, 10)[0].min() >= 2048


def test_answer_does_not_depend_on_batch_or_threads(monkeypatch):
    u, i, exclude = draw_case(5, 3000, 64, 48, "normal", .1)
    index, wanted = index_items(i, int8="int8" in ENGINES), exact_topk(u, i, 20, exclude)
    for batch, threads in ((1, 1), (5, 3), (64, 2)):
        monkeypatch.setattr(topk, "BATCH", batch)
        for engine in ENGINES:
            got = exact_topk(u, index, 20, exclude, engine, n_threads=threads)
            np.testing.assert_array_equal(got[0], wanted[0])
            np.testing.assert_array_equal(got[1], wanted[1])


@pytest.mark.parametrize("kind", ["normal", "ties", "copies", "lengths"])
@pytest.mark.parametrize("n_users, share", [(1, .001), (1, .9), (19, .05), (19, 1.)])
def test_what_is_hidden_from_all_is_as_if_excluded_for_each(kind, n_users, share):
    u, i, exclude = draw_case(11, 5000, n_users, 12, kind, .02)
    hidden = np.flatnonzero(np.random.default_rng(1).random(5000) < share)
    both = exclude.toarray()
    both[:, hidden] = True
    for own, masked in ((exclude, both), (None, np.isin(np.arange(5000), hidden) | np.zeros((n_users, 1), bool))):
        wanted = full_sort_topk(u, i, 30, sp.csr_matrix(masked))
        for engine in ENGINES:
            got = exact_topk(u, i, 30, own, engine, n_threads=2, hidden=hidden)
            assert all(np.array_equal(a, b) for a, b in zip(got, wanted)), engine


def test_an_index_that_was_used_can_be_sent_elsewhere():
    u, i, _ = draw_case(2, 3000, 3, 8, "normal", None)
    index = index_items(i, int8="int8" in ENGINES)
    wanted = exact_topk(u, index, 10)
    sent = pickle.dumps(index)
    del index                      # the addresses of its arrays must not be among what was sent
    there = pickle.loads(sent)
    assert there.n_bytes == index_items(i, int8="int8" in ENGINES).n_bytes
    assert all(np.array_equal(a, b) for a, b in zip(exact_topk(u, there, 10), wanted))


@needs_compiler
def test_plain_loop_of_the_compiled_search_is_exact_too(monkeypatch):
    plain = native.load_search(source=native.SOURCE.replace("__AVX512VNNI__", "NO_SUCH_THING"))
    assert not plain.fast()
    monkeypatch.setattr(native, "find_library", lambda: plain)
    for seed, kind in ((1, "normal"), (2, "ties"), (3, "lengths")):
        u, i, exclude = draw_case(seed, 3000, 5, 13, kind, .3)
        assert_exact(u, i, 40, exclude, ["int8"])


@needs_compiler
def test_bound_of_8_bit_scores_is_needed(monkeypatch):
    "Without the error term the search must lose items, else the bound is not what makes it exact."
    careless = native.load_search(source=native.SOURCE.replace("return 1.000001 * (integer", "return 0 * (integer"))
    u, i, _ = draw_case(7, 20_000, 20, 16, "normal", None)
    index, wanted = index_items(i, int8=True), full_sort_topk(u, i, 10)[0]
    assert (exact_topk(u, index, 10)[0] == wanted).all()
    monkeypatch.setattr(native, "find_library", lambda: careless)
    assert (exact_topk(u, index, 10)[0] != wanted).any()


# The compiled library

TWICE = "int twice(int x) { return 2 * x; }"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def plant(path, marker): # Put a library in the place of another, under the name of its own hash
    source = f'#include <stdio.h>\n__attribute__((constructor)) void run(void) {{ fclose(fopen("{marker}", "w")); }}\n{TWICE}'
    evil = compiler._build(source, "cc", path.parent, path.name.split("-")[0] + "-" + path.name.split("-")[1])
    path.unlink()
    return evil


@needs_compiler
@pytest.mark.parametrize("how", ["another account's", "open file", "open folder", "open folder above", "same account"])
def test_a_planted_library_is_not_loaded(own_cache, tmp_path, how):
    if how == "another account's" and os.geteuid(): pytest.skip("needs root to give a file away")
    compiler.compile_c(TWICE)
    evil, marker = plant(next(own_cache.glob("*.so")), tmp_path / "marker"), tmp_path / "marker"
    if how == "another account's": os.chown(evil, 65534, 65534)
    if how == "open file": os.chmod(evil, 0o666)
    if how == "open folder": os.chmod(own_cache, 0o777)
    if how == "open folder above": os.chmod(own_cache.parent, 0o777)
    warned = pytest.warns(UserWarning, match="others can write") if "folder" in how else contextlib.nullcontext()
    with warned: assert compiler.compile_c(TWICE).twice(21) == 42
    assert marker.exists() == (how == "same account"), "the test itself must see a library that is loaded"
    assert evil.exists() == (how not in ("another account's", "open file"))


@needs_compiler
def test_a_damaged_library_is_compiled_again(own_cache):
    compiler.compile_c(TWICE)
    good = next(own_cache.glob("*.so"))
    content, gen = good.read_bytes(), np.random.default_rng(0)
    for n in range(12):
        at = int(gen.integers(len(content)))
        bad = content[:at] if n % 3 == 0 else content[:at] + bytes([content[at] ^ 1 << n % 8]) + content[at + 1:]
        good.unlink(); good.write_bytes(bad) # another file: the one that is loaded stays as it is
        assert compiler.compile_c(TWICE).twice(21) == 42 and good.read_bytes() == content


@needs_compiler
def test_a_library_that_searches_wrongly_is_not_used(own_cache, monkeypatch):
    for right, wrong in (("has(u->exclude, u->n_exclude, p)", "0"), ("has(u->hidden, u->n_hidden, p)", "0"),
                         ("(s == t && i > j)", "(s == t && i < j)"),
                         ("sum += (double)u->row[c]", "sum -= (double)u->row[c]"), ("-128 * sum", "-127 * sum")):
        assert right in native.SOURCE
        with pytest.raises(UserError, match="answers are wrong"):
            native.load_search(source=native.SOURCE.replace(right, wrong), is_right=native.gives_numpys_lists)
    assert not list(own_cache.glob("*.so"))
    monkeypatch.setattr(native, "gives_numpys_lists", lambda library: False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert native.find_library.__wrapped__() is None
    assert "answers are wrong" in str(said[0].message)


@needs_compiler
def test_a_cache_that_cannot_be_used_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be used"): assert compiler.compile_c(TWICE).twice(21) == 42


# The Recommender

def purchases(R):
    (u, i), none = R.nonzero(), np.full(R.nnz, None, object)
    ids = (np.array([f"{side}{j}" for j in range(n)], object) for side, n in zip("ui", R.shape))
    return Interactions(u, i, none, none, none, *ids)


@dataclasses.dataclass(frozen=True)
class ToyConfig(Config):
    emb_dim: int = option(4, "embedding width")


@pytest.fixture(scope="module")
def train():
    R = sp.random(9, 30, .2, format="csr", random_state=0)
    return purchases(R)


@pytest.fixture(scope="module")
def state(train):
    gen = np.random.default_rng(0)
    draw = lambda n: gen.normal(size=(n, 4)).astype(np.float32)
    degree, ones = np.bincount(train.item_idx, minlength=30), np.ones((3, 4), np.float32)
    return StudentState(draw(9), draw(30), draw(30), ones, draw(2), degree, ToyConfig(), "x", "tfidf")


@pytest.fixture(scope="module")
def shop(state, train):
    words = WordEncoder(("moon", "sea"), np.ones(2, np.float32), np.eye(2, dtype=np.float32))
    return build_recommender(state, train, text_encoder=TextEncoder((words,)))


def test_without_a_compiler_answers_are_the_same(shop, monkeypatch):
    with_it = shop.recommend(shop.user_ids, k=4)
    for module in (native, topk): monkeypatch.setattr(module, "find_library", lambda: None)
    without = dataclasses.replace(shop)
    assert without.item_index.codes is None and without.recommend(shop.user_ids, k=4).equals(with_it)
    with pytest.raises(UserError, match="C compiler"): index_items(shop.item_emb, int8=True)


def test_lists_are_those_of_a_full_sort(shop, train):
    every = sp.csr_matrix(np.ones((9, 30)))
    full = dataclasses.replace(shop, exclude=every)
    for rec, exclude, all_items in ((shop, train.to_csr(), False), (shop, None, True), (full, every, False)):
        answer = rec.recommend(shop.user_ids, k=30, all_items=all_items)
        idx, _ = full_sort_topk(shop.user_emb, shop.item_emb, 30, exclude)
        assert answer.item_id.tolist() == [f"i{i}" for row in idx for i in row if i >= 0]
    lengths = [len(shop.recommend_new(shop.item_ids, k=5, all_items=offered)) for offered in (False, True)]
    assert lengths == [0, 5]
    assert shop.recommend(["u1", "u1"], k=2).item_id.tolist() == 2 * shop.recommend("u1", k=2).item_id.tolist()


@pytest.mark.parametrize("call, says", [
    (lambda r: r.recommend("u1", k=0), "nearest good choice is 1"), (lambda r: r.recommend([]), "empty"),
    (lambda r: r.fold_in(["i1"], "u77"), "'u77'"), (lambda r: r.fold_in([], review_emb=[np.nan, 1]), "finite"),
    (lambda r: r.similar_items("i99"), "Did you mean 'i9'"), (lambda r: r.similar_items(["i1", "i2"]), "expected one"),
    (lambda r: r.with_item("new", [1., 2., 3.]), "expected \\(2,\\)"),
    (lambda r: r.export_torch("x", k=31), "nearest good choice is 30")])
def test_bad_input_is_named(shop, call, says):
    with pytest.raises(UserError, match=says): call(shop)


def test_what_does_not_belong_together_is_not_built(state, train):
    bad = dataclasses.replace(state, item_emb=state.item_emb.copy())
    bad.item_emb[3, 1] = np.nan
    with pytest.raises(UserError, match="item_emb row 3"): build_recommender(bad, train)
    fewer = dataclasses.replace(train, user_ids=train.user_ids[:8])
    with pytest.raises(UserError, match="9 rows, the interactions 8"): build_recommender(state, fewer)


def test_ids_are_read_as_in_the_data(state, train):
    numbered = dataclasses.replace(train, user_ids=np.array([str(n) for n in range(9)], object))
    rec = build_recommender(state, numbered)
    wanted = rec.recommend("3", k=3)
    for same in (3, 3., np.float32(3), np.int64(3), [3.], np.array([3.]), b"3"):
        assert rec.recommend(same, k=3, unknown="popular").equals(wanted), same
    for call in (lambda: rec.recommend_new(3), lambda: rec.recommend_new([3.5]), lambda: rec.similar_items(4)):
        with pytest.raises(UserError, match="unknown item '(3|3.5|4)'.*like 'i0'"): call()
    for odd in (None, float("nan"), np.float32("nan"), {"3": 1}, [["3"]], [None]):
        with pytest.raises(UserError, match="not an id"): rec.recommend(odd, unknown="popular")
        with pytest.raises(UserError, match="not an id"): rec.recommend_new(odd)


def test_a_list_is_never_longer_than_the_catalogue(shop):
    assert len(shop.recommend("u1", k=10**6, all_items=True)) == len(shop.recommend_new(k=99)) == 30
    assert len(shop.similar_items("i1", k=31)) == 29 and len(shop.recommend("x", k=40, unknown="popular")) == 30


def test_exclusions_are_read_by_id(state, train):
    other = dataclasses.replace(train, user_ids=train.user_ids[::-1], item_ids=train.item_ids[::-1],
                                user_idx=8 - train.user_idx, item_idx=29 - train.item_idx)
    more = dataclasses.replace(other, user_idx=np.array([8]), item_idx=np.array([29 - 7]))
    offers = lambda rec: set(rec.recommend("u0", k=30).item_id)
    assert offers(build_recommender(state, train, exclude=(other,))) == offers(build_recommender(state, train))
    assert offers(build_recommender(state, train, exclude=(other, more))) == offers(build_recommender(state, train)) - {"i7"}
    assert "i7" in offers(build_recommender(state, train))
    for name in ("user_ids", "item_ids"):
        foreign = dataclasses.replace(other, **{name: np.array([f"z{n}" for n in range(30)], object)})
        with pytest.raises(UserError, match="unknown (user|item) 'z"): build_recommender(state, train, exclude=(foreign,))


def test_exclude_leaves_items_out(shop):
    for call in (lambda **o: shop.recommend(["u1", "u2"], k=30, **o), lambda **o: shop.recommend_new(["i3"], k=30, **o)):
        for options in ({}, {"all_items": True}):
            every, some = call(**options), call(exclude=["i1", "i9"], **options)
            assert some.item_id.tolist() == [i for i in every.item_id if i not in ("i1", "i9")]


def test_a_text_without_a_known_word_places_no_item(shop):
    for options in (dict(reviews="unheard of"), dict(reviews=["", "?"]), dict(review_emb=np.zeros(2))):
        with pytest.raises(UserError, match="nothing is known about item 'new'"): shop.with_item("new", **options)


def test_words_of_few_users_are_not_stored(tmp_path):
    split = written_split(n_users=12)
    split.train.review[:3], split.train.user_idx[:3] = "4111111111111111 amp", [0, 0, 1]
    user, item, encoder = encode_words(split, ReviewConfig(n_dims=20))
    assert "4111111111111111" in encoder.words
    gen, (d_t, (U, I)) = np.random.default_rng(0), (encoder.n_dims, (12, 60))
    draw = lambda n: gen.normal(size=(n, 4)).astype(np.float32)
    bought = purchases(sp.csr_matrix((np.ones(300), (split.train.user_idx, split.train.item_idx)), shape=(U, I)))
    state = StudentState(draw(U), draw(I), draw(I), draw(d_t + 1), draw(d_t), np.ones(I, np.int64), ToyConfig(), "x", "tfidf")
    for min_users, stored in ((2, True), (3, False)):
        rec = build_recommender(state, bought, text_encoder=TextEncoder((encoder,)), min_users=min_users)
        file = rec.save(tmp_path / str(min_users)) / store.FILE
        assert (b"4111111111111111" in file.read_bytes()) == stored and b"amp" in file.read_bytes()
        again = Recommender.load(file.parent)
        assert again.facts["min_users_of_a_word"] == min_users
        assert again.recommend_new(reviews="amp loud", k=9).equals(rec.recommend_new(reviews="amp loud", k=9))
        assert np.allclose(rec.text_encoder("amp loud"), TextEncoder((encoder,))("amp loud"))


def test_without_histories_nobody_is_in_the_file(shop, tmp_path):
    small = Recommender.load(shop.save(tmp_path / "a", histories=False))
    content = (tmp_path / "a" / store.FILE).read_bytes()
    assert not [u for u in shop.user_ids if f'"{u}"'.encode() in content] and b'"i7"' in content
    assert "train_indices" in load_file(tmp_path / "a" / store.FILE) and not small.train.nnz
    ask = dict(items=["i1", "i2"], exclude=["i5"], reviews="moon", k=30)
    assert small.recommend_new(**ask).equals(shop.recommend_new(**ask)) and len(small.recommend_new(**ask)) == 27
    with pytest.raises(UserError, match="histories=False"): small.recommend("u1")
    with pytest.raises(UserError, match="histories=False"): small.fold_in([], "u1")
    assert len(small.recommend("u1", k=3, unknown="popular")) == 3
    assert "new" in set(small.with_item("new", reviews="sea").recommend_new(k=31).item_id)
    small.save(tmp_path / "b")
    assert Recommender.load(tmp_path / "b").recommend_new(**ask).equals(small.recommend_new(**ask))


# Folders

def files(folder): return sorted(p.name for p in folder.iterdir() if p.name != ".lock")


def test_a_link_is_followed_and_strangers_are_kept(shop, tmp_path):
    shop.save(tmp_path / "v1"); (tmp_path / "now").symlink_to(tmp_path / "v1")
    (tmp_path / "v1" / "thesis.txt").write_text("not to be lost")
    for _ in range(2): shop.save(tmp_path / "now")
    assert (tmp_path / "now").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["now", "v1"]
    assert files(tmp_path / "v1") == [store.FILE, "thesis.txt"]
    assert Recommender.load(tmp_path / "v1").recommend("u1", k=2).equals(shop.recommend("u1", k=2))
    (tmp_path / "v1" / store.FILE).unlink()
    with pytest.raises(UserError, match="not a saved Recommender"): shop.save(tmp_path / "now")
    assert files(tmp_path / "v1") == ["thesis.txt"]


def test_a_folder_of_the_former_format_is_refused_and_replaced(shop, tmp_path):
    (tmp_path / "a").mkdir()
    for name in store.FORMER: (tmp_path / "a" / name).write_text("{}")
    with pytest.raises(UserError, match="former format.*version 3"): Recommender.load(tmp_path / "a")
    assert files(shop.save(tmp_path / "a")) == [store.FILE] and Recommender.load(tmp_path / "a")


def test_a_tilde_is_the_home_folder(shop, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shop.save("~/student")
    assert files(tmp_path / "student") == [store.FILE] and Recommender.load("~/student").n_bytes == shop.n_bytes


@pytest.mark.parametrize("change, says", [
    (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "checksum"), (lambda b: b.replace(b"u3", b"u4"), "checksum"),
    (lambda b: b.replace(b"emb_dim", b"emb_dum"), "checksum"), (lambda b: b.replace(b"moon", b"noon"), "checksum"),
    (lambda b: b[:-5], "cut off"), (lambda b: b"", "cut off"), (lambda b: b"\xff" * 99, "cut off"),
    (lambda b: b.replace(b"-recommender", b"-recommendor"), "format"),
    (lambda b: b.replace(b'"version":"3"', b'"version":"9"'), "version 9"),
    (None, "not a saved Recommender"), ("folder", "not a regular file"), ("pipe", "not a regular file")])
def test_damaged_folder_is_refused(shop, tmp_path, change, says):
    file = shop.save(tmp_path / "a") / store.FILE
    content = file.read_bytes()
    file.unlink()
    if change == "folder": file.mkdir()
    elif change == "pipe": os.mkfifo(file)
    elif change: file.write_bytes(change(content))
    with pytest.raises(UserError, match=says): Recommender.load(tmp_path / "a")


def test_a_failed_save_leaves_the_old_folder(shop, tmp_path, monkeypatch):
    shop.save(tmp_path / "a")
    with pytest.raises(TypeError): dataclasses.replace(shop, facts={"config": object}).save(tmp_path / "a")
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(UserError, match="No space left"): shop.save(tmp_path / "a")
    assert files(tmp_path / "a") == [store.FILE] and files(tmp_path) == ["a"]
    assert Recommender.load(tmp_path / "a").facts["config"] == {"emb_dim": 4}


def test_half_a_character_is_named(shop, tmp_path):
    odd = np.array(["\ud800", *shop.item_ids[1:]], object)
    with pytest.raises(UserError, match="half a character"): dataclasses.replace(shop, item_ids=odd).save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_student_is_private(shop, tmp_path):
    (tmp_path / "a").mkdir(mode=0o755)
    for umask in (0o000, 0o077):
        before = os.umask(umask)
        try: shop.save(tmp_path / "a")
        finally: os.umask(before)
        assert oct((tmp_path / "a").stat().st_mode)[-4:] == "0700"
        assert {oct(p.stat().st_mode)[-4:] for p in (tmp_path / "a").iterdir()} == {"0600"}
    if os.geteuid(): pytest.skip("needs root to become another account")
    code = """import os, sys
from sharp_distill.core import error_line
from sharp_distill.serve.recommender import Recommender
os.setuid(65534)
print(error_line(Recommender.load, sys.argv[1]))"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("UserError") and "closed to this account" in done.stdout and not done.stderr


FORKED = """import os, random, signal, sys, time
import numpy as np
from sharp_distill.core import UserError
from sharp_distill.serve.recommender import Recommender
folder, what, n = sys.argv[1], sys.argv[2], int(sys.argv[3])
import dataclasses
base = Recommender.load(folder)
scaled = lambda k: dataclasses.replace(base, **{name: np.array(getattr(base, name)) * np.float32(k)
                                                for name in ("user_emb", "item_emb", "item_message")})
students = [scaled(k) for k in (1, 2, 4, 8)]
def which(): # of the students, or an error
    s = Recommender.load(folder)
    found = {float(round(getattr(s, name)[-1, -1] / getattr(base, name)[-1, -1], 3)) for name in ("user_emb", "item_emb", "item_message")}
    assert len(found) == 1, found
    return found.pop()
def child(work):
    pid = os.fork()
    if pid: return pid
    try: work(); os._exit(0)
    except BaseException as e: print(repr(e), flush=True); os._exit(1)
def saving(k, times):
    for _ in range(times): students[k].save(folder)
if what == "race": # two save, two load
    for trial in range(n):
        pids = [child(lambda k=k: saving(k, 25)) for k in (0, 1)] + [child(lambda: [which() for _ in range(25)]) for _ in range(2)]
        print("right" if all(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) == 0 for p in pids) else "wrong", which())
if what == "writers":
    for trial in range(n):
        pids = [child(lambda k=k: saving(k, 5)) for k in range(4)]
        print("right" if all(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) == 0 for p in pids) else "wrong", which())
if what == "kill":
    draw = random.Random(0)
    for trial in range(n):
        pid, until = child(lambda: [saving(k % 4, 1) for k in range(10**6)]), time.monotonic() + draw.uniform(.002, .03)
        while time.monotonic() < until: which() # there is always a student
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        print("right", which())
    print("left", len([p for p in os.listdir(folder) if p.startswith(".student")]))
    students[0].save(folder)
    assert which() == 1
"""


@pytest.mark.parametrize("what, n", [("race", 20), ("writers", 5), ("kill", 60)])
def test_saving_and_loading_at_once(shop, tmp_path, what, n):
    shop.save(tmp_path / "a")
    done = subprocess.run([sys.executable, "-c", FORKED, str(tmp_path / "a"), what, str(n)], capture_output=True, text=True)
    assert not done.returncode and done.stdout.count("right ") == n, done.stdout[-2000:] + done.stderr[-2000:]
    assert files(tmp_path / "a") == [store.FILE] and files(tmp_path) == ["a"]


def test_publishing_again_is_never_without_a_student(shop, tmp_path):
    from sharp_distill.experiments.run import _put
    def folder(name, scale):
        dataclasses.replace(shop, user_emb=shop.user_emb * np.float32(scale)).save(tmp_path / name / "student")
        (tmp_path / name / "run.json").write_text(str(scale))
        return tmp_path / name
    run, stop, seen = folder("run", 1), threading.Event(), []
    (run / "student" / "names.json").write_text("of a former format"); os.chmod(run / "student", 0o755)
    def look():
        while not stop.is_set(): seen.append((Recommender.load(run / "student"), json.loads((run / "run.json").read_text())))
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for n in range(30): _put(folder("new", 1 + n % 2), run)
        stop.set()
        looking.result()
    assert {float(s.user_emb[0, 0] / shop.user_emb[0, 0]) for s, _ in seen} | {n for _, n in seen} == {1, 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"] and (run / "student").stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in run.rglob("*") if p.name != ".lock") == ["run.json", "student", store.FILE]


# Damage with a checksum that was made right again

def remade(path, arrays): save_file(arrays, path, dict(format=store.FORMAT, version=store.VERSION, sha256=store._sha_of(arrays)))


def odd_value(gen): return [None, -1, 2**70, 1e400, "", "u1", [], {}, [None], ["x"] * 3, True, 10**9, "\ud800", [[]]][gen.integers(14)]


def change_text(gen, node): # a place in the JSON gets another value
    pick = lambda: (list(node) if isinstance(node, dict) else range(len(node)))[gen.integers(len(node))]
    key = pick()
    while isinstance(node[key], (dict, list)) and node[key] and gen.random() < .7: node = node[key]; key = pick()
    if gen.random() < .3: del node[key]
    else: node[key] = odd_value(gen)


def change_array(gen, arrays):
    name = sorted(arrays)[gen.integers(len(arrays))]
    a, how = np.array(arrays[name]), gen.integers(8)
    if how == 0: del arrays[name]; return
    if how == 1: a = a[: len(a) // 2]
    if how == 2: a = a.reshape(-1)[None]
    if how == 3: a = a.astype([np.float64, np.int64, np.int32, np.float16, np.uint8][gen.integers(5)])
    if how == 4: a = np.concatenate([a, a])
    if how == 5: a = np.zeros((0, *a.shape[1:]), a.dtype)
    if how > 5 and a.size:
        odd = [np.nan, np.inf, 1e30, -1] if a.dtype.kind == "f" else [-1, np.iinfo(a.dtype).max, np.iinfo(a.dtype).min, 31]
        a.reshape(-1)[gen.integers(a.size)] = np.array(odd[gen.integers(4)]).astype(a.dtype)
    arrays[name] = np.ascontiguousarray(a)


def damage(gen, file, n): # -> whether the checksum was made right again
    content = file.read_bytes()
    at, to = sorted(int(x) for x in gen.integers(0, len(content), 2))
    cut = [lambda: content[:at], lambda: content[:at] + bytes([content[at] ^ 1 << int(gen.integers(8))]) + content[at + 1:],
           lambda: content[to:] + content[at:to] + content[:at], lambda: content[:at] + content[to:] + bytes(to - at)]
    if n % 2 == 0: file.write_bytes(cut[n // 2 % 4]()); return False
    arrays = {k: np.array(a) for k, a in load_file(file).items()}
    if n % 4 == 1: change_array(gen, arrays)
    else:
        text = json.loads(bytes(arrays["text"]).decode())
        change_text(gen, text)
        arrays["text"] = np.frombuffer(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"), np.uint8)
    if gen.random() < .2 and len(arrays): change_array(gen, arrays)
    remade(file, arrays)
    return True


def ask(rec): # all that a service asks
    return [rec.recommend(list(rec.user_ids[:3]), k=5), rec.recommend_new(list(rec.item_ids[:2]), reviews="moon sea", k=5),
            rec.similar_items(rec.item_ids[0]), rec.with_item("new", reviews="moon").recommend_new(k=5), rec.n_bytes, repr(rec)]


def test_damage_gives_one_line_or_a_whole_student(shop, tmp_path, n_cases=300):
    file, loaded = shop.save(tmp_path / "a") / store.FILE, 0
    good, before = file.read_bytes(), load_file(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in range(n_cases):
            gen = np.random.default_rng(n)
            file.write_bytes(good)
            right = damage(gen, file, n)
            for checksum in (True, False):
                try: rec = Recommender.load(tmp_path / "a", checksum=checksum)
                except UserError: continue
                if checksum and not right:
                    same = load_file(file)
                    assert same.keys() == before.keys() and all(np.array_equal(same[k], before[k]) for k in same), n
                loaded += 1
                with contextlib.suppress(UserError): ask(rec)
    assert 0 < loaded < n_cases, loaded
    file.write_bytes(good)
    assert len(ask(Recommender.load(tmp_path / "a"))) == 6


def test_a_batch_without_codes_and_without_torch_is_searched_by_numpy(monkeypatch):
    "As on a processor without the 8-bit search, where torch is not installed."
    monkeypatch.setitem(sys.modules, "torch", None)
    users, items = np.random.default_rng(0).standard_normal((2, 9, 4)).astype(np.float32)
    found, wanted = exact_topk(users, index_items(items, int8=False), 3), full_sort_topk(users, items, 3)
    assert all(map(np.array_equal, found, wanted))


def test_loading_and_answering_need_no_torch(shop, tmp_path):
    shop.save(tmp_path / "a")
    code = """import sys
for name in ("torch", "transformers", "sklearn"): sys.modules[name] = None # as if they were not installed
from sharp_distill.serve.recommender import Recommender
r = Recommender.load(sys.argv[1])
r.recommend(list(r.user_ids), k=3), r.similar_items("i1"), r.n_bytes
r.recommend_new(["i1"], "u1"), r.recommend_new(["i1"], reviews="moon"), r.recommend_new(review_emb=[1., 2.])
assert "new" in set(r.with_item("new", reviews="sea").recommend("u1", k=31).item_id)
r.with_item("new", reviews="sea").save(sys.argv[1])
assert "new" in Recommender.load(sys.argv[1]).item_ids"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)
