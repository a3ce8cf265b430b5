"""Splits beyond the notebook's lessons: what every protocol must keep, and what a split must refuse."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from sharp_distill.core import UserError, read_json, write_json
from sharp_distill.data.dates import NO_TIME
from sharp_distill.data.interactions import from_frame, load_interactions, make_sample
from sharp_distill.data.protocol import check_times, refit_split
from sharp_distill.data.split import (
    PARTS, PROTOCOLS, TARGETS, Split, check_split, load_split, make_split, part_sizes, save_split, split_from_column,
    split_from_files, split_from_parts, split_stats)
from sharp_distill.models.registry import Fits

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


SAMPLE_ROWS = np.bincount(SAMPLE.user_idx, minlength=SAMPLE.n_users)


def test_time_goes_forward():
    last = make_split(SAMPLE, "leave_last_out")
    for u in range(SAMPLE.n_users):
        times = [part.timestamp[part.user_idx == u] for part in (last.train, last.valid, last.test)]
        assert [len(t) for t in times[1:]] == [min(max(SAMPLE_ROWS[u] - 2, 0), 1), min(SAMPLE_ROWS[u] - 1, 1)]
        known = [t for t in times if len(t)]
        assert all(a.max() <= b.min() for a, b in zip(known, known[1:]))
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


# Windows in time

MOMENTS = st.lists(st.integers(-60, 60), min_size=12, max_size=120)


def at_days(days): # One user and one item a row
    frame = pd.DataFrame(dict(user_id=[f"u{k}" for k in range(len(days))], item_id="i"))
    return replace(from_frame(frame), timestamp=np.array(days) * 86_400)


def test_one_window_is_the_split_of_before():
    "The hash of the temporal split as it was before there were windows."
    sample = load_interactions("sample")
    assert make_split(sample, "temporal").sha == make_split(sample, "temporal", cuts=1, cut=0).sha == "b0bdf4102daa36e1"
    assert make_split(sample).sha == "b00fe4e33106b202"


@settings(max_examples=80, deadline=None)
@given(MOMENTS, st.integers(1, 5))
def test_windows_follow_each_other(days, cuts):
    "Disjoint windows that are the test part of one cut together; train before validation before test, whatever ties."
    data = at_days(days)
    try: windows = [make_split(data, "temporal", cuts=cuts, cut=c) for c in range(cuts)]
    except UserError: return # too few moments
    whole, n = make_split(data, "temporal"), len(data)
    assert sorted(np.concatenate([w.test.user_idx for w in windows])) == sorted(whole.test.user_idx)
    for w, later in zip(windows, [*windows[1:], None]):
        assert w.train.timestamp.max() < w.valid_at <= w.test_at and (cuts == 1 or len(w.valid))
        assert not len(w.valid) or w.valid.timestamp.max() < w.test_at
        known = np.sort(data.timestamp[data.timestamp < w.test_at])
        assert np.array_equal(np.sort(refit_split(w).train.timestamp), known), "all that was known, nothing else"
        if later is not None: assert w.test.timestamp.max() < later.test_at
    if len(set(days)) == n: # no ties: equal windows, validation as long as a window and no longer than its share
        assert np.ptp([len(w.test) for w in windows]) <= 1
        assert all(abs(len(w.valid) - min(.1, .2 / cuts) * n) <= 1 for w in windows)


def test_a_window_knows_its_moments_and_is_loaded_with_them(tmp_path):
    split = make_split(SAMPLE, "temporal", cuts=3, cut=1, targets="last")
    loaded = load_split(save_split(split, tmp_path / "s"))
    facts = lambda s: (s.sha, s.cuts, s.cut, s.targets, s.valid_at, s.test_at)
    about = read_json(tmp_path / "s/split.json")
    assert facts(loaded) == facts(split) and (about["valid_at"], about["test_at"]) == (split.valid_at, split.test_at)
    assert "cut 1 of 3" in repr(split) and make_split(SAMPLE).test_at is None
    save_split(old := make_split(SAMPLE, "temporal"), tmp_path / "old")
    write_json(tmp_path / "old/split.json", {k: about.get(k) for k in ("format", "provenance")} | dict(
        protocol="temporal", seed=0, sha=old.sha)) # as it was written before there were windows
    assert facts(load_split(tmp_path / "old")) == facts(old)


def test_last_and_first_rows_of_a_window():
    split = {t: make_split(SAMPLE, "temporal", targets=t) for t in TARGETS}
    assert len({s.sha for s in split.values()}) == 3 and len({s.test.sha for s in split.values()}) == 1
    rows = split["all"].test
    for target, pick in (("last", np.max), ("first", np.min)):
        asked = split[target].held_out("test")
        assert sorted(asked.user_idx) == sorted(set(rows.user_idx)), "one row a user"
        assert all(t == pick(rows.timestamp[rows.user_idx == u]) for u, t in zip(asked.user_idx, asked.timestamp))
    tied = replace(split["last"], test=replace(rows, timestamp=np.zeros(len(rows), np.int64)))
    draws = [key(replace(tied, seed=s).held_out("test")) for s in (0, 0, 1)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any(), "equal times: the seed decides"


@pytest.mark.parametrize("change, options, words", [
    (lambda d: replace(d, timestamp=np.full(len(d), NO_TIME)), {}, "needs times, and .* have none; protocol='random'"),
    (lambda d: replace(d, timestamp=np.where(np.arange(len(d)) == 3, NO_TIME, d.timestamp)), {}, "1 of .* rows have none"),
    (lambda d: replace(d, timestamp=np.full(len(d), 1_500_000_000)), {}, "train part is empty .* all of one time; try protocol='random'"),
    (lambda d: replace(d, timestamp=d.timestamp // 10**10), dict(cuts=2), "at 1 moments .* the nearest good choice is cuts=1"), # one day
    (lambda d: d, dict(fractions=(.0001, .4999, .5)), "train part is empty"), # a cut before the first row
    (lambda d: d.take(np.arange(60)), dict(cuts=40), "cuts is 40: 60 rows .* the nearest good choice is cuts="),
    (lambda d: d, dict(cuts=0), "cuts is 0: expected 1 or more"),
    (lambda d: d, dict(cuts=3, cut=3), "cut is 3: expected 0 to 2"),
    (lambda d: d, dict(targets="lst"), "targets is 'lst'.*Did you mean 'last'"),
    (lambda d: d, dict(protocol="random", cuts=3), "cuts is 3 under protocol 'random': expected protocol='temporal'"),
    (lambda d: d, dict(protocol="leave_last_out", targets="last"), "targets is 'last' under protocol 'leave_last_out'")])
def test_times_that_allow_no_window(change, options, words):
    import re
    said = refused(make_split, change(SAMPLE), **dict(protocol="temporal") | options)
    assert re.search(words, said), said


def test_the_nearest_number_of_cuts_works():
    days = at_days(np.repeat(np.arange(20), 3))
    assert "the nearest good choice is cuts=4" in (said := refused(make_split, days, "temporal", cuts=7)), said
    assert [len(make_split(days, "temporal", cuts=4, cut=c).test) for c in range(4)] == [3] * 4


def test_times_before_1970_and_after_today(capsys):
    early = make_split(replace(SAMPLE, timestamp=SAMPLE.timestamp - 2 * 10**9), "temporal", cuts=2)
    assert early.train.timestamp.max() < 0 and early.test_at - make_split(SAMPLE, "temporal", cuts=2).test_at == -2 * 10**9
    assert capsys.readouterr().out == ""
    ahead = SAMPLE.timestamp.copy()
    ahead[5] = 7_258_118_400 # 2200
    kept = make_split(replace(SAMPLE, timestamp=ahead), "temporal")
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "1 of" in said and "2200-01-01" in said and 7_258_118_400 in kept.test.timestamp


def test_who_comes_after_the_cut_is_a_cold_start_user():
    split = make_split(SAMPLE, "temporal")
    late = np.flatnonzero(np.bincount(split.test.user_idx, minlength=SAMPLE.n_users))[0]
    mine = SAMPLE.user_idx == late
    data = replace(SAMPLE, timestamp=np.where(mine, SAMPLE.timestamp.max() + np.arange(len(mine)) + 1, SAMPLE.timestamp))
    stats = split_stats(moved := make_split(data, "temporal"))
    assert not (moved.train.user_idx == late).any() and (moved.test.user_idx == late).sum() == mine.sum()
    assert stats.loc["test", "cold_users"] == split_stats(split).loc["test", "cold_users"] + 1


def test_auto_goes_by_time_where_it_can(capsys):
    assert make_split(SAMPLE, "auto", cuts=2).protocol == "temporal" and capsys.readouterr().out == ""
    some = np.where(np.arange(len(SAMPLE)) < 7, NO_TIME, SAMPLE.timestamp)
    imported = np.where(np.arange(len(SAMPLE)) < .8 * len(SAMPLE), SAMPLE.timestamp.min(), SAMPLE.timestamp) # most at one date
    days = 10**9 + 86_400 * (np.arange(len(SAMPLE)) % 3)
    for when, why in ((some, "7 of"), (np.full(len(SAMPLE), 99), "all rows are of one time"), (imported, "in time empty"), (days, "3 moments")):
        assert make_split(replace(SAMPLE, timestamp=when), "auto").protocol == "random"
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and why in said and "hides" in said


def test_a_future_row_is_refused_before_anything_is_fitted():
    "Broken on purpose: one test row in train, one in validation, one validation row in train."
    split = make_split(SAMPLE, "temporal")
    def with_row_of(part, other):
        rows = np.isin(key(SAMPLE), np.r_[key(getattr(split, part)), key(getattr(split, other))[:1]])
        return replace(split, **{part: SAMPLE.take(rows)})
    for part, other, words in (("train", "test", "train reaches into validation: 1 of"),
                               ("train", "valid", "train reaches into validation: 1 of"),
                               ("valid", "test", "valid reaches into test: 1 of")):
        leaky = with_row_of(part, other)
        for call in (check_times, refit_split, lambda s: Fits(s, None)): assert words in refused(call, leaky)
    none = split.valid.take(np.zeros(len(split.valid), bool))
    no_valid = replace(split, train=with_row_of("train", "test").train, valid=none)
    assert "train reaches into" in refused(check_times, no_valid)
    assert check_times(split) is split and refit_split(split).train.timestamp.max() < split.test_at
