"""Stress tests of the serving part: exact search against a full sort, folders that were damaged, ids that do not exist."""
import dataclasses
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings, strategies as st

from sharp_distill.serve import native, topk as serving
from sharp_distill.core import UserError
from sharp_distill.serve.recommender import Recommender, build_recommender
from sharp_distill.serve.topk import exact_topk, full_sort_topk, index_items

ENGINES = ("numpy", "torch", "int8") if native.find_library() else ("numpy", "torch")
HAS_INT8 = "int8" in ENGINES


def draw_case(seed, n_items, n_users, d, kind, share_seen):
    gen = np.random.default_rng(seed)
    if kind == "ties": u, i = (gen.integers(-1, 2, size=(n, d)).astype(np.float32) for n in (n_users, n_items))
    elif kind == "copies": u, i = gen.normal(size=(n_users, d)).astype(np.float32), gen.normal(size=(max(1, n_items // 7), d)).astype(np.float32)[gen.integers(0, max(1, n_items // 7), n_items)]
    elif kind == "zeros": u, i = np.zeros((n_users, d), np.float32), gen.normal(size=(n_items, d)).astype(np.float32)
    else: u, i = gen.normal(size=(n_users, d)).astype(np.float32), gen.normal(size=(n_items, d)).astype(np.float32)
    if kind == "lengths": i = (i * np.exp(2 * gen.normal(size=(n_items, 1)))).astype(np.float32)
    if kind == "tiny": u, i = u * np.float32(1e-18), i * np.float32(1e-18)
    if kind == "large": u, i = u * np.float32(1e8), i * np.float32(1e8)
    seen = None if share_seen is None else sp.csr_matrix(gen.random((n_users, n_items)) < share_seen)
    return u, i, seen


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n_items=st.one_of(st.integers(1, 40), st.integers(1000, 1100), st.integers(2000, 9000)), n_users=st.integers(1, 20), d=st.integers(1, 33),
       kind=st.sampled_from(["normal", "ties", "copies", "zeros", "lengths", "tiny", "large"]), share_seen=st.sampled_from([None, 0., .02, .5, .98, 1.]),
       near=st.sampled_from(["small", "middle", "all", "all but one"]))
def test_exact_topk_is_a_full_sort(seed, n_items, n_users, d, kind, share_seen, near):
    u, i, seen = draw_case(seed, n_items, n_users, d, kind, share_seen)
    k = {"small": min(10, n_items), "middle": max(1, n_items // 3), "all": n_items, "all but one": max(1, n_items - 1)}[near]
    if kind == "zeros" and n_items > 2000: n_users, u, seen = 2, u[:2], None if seen is None else seen[:2]
    wanted = full_sort_topk(u, i, k, seen)
    for engine in ENGINES:
        got = exact_topk(u, i, k, seen, engine, batch_size=7)
        np.testing.assert_array_equal(got[0], wanted[0])
        np.testing.assert_array_equal(got[1], wanted[1])


def test_many_tiles_pruned_by_length():
    u, i, seen = draw_case(3, 70_000, 30, 16, "lengths", None)
    wanted = full_sort_topk(u, i, 10)
    for engine in ENGINES: np.testing.assert_array_equal(exact_topk(u, i, 10, engine=engine)[0], wanted[0])


def test_padding_never_counts_when_all_scores_are_negative():
    u, i, _ = draw_case(1, 1500, 9, 5, "normal", None)
    u, i = np.abs(u), -np.abs(i)
    for k in (1, 10, 200, 700):
        wanted = full_sort_topk(u, i, k)
        for engine in ENGINES: np.testing.assert_array_equal(exact_topk(u, i, k, engine=engine)[0], wanted[0])


def test_pruning_keeps_short_items_that_point_the_right_way():
    gen, n = np.random.default_rng(0), 40_000
    i = (.001 * gen.normal(size=(n, 4))).astype(np.float32)
    i[:4000] += np.float32([1, 9, 0, 0])        # long, but sideways: score 1
    i[4000:20_000] += np.float32([1, 2, 0, 0])  # shorter, still sideways
    i[20_000:] += np.float32([1.5, 0, 0, 0])    # shortest, and ahead: score 1.5
    u = np.float32([[1, 0, 0, 0]] * 3)
    wanted = full_sort_topk(u, i, 10)
    assert wanted[0].min() >= 20_000
    for engine in ENGINES: np.testing.assert_array_equal(exact_topk(u, i, 10, engine=engine)[0], wanted[0])


def test_answer_does_not_depend_on_batch_or_threads():
    u, i, _ = draw_case(5, 5000, 64, 48, "normal", None)
    index, wanted = index_items(i, int8=HAS_INT8), exact_topk(u, i, 20)
    for engine in ENGINES:
        for size, threads in ((1, 1), (5, 3), (64, 2)):
            got = exact_topk(u, index, 20, engine=engine, batch_size=size, n_threads=threads)
            np.testing.assert_array_equal(got[0], wanted[0])
            np.testing.assert_array_equal(got[1], wanted[1])


def test_setting_of_torch_threads_comes_back():
    import torch
    before = torch.get_num_threads()
    u, i, _ = draw_case(5, 500, 64, 8, "normal", None)
    exact_topk(u, i, 5, engine="torch")
    with pytest.raises(UserError): exact_topk(u, i, 501, engine="torch")
    assert torch.get_num_threads() == before


@pytest.mark.skipif(not HAS_INT8, reason="no C compiler")
def test_plain_loop_of_the_compiled_search_is_exact_too(monkeypatch):
    plain = native.compile_library("cc", native.SOURCE.replace("__AVX512VNNI__", "NO_SUCH_THING"))
    assert not plain.fast()
    monkeypatch.setattr(native, "find_library", lambda: plain)
    for seed, kind in ((1, "normal"), (2, "ties"), (3, "lengths")):
        u, i, seen = draw_case(seed, 3000, 5, 13, kind, .3)
        np.testing.assert_array_equal(exact_topk(u, i, 40, seen, "int8")[0], full_sort_topk(u, i, 40, seen)[0])


@pytest.mark.skipif(not HAS_INT8, reason="no C compiler")
def test_bound_of_8_bit_scores_is_needed():
    """Without the error term the search must lose items, else the bound is not what makes it exact."""
    careless = native.compile_library("cc", native.SOURCE.replace("return 1.000001 * (u->length", "return 0 * (u->length"))
    u, i, _ = draw_case(7, 20_000, 40, 16, "normal", None)
    index, wanted = index_items(i, int8=True), full_sort_topk(u, i, 10)[0]
    assert (exact_topk(u, index, 10)[0] == wanted).all()
    before = native.find_library
    native.find_library = lambda: careless
    try: assert (exact_topk(u, index, 10)[0] != wanted).any()
    finally: native.find_library = before


def test_without_a_compiler_answers_are_the_same(shop, monkeypatch):
    with_it = shop.recommend(list(shop.user_ids), k=4)
    for module in (native, serving): monkeypatch.setattr(module, "find_library", lambda: None)
    for module in (native, serving): monkeypatch.setattr(module, "has_fast_search", lambda: False)
    without = dataclasses.replace(shop)
    assert without._index.codes is None and without.recommend(list(shop.user_ids), k=4).equals(with_it)
    with pytest.raises(UserError, match="C compiler"): index_items(shop.item_emb, int8=True)
    with pytest.raises(UserError, match="no 8-bit codes"): exact_topk(shop.user_emb, without._index, 3, engine="int8")


def test_a_failing_compiler_is_named():
    with pytest.raises(UserError, match="could not compile"): native.compile_library("false", "int x(")


@pytest.fixture
def shop():
    gen = np.random.default_rng(0)
    R = sp.random(9, 30, .2, format="csr", random_state=0); R.data[:] = 1
    state = types.SimpleNamespace(user_emb=gen.normal(size=(9, 4)).astype(np.float32), item_emb=gen.normal(size=(30, 4)).astype(np.float32), item_message=gen.normal(size=(30, 4)).astype(np.float32),
                                  user_map=np.ones((3, 4), np.float32), item_map=np.ones((2, 4), np.float32), item_degree=np.asarray(R.sum(0)).ravel().astype(int), head={}, config={}, split_sha="x", encoder="none")
    seen = types.SimpleNamespace(n_users=9, n_items=30, user_ids=np.array([f"u{j}" for j in range(9)], object), item_ids=np.array([f"i{j}" for j in range(30)], object), item_titles=None, to_csr=lambda: R)
    return build_recommender(state, seen)


def test_save_replaces_whole_and_refuses_strangers(shop, tmp_path):
    shop.save(tmp_path / "a"); shop.save(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "mine").mkdir(); (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not a saved Recommender"): shop.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_link_is_followed(shop, tmp_path):
    shop.save(tmp_path / "v1"); (tmp_path / "now").symlink_to(tmp_path / "v1")
    (tmp_path / "v1" / "names.json").write_text("old")
    for _ in range(2): shop.save(tmp_path / "now")
    assert (tmp_path / "now").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["now", "v1"]
    assert Recommender.load(tmp_path / "v1").recommend("u1", k=2).equals(shop.recommend("u1", k=2))


@pytest.mark.parametrize("name, change, says", [
    ("arrays.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "checksum"), ("arrays.safetensors", lambda b: b[:100], "cut off"),
    ("names.json", lambda b: b.replace(b"u3", b"u4"), "checksum"), ("recommender.json", lambda b: b.replace(b'"version": 1', b'"version": 9'), "version 9"),
    ("recommender.json", lambda b: b"{}", "format"), ("recommender.json", lambda b: b"[]", "format"),
    ("recommender.json", lambda b: re.sub(rb'"files": *{.*?}\s*}', b'"files": {}', b, flags=re.S), "checksum of"), ("recommender.json", lambda b: b[:30], "not valid JSON")])
def test_damaged_folder_is_refused(shop, tmp_path, name, change, says):
    file = shop.save(tmp_path / "a") / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=says): Recommender.load(tmp_path / "a")


def test_bad_input_is_named(shop):
    for call, says in [(lambda: shop.recommend("nobody"), "'nobody'"), (lambda: shop.recommend("u1", k=31), "nearest good choice is 30"), (lambda: shop.recommend("u1", k=0), "nearest good choice is 1"),
                       (lambda: shop.recommend([]), "empty"), (lambda: shop.recommend("u1", unknown="popluar"), "'popular'"), (lambda: shop.fold_in(["i1", "zz"]), "'zz'"), (lambda: shop.recommend_idx([9]), "expected 0 to 8"),
                       (lambda: shop.with_item("i1", [0, 0]), "exists already"), (lambda: shop.fold_in([], review_emb=[np.nan, 1]), "finite")]:
        with pytest.raises(UserError, match=says): call()


def test_numbers_of_numpy_are_ids_too(shop):
    same = dataclasses.replace(shop, user_ids=np.arange(9).astype(str).astype(object), item_ids=np.arange(30).astype(str).astype(object))
    assert same.recommend(np.int64(3), k=4).equals(same.recommend("3", k=4)) and same.similar_items(np.int64(7), k=3).equals(same.similar_items("7", k=3))


def test_all_seen_gives_no_rows_and_invents_nothing(shop):
    full = dataclasses.replace(shop, seen=sp.csr_matrix(np.ones((9, 30), np.float32)))
    assert len(full.recommend("u1")) == 0 and (full.recommend_idx([1, 2], 3)[0] == -1).all()
    assert len(full.recommend("u1", k=30, exclude_seen=False)) == 30
    assert len(shop.recommend_new(list(shop.item_ids), k=5)) == 0


def test_rows_that_are_not_numbers_are_named(shop):
    bad = shop.item_emb.copy(); bad[3, 1] = np.nan
    state = types.SimpleNamespace(**{n: getattr(shop, n) for n in serving.ARRAYS} | {"item_emb": bad}, head={}, config={}, split_sha="x", encoder="none")
    seen = types.SimpleNamespace(n_users=9, n_items=30, user_ids=shop.user_ids, item_ids=shop.item_ids, item_titles=None, to_csr=lambda: shop.seen)
    with pytest.raises(UserError, match="item_emb row 3"): build_recommender(state, seen)
    with pytest.raises(UserError, match="user_emb row 0"): exact_topk(np.float32([[np.inf, 0, 0, 0]]), shop.item_emb, 3)
    with pytest.raises(UserError, match="9 rows, the interactions 8"): build_recommender(types.SimpleNamespace(**vars(state) | {"item_emb": shop.item_emb}), types.SimpleNamespace(**vars(seen) | {"n_users": 8}))
    with pytest.raises(UserError, match="MLP head"): build_recommender(types.SimpleNamespace(**vars(state) | {"head": {"w": 1}}), seen)


def test_empty_history_and_unknown_readers_have_an_answer(shop):
    np.testing.assert_allclose(shop.fold_in([])[0], shop.user_map[-1], atol=1e-6)
    assert len(shop.recommend_new([], k=4)) == 4
    popular = shop.recommend("nobody", k=3, unknown="popular").item_id.tolist()
    assert popular == [shop.item_ids[j] for j in np.argsort(-shop.item_degree, kind="stable")[:3]]


def test_folding_in_the_train_items_gives_the_trained_row():
    gen = np.random.default_rng(3)
    R = sp.csr_matrix((gen.random((12, 40)) < .2).astype(np.float32))
    message, user_map = gen.normal(size=(40, 6)).astype(np.float32), gen.normal(size=(1, 6)).astype(np.float32)
    n, degree = np.diff(R.indptr), np.asarray(R.sum(0)).ravel().astype(int)
    rows = user_map / (n + 1)[:, None] + (R.toarray() / np.sqrt((n + 1)[:, None] * (degree + 1))) @ message
    state = types.SimpleNamespace(user_emb=rows.astype(np.float32), item_emb=message, item_message=message, user_map=user_map, item_map=np.zeros((0, 6), np.float32), item_degree=degree,
                                  head={}, config={}, split_sha="x", encoder="none")
    seen = types.SimpleNamespace(n_users=12, n_items=40, user_ids=np.arange(12).astype(str).astype(object), item_ids=np.arange(40).astype(str).astype(object), item_titles=None, to_csr=lambda: R)
    rec = build_recommender(state, seen)
    for u in range(12):
        hers = [str(i) for i in R[u].indices]
        np.testing.assert_allclose(rec.fold_in(hers, user_id=str(u))[0], rows[u], atol=1e-5)
        assert not set(rec.recommend_new([], user_id=str(u), k=5).item_id) & set(hers)


def test_duplicates_count_once(shop):
    np.testing.assert_array_equal(shop.fold_in(["i1", "i2", "i1"])[0], shop.fold_in(["i1", "i2"])[0])
    assert shop.recommend(["u1", "u1"], k=2).item_id.tolist()[:2] == shop.recommend("u1", k=2).item_id.tolist()


def test_loading_and_answering_need_no_torch(shop, tmp_path):
    shop.save(tmp_path / "a")
    code = "import sys; from sharp_distill.serve.recommender import Recommender as R; r = R.load(sys.argv[1]); r.recommend('u1', k=3); r.recommend_idx(list(range(9)), 3); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=True)


def test_exports_agree(shop, tmp_path):
    import torch
    users, hide = torch.arange(9), torch.from_numpy(shop.seen.toarray() > 0)
    idx = torch.export.load(shop.export_torch(tmp_path / "m.pt2", k=5)).module()(users, hide)[0].numpy()
    np.testing.assert_array_equal(idx, shop.recommend_idx(users.numpy(), 5)[0])
    ort = pytest.importorskip("onnxruntime"); pytest.importorskip("onnxscript")
    session = ort.InferenceSession(str(shop.export_onnx(tmp_path / "m.onnx", k=5)))
    np.testing.assert_array_equal(session.run(["idx"], {"user_idx": users.numpy(), "seen": hide.numpy()})[0], idx)
