"""Files, sources and cleaning: real formats, bad input, broken downloads, and the real files where they lie beside the repository."""
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sharp_distill.core import UserError
from sharp_distill.data.interactions import (
    CleanConfig, clean, compact, data_card, drop_duplicates, from_frame, k_core, load_interactions, make_sample,
    make_scale, provenance_frame, read_interactions)
from sharp_distill.plots.data import plot_card
from sharp_distill.data.files import read_table
from sharp_distill.data.sources import datasets, download, fetch, find_source
from sharp_distill.data.synthetic import make_graph

HERE = Path(__file__).resolve().parents[1]
REAL = next((p for p in (os.environ.get("SHARP_DISTILL_DATA"), HERE.parent / "shared/data") if p and (Path(p) / "steam.parquet").exists()), None)
HEAD = "user_id,item_id,rating,timestamp,review\n"
ROWS = HEAD + "u1,a,5,1600000000,Good\nu2,a,4,1600000001,Fine\nu2,b,3,1600000002,So so\n"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "No data folder, no cache, no progress speed_criteria from outside."
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SHARP_DISTILL_QUIET", "1")
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


def lines(rows): return "".join(json.dumps(r) + "\n" for r in rows).encode()


def refused(fn, *args, **kw):
    "Return the message of the UserError that must come, on one line."
    with pytest.raises(UserError) as caught: fn(*args, **kw)
    said = str(caught.value)
    assert "\n" not in said and 20 < len(said) < 600, said
    return said


# ---------------------------------------------------------------- formats
A14 = dict(reviewerID="A1", asin="0001", reviewerName="x", helpful=[0, 1], reviewText="It's fine", overall=4.0, summary="s", unixReviewTime=1252800000, reviewTime="09 13, 2009")
A18 = dict(overall=5.0, verified=True, reviewTime="09 1, 2016", reviewerID="A2", asin="B01", style={"Size:": " 7 oz"}, reviewText="As advertised", unixReviewTime=1472688000)
A23 = dict(rating=3.0, title="Headline", text="Meh", images=[], asin="B0X", parent_asin="B0P", user_id="AE1", timestamp=1588687728923, helpful_vote=0, verified_purchase=True)
YELP = dict(review_id="r", user_id="u1", business_id="b1", stars=4.0, useful=0, funny=0, cool=0, text="Good soup", date="2018-07-07 22:09:11")


@pytest.mark.parametrize("row, expected", [(A14, ("A1", "0001", 4, 1252800000, "It's fine")), (A18, ("A2", "B01", 5, 1472688000, "As advertised")),
                                           (A23, ("AE1", "B0P", 3, 1588687728, "Meh")), (YELP, ("u1", "b1", 4, 1531001351, "Good soup"))])
@pytest.mark.parametrize("packed", [False, True])
def test_published_json_dialects(put, row, expected, packed):
    data = read_interactions(put("any_name.bin", gzip.compress(lines([row])) if packed else lines([row])))
    assert tuple(data.to_frame()[["user_id", "item_id", "rating", "timestamp", "review"]].iloc[0]) == expected


def test_amazon_2014_python_literals(put):
    path = put("reviews_X.json.gz", gzip.compress((repr(A14) + "\n" + repr({**A14, "asin": "0002", "reviewText": 'said "no"'}) + "\n").encode()))
    data = read_interactions(path)
    assert data.item_ids.tolist() == ["0001", "0002"] and set(data.review) == {"It's fine", 'said "no"'}


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip_of_tar", "zip"])
def test_yelp_archives(put, kind):
    members = [("yelp_academic_dataset_business.json", lines([dict(business_id="b1", name="Corner Cafe")])),
               ("yelp_academic_dataset_review.json", lines([YELP, {**YELP, "user_id": "u2"}])), ("yelp_academic_dataset_tip.json", lines([dict(user_id="u3", business_id="b1", text="tip")]))]
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as z: [z.writestr("Yelp JSON/" + n, c) for n, c in members]
    else:
        with tarfile.open(fileobj=out, mode="w:gz" if kind == "tgz" else "w") as t:
            for n, c in members:
                info = tarfile.TarInfo(n); info.size = len(c); t.addfile(info, io.BytesIO(c))
    content = out.getvalue()
    if kind == "zip_of_tar":
        outer = io.BytesIO()
        with zipfile.ZipFile(outer, "w") as z: z.writestr("Yelp JSON/yelp_dataset.tar", content)
        content = outer.getvalue()
    data = read_interactions(put("yelp_dataset.tar", content))
    assert len(data) == 2 and data.item_titles.tolist() == ["Corner Cafe"]


