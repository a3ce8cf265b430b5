"""Splits: what every protocol must keep, drawn at random by hypothesis, and what a split must refuse."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from sharp_distill.core import UserError
from sharp_distill.data.interactions import from_frame, make_sample
from sharp_distill.data.split import (
    PARTS, PROTOCOLS, Split, check_split, load_split, make_split, part_sizes, split_from_column,
    split_from_files, split_from_parts)

SAMPLE = make_sample(n_users=300, n_items=100)
key = lambda d: d.user_idx * d.n_items + d.item_idx


def refused(fn, *args, **kw):
    with pytest.raises(UserError) as caught: fn(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_row_in_one_part(protocol):
    split = make_split(SAMPLE, protocol, seed=3)
    parts = [getattr(split, p) for p in PARTS]
    assert sorted(np.concatenate([key(p) for p in parts])) == sorted(key(SAMPLE)) and all(len(p) for p in parts)
    assert {p.n_users for p in parts} == {SAMPLE.n_users} and split.sha == make_split(SAMPLE, protocol, seed=3).sha
    if protocol != "temporal": assert split.sha != make_split(SAMPLE, protocol, seed=4).sha or protocol == "leave_last_out"
    text = {(u, i): t for u, i, t in zip(SAMPLE.user_idx, SAMPLE.item_idx, SAMPLE.review)}
    assert all(text[u, i] == t for p in parts for u, i, t in zip(p.user_idx, p.item_idx, p.review)), "a review goes where its row goes"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=30), st.sampled_from([(.7, .1, .2), (.7, .2, .1), (.5, .25, .25), (.8, 0, .2), (.02, .49, .49)]))
def test_sizes_of_users_with_any_number_of_rows(counts, fractions):
    valid, test = part_sizes(np.array(counts), fractions)
    n = np.array(counts)
    assert (valid >= 0).all() and (test >= 0).all() and (n - valid - test >= 1).all()
    assert (np.abs(test - n * fractions[2]) <= 0.5 + 1e-6)[n * fractions[0] >= 1].all()


def test_random_is_per_user_and_close_to_its_fractions():
    split = make_split(SAMPLE)
    count = lambda d: np.bincount(d.user_idx, minlength=SAMPLE.n_users)
    valid, test = part_sizes(count(SAMPLE), (.7, .1, .2))
    assert (count(split.test) == test).all() and (count(split.valid) == valid).all() and count(split.train).min() >= 1
    swapped = make_split(SAMPLE, "random_70_20_10")
    assert len(swapped.valid) > len(swapped.test)


def test_time_goes_forward():
    last = make_split(SAMPLE, "leave_last_out")
    for u in range(SAMPLE.n_users):
        times = [getattr(last, p).timestamp[getattr(last, p).user_idx == u] for p in PARTS]
        joined = [t for t in times if len(t)]
        assert all(a.max() <= b.min() for a, b in zip(joined, joined[1:])) and len(times[2]) <= 1
    cut = make_split(SAMPLE, "temporal")
    assert cut.train.timestamp.max() < cut.valid.timestamp.min() and cut.valid.timestamp.max() < cut.test.timestamp.min()


def test_rows_of_one_moment_stay_together():
    days = replace(SAMPLE, timestamp=SAMPLE.timestamp // (86400 * 90) * 86400 * 90)
    cut = make_split(days, "temporal")
    assert len(cut.train) <= 0.7 * len(days), "the rows of the cut's moment fall on the later side"
    assert not set(cut.train.timestamp) & (set(cut.valid.timestamp) | set(cut.test.timestamp)) and not set(cut.valid.timestamp) & set(cut.test.timestamp)


def test_ties_in_time_are_drawn_by_the_seed():
    tied = replace(SAMPLE, timestamp=np.zeros(len(SAMPLE), np.int64))
    assert make_split(tied, "leave_last_out", seed=0).sha != make_split(tied, "leave_last_out", seed=1).sha


def test_poisoned_test_reviews_stay_in_test():
    split = make_split(SAMPLE)
    dyed = replace(SAMPLE, review=np.where(np.isin(key(SAMPLE), key(split.test)), "xyzzy", SAMPLE.review))
    again = make_split(dyed)
    assert not any("xyzzy" in t for p in (again.train, again.valid) for t in p.review) and set(again.test.review) == {"xyzzy"}


def test_save_and_load(tmp_path):
    split = make_split(SAMPLE, "temporal", 7)
    loaded = Split.load(split.save(tmp_path / "s"))
    assert (loaded.sha, loaded.protocol, loaded.seed) == (split.sha, "temporal", 7) and loaded.stats().equals(split.stats())
    assert loaded.train.provenance == split.train.provenance and loaded.train.item_titles.tolist() == split.train.item_titles.tolist()
    rows = pd.read_parquet(tmp_path / "s/rows.parquet")
    rows.iloc[1:].to_parquet(tmp_path / "s/rows.parquet")
    assert "was changed" in refused(load_split, tmp_path / "s")
    (tmp_path / "s/rows.parquet").write_bytes(b"PAR1")
    assert "missing or broken" in refused(load_split, tmp_path / "s")
    assert "no saved split" in refused(load_split, tmp_path / "elsewhere")


def test_other_peoples_splits(tmp_path):
    split = make_split(SAMPLE)
    frames = {p: getattr(split, p).to_frame() for p in PARTS}
    for p, f in frames.items(): f.to_parquet(tmp_path / f"{p}.parquet")
    paths = [tmp_path / f"{p}.parquet" for p in PARTS]
    assert split_from_files(*paths).sha == split.sha
    assert len(split_from_files(paths[0], None, paths[2]).valid) == 0
    joined = pd.concat([f.assign(fold={"train": "Training", "valid": "dev", "test": "TEST"}[p]) for p, f in frames.items()])
    joined.to_csv(tmp_path / "all.csv", index=False)
    assert split_from_column(tmp_path / "all.csv", "fold").sha == split.sha
    assert "are in train and in test" in refused(split_from_files, paths[0], None, paths[0])
    assert "expected train, valid or test" in refused(split_from_column, joined.assign(fold="x"), "fold")
    assert "Did you mean 'fold'" in refused(split_from_column, joined, "folds")
    assert "Did you mean 'fold'" in refused(split_from_column, tmp_path / "all.csv", "folds")


def test_what_is_refused():
    assert "Did you mean" in refused(make_split, SAMPLE, "tempora")
    for bad in ((.7, .2), (.7, .1, .1), (0, .5, .5), (1.2, -.1, -.1)): assert "fractions" in refused(make_split, SAMPLE, fractions=bad)
    assert "needs times" in refused(make_split, replace(SAMPLE, timestamp=np.full(len(SAMPLE), -1)), "temporal")
    assert "twice" in refused(make_split, SAMPLE.take(np.repeat(np.arange(50), 2)))
    lonely = from_frame(pd.DataFrame(dict(user_id=["a", "b"], item_id=["x", "y"])))
    assert "test part is empty" in refused(make_split, lonely)
    other = make_sample(n_users=50, n_items=30)
    assert "different vocabularies" in refused(check_split, Split(SAMPLE, SAMPLE, other, "x", 0))


def test_cold_rows_are_counted():
    train = from_frame(pd.DataFrame(dict(user_id=["a", "b"], item_id=["x", "y"], review=["one two three four five six seven eight nine ten"] * 2)))
    test = from_frame(pd.DataFrame(dict(user_id=["a", "c"], item_id=["z", "x"], review=["one two three four five six seven eight nine ten", "new"])))
    stats = split_from_parts(train, None, test).stats().loc["test"]
    assert (stats.cold_users, stats.cold_items, stats.cold_rows, stats.text_in_train) == (1, 1, 1.0, 1.0)
