"""Small files with the faults that people met, each with its right value; and mangled files, which are read right or refused."""
import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharp_distill.core import UserError
from sharp_distill.data import containers
from sharp_distill.data.dates import NO_TIME
from sharp_distill.data.evaluation import evaluate
from sharp_distill.data.interactions import from_frame, load_interactions
from sharp_distill.data.split import make_split, split_from_column, split_from_files, split_from_parts
from sharp_distill.experiments.run import DataConfig

CASES = Path(__file__).parent / "cases"
BASE = CASES / "base/reviews.csv"
TABLE = pd.read_csv(BASE)
SHA = load_interactions(BASE).sha


def load(content, **kw): return load_interactions(io.BytesIO(content if isinstance(content, bytes) else content.encode()), **kw)
def json_lines(rows, end="\n"): return "".join(json.dumps(r) + end for r in rows)
def parquet(table):
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def zipped(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, text in members.items(): z.writestr(name.replace("__", "."), text)
    return out.getvalue()


def tarred(members, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


# ---------------------------------------------------------------- the same content in another form
CSV = BASE.read_bytes()
ROWS = TABLE.to_dict("records")
HALF = "\n".join(CSV.decode().split("\n")[:121]) + "\n", "\n".join(CSV.decode().split("\n")[:1] + CSV.decode().split("\n")[121:])
SAME = {
    "gzip": lambda: gzip.compress(CSV), "bz2": lambda: bz2.compress(CSV), "xz": lambda: lzma.compress(CSV),
    "zstd": lambda: pa.compress(CSV, "zstd", asbytes=True), "zip": lambda: zipped(data__csv=CSV),
    "two review files": lambda: zipped(reviews_1__csv=HALF[0], reviews_2__csv=HALF[1]), "tar": lambda: tarred({"x/reviews.csv": CSV}),
    "tar.gz": lambda: tarred({"reviews.csv": CSV}, "w:gz"), "tar.xz": lambda: tarred({"reviews.csv": CSV}, "w:xz"),
    "array": lambda: json.dumps(ROWS), "array, pretty": lambda: json.dumps(ROWS, indent=2),
    "trailing comma": lambda: json_lines(ROWS, ",\n"), "utf-16": lambda: CSV.decode().encode("utf-16"),
    "json in utf-16": lambda: json_lines(ROWS).encode("utf-16"), "utf-8 with a mark": lambda: b"\xef\xbb\xbf" + CSV,
    "bare CR": lambda: CSV.replace(b"\n", b"\r"), "CR LF": lambda: CSV.replace(b"\n", b"\r\n"), "blank lines": lambda: b"\n\n" + CSV.replace(b"\n", b"\n\n"),
    "header in the middle": lambda: b"\n".join([*CSV.split(b"\n")[:9], CSV.split(b"\n")[0], *CSV.split(b"\n")[9:]]),
    "two files in one": lambda: "".join(HALF), "sep line": lambda: b"sep=;\r\n" + CSV.replace(b",", b";"), "trailing separators": lambda: CSV.replace(b"\n", b",\n"),
    "spaces": lambda: CSV.replace(b",i", b" , i"), "tsv": lambda: CSV.replace(b",", b"\t"), "quoted": lambda: TABLE.to_csv(index=False, quoting=1),
    "quoted tsv": lambda: TABLE.to_csv(index=False, quoting=1, sep="\t"), "parquet": lambda: parquet(pa.Table.from_pandas(TABLE)),
    "packed parquet": lambda: gzip.compress(parquet(pa.Table.from_pandas(TABLE))), "parquet in a zip": lambda: zipped(a__parquet=parquet(pa.Table.from_pandas(TABLE))),
    "ids as index": lambda: parquet(pa.Table.from_pandas(TABLE.set_index(["user_id", "item_id"]))),
    "bytes": lambda: parquet(pa.Table.from_pandas(TABLE.assign(user_id=TABLE["user_id"].str.encode("utf-8"), review=TABLE["review"].str.encode("utf-8")))),
    "dictionaries of Arrow": lambda: parquet(pa.Table.from_pandas(TABLE.astype({"user_id": "category", "item_id": "category"}))),
    "other names": lambda: TABLE.rename(columns=dict(user_id="userId", item_id="ProductId", timestamp="date_added")).to_csv(index=False),
    "milliseconds": lambda: TABLE.assign(timestamp=TABLE["timestamp"] * 1000).to_csv(index=False),
    "dates": lambda: TABLE.assign(timestamp=pd.to_datetime(TABLE["timestamp"], unit="s").astype(str)).to_csv(index=False)}


@pytest.mark.parametrize("form", SAME)
def test_the_same_content_in_another_form(form):
    assert load(SAME[form]()).sha == SHA


def test_the_same_table_in_memory_and_as_a_list_of_files(tmp_path):
    for name, text in zip("ab", HALF): (tmp_path / name).write_text(text)
    assert load_interactions([tmp_path / "a", tmp_path / "b"]).sha == SHA
    assert load_interactions(pa.Table.from_pandas(TABLE)).sha == load_interactions(io.StringIO(CSV.decode())).sha == SHA
    assert load_interactions(TABLE.set_index(["user_id", "item_id"])).sha == SHA
    (tmp_path / "c").write_text("user_id,item_id\nu,x\n")
    assert "different columns" in refused(load_interactions, [tmp_path / "a", tmp_path / "c"])
    assert "empty" in refused(load_interactions, [])


def test_home_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.csv").write_bytes(CSV)
    (tmp_path / "i.csv").write_text("item_id,title\ni00,The Owl\n")
    assert load_interactions("~/r.csv").sha == SHA and load_interactions("~/r.csv", items="~/i.csv").item_titles[0] == "The Owl"


# ---------------------------------------------------------------- ids
def test_whole_numbers_beside_a_gap_stay_whole():
    data = load_interactions(CASES / "parquet_null_bigint/steam.parquet")
    assert data.user_ids.tolist() == [f"7656119800000000{k}" for k in (1, 2, 3)] and "left out: 1" in data.provenance[0].note
    csv = "user_id,item_id\n76561198000000001,1\n,2\n76561198000000002,1\n"
    assert load(csv).user_ids.tolist() == ["76561198000000001", "76561198000000002"]
    frame = pd.DataFrame(dict(user_id=pd.array([2**60 + 1, 2**60 + 2, None], "Int64"), item_id=[1.0, np.nan, 2.0]))
    assert from_frame(frame).user_ids.tolist() == [str(2**60 + 1)]
    jsonl = json_lines([dict(user=2**60 + k if k else None, item=k) for k in range(3)])
    assert load(jsonl).user_ids.tolist() == [str(2**60 + 1), str(2**60 + 2)]


def test_binary_and_blank_ids():
    assert load_interactions(CASES / "parquet_types/binary_ids.parquet").user_ids.tolist() == ["u0", "u1", "u2"]
    assert load_interactions(CASES / "parquet_types/binary_ids.parquet").review[0] == "bytes text"
    blank = load_interactions(CASES / "parquet_types/dict_empty.parquet")
    assert blank.user_ids.tolist() == ["u1", "u2"] and "left out: 2" in blank.provenance[0].note
    assert load_interactions(CASES / "parquet_types/indexed.parquet").sha == SHA


HUGE = [2.0**53, 2.0**53 + 2]
ODD_IDS = {"floats beyond 2^53": HUGE, "1e20": [1e20, 2e20], "dicts": [{"id": 1}] * 2, "lists": [[1], [2]], "durations": pd.to_timedelta([1, 2], "s"),
           "dates": pd.to_datetime(["2020-01-01", "2020-01-02"]), "bytes of no text": [b"\xff", b"\xfe"], "float32 beyond 2^24": np.float32([2**24, 2**25]),
           "infinite": [np.inf, 1.0], "truth": [True, False], "rounded text": ["7.65612E+16", "7.65613E+16"], "periods": pd.period_range("2020", periods=2)}


@pytest.mark.parametrize("kind", ODD_IDS)
def test_what_is_no_id_is_refused_with_its_column(kind):
    for columns in (dict(user_id=ODD_IDS[kind], item_id=["a", "b"]), dict(user_id=["u", "v"], item_id=ODD_IDS[kind])):
        assert next(c for c in columns if columns[c] is ODD_IDS[kind]) in refused(from_frame, pd.DataFrame(columns))


def test_files_with_such_ids():
    assert "'user_id'" in refused(load_interactions, CASES / "parquet_types/float_huge_ids.parquet")
    nested = json_lines([dict(user=dict(id=r["user_id"]), item_id=r["item_id"]) for r in ROWS])
    assert "'user'" in refused(load, nested) and "a dict" in refused(load, nested, bad_rows="skip")


def test_whole_floats_are_integers_in_splits(tmp_path):
    parts = [CASES / "split_id_styles" / f"{p}.csv" for p in ("train", "test")]
    split = split_from_files(parts[0], None, parts[1])
    cold = ~np.isin(split.test.user_idx, np.r_[split.train.user_idx, split.valid.user_idx])
    assert not cold.any() and split.n_users == 30
    joined = pd.concat([pd.read_csv(p, dtype=object).assign(part=p.stem) for p in parts])
    assert split_from_column(joined, "part").sha == split.sha


# ---------------------------------------------------------------- columns and titles
def test_headerless_files():
    names = "user_id,item_id,rating,timestamp"
    ml = load_interactions(CASES / "movielens_1m/ratings.dat", names=names)
    assert (len(ml), ml.n_users, ml.item_ids.tolist(), ml.rating.max()) == (4, 2, ["10", "20", "30"], 5) and ml.timestamp.min() == 978300275
    assert load_interactions(CASES / "movielens_1m/ratings.dat", names=names.split(","), sep="::").sha == ml.sha
    assert "names='user_id,item_id,...'" in refused(load_interactions, CASES / "movielens_1m/ratings.dat")
    assert "leave names= out" in refused(load_interactions, BASE, names=names + ",review")
    assert "4 fields where 3 are named" in refused(load_interactions, CASES / "movielens_1m/ratings.dat", names="user_id,item_id,rating")
    assert load("1 2 5\n3 4 1\n", names="user_id,item_id,rating", sep=" ").user_ids.tolist() == ["1", "3"]


def test_movielens_latest():
    for name in ("ml-small.zip", "ratings.csv"):
        ml = load_interactions(CASES / "movielens_latest" / name, items=None if name[-3:] == "zip" else CASES / "movielens_latest/movies.csv")
        assert ml.item_titles.tolist() == ["Alpha (1999)", "Beta, The (2001)", "Gamma (1987)"] and len(ml) == 5


def test_item_files_with_encodings_and_names(tmp_path):
    reviews = tmp_path / "r.csv"
    reviews.write_text("user_id,item_id\nu,i01\n")
    latin = CASES / "items_latin1/items.csv"
    assert load_interactions(reviews, items=latin, encoding="latin-1").item_titles.tolist() == ["Café"]
    assert "byte 0xe9" in refused(load_interactions, reviews, items=latin)
    (tmp_path / "names.csv").write_text("code;label\ni01;Tea\n")
    (tmp_path / "mine.csv").write_text("user_id,code\nu,i01\n")
    named = load_interactions(tmp_path / "mine.csv", "item_id=code,item_title=label", tmp_path / "names.csv")
    assert named.item_titles.tolist() == ["Tea"]
    (tmp_path / "other.csv").write_text("item_id,title\nx99,Tea\n")
    assert "names none of the 1 items" in refused(load_interactions, reviews, items=tmp_path / "other.csv")


def test_columns_that_are_not_clear():
    assert "could both be user_id" in refused(load, "user_id,user_id,item_id\nu,v,x\n")
    twice = pd.DataFrame([["u", "v", "x"]], columns=["user_id", "user_id", "item_id"])
    assert "could both be user_id" in refused(from_frame, twice)
    for user, item, when in (("userId", "ProductId", "date_added"), ("USER ID", "gmap_id", "time"), ("customer_id", "book_id", "review_time")):
        data = load(f"{user},{item},{when}\n1,2,2016-09-01\n")
        assert data.timestamp.tolist() == [1472688000] and data.item_ids.tolist() == ["2"]
    frame = TABLE.rename(columns=dict(user_id="who")).assign(part=["train"] * 200 + ["test"] * 40)
    assert len(split_from_column(frame, "part", columns="user_id=who").test) == 40


# ---------------------------------------------------------------- rows
def test_open_quotes():
    tsv = load_interactions(CASES / "tsv_open_quote/reviews.tsv")
    assert len(tsv) == 12 and (tsv.review == '"great').sum() == 2
    inter = (CASES / "tsv_open_quote/reviews.tsv").read_text().replace("user_id\titem_id", "user_id:token\titem_id:token")
    assert load(inter).sha == tsv.sha
    head, rows = "user_id,item_id,rating,review\n", [f"u{k},i{k},4,text {k}\n" for k in range(6)]
    for swallowed in ('u1,i9,5,"great\n', 'u1,i9,5,"so ""fine""\n'):
        for last in ("", 'u2,i9,5,fine"\n', 'u2,i9,5,"fine"\n'):
            said = refused(load, head + rows[0] + swallowed + "".join(rows[1:]) + last)
            assert "line 3: a quotation mark opens" in said, said
            assert "line 3" in refused(load, head + rows[0] + swallowed + "".join(rows[1:]) + last, bad_rows="skip")
    assert load(head + 'u,x,4,"two\nlines, and\nmore"\n').review.tolist() == ["two\nlines, and\nmore"]


def test_backslashes_before_quotes():
    data = load_interactions(CASES / "csv_backslash_quotes/reviews.csv")
    assert len(data) == 4 and 'she said "nice, really" and left' in data.review
    assert load('user_id,item_id,review\nu,x,"C:\\dir\\"\n').review.tolist() == ["C:\\dir\\"], "doubled marks come first"


def test_short_and_cut_rows():
    cut = "user_id,item_id,rating\nu1,item100,5\nu2,item100,4\nu3,item1"
    assert "line 4: 2 fields where 3 are named" in refused(load, cut)
    assert load(cut, bad_rows="skip").item_ids.tolist() == ["item100"]
    for row in ("u,x", "u,x,5,6", "u"): assert "line 2" in refused(load, f"user_id,item_id,rating\n{row}\nv,y,4\n")
    assert "field" in refused(load, "user_id,item_id,review\nu,x,nice\rbook\nv,y,z\n"), "a bare CR ends a row"


def test_repeated_headers_are_counted():
    data = load_interactions(CASES / "repeated_header/no_rating.csv")
    assert data.user_ids.tolist() == ["u1", "u2", "u3"] and "repeat the header, left out: 1" in data.provenance[0].note
    assert "in another order" in refused(load, "user_id,item_id\nu,x\nitem_id,user_id\ny,v\n")
    assert load_interactions(CASES / "repeated_header/sep_line.csv").rating.tolist() == [5]


def test_ratings_as_text():
    assert load_interactions(CASES / "ratings_as_text/comma.csv").rating.tolist() == [4.5, 3]
    assert load_interactions(CASES / "ratings_as_text/bool.csv").rating.tolist() == [1, 0]
    for odd in ("1,000", "five", "1_0", "0x5", "1e60", "4/5"):
        assert "rating" in refused(load, f"user_id;item_id;rating\nu;x;{odd}\n")
    for odd in ([{"a": 1}], [[5]], pd.to_datetime(["2020-01-01"])): assert "rating" in refused(from_frame, pd.DataFrame(dict(user_id=["u"], item_id=["x"], rating=odd)))


def test_large_losses_are_said(capsys):
    rows = [dict(user_id=k if k % 5 < 2 else None, product_id=k % 7, text="ok") for k in range(100)]
    load(json_lines(rows))
    assert "60 of 100 rows (60%) left out" in capsys.readouterr().out
    load(CSV)
    assert not capsys.readouterr().out


# ---------------------------------------------------------------- times
def when(*values): return from_frame(pd.DataFrame(dict(user_id="u", item_id=[f"i{k}" for k in range(len(values))], timestamp=values))).to_frame().sort_values("item_id")["timestamp"].tolist()


def test_times_before_1970_are_times():
    assert load_interactions(CASES / "times/negative.csv").timestamp.tolist() == [-86400, 1400000000]
    assert load_interactions(CASES / "times/before1970.csv").timestamp.tolist() == [-152668800, 978307200]
    gap = when(-1, None, -86400)
    assert gap[0] == -1 and pd.isna(gap[1]) and gap[2] == -86400
    assert when(-86400_000, 1472688000_000, 1472688001_000)[0] == -86400, "in milliseconds, as the rest of the column"
    known, unknown = (from_frame(pd.DataFrame(dict(user_id=["u"], item_id=["x"], timestamp=[t]))) for t in (-1, None))
    assert known.sha != unknown.sha and unknown.timestamp.tolist() == [NO_TIME]
    old = make_split(load_interactions(TABLE.assign(timestamp=TABLE["timestamp"] - 2**31)), "temporal")
    assert old.train.timestamp.max() < old.test.timestamp.min() < 0


REFUSED_TIMES = {"the clock": ["now", "2016-01-01"], "today": ["today", "2016-01-01"], "a time of day": ["12:30", "2016-01-01"], "a day without a year": ["5 May", "2016-01-01"],
                 "years": [2014, 2015], "years as text": ["2014", "2015"], "days of Excel": [41640, 41641], "months": [201401, 201402], "1e300": [1e300, 1.4e9],
                 "infinite": [np.inf, 1.4e9], "no month 13": [20161301, 20161201], "two orders": ["25/12/2016", "12/25/2016"], "truth": [True, False],
                 "durations": pd.to_timedelta([1, 2], "D"), "dicts": [{"a": 1}, {"b": 1}], "24 hours": ["2016-13-01", "2016-01-01"]}


@pytest.mark.parametrize("kind", REFUSED_TIMES)
def test_what_is_no_time_is_refused(kind):
    assert "time" in refused(when, *REFUSED_TIMES[kind])


def test_one_order_a_file(monkeypatch):
    "The first 100,000 rows could be read in both orders; a row behind them tells."
    rows = "".join(f"u{k % 999},i{k},0{k % 9 + 1}/05/2016\n" for k in range(100_500)) + "u,x,25/12/2016\n"
    data = load("user_id,item_id,date\n" + rows)
    assert set(data.timestamp.astype("datetime64[s]").astype("datetime64[M]").astype(str)) == {"2016-05", "2016-12"}
    doubt = load("user_id,item_id,date\nu,x,05/12/2016\n")
    assert "could be read in two ways" in doubt.provenance[0].note
    assert when("05/12/2016", "25/12/2016 10:00")[0] == when("2016-12-05")[0]


def test_spelled_times():
    assert when(20160901, 20160902) == [1472688000, 1472774400] and when("20160901123000", "20160901123001")[0] == 1472733000
    assert when("Fri Aug 25 13:55:02 -0700 2017", "09 1, 2016") == [1503694502, 1472688000]


# ---------------------------------------------------------------- containers
def broken_zip(flip):
    content = bytearray(zipped(reviews__csv=CSV))
    flip(content)
    return bytes(content)


def flag(content): content[6] |= 1; content[content.rindex(b"PK\1\2") + 8] |= 1
def method(content): content[8] = 9; content[content.rindex(b"PK\1\2") + 10] = 9
def crc(content): content[200] ^= 1


TWO = tarred({"a/reviews_1.csv": HALF[0].encode(), "a/reviews_2.csv": HALF[1].encode()})
BROKEN = {"zip CRC": (lambda: broken_zip(crc), "broken zip"), "encrypted zip": (lambda: broken_zip(flag), "encrypted"), "odd method": (lambda: broken_zip(method), "method 9"),
          "bz2": (lambda: bz2.compress(CSV)[:-20], "broken bz2"), "xz": (lambda: lzma.compress(CSV)[:-20], "broken xz"),
          "zstd": (lambda: pa.compress(CSV, "zstd", asbytes=True)[:-20], "broken zstd"), "tar in a member": (lambda: TWO[:3000], "broken"),
          "tar in a header": (lambda: TWO[:7680 + 100], "broken"), "tar between members": (lambda: TWO[:512 + len(HALF[0]) + -len(HALF[0]) % 512], "broken tar"),
          "two kinds of reviews": (lambda: zipped(ratings__csv="user_id,item_id\nu,x\n", reviews__csv=CSV), "ratings.csv and"),
          "a member without items": (lambda: zipped(users__csv="user_id,age\nu,5\n", data__csv=CSV), "users.csv, no column for item_id"),
          "no reviews": (lambda: zipped(readme__txt="x"), "no file of reviews"), "workbook": (lambda: (CASES / "excel/reviews.xlsx").read_bytes(), "save the sheet as CSV"),
          "old workbook": (lambda: b"\xd0\xcf\x11\xe0" + bytes(99), "Excel"), "7z": (lambda: b"7z\xbc\xaf'\x1c" + bytes(99), "7z"), "sqlite": (lambda: b"SQLite format 3\0" + bytes(99), "SQLite"),
          "an archive in an archive": (lambda: zipped(reviews__zip=zipped(a__csv=CSV)), "archive in an archive"),
          "unknown binary": (lambda: bytes(range(256)) * 9, "not a review table"), "utf-16 without a mark": (lambda: CSV.decode().encode("utf-16-le"), "utf-16-le"),
          "nothing": (lambda: b"", "empty"), "array of numbers": (lambda: b"[1, 2]", "expected an object"), "empty array": (lambda: b"[]", "no column")}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_containers(kind):
    make, words = BROKEN[kind]
    assert words in refused(load, make())


def test_encodings():
    assert len(load_interactions(CASES / "latin1_bom/bom_cp1252.csv", encoding="cp1252")) == 1
    assert load(CSV.decode().encode("utf-16-le"), encoding="utf-16-le").sha == SHA
    assert "Did you mean 'utf-8'" in refused(load, CSV, encoding="utf-88") and "encoding" in refused(load, CSV, encoding="base64")
    assert "line 2: byte 0xe9" in refused(load, "user_id,item_id\né,x\n".encode("latin-1"))
    early = load_interactions(CASES / "nul_bytes/early.csv")
    assert len(early) == 240 and "before\0after" in early.review
    assert "NUL" in refused(load, "user_id,item_id\nu\0,x\n" + "v,y\n" * 99)


def test_limits(monkeypatch, tmp_path):
    monkeypatch.setattr(containers, "MAX_LINE", 2**21)
    monkeypatch.setattr(containers, "MAX_UNPACKED", 2**22)
    long = CSV + b"u,x,5,1400000000," + b"x" * 2**22
    assert "line 242: longer than" in refused(load, long)
    for pack in (gzip.compress, bz2.compress, lzma.compress): assert "unpacks to more than" in refused(load, pack(CSV + b"u,x,5,1400000000,fine\n" * 10**6))


# ---------------------------------------------------------------- what follows from it
def test_low_ratings_stay_known():
    data = load_interactions(TABLE, min_rating=4)
    low = TABLE[TABLE["rating"] < 4].drop_duplicates(["user_id", "item_id"])
    pairs = {(data.user_ids[u], data.item_ids[i]) for u, i in data.low}
    assert pairs == {(u, i) for u, i in zip(low["user_id"], low["item_id"]) if u in data.user_ids and i in data.item_ids} and pairs
    split = make_split(data)
    assert all((getattr(split, p).low == data.low).all() for p in ("train", "valid", "test"))
    core = load_interactions(TABLE, min_rating=2, k_core=3)
    names = {(core.user_ids[u], core.item_ids[i]) for u, i in core.low}
    assert names and names <= set(zip(TABLE["user_id"][TABLE["rating"] < 2], TABLE["item_id"][TABLE["rating"] < 2]))


def test_a_small_catalogue():
    data = load_interactions(CASES / "small_worlds/items15.csv")
    split = make_split(data)
    with pytest.warns(UserWarning, match="15 items"): measured = evaluate(lambda u: np.zeros((len(u), 15), np.float32), split, ks=(5, 20))
    assert set(measured.metrics) >= {"NDCG@5", "NDCG@20"} and measured.mean("R@20") == 1
    assert "has 15 items" in refused(DataConfig(dataset=str(CASES / "small_worlds/items15.csv")).load)


def test_a_validation_part_is_cut_and_said(capsys):
    parts = [load_interactions(TABLE.iloc[k::2]) for k in range(2)]
    split = split_from_parts(parts[0], None, parts[1])
    assert "train rows become it" in capsys.readouterr().out and 0 < len(split.valid) < len(split.train)


# ---------------------------------------------------------------- mangled files
SMALL = TABLE.iloc[:60].assign(review=lambda f: [f"{r}, it's fine" if k % 3 else f'say "{r}"' for k, r in enumerate(f["review"])])
TEXT = SMALL.to_csv(index=False)
FORMS = {"csv": TEXT.encode(), "quoted csv": SMALL.to_csv(index=False, quoting=1).encode(), "semicolons": SMALL.to_csv(index=False, sep=";").encode(),
         "tsv": TEXT.split("\n")[0].replace(",", "\t").encode() + b"\n" + "".join("\t".join(map(str, r)) + "\n" for r in SMALL.values).encode(),
         "backslashes": SMALL.to_csv(index=False, quoting=1, doublequote=False, escapechar="\\").encode(),
         "json": json_lines(SMALL.to_dict("records")).encode(), "literals": "".join(f"{r!r}\n" for r in SMALL.to_dict("records")).encode(),
         "array": json.dumps(SMALL.to_dict("records")).encode(), "utf-16": TEXT.encode("utf-16"), "gzip": gzip.compress(TEXT.encode()), "bz2": bz2.compress(TEXT.encode()),
         "xz": lzma.compress(TEXT.encode()), "zip": zipped(reviews__csv=TEXT), "tar.gz": tarred({"reviews.csv": TEXT.encode()}, "w:gz"),
         "tar": tarred({"readme.txt": b"x", "reviews.csv": TEXT.encode()}), "parquet": parquet(pa.Table.from_pandas(SMALL))}
CHECKED = ("gzip", "bz2", "xz", "zip", "tar.gz") # they carry a checksum of their content: whatever is read is right
SIGNS = [b'"', b"'", b",", b";", b"\t", b"\n", b"\r", b"\\", b"\0", b"\xff", b"{", b"}", b"[", b"]", b":", b" ", b"-", b"7", b'"\n', b'","', b"\xef\xbb\xbf"]


def content_of(data): return Counter(map(tuple, data.to_frame().astype({"timestamp": str}).values.tolist()))


def mangled(content, form, how, draw): # Bytes, and the number of rows that may differ
    first = 0 if form in CHECKED or form in ("parquet", "tar") else 2 * TEXT.index("\n") + 4 if form == "utf-16" else content.index(b"\n") + 1 if b"\n" in content else 1
    at = draw.randrange(first, len(content))
    if how == "flip": return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1:], 2
    if how == "insert": return content[:at] + draw.choice(SIGNS) + content[at:], 2
    if how == "delete": return content[:at] + content[at + draw.randrange(1, 4):], 2
    if how == "two marks":
        other = draw.randrange(first, len(content))
        for k in sorted((at, other), reverse=True): content = content[:k] + b'"' + content[k:]
        return content, 2
    if how == "swap":
        rows = content.split(b"\n")
        k, j = draw.randrange(1, len(rows)), draw.randrange(1, len(rows))
        if len(rows) > 3: rows[k], rows[j] = rows[j], rows[k]
        return b"\n".join(rows), 0
    if how == "ends": return content.replace(b"\n", draw.choice([b"\r\n", b"\n\n", b" \n" if form != "tar" else b"\n"])), len(SMALL)
    return content[:at], 1


@pytest.mark.slow
@settings(max_examples=1500, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(list(FORMS)), st.sampled_from(["flip", "insert", "delete", "two marks", "cut", "swap", "ends"]), st.integers(0, 2**32 - 1), st.booleans())
def test_mangled_files_are_read_right_or_refused(form, how, seed, skip):
    "Whatever a file met on its way: the same content, a change of no more than the rows it hit, or one line; never a traceback."
    if form == "parquet" and how != "cut" or form == "tar" and how not in ("cut", "swap"): how = "cut" # without checksums inside
    if how == "two marks" and form == "utf-16": how = "insert" # what lies between two odd bytes becomes other letters: no reader can tell
    if how in ("swap", "ends") and form in (*CHECKED, "tar", "utf-16", "array", "parquet"): how = "cut"
    content, touched = mangled(FORMS[form], form, how, random.Random(seed))
    try: data = load(content, bad_rows="skip" if skip else "error")
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 600
        return
    right, found = content_of(load(FORMS[form])), content_of(data)
    new, lost = found - right, right - found
    assert sum(new.values()) <= (0 if form in CHECKED else touched), f"{form}, {how}: rows that nobody wrote: {list(new)[:3]}"
    counted = sum(s.lost for s in data.provenance)
    if how != "cut": assert sum(lost.values()) <= touched + counted, f"{form}, {how}: lost without a word: {list(lost)[:3]}"
    elif form in (*CHECKED, "tar"): assert not lost, f"{form} was cut and nobody said so"