def test_recbole_atomic_files_with_titles(put):
    put("toy.item", "item_id:token\tmovie_title:token_seq\n7\tThe Owl\n007\tThe Fox\n9\tUnseen\n")
    data = read_interactions(put("toy.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\t7\t3\t881250949\nu\t007\t4\t881250950.0\n"))
    assert data.item_ids.tolist() == ["007", "7"] and data.item_titles.tolist() == ["The Fox", "The Owl"] and data.timestamp.tolist() == [881250949, 881250950]


@pytest.mark.parametrize("meta", [lines([dict(asin="B01", title="A jar")]), (repr({"asin": "B01", "title": "A jar"}) + "\n").encode()])
def test_amazon_metadata_gives_titles(put, meta):
    put("meta_X.json.gz", gzip.compress(meta))
    assert read_interactions(put("X_5.json.gz", gzip.compress(lines([A18])))).item_titles.tolist() == ["A jar"], "found beside the reviews"
    other = put("elsewhere/names.json", meta)
    assert read_interactions(put("Y.json", lines([A18])), items=other).item_titles.tolist() == ["A jar"]


def test_all_formats_of_one_table_are_equal(put, tmp_path):
    sample = make_sample(n_users=60, n_items=40)
    frame = sample.to_frame()
    frame.to_parquet(tmp_path / "a.parquet"); frame.to_csv(tmp_path / "a.csv", index=False); frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    shas = {load_interactions(tmp_path / f"a.{e}").sha for e in ("parquet", "csv", "tsv", "jsonl")}
    assert shas == {sample.sha}


def test_name_of_a_file_means_nothing(put, tmp_path):
    make_sample(n_users=30, n_items=20).to_frame().to_parquet(tmp_path / "really.parquet")
    (tmp_path / "really.parquet").rename(tmp_path / "reviews.csv")
    assert len(load_interactions(tmp_path / "reviews.csv")) > 100
    assert len(load_interactions(put("reviews.parquet", ROWS))) == 3


def test_ids_that_look_like_numbers_stay_text(put):
    data = load_interactions(put("a.csv", "user_id,item_id\n007,1e5\n7,0x1\nNA,nan\n"))
    assert data.user_ids.tolist() == ["007", "7", "NA"] and data.item_ids.tolist() == ["0x1", "1e5", "nan"]
    assert from_frame(pd.DataFrame(dict(user_id=[7.0, np.nan, 8.0], item_id=[1, 2, 3]))).user_ids.tolist() == ["7", "8"]
    assert load_interactions(put("a.jsonl", b'{"user": 7, "item": "x"}\n{"user": "007", "item": "x"}\n')).user_ids.tolist() == ["007", "7"]


def test_times_in_all_units(put):
    same = ["1600000000", "1600000000.0", "1600000000000", "1600000000000000", "1600000000000000000", "2020-09-13T12:26:40Z", "2020-09-13 14:26:40+02:00"]
    data = load_interactions(put("t.csv", "user_id,item_id,timestamp\n" + "".join(f"u,{i},{t}\n" for i, t in enumerate(same))))
    assert set(data.timestamp) == {1600000000}
    frame = pd.DataFrame(dict(user_id="u", item_id=["a", "b"], timestamp=pd.to_datetime(["2020-09-13 12:26:40", None])))
    assert from_frame(frame).timestamp.tolist() == [-1, 1600000000]


