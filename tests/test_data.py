"""Files, sources and cleaning beyond the notebooks' lessons: publishers' formats, bad input, broken downloads."""
import gzip
import io
import json
import os
import re
import tarfile
import threading
import tracemalloc
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import refused

from sharp_distill.data import sources
from sharp_distill.data.files import read_table
from sharp_distill.data.dates import NO_TIME
from sharp_distill.data.interactions import (
    CleanConfig, clean, compact, from_frame, load_interactions, make_sample, provenance_frame, read_interactions)
from sharp_distill.data.sources import bare_name, datasets, download, fetch, find_source
from sharp_distill.data.summary import data_card, length_frame, rating_counts, tail_frame, time_frame
from sharp_distill.plots.data import plot_card

HERE = Path(__file__).resolve().parents[1]
PLACES = [p for p in (os.environ.get("SHARP_DISTILL_DATA"), HERE.parent / "shared/data") if p]
REAL = next((Path(p) for p in PLACES if (Path(p) / "steam.parquet").exists()), None)
HEAD = "user_id,item_id,rating,timestamp,review\n"
ROWS = HEAD + "u1,a,5,1600000000,Good\nu2,a,4,1600000001,Fine\nu2,b,3,1600000002,So so\n"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "No data folder, no cache, no proxy from outside."
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("SHARP_DISTILL_DATA", raising=False)
    monkeypatch.delenv("SHARP_DISTILL_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def put(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return write


def lines(*rows): return "".join(json.dumps(r) + "\n" for r in rows).encode()


# ---------------------------------------------------------------- formats
A14 = dict(reviewerID="A1", asin="0001", reviewerName="x", helpful=[0, 1], reviewText="It's fine", overall=4.0,
           summary="s", unixReviewTime=1252800000, reviewTime="09 13, 2009")
A18 = dict(overall=5.0, verified=True, reviewTime="09 1, 2016", reviewerID="A2", asin="B01", style={"Size:": " 7 oz"},
           reviewText="As advertised", unixReviewTime=1472688000)
A23 = dict(rating=3.0, title="Headline", text="Meh", images=[], asin="B0X", parent_asin="B0P", user_id="AE1",
           timestamp=1588687728923, helpful_vote=0, verified_purchase=True)
YELP = dict(review_id="r", user_id="u1", business_id="b1", stars=4.0, useful=0, funny=0, cool=0, text="Good soup",
            date="2018-07-07 22:09:11")
DIALECTS = {"2014": (lines(A14), ("A1", "0001", 4, 1252800000, "It's fine")),
            "2014 literals": (f"{A14!r}\n".encode(), ("A1", "0001", 4, 1252800000, "It's fine")),
            "2018": (lines(A18), ("A2", "B01", 5, 1472688000, "As advertised")),
            "2023": (lines(A23), ("AE1", "B0P", 3, 1588687728, "Meh")),
            "yelp": (lines(YELP), ("u1", "b1", 4, 1531001351, "Good soup"))}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_published_json_dialects(put, dialect):
    content, expected = DIALECTS[dialect]
    for path in (put("plain.bin", content), put("packed.bin", gzip.compress(content))):
        row = read_interactions(path).to_frame().iloc[0]
        assert tuple(row[["user_id", "item_id", "rating", "timestamp", "review"]]) == expected


def tar_of(members, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for name, content in members.items():
            info = tarfile.TarInfo(name); info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, content in members.items(): z.writestr(name, content)
    return out.getvalue()


def test_yelp_archives(put):
    members = {"yelp_academic_dataset_business.json": lines(dict(business_id="b1", name="Corner Cafe")),
               "yelp_academic_dataset_review.json": lines(YELP, {**YELP, "user_id": "u2"}),
               "yelp_academic_dataset_tip.json": lines(dict(user_id="u3", business_id="b1", text="tip"))}
    for archive in (tar_of(members), tar_of(members, "w:gz"), zip_of(members), zip_of({"a/yelp.tar": tar_of(members)})):
        data = read_interactions(put("yelp_dataset.tar", archive))
        assert len(data) == 2 and data.item_titles.tolist() == ["Corner Cafe"]


def test_amazon_metadata_gives_titles(put):
    put("meta_X.json.gz", gzip.compress(lines(dict(asin="B01", title="A jar"))))
    beside = read_interactions(put("X_5.json.gz", gzip.compress(lines(A18))))
    elsewhere = put("elsewhere/names.json", b"{'asin': 'B01', 'title': 'A jug'}\n")
    named = read_interactions(put("Y.json", lines(A18)), items=elsewhere)
    assert beside.item_titles.tolist() == ["A jar"] and named.item_titles.tolist() == ["A jug"]


def test_all_formats_of_one_table_are_equal(tmp_path):
    sample = make_sample(n_users=60, n_items=40)
    frame = sample.to_frame()
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    assert {load_interactions(tmp_path / f"a.{e}").sha for e in ("parquet", "csv", "tsv", "jsonl")} == {sample.sha}


def test_ids_that_look_like_numbers_stay_text(put):
    data = load_interactions(put("a.csv", "user_id,item_id\n007,1e5\n7,0x1\nNA,nan\n"))
    assert data.user_ids.tolist() == ["007", "7", "NA"] and data.item_ids.tolist() == ["0x1", "1e5", "nan"]
    mixed = load_interactions(put("a.jsonl", b'{"user": 7, "item": "x"}\n{"user": "007", "item": "x"}\n'))
    assert mixed.user_ids.tolist() == ["007", "7"]


def test_times_in_all_units(put):
    same = ["1600000000.0", "2020-09-13T12:26:40Z", "2020-09-13 14:26:40+02:00"]
    same += [f"16{'0' * n}" for n in (8, 11, 14, 17)] # seconds, milliseconds, microseconds, nanoseconds
    rows = "".join(f"u,{i},{t}\n" for i, t in enumerate(same))
    assert set(load_interactions(put("t.csv", "user_id,item_id,timestamp\n" + rows)).timestamp) == {1600000000}
    frame = pd.DataFrame(dict(user_id="u", item_id=["a", "b"], timestamp=pd.to_datetime(["2020-09-13 12:26:40", None])))
    assert from_frame(frame).timestamp.tolist() == [NO_TIME, 1600000000]


def test_bom_and_mixed_line_ends(put):
    text = "\ufeff" + HEAD + "u1,a,5,1,Good\r\nu2,a,4,2,\"two\r\nlines\"\ru3,b,4,3,End"
    assert load_interactions(put("m.csv", text)).n_users == 3
    json_text = b"\xef\xbb\xbf" + lines(YELP).replace(b"\n", b"\r\n") + b"\r\n" + lines({**YELP, "user_id": "u2"})
    assert len(load_interactions(put("m.jsonl", json_text))) == 2


def test_megabytes_in_one_review(put):
    long = "word " * 800_000
    for path in (put("l.jsonl", lines(YELP, {**YELP, "user_id": "u2", "text": long}, {**YELP, "user_id": "u3"})),
                 put("l.csv", ROWS + f"u9,a,5,3,{long}\n")):
        assert max(map(len, load_interactions(path).review)) == len(long)
    cut = load_interactions(path, max_chars=1000)
    assert max(map(len, cut.review)) == 1000 and "cut" in cut.provenance[-1].name


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings(put, encoding):
    path = put("e.csv", ROWS.replace("Fine", "café").encode(encoding))
    assert "café" in load_interactions(path, encoding=encoding).review


# ---------------------------------------------------------------- bad input: each is one clear line
def parquet_of(**columns):
    out = io.BytesIO()
    pd.DataFrame(columns).to_parquet(out)
    return out.getvalue()


RANDOM = b"".join(lines({**A18, "asin": f"{k * 7919 % 10**9:09d}"}) for k in range(3000))
BAD = {
    "truncated gzip": ("a.json.gz", gzip.compress(lines(*[A18] * 999))[:-20], "broken gzip"),
    "gzip cut in the middle": ("a.json.gz", gzip.compress(RANDOM)[:9_000], "broken gzip"),
    "gzip with a wrong checksum": ("a.json.gz", gzip.compress(lines(*[A18] * 99))[:-8] + b"12345678", "broken gzip"),
    "broken json line": ("a.json", lines(A18, A18) + b'{"reviewerID": "A1", "asin"\n' + lines(A18),
                         "line 3: not valid JSON"),
    "json file cut off": ("a.json", lines(A18, A18)[:-30], "line 2: not valid JSON"),
    "json array cut off": ("a.json", json.dumps([A18, A18])[:-9], "no valid JSON array"),
    "json of numbers among objects": ("a.json", lines(A18) + b"7\n", "line 2: expected an object"),
    "json in latin-1": ("a.json", lines(A18) + b'{"reviewerID": "A", "asin": "caf\xe9"}\n', "line 2: byte 0xe9"),
    "wrong encoding": ("a.csv", (ROWS + "u4,a,5,1,caf\xe9\n").encode("latin-1"), "line 5: byte 0xe9 is not utf-8"),
    "missing user column": ("a.csv", "usr_id,item_id\n1,2\n", "Did you mean 'usr_id'"),
    "no header": ("a.csv", "u1,a,5,Good\nu2,a,4,Fine\n", "first line must name the columns"),
    "metadata instead of reviews": ("meta.json", lines(dict(asin="B01", title="A jar", price=3)), "a file about items"),
    "rating as a word": ("a.csv", HEAD + "u1,a,5,1,x\nu1,b,five,1,x\n", "line 3: rating 'five'"),
    "rating missing": ("a.csv", HEAD + "u1,a,5,1,x\nu1,b,,1,x\n", "line 3: rating is missing"),
    "NaN rating in parquet": ("a.parquet", parquet_of(user_id=["u", "v"], item_id=["a", "b"], rating=[1, np.nan]),
                              "rating is missing"),
    "infinite rating": ("a.csv", HEAD + "u1,a,inf,1,x\n", "rating 'inf'"),
    "date that is none": ("a.csv", HEAD + "u1,a,5,someday,x\nu2,a,5,1,x\n", "timestamp 'someday'"),
    "too many fields": ("a.csv", HEAD + "u1,a,5,1,x\nu1,b,5,1,x,y,z\n", "line 3"),
    "more fields than names": ("a.csv", HEAD + "u1,a,5,1,x,y\nu1,b,5,1,x,y\n", "name every column"),
    "open quotation mark": ("a.csv", HEAD + "u1,a,5,1,\"never closed\nu2,b,5,1,x\n", "quotation mark"),
    "empty file": ("a.csv", b"", "is empty"),
    "blank file": ("a.csv", b"\n  \n", "is empty"),
    "header only": ("a.csv", HEAD, "no row"),
    "web page": ("a.json.gz", b"<!DOCTYPE html><html>Not found</html>", "web page"),
    "picture": ("a.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a review table"),
    "parquet cut off": ("a.parquet", parquet_of(user_id=["u"], item_id=["i"])[:-100], "broken Parquet"),
    "tar with a name outside": ("a.tar", tar_of({"../../etc/passwd": b"x"}), "outside the archive"),
    "tar with an absolute path": ("a.tar", tar_of({"/etc/passwd": b"x"}), "outside the archive"),
    "zip with a name outside": ("a.zip", zip_of({"..\\..\\x": b"x"}), "outside the archive"),
    "zip cut off": ("a.zip", zip_of({"review.json": b"x"})[:-20], "broken zip"),
    "archive without reviews": ("a.tar", tar_of({"readme.txt": b"x"}), "holds no file of reviews"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(put, case):
    name, content, words = BAD[case]
    said = refused(load_interactions, put(name, content))
    assert words in said and name in said, said


@pytest.mark.parametrize("case", ["broken json line", "json in latin-1", "json of numbers among objects",
                                  "rating as a word", "rating missing", "date that is none", "too many fields"])
def test_bad_rows_can_be_skipped_and_are_counted(put, case):
    name, content, _ = BAD[case]
    data = load_interactions(put(name, content), bad_rows="skip")
    assert len(data) >= 1 and "bad rows left out: 1" in data.provenance[0].note


def test_line_numbers_hold_beyond_the_first_block(put):
    row = lines({**YELP, "text": "x" * 900})
    said = refused(load_interactions, put("long.json", row * 20_000 + b'{"user_id": \n' + row))
    assert "line 20001" in said


def test_reading_is_in_pieces(put):
    "A large file of which little is wanted costs the memory of a few blocks, not of the file."
    piece = lines(*({**A23, "images": "x" * 80_000, "user_id": f"u{k}", "parent_asin": f"i{k % 5}"} for k in range(50)))
    path = put("big.jsonl", piece * 24)
    read_table(put("small.jsonl", lines(A23))) # what importing costs is not measured
    tracemalloc.start()
    try: n, peak = len(read_table(path).frame), tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert n == 1_200 and peak < 80 * 2**20 < path.stat().st_size, peak


def test_what_a_person_may_get_wrong(put, tmp_path):
    path = put("folder/some.csv", ROWS.replace("user_id", "who"))
    for wrong in ("folder", "folder/sone.csv"): assert "some.csv" in refused(load_interactions, tmp_path / wrong)
    for columns in ("user_id=who", dict(user_id="who")): assert len(load_interactions(path, columns=columns)) == 3
    assert "'whom'" in refused(load_interactions, path, columns="user_id = whom")
    assert "Did you mean 'user_id'" in refused(load_interactions, path, columns="usr_id=who")
    assert "k=1 leaves 3" in refused(load_interactions, path, columns="user_id=who", k_core=5)
    assert "both a user and an item" in refused(load_interactions, put("c.csv", "user_id,item_id\nu,\n,a\n"))
    assert "items= goes with a file" in refused(load_interactions, pd.read_csv(path), items=path)


# ---------------------------------------------------------------- cleaning
def test_steps_are_counted_in_order():
    data = clean(make_sample(n_users=200, n_items=80), CleanConfig(min_rating=3, max_chars=80, n_users=100, k_core=3))
    frame = provenance_frame(data)
    assert frame["rows"].is_monotonic_decreasing and frame["rows"].iloc[-1] == len(data)
    assert frame["users"].iloc[-1] == data.n_users == len(np.unique(data.user_idx))
    assert min(np.bincount(data.user_idx).min(), np.bincount(data.item_idx).min()) >= 3 and data.rating.min() >= 3
    json.dumps(frame.reset_index().to_dict("records"))


def test_titles_follow_the_items():
    data = make_sample(n_users=50, n_items=40)
    few, wanted = compact(data.take(data.item_idx < 7)), dict(zip(data.item_ids, data.item_titles))
    assert 0 < few.n_items <= 7 and few.item_titles.tolist() == [wanted[i] for i in few.item_ids]


def test_card_and_figure_of_poor_data():
    data = from_frame(pd.DataFrame(dict(user_id=["u", "v"], item_id=["a", "a"]))) # no times, texts or ratings
    assert data_card(data).loc["rows"].item() == 2 and "first day" not in data_card(data).index
    assert len(plot_card(tail_frame(data), length_frame(data), rating_counts(data), time_frame(data))) == 4


# ---------------------------------------------------------------- downloads
class Server(BaseHTTPRequestHandler):
    "Serves `files`; can hang up after `cut` bytes, change its version, or fail a few times."
    files, cut, tag, failing, log = {}, None, '"v1"', 0, []

    def do_GET(self):
        cls, body = type(self), self.files.get(self.path)
        if body is None: return self.send_error(404)
        if cls.failing: cls.failing -= 1; return self.send_error(503)
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range") in (None, self.tag)
        start = int(asked[1]) if asked and same else 0
        self.log.append(start)
        if start and start >= len(body): return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("ETag", self.tag)
        if not self.path.startswith("/nosize"): self.send_header("Content-Length", len(body) - start)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[start:][:self.cut])

    def log_message(self, *args): pass


@pytest.fixture
def web():
    handler = type("Handler", (Server,), dict(files={}, log=[]))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    handler.home = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown(); server.server_close()


NOISE = np.random.default_rng(0).integers(0, 2**62, (4000, 6)).tolist()
BODY = gzip.compress(lines(*({**A18, "asin": f"{i:05d}", "reviewText": str(n)} for i, n in enumerate(NOISE))), 1, mtime=0) # a test is named by it


def leftovers(folder): return sorted(p.name for p in folder.iterdir() if not p.name.endswith((".source.json", ".lock")))


def test_download_retries_within_one_call(web, tmp_path):
    web.files["/x.json.gz"], web.cut = BODY, 120_000
    download(web.home + "/x.json.gz", tmp_path / "x.json.gz", tries=9, wait_s=0)
    assert web.log == [i * 120_000 for i in range(len(web.log))] and len(web.log) > 1
    web.cut, web.failing = None, 2
    assert download(web.home + "/x.json.gz", tmp_path / "y.json.gz", wait_s=0).read_bytes() == BODY
    asked = len(web.log)
    download(web.home + "/x.json.gz", tmp_path / "y.json.gz")
    assert len(web.log) == asked, "a file that is there is not fetched again"


def test_download_starts_anew_when_the_server_has_another_version(web, tmp_path):
    web.files["/x.json.gz"], web.cut = BODY, 50_000
    refused(download, web.home + "/x.json.gz", tmp_path / "x.json.gz", tries=1)
    other = gzip.compress(RANDOM, 0)
    web.files["/x.json.gz"], web.cut, web.tag = other, None, '"v2"'
    assert download(web.home + "/x.json.gz", tmp_path / "x.json.gz").read_bytes() == other and len(other) > 50_000


def test_part_longer_than_the_file_is_dropped(web, tmp_path):
    web.files["/x.json.gz"], web.cut = BODY, 50_000
    refused(download, web.home + "/x.json.gz", tmp_path / "x.json.gz", tries=1)
    web.files["/x.json.gz"], web.cut = gzip.compress(b"short"), None # the same version tag: a server that lies
    assert download(web.home + "/x.json.gz", tmp_path / "x.json.gz", wait_s=0).read_bytes() == web.files["/x.json.gz"]


@pytest.mark.parametrize("path, body, words", [("/nosize.json.gz", BODY[:-30], "broken gzip"),
                                               ("/empty.json.gz", b"", "empty"),
                                               ("/page.json.gz", b"<html>please log in</html>", "web page")], ids=["cut", "empty", "page"])
def test_bad_download_is_never_used(web, tmp_path, path, body, words):
    web.files[path] = body
    assert words in refused(download, web.home + path, tmp_path / "d" / path[1:], tries=1)
    assert leftovers(tmp_path / "d") == [], "neither under its name nor as a part that would spoil the next attempt"


def test_nobody_answers(tmp_path):
    assert "could not be fetched" in refused(download, "http://127.0.0.1:9/x", tmp_path / "nobody", tries=1)


def test_named_set_end_to_end(web, monkeypatch):
    "amazon_X: downloaded, cached, read, 5-cored; the second time from the cache, offline."
    monkeypatch.setitem(sources.BASES, 2014, web.home + "/")
    pairs = {tuple(p) for p in np.random.default_rng(0).integers(0, [40, 30], (700, 2)).tolist()}
    rows = [{**A14, "reviewerID": f"A{u}", "asin": f"{i:04d}"} for u, i in pairs] + [{**A14, "reviewerID": "once"}]
    web.files["/reviews_Baby_5.json.gz"] = gzip.compress(lines(*rows))
    data = load_interactions("amazon_baby")
    assert np.bincount(data.user_idx).min() >= 5 and "once" in load_interactions("amazon_baby", k_core=1).user_ids
    monkeypatch.setenv("SHARP_DISTILL_OFFLINE", "1")
    assert load_interactions("amazon_2014_baby").sha == data.sha and len(web.log) == 1
    how = datasets(everything=True)["how"]
    assert how["amazon_2014_baby"] == "on this computer" and how["amazon_2018_books"] == "fetched on first use"
    assert "by a person" in refused(fetch, "yelp") and "OFFLINE" in refused(fetch, "amazon_2018_books")


def test_titles_of_a_named_set_are_fetched_when_asked_for(web, monkeypatch):
    monkeypatch.setitem(sources.BASES, 2018, web.home + "/")
    rows = [{**A18, "reviewerID": f"A{u}", "asin": f"B{i}"} for u in range(5) for i in range(5)]
    web.files["/categoryFilesSmall/Software_5.json.gz"] = gzip.compress(lines(*rows))
    titles = [dict(asin=f"B{i}", title=f"Tool {i}") for i in range(9)]
    web.files["/metaFiles2/meta_Software.json.gz"] = gzip.compress(lines(*titles))
    assert load_interactions("amazon_software").item_titles is None
    sources.fetch_titles("amazon_software")
    assert load_interactions("amazon_software").item_titles.tolist() == [f"Tool {i}" for i in range(5)]
    assert "Did you mean 'amazon_software'" in refused(sources.fetch_titles, "amazon_sofware")


def test_names_of_own_files(put, monkeypatch, tmp_path):
    put("box/steam.2.csv", ROWS); put("box/raw/All_Pens_5.json", lines(A18))
    put("box/amazon_cds/reviews_CDs_and_Vinyl_5.json", lines(A14))
    monkeypatch.setenv("SHARP_DISTILL_DATA", str(tmp_path / "box"))
    assert len(load_interactions("steam.2")) == 3, "a dot belongs to the name"
    assert len(load_interactions("All_Pens_5")) == 1 and len(load_interactions("amazon_cds", k_core=1)) == 1
    assert {"steam.2", "All_Pens_5"} <= set(datasets().index)
    assert find_source("amazon_1999_cds") is None and find_source("ebay") is None
    assert bare_name(tmp_path / "box/steam.2.csv") == "steam.2"


# ---------------------------------------------------------------- the real files
COUNTS = {"amazon_musical_instruments.parquet": (1429, 900, 10261), "ratebeer.parquet": (2890, 3372, 217397),
          "steam.parquet": (6272, 4583, 132489), "yelp_atlanta.parquet": (8196, 205, 10923),
          "raw/All_Beauty_5.json.gz": (991, 85, 5269), "raw/Gift_Cards_5.json.gz": (458, 148, 2972)}


@pytest.mark.skipif(REAL is None, reason="the real files are not on this computer")
@pytest.mark.parametrize("file", [pytest.param(f, marks=[pytest.mark.slow] * (COUNTS[f][2] > 100_000)) for f in COUNTS])
def test_real_counts(file):
    data = read_interactions(REAL / file)
    assert (data.n_users, data.n_items, len(data)) == COUNTS[file]
    if "yelp" not in file: assert (data.timestamp > 0).mean() > .99


@pytest.mark.skipif(REAL is None, reason="the real files are not on this computer")
def test_real_files_that_must_be_refused():
    assert "broken gzip" in refused(load_interactions, REAL / "raw/reviews_Digital_Music_5.json.gz")
    assert "5-core of 10,923 rows is empty" in refused(load_interactions, REAL / "yelp_atlanta.parquet", k_core=5)


def test_each_planted_strength_is_off_at_zero():
    "Without strengths no book has a season and nothing follows; drift alone moves days and leaves every other column as it was."
    from sharp_distill.data.synthetic import PlantedTime, sample_frame
    made = lambda **k: sample_frame(0, 300, 120, planted=PlantedTime(**dict(fashion=0, drift=0, series=0) | k))
    calm, fashion, drift, series = made(), made(fashion=3), made(drift=9), made(series=.8)
    columns = ["user_id", "item_id", "rating", "item_title", "review"]
    assert calm[columns].equals(drift[columns]) and not calm.timestamp.equals(drift.timestamp)
    common = lambda f: f[f.item_id.isin(calm.item_id.value_counts().index[:40])]
    spread = lambda f: common(f).groupby("item_id").timestamp.std().mean()
    assert spread(fashion) < .7 * spread(calm) and abs(spread(drift) / spread(calm) - 1) < .1
    def steps(frame): # Share of the pairs of two items that one user takes one after the other, in one order more often
        ordered = frame.sort_values(["user_id", "timestamp"])
        same = ordered.user_id.eq(ordered.user_id.shift(-1))
        pairs = (ordered.item_id + " " + ordered.item_id.shift(-1).astype(str))[same].value_counts()
        return pairs.iloc[:20].sum()
    assert steps(series) > 2 * steps(calm)


def test_users_are_drawn_among_those_who_have_rows():
    "After a filter on ratings some users have none left."
    frame = pd.DataFrame(dict(user_id=[f"u{n}" for n in range(10)], item_id="i", rating=[5.] * 5 + [1.] * 5))
    for seed in range(5):
        drawn = clean(from_frame(frame), CleanConfig(min_rating=4., n_users=4, seed=seed))
        assert (drawn.n_users, len(drawn)) == (4, 4)
