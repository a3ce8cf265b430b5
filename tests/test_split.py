"""Splits beyond the notebook's lessons: what every protocol must keep, and what a split must refuse."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from sharp_distill.data.interactions import from_frame, make_sample
from sharp_distill.data.split import (
    PARTS, PROTOCOLS, Split, check_split, load_split, make_split, part_sizes, save_split, split_from_column,
    split_from_files, split_from_parts, split_stats)

SAMPLE = make_sample(n_users=120, n_items=60)
key = lambda d: d.user_idx * d.n_items + d.item_idx


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_row_in_one_part(protocol):
    split = make_split(SAMPLE, protocol, seed=3)
    parts = [getattr(split, p) for p in PARTS]
    assert sorted(np.concatenate([key(p) for p in parts])) == sorted(key(SAMPLE)) and all(len(p) for p in parts)
    assert {p.n_users for p in parts} == {SAMPLE.n_users} and split.sha == make_split(SAMPLE, protocol, seed=3).sha
    by_time = protocol in ("temporal", "leave_last_out") # no two rows of a user have one time here
    assert (split.sha == make_split(SAMPLE, protocol, seed=4).sha) == by_time
    text = {(u, i): t for u, i, t in zip(SAMPLE.user_idx, SAMPLE.item_idx, SAMPLE.review)}
    assert all(text[u, i] == t for p in parts for u, i, t in zip(p.user_idx, p.item_idx, p.review)), \
        "a review goes where its row goes"


FRACTIONS = [(.7, .1, .2), (.7, .2, .1), (.5, .25, .25), (.8, 0, .2), (.02, .49, .49)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=30), st.sampled_from(FRACTIONS))
def test_sizes_of_users_with_any_number_of_rows(counts, fractions):
    n = np.array(counts)
    valid, test = part_sizes(n, fractions)
    assert (valid >= 0).all() and (test >= 0).all() and (n - valid - test >= 1).all()
    assert (np.abs(test - n * fractions[2]) <= .5 + 1e-6)[n * fractions[0] >= 1].all()


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
        times = [part.timestamp[part.user_idx == u] for part in (last.train, last.valid, last.test)]
        assert len(times[1]) == len(times[2]) == 1
        assert times[0].max() <= times[1][0] <= times[2][0]
    cut = make_split(SAMPLE, "temporal")
    for a, b in ((cut.train, cut.valid), (cut.valid, cut.test)): assert a.timestamp.max() < b.timestamp.min()


def test_rows_of_one_moment_stay_together():
    days = replace(SAMPLE, timestamp=SAMPLE.timestamp // (86400 * 90) * 86400 * 90)
    cut = make_split(days, "temporal")
    assert len(cut.train) <= .7 * len(days), "the rows of the cut's moment fall on the later side"
    times = [set(getattr(cut, p).timestamp) for p in PARTS]
    assert not times[0] & times[1] and not times[0] & times[2] and not times[1] & times[2]


def test_saved_split_that_is_not_whole(tmp_path):
    split = make_split(SAMPLE, "temporal", 7)
    loaded = load_split(save_split(split, tmp_path / "s"))
    assert (loaded.sha, loaded.protocol, loaded.seed) == (split.sha, "temporal", 7)
    assert split_stats(loaded).equals(split_stats(split))
    rows = pd.read_parquet(tmp_path / "s/rows.parquet")
    rows.iloc[1:].to_parquet(tmp_path / "s/rows.parquet")
    assert "was changed" in refused(load_split, tmp_path / "s")
    (tmp_path / "s/rows.parquet").write_bytes(b"PAR1")
    assert "missing or broken" in refused(load_split, tmp_path / "s")


def test_other_peoples_splits(tmp_path, capsys):
    split = make_split(SAMPLE)
    frames = {p: getattr(split, p).to_frame() for p in PARTS}
    for p, f in frames.items(): f.to_parquet(tmp_path / f"{p}.parquet")
    without = split_from_files(tmp_path / "train.parquet", None, tmp_path / "test.parquet")
    assert "train rows become it" in capsys.readouterr().out and len(without.valid) >= len(split.train) // 16
    assert len(without.train) + len(without.valid) == len(split.train) and without.train.provenance[-1].note
    joined = pd.concat([f.assign(fold=p) for p, f in frames.items()])
    joined.to_csv(tmp_path / "all.csv", index=False)
    assert split_from_column(tmp_path / "all.csv", "fold").sha == split.sha
    for table in (joined, tmp_path / "all.csv"):
        assert "Did you mean 'fold'" in refused(split_from_column, table, "folds")
    assert "no row of test" in refused(split_from_column, joined[joined["fold"] != "test"], "fold")


def test_a_leak_is_refused():
    split = make_split(SAMPLE)
    leaky = np.r_[key(split.train), key(split.test)[:1]]
    train = SAMPLE.take(np.isin(key(SAMPLE), leaky))
    assert "1 pairs are in train and in test" in refused(check_split, replace(split, train=train))
    other = make_sample(n_users=50, n_items=30)
    assert "different vocabularies" in refused(check_split, Split(SAMPLE, SAMPLE, other, "x", 0))


def test_fractions_that_are_refused():
    for bad in ((.7, .2), (.7, .1, .1), (0, .5, .5), (1.2, -.1, -.1)):
        assert "fractions" in refused(make_split, SAMPLE, fractions=bad)
    lonely = from_frame(pd.DataFrame(dict(user_id=["a", "b"], item_id=["x", "y"])))
    assert "test part is empty" in refused(make_split, lonely)


def test_texts_that_train_has_are_counted():
    ten = "one two three four five six seven eight nine ten"
    train = from_frame(pd.DataFrame(dict(user_id=["a", "b"], item_id=["x", "y"], review=[ten, "short"])))
    texts = [ten, "short", f"not {ten}"]
    test = from_frame(pd.DataFrame(dict(user_id=["a", "c", "c"], item_id=["z", "x", "y"], review=texts)))
    stats = split_stats(split_from_parts(train, train.take(np.array([], int)), test)).loc["test"]
    assert (stats.cold_users, stats.cold_items, stats.cold_rows, stats.text_in_train) == (1, 1, 1.0, .5)