def test_bom_and_mixed_line_ends(put):
    text = "\ufeff" + HEAD + "u1,a,5,1,Good\r\nu2,a,4,2,\"two\r\nlines\"\ru3,b,4,3,End"
    data = load_interactions(put("m.csv", text))
    assert len(data) == 3 and data.n_users == 3
    assert len(load_interactions(put("m.jsonl", b"\xef\xbb\xbf" + lines([YELP]).replace(b"\n", b"\r\n") + lines([A18])[:0] + b"\r\n" + lines([{**YELP, "user_id": "u2"}])))) == 2


def test_ten_megabytes_in_one_review(put):
    long = "word " * 2_000_000
    for path in (put("l.jsonl", lines([YELP, {**YELP, "user_id": "u2", "text": long}, {**YELP, "user_id": "u3"}])), put("l.csv", ROWS + f"u9,a,5,3,{long}\n")):
        data = load_interactions(path)
        assert max(map(len, data.review)) == len(long)
    cut = load_interactions(path, max_chars=1000)
    assert max(map(len, cut.review)) == 1000 and "cut" in cut.provenance[-1].name


def test_other_encodings(put):
    text = ROWS.replace("Fine", "café")
    assert "café" in load_interactions(put("e.csv", text.encode("latin-1")), encoding="latin-1").review
    assert "café" in load_interactions(put("e16.csv", text.encode("utf-16")), encoding="utf-16").review


def test_half_a_surrogate_can_be_stored(put):
    data = load_interactions(put("s.jsonl", b'{"user_id": "u", "item_id": "i", "text": "half \\ud83d end"}\n'))
    assert data.review[0] == "half \ufffd end" and data.sha


def test_missing_ids_and_texts(put):
    data = load_interactions(put("a.csv", HEAD + "u1,a,5,1,\n,a,4,2,who\nu2,,4,3,what\nu2,b,1,4,Fine\n"))
    assert len(data) == 2 and "left out: 2" in data.provenance[0].note and data.review.tolist() == ["", "Fine"]


# ---------------------------------------------------------------- bad input: each is one clear line
def tar_of(name):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as t:
        info = tarfile.TarInfo(name); info.size = 1; t.addfile(info, io.BytesIO(b"x"))
    return out.getvalue()


def zip_of(name):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z: z.writestr(name, "x")
    return out.getvalue()


