"""Stress tests of serving: exact search against a full sort, damaged folders, unknown ids, a process without torch."""
import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings, strategies as st

from sharp_distill.core import Config, UserError, option
from sharp_distill.data.interactions import Interactions
from sharp_distill.models.student import StudentState
from sharp_distill.serve import native, topk
from sharp_distill.serve.recommender import Recommender, build_recommender
from sharp_distill.serve.topk import exact_topk, full_sort_topk, index_items
from sharp_distill.text.reviews import TextEncoder
from sharp_distill.text.words import WordEncoder

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


# Folders

def test_a_link_is_followed_and_strangers_are_kept(shop, tmp_path):
    shop.save(tmp_path / "v1"); (tmp_path / "now").symlink_to(tmp_path / "v1")
    (tmp_path / "v1" / "names.json").write_text("old")
    for _ in range(2): shop.save(tmp_path / "now")
    assert (tmp_path / "now").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["now", "v1"]
    assert Recommender.load(tmp_path / "v1").recommend("u1", k=2).equals(shop.recommend("u1", k=2))
    (tmp_path / "v1" / "recommender.json").unlink()
    with pytest.raises(UserError, match="not a saved Recommender"): shop.save(tmp_path / "now")
    assert len(list((tmp_path / "v1").iterdir())) == 4


@pytest.mark.parametrize("name, change, says", [
    ("arrays.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "checksum"),
    ("names.json", lambda b: b.replace(b"u3", b"u4"), "checksum"),
    ("text_encoder.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "checksum"),
    ("text_encoder.json", lambda b: b[:-5], "cut off"), ("text_encoder.json", None, "no bytes"),
    ("recommender.json", lambda b: b"{}", "format"), ("recommender.json", lambda b: b"[]", "format"),
    ("recommender.json", lambda b: re.sub(rb'"files": *{.*?}\s*}', b'"files": {}', b, flags=re.S), "checksum of"),
    ("recommender.json", None, "not a saved Recommender")])
def test_damaged_folder_is_refused(shop, tmp_path, name, change, says):
    file = shop.save(tmp_path / "a") / name
    file.write_bytes(change(file.read_bytes())) if change else file.unlink()
    with pytest.raises(UserError, match=says): Recommender.load(tmp_path / "a")


def test_a_failed_save_leaves_the_old_folder(shop, tmp_path):
    shop.save(tmp_path / "a")
    with pytest.raises(TypeError): dataclasses.replace(shop, facts={"config": object}).save(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert Recommender.load(tmp_path / "a").facts["config"] == {"emb_dim": 4}


def test_loading_and_answering_need_no_torch(shop, tmp_path):
    shop.save(tmp_path / "a")
    code = """import sys
from sharp_distill.serve.recommender import Recommender
r = Recommender.load(sys.argv[1])
r.recommend(list(r.user_ids), k=3), r.similar_items("i1"), r.n_bytes
r.recommend_new(["i1"], "u1"), r.recommend_new(["i1"], reviews="moon")
assert "new" in set(r.with_item("new", reviews="sea").recommend("u1", k=31).item_id)
assert not {"torch", "transformers", "sklearn"} & set(sys.modules)"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)