PARQUET = io.BytesIO(); pd.DataFrame(dict(user_id=["u"] * 500, item_id=[str(i) for i in range(500)])).to_parquet(PARQUET)
BAD = {
    "truncated gzip": ("a.json.gz", gzip.compress(lines([A18] * 999))[:-20], "broken gzip"),
    "gzip cut in the middle": ("a.json.gz", gzip.compress(b"".join(lines([{**A18, "asin": os.urandom(9).hex()}]) for _ in range(3000)))[:20_000], "broken gzip"),
    "gzip with a wrong checksum": ("a.json.gz", gzip.compress(lines([A18] * 99))[:-8] + b"12345678", "broken gzip"),
    "broken json line": ("a.json", lines([A18, A18]) + b'{"reviewerID": "A1", "asin"\n' + lines([A18]), "line 3: not valid JSON"),
    "json file cut off": ("a.json", lines([A18, A18])[:-30], "line 2: not valid JSON"),
    "json array": ("a.json", json.dumps([A18, A18]), "one JSON array"),
    "json of numbers among objects": ("a.json", lines([A18]) + b"7\n", "line 2: expected an object"),
    "json in latin-1": ("a.json", lines([A18]) + b'{"reviewerID": "A", "asin": "caf\xe9"}\n', "line 2: byte 0xe9"),
    "wrong encoding": ("a.csv", (ROWS + "u4,a,5,1,caf\xe9\n").encode("latin-1"), "line 5: byte 0xe9 is not utf-8"),
    "missing user column": ("a.csv", "usr_id,item_id\n1,2\n", "Did you mean 'usr_id'"),
    "missing both columns": ("a.csv", "one,two\n1,2\n", "no column for user_id or item_id"),
    "no header": ("a.csv", "u1,a,5,Good\nu2,a,4,Fine\n", "first line must name the columns"),
    "metadata instead of reviews": ("meta.json", lines([dict(asin="B01", title="A jar", price=3)]), "a file about items"),
    "rating as a word": ("a.csv", HEAD + "u1,a,5,1,x\nu1,b,five,1,x\n", "row 3: rating 'five'"),
    "rating missing": ("a.csv", HEAD + "u1,a,5,1,x\nu1,b,,1,x\n", "row 3: rating is missing"),
    "NaN rating in parquet": ("a.parquet", (lambda b: (pd.DataFrame(dict(user_id=["u", "v"], item_id=["a", "b"], rating=[1.0, np.nan])).to_parquet(b), b.getvalue())[1])(io.BytesIO()), "rating is missing"),
    "infinite rating": ("a.csv", HEAD + "u1,a,inf,1,x\n", "rating 'inf'"),
    "date that is none": ("a.csv", HEAD + "u1,a,5,someday,x\n", "timestamp 'someday'"),
    "too many fields": ("a.csv", HEAD + "u1,a,5,1,x\nu1,b,5,1,x,y,z\n", "line 3"),
    "open quotation mark": ("a.csv", HEAD + "u1,a,5,1,\"never closed\nu2,b,5,1,x\n", "quotation mark"),
    "empty file": ("a.csv", b"", "is empty"),
    "blank file": ("a.csv", b"\n  \n", "is empty"),
    "header only": ("a.csv", HEAD, "no row"),
    "web page": ("a.json.gz", b"<!DOCTYPE html><html>Not found</html>", "web page"),
    "picture": ("a.csv", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not a review table"),
    "parquet cut off": ("a.parquet", PARQUET.getvalue()[:-100], "broken Parquet"),
    "tar that climbs out": ("a.tar", tar_of("../../etc/passwd"), "climbs out"),
    "tar with an absolute path": ("a.tar", tar_of("/etc/passwd"), "climbs out"),
    "zip that climbs out": ("a.zip", zip_of("..\\..\\x"), "climbs out"),
    "zip cut off": ("a.zip", zip_of("review.json")[:-20], "broken zip"),
    "archive without reviews": ("a.tar", tar_of("readme.txt"), "holds no file of reviews"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file(put, case):
    name, content, words = BAD[case]
    said = refused(load_interactions, put(name, content))
    assert words in said and (name in said or case == "header only"), said


@pytest.mark.parametrize("case", ["broken json line", "json in latin-1", "json of numbers among objects", "rating as a word", "rating missing", "date that is none", "too many fields"])
def test_bad_rows_can_be_skipped_and_are_counted(put, case):
    name, content, _ = BAD[case]
    if case == "date that is none": content += "u2,a,5,1,x\n"
    data = load_interactions(put(name, content), bad_rows="skip")
    assert len(data) >= 1 and "bad rows left out: 1" in data.provenance[0].note


def test_line_numbers_hold_beyond_the_first_block(put):
    row = lines([{**YELP, "text": "x" * 900}])
    said = refused(load_interactions, put("long.json", row * 20_000 + b'{"user_id": \n' + row))
    assert "line 20001" in said


def test_reading_is_in_pieces(put):
    "A quarter of a gigabyte of which little is wanted costs the memory of a few pieces, not of the file."
    row = {**A23, "images": "x" * 8000}
    with gzip.open(put("big.jsonl.gz", b""), "wb", 1) as out:
        for k in range(60): out.write(lines([{**row, "user_id": f"u{k}", "parent_asin": str(i)} for i in range(500)]))
    put("small.jsonl", lines([A23]))
    code = ("from sharp_distill.core import peak_mib\nfrom sharp_distill.data.files import read_table\nread_table('small.jsonl')\n"
            "before = peak_mib()\nn = len(read_table('big.jsonl.gz').frame)\nprint(n, peak_mib() - before)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    rows, more = map(float, done.stdout.split())
    assert rows == 30_000 and more < 150, done.stdout


def test_bad_path(put, tmp_path):
    put("folder/some.csv", ROWS)
    assert "is a folder" in refused(load_interactions, tmp_path / "folder") and "some.csv" in refused(load_interactions, tmp_path / "folder")
    assert "does not exist" in refused(load_interactions, tmp_path / "folder/sone.csv") and "some.csv" in refused(load_interactions, tmp_path / "folder/sone.csv")


def test_bad_names_and_options(put):
    assert "amazon_cds" in refused(load_interactions, "amazon_cd")
    assert "k_core" in refused(load_interactions, "sample", kcore=3)
    assert "0 or more" in refused(load_interactions, "sample", k_core=-1)
    assert "duplicates" in refused(load_interactions, "sample", duplicates="both")
    assert "'usr'" in refused(load_interactions, put("a.csv", ROWS), columns=dict(user_id="usr"))
    assert "paper's" in refused(load_interactions, "scale_amazon_dvds")
    path = put("b.csv", ROWS.replace("user_id", "who"))
    assert len(load_interactions(path, columns=dict(user_id="who"))) == len(load_interactions(path, columns="user_id=who")) == 3
    assert "pairs such as" in refused(load_interactions, path, columns="who") and "pairs such as" in refused(load_interactions, path, columns="user_id=")
    assert "'whom'" in refused(load_interactions, path, columns="user_id = whom") and "Did you mean 'user_id'" in refused(load_interactions, path, columns="usr_id=who")


def test_k_core_that_empties_the_data_says_what_would_not(put):
    said = refused(load_interactions, put("a.csv", ROWS), k_core=5)
    assert "k=1 leaves 3" in said and "k_core=1" in said
    assert "leaves nothing" in refused(load_interactions, put("a.csv", ROWS), min_rating=9)
    assert "leaves nothing" in refused(load_interactions, put("b.csv", "user_id,item_id\nu,a\n"), empty_text="drop")
    assert "both a user and an item" in refused(load_interactions, put("c.csv", "user_id,item_id\nu,\n,a\n"))


def test_one_user_only(put):
    data = load_interactions(put("a.csv", HEAD + "u,a,5,1,x\nu,b,4,2,y\n"))
    assert data.n_users == 1 and data.to_csr().shape == (1, 2)


# ---------------------------------------------------------------- cleaning
def test_duplicates_keep_the_last_word():
    frame = pd.DataFrame(dict(user_id="u", item_id=["a", "a", "a", "b"], timestamp=[3, 9, 5, 1], review=["x", "last", "y", "z"]))
    data = drop_duplicates(from_frame(frame))
    assert len(data) == 2 and "last" in data.review and "x" in drop_duplicates(from_frame(frame), "first").review
    once = drop_duplicates(data)
    assert once is data, "a step that changes nothing leaves no line"


def test_steps_are_counted_in_order():
    data = clean(make_sample(n_users=200, n_items=80), CleanConfig(min_rating=3, max_chars=80, n_users=100, k_core=3))
    frame = provenance_frame(data)
    assert (frame["rows"].diff().dropna() <= 0).all() and frame["rows"].iloc[-1] == len(data)
    assert frame["users"].iloc[-1] == data.n_users == len(np.unique(data.user_idx))
    assert min(np.bincount(data.user_idx).min(), np.bincount(data.item_idx).min()) >= 3 and data.rating.min() >= 3
    json.dumps(frame.reset_index().to_dict("records"))


def test_k_core_is_the_largest_one():
    gen = np.random.default_rng(3)
    frame = pd.DataFrame(gen.integers(0, [60, 50], (400, 2)), columns=["user_id", "item_id"]).drop_duplicates()
    rows = set(map(tuple, k_core(from_frame(frame), 4).to_frame()[["user_id", "item_id"]].astype(int).to_numpy()))
    left = frame
    while True:
        kept = left[left.groupby("user_id").item_id.transform("size").ge(4) & left.groupby("item_id").user_id.transform("size").ge(4)]
        if len(kept) == len(left): break
        left = kept
    assert rows == set(map(tuple, left.to_numpy()))


def test_vocabulary_and_titles_follow_the_rows():
    data = make_sample(n_users=50, n_items=40)
    few = compact(data.take(data.item_idx < 7))
    wanted = {i: t for i, t in zip(data.item_ids, data.item_titles)}
    assert few.n_items <= 7 and all(wanted[i] == t for i, t in zip(few.item_ids, few.item_titles))


def test_order_of_rows_and_chunks_does_not_matter(put):
    frame = make_sample(n_users=80, n_items=40).to_frame()
    assert from_frame(frame).sha == from_frame(frame.sample(frac=1, random_state=1)).sha


def test_sample_is_pinned():
    data = make_sample()
    assert data.sha == "38913632da1c401e" and 1500 <= data.n_users <= 3000 and 600 <= data.n_items <= 900 and 25_000 <= len(data) <= 40_000
    assert make_sample(1).sha != data.sha and len(set(data.item_titles)) == data.n_items


def test_card_and_figures_of_poor_data():
    import matplotlib
    matplotlib.use("Agg")
    data = from_frame(pd.DataFrame(dict(user_id=["u", "v"], item_id=["a", "a"])))
    assert data_card(data).loc["rows"].item() == 2 and len(plot_card(data).axes) == 4


def test_scale_graphs_have_exact_counts():
    data = make_scale("amazon_cellphones")
    assert (data.n_users, data.n_items, len(data)) == (7598, 6208, 85472) and data.to_csr().max() == 1
    u, i = make_graph(500, 400, 6000, seed=2)
    assert len(set(zip(u, i))) == 6000 and np.bincount(u).min() >= 1
    assert "do not fit" in refused(make_graph, 10, 10, 90)


# ---------------------------------------------------------------- downloads
class Server(BaseHTTPRequestHandler):
    "Serves `files`; can hang up after `cut` bytes, ignore ranges, change its version, or fail a few times."
    files, cut, ranges, tag, failing, log = {}, None, True, '"v1"', 0, []

    def do_GET(self):
        cls, body = type(self), self.files.get(self.path)
        if body is None: return self.send_error(404)
        if cls.failing: cls.failing -= 1; return self.send_error(503)
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        fresh = self.headers.get("If-Range") in (None, self.tag)
        start = int(asked[1]) if asked and self.ranges and fresh else 0
        self.log.append(start)
        if start >= len(body): return self.send_error(416)
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
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.home = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown(); server.server_close()


BODY = gzip.compress(lines([{**A18, "asin": f"{i:05d}", "reviewText": os.urandom(90).hex()} for i in range(4000)]))


def leftovers(folder): return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".source.json"))


def test_download_resumes_where_it_broke_off(web, tmp_path):
    web.files["/x.json.gz"], web.cut, target = BODY, 50_000, tmp_path / "d/x.json.gz"
    assert "50,000 of" in refused(download, web.home + "/x.json.gz", target, tries=1)
    assert not target.exists() and (target.parent / ".x.json.gz.part").stat().st_size == 50_000
    web.cut = None
    download(web.home + "/x.json.gz", target)
    assert web.log == [0, 50_000] and target.read_bytes() == BODY and leftovers(target.parent) == ["x.json.gz"]
    web.files.clear()
    assert download(web.home + "/x.json.gz", target) == target, "a file that is there is not fetched again"


def test_download_retries_within_one_call(web, tmp_path):
    web.files["/x.json.gz"], web.cut = BODY, 120_000
    download(web.home + "/x.json.gz", tmp_path / "x.json.gz", tries=9, wait_s=0.01)
    assert web.log == [i * 120_000 for i in range(len(web.log))] and len(web.log) > 1
    web.cut, web.failing = None, 2
    assert download(web.home + "/x.json.gz", tmp_path / "y.json.gz", wait_s=0.01).exists()


def test_download_starts_anew_when_the_server_has_another_version(web, tmp_path):
    web.files["/x.json.gz"], web.cut = BODY, 50_000
    refused(download, web.home + "/x.json.gz", tmp_path / "x.json.gz", tries=1)
    other = gzip.compress(lines([{**A23, "text": os.urandom(90).hex()} for _ in range(2000)]))
    assert len(other) > 50_000
    web.files["/x.json.gz"], web.cut, web.tag = other, None, '"v2"'
    assert download(web.home + "/x.json.gz", tmp_path / "x.json.gz").read_bytes() == other


def test_download_from_a_server_without_ranges(web, tmp_path):
    web.files["/x.json.gz"], web.cut, web.ranges = BODY, 50_000, False
    refused(download, web.home + "/x.json.gz", tmp_path / "x.json.gz", tries=1)
    web.cut = None
    assert download(web.home + "/x.json.gz", tmp_path / "x.json.gz").read_bytes() == BODY


@pytest.mark.parametrize("path, body, words", [("/torn.json.gz", BODY[:-30], "broken gzip"), ("/nosize.json.gz", BODY[:-30], "broken gzip"),
                                               ("/page.json.gz", b"<html>please log in</html>", "web page"), ("/empty.json.gz", b"", "empty")])
def test_bad_download_is_never_used(web, tmp_path, path, body, words):
    web.files[path] = body
    assert words in refused(download, web.home + path, tmp_path / "d" / path[1:], tries=1)
    assert leftovers(tmp_path / "d") == [], "neither under its name nor as a part that would poison the next attempt"


def test_hash_offline_and_missing(web, tmp_path, monkeypatch):
    web.files["/x.json.gz"] = BODY
    assert "SHA-256" in refused(download, web.home + "/x.json.gz", tmp_path / "x", sha256="0" * 64)
    assert "404" in refused(download, web.home + "/gone", tmp_path / "gone")
    assert "could not be fetched" in refused(download, "http://127.0.0.1:9/x", tmp_path / "nobody", tries=1)
    monkeypatch.setenv("SHARP_DISTILL_OFFLINE", "1")
    n = len(web.log)
    assert "OFFLINE" in refused(download, web.home + "/x.json.gz", tmp_path / "y") and len(web.log) == n


def test_named_set_end_to_end(web, tmp_path, monkeypatch):
    "amazon_X: downloaded, cached, read, 5-cored; the second time from the cache, offline."
    import sharp_distill.sources as sources
    monkeypatch.setitem(sources.BASES, 2014, web.home + "/")
    gen = np.random.default_rng(0)
    rows = [{**A14, "reviewerID": f"A{u}", "asin": f"{i:04d}"} for u, i in {tuple(p) for p in gen.integers(0, [40, 30], (700, 2)).tolist()}]
    web.files["/reviews_Baby_5.json.gz"] = gzip.compress(lines(rows))
    data = load_interactions("amazon_baby")
    assert np.bincount(data.user_idx).min() >= 5 and len(data) == len(load_interactions("amazon_baby", k_core=5))
    monkeypatch.setenv("SHARP_DISTILL_OFFLINE", "1")
    assert load_interactions("amazon_baby").sha == load_interactions("amazon_2014_baby").sha == data.sha and len(web.log) == 1
    assert datasets(True).loc["amazon_2014_baby", "how"] == "on this computer" and "by a person" in refused(fetch, "yelp")
    assert datasets(True).loc["amazon_2018_books", "how"] == "fetched on first use" and "OFFLINE" in refused(fetch, "amazon_2018_books")


def test_titles_of_a_named_set_are_fetched_when_asked_for(web, monkeypatch):
    import sharp_distill.sources as sources
    monkeypatch.setitem(sources.BASES, 2018, web.home + "/")
    web.files |= {"/categoryFilesSmall/Software_5.json.gz": gzip.compress(lines([{**A18, "reviewerID": f"A{u}", "asin": f"B{i}"} for u in range(5) for i in range(5)])),
                  "/metaFiles2/meta_Software.json.gz": gzip.compress(lines([dict(asin=f"B{i}", title=f"Tool {i}") for i in range(9)]))}
    assert load_interactions("amazon_software").item_titles is None
    sources.fetch_titles("amazon_software")
    assert load_interactions("amazon_software").item_titles.tolist() == [f"Tool {i}" for i in range(5)], "found beside the reviews from then on"
    assert "no item file" in refused(sources.fetch_titles, "yelp") and "Did you mean 'amazon_software'" in refused(sources.fetch_titles, "amazon_sofware")


def test_names_follow_the_rule(put, monkeypatch, tmp_path):
    table = datasets(everything=True)
    assert table.index.is_unique and all(find_source(n) for n in table.index if n.startswith("amazon_"))
    assert find_source("amazon_2018_cellphones_full").files == ("Cell_Phones_and_Accessories.json.gz",)
    assert find_source("amazon_1999_cds") is None and find_source("ebay") is None
    put("box/steam2.csv", ROWS); put("box/raw/All_Pens_5.json", lines([A18])); put("box/amazon_cds/reviews_CDs_and_Vinyl_5.json", lines([A14]))
    monkeypatch.setenv("SHARP_DISTILL_DATA", str(tmp_path / "box"))
    assert len(load_interactions("steam2")) == 3 and len(load_interactions("All_Pens_5")) == 1 and len(load_interactions("amazon_cds", k_core=1)) == 1
    assert {"steam2", "All_Pens_5"} <= set(datasets().index)


# ---------------------------------------------------------------- the real files
@pytest.mark.skipif(REAL is None, reason="the real files are not on this computer")
@pytest.mark.parametrize("file, users, items, rows", [("amazon_musical_instruments.parquet", 1429, 900, 10261), ("ratebeer.parquet", 2890, 3372, 217397), ("steam.parquet", 6272, 4583, 132489),
                                                      ("yelp_atlanta.parquet", 8196, 205, 10923), ("raw/All_Beauty_5.json.gz", 991, 85, 5269), ("raw/Gift_Cards_5.json.gz", 458, 148, 2972)])
def test_real_counts(file, users, items, rows):
    data = read_interactions(Path(REAL) / file)
    assert (data.n_users, data.n_items, len(data)) == (users, items, rows) and (data.timestamp > 0).mean() > (0.99 if "yelp" not in file else -1)


@pytest.mark.skipif(REAL is None, reason="the real files are not on this computer")
def test_real_files_that_must_be_refused():
    assert "broken gzip" in refused(load_interactions, Path(REAL) / "raw/reviews_Digital_Music_5.json.gz")
    assert "5-core of 10,923 rows is empty" in refused(load_interactions, Path(REAL) / "yelp_atlanta.parquet", k_core=5)


def test_a_field_that_begins_late_is_read(tmp_path):
    lines = [json.dumps(dict(user_id=f"u{k % 40}", item_id=f"i{k // 40}", **({"review": f"words {k}"} if k > 900 else {}))) for k in range(1200)]
    (tmp_path / "late.jsonl").write_text("\n".join(lines))
    data = load_interactions(str(tmp_path / "late.jsonl"))
    assert sum(map(bool, data.review)) == 299
    (tmp_path / "none.csv").write_text("user_id,item_id\nu1,i1\n"); (tmp_path / "wide.csv").write_text("user-id,Item ID,Review Text,Ratings\nu1,i1,Well made,4\n")
    assert "no reviews" in str(load_interactions(str(tmp_path / "none.csv")).provenance[0])
    wide = load_interactions(str(tmp_path / "wide.csv"))
    assert list(wide.review) == ["Well made"] and list(wide.rating) == [4] and "no reviews" not in str(wide.provenance[0])
