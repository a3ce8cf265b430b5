"""Stores that several processes share: started together, each finds what is right; killed at any moment, nothing that was finished is lost."""
import contextlib
import functools
import gzip
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from sharp_distill.core import UserError, read_json
from sharp_distill.data import sources
from sharp_distill.data.evaluation import EvalResult
from sharp_distill.experiments import board, grid, run, search
from sharp_distill.text import encoder_adapting
from sharp_distill.text.vector_cache import cached_vectors, read_vectors

fork = multiprocessing.get_context("fork") # the libraries are loaded once
ROWS = pd.DataFrame(dict(rating=[1.])) # stands in for train rows
SPLIT = SimpleNamespace(sha="abc", protocol="random", cut=0, seed=0, n_users=5, n_items=9, train=ROWS, valid=(), test=())


def race(work, n=4, seconds=60): # -> [work(0), ..., work(n - 1)], each in a process of its own
    "Start the same work in several processes at one moment."
    start, answers = fork.Barrier(n), fork.SimpleQueue()
    def one(who):
        start.wait()
        try: answers.put((who, work(who)))
        except BaseException as e: answers.put((who, f"{type(e).__name__}: {e}"))
    processes = [fork.Process(target=one, args=(w,)) for w in range(n)]
    for p in processes: p.start()
    until = time.time() + seconds
    for p in processes: p.join(max(0, until - time.time()))
    for p in processes: p.kill()
    found = {}
    while not answers.empty(): found.update([answers.get()])
    return [found.get(w) for w in range(n)]


def killed(work, rounds, longest=.15): # Yields, after each kill, what `work(done)` had called `done` with
    "Start work over and over, and kill it at a random moment."
    r = random.Random(0)
    for _ in range(rounds):
        finished, told = fork.Pipe(duplex=False)
        p = fork.Process(target=work, args=(told.send,))
        p.start(); told.close()
        finished.poll(20) # it has begun
        time.sleep(longest * r.random())
        os.kill(p.pid, signal.SIGKILL); p.join()
        done = []
        while finished.poll():
            try: done.append(finished.recv())
            except EOFError: break
        yield done


# Review vectors

def length_and_end(texts): return np.array([[len(t), ord(t[-1])] for t in texts], np.float32)


def vectors_race(folder):
    texts, counted = [f"review {'x' * (i % 50)} {i}" for i in range(300)], folder.with_suffix(".counted")
    def encode(texts):
        with open(counted, "a") as f: f.write("once\n" * len(texts))
        return length_and_end(texts)
    def work(who): # each process asks for other texts, and they overlap
        mine = texts[50 * who:50 * who + 150]
        out, column = cached_vectors(folder, mine, encode, block=20)
        return bool((out[column] == length_and_end(mine)).all())
    right = race(work)
    stored = [read_vectors(p) for p in folder.glob("*.safetensors")]
    return counted.read_text().count("once") == 300 and right == [True] * 4 and len(stored) == 4 and all(s is not None and s[1].any(axis=1).all() for s in stored)


def test_review_vectors(tmp_path):
    for i in range(3): assert vectors_race(tmp_path / str(i))


def test_a_store_that_holds_zeros_is_repaired(tmp_path):
    "A store as an earlier version could leave it: vectors of zeros under a right checksum."
    import struct
    import zlib
    cached_vectors(tmp_path, ["ink", "a mat"], length_and_end)
    path, = tmp_path.glob("*.safetensors")
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    head, keys = json.loads(raw[8:8 + n]), raw[8 + n:8 + n + 16]
    zeros = bytes(len(raw) - 8 - n - 16)
    head["__metadata__"]["crc"] = str(zlib.crc32(zeros, zlib.crc32(keys)))
    text = json.dumps(head).encode().ljust(n)
    path.write_bytes(struct.pack("<Q", len(text)) + text + keys + zeros)
    out, column = cached_vectors(tmp_path, ["ink", "a mat"], length_and_end)
    assert (out[column] == length_and_end(["ink", "a mat"])).all()


# Leaderboards

def put(folder, who, seed, split=SPLIT):
    values = np.full(5, .1 * who + .01 * seed)
    row = dict(model="lightgcn", seed=100 * who + seed, metrics={"NDCG@10": float(values.mean())}, config={})
    board.put_row(folder, "shop", split, row, EvalResult(np.arange(5), np.zeros((5, 0), int), {"NDCG@10": values}, "test", "abc"))
    return row["seed"]


def board_holds(folder, seeds): # Every row with its users
    rows, users = board.read_board(folder, "shop"), board.read_users(folder, "shop")
    means = {r["seed"]: r["metrics"]["NDCG@10"] for r in rows}
    return set(seeds) <= set(means) and all(np.isclose(users[f"lightgcn {s}"].mean(), means[s]) for s in seeds)


def board_race(folder, rows=8):
    fits = SimpleNamespace(split=SPLIT, reviews=SimpleNamespace(encoder="none"))
    def work(who):
        for seed in range(rows): put(folder, who, seed)
        board.write_tests(folder, "shop", fits, board.read_board(folder, "shop"), {("ease", "itemknn", "slim", "rp3beta")[who]: dict(who=who)})
    race(work)
    wanted = [100 * w + s for w in range(4) for s in range(rows)]
    searches = read_json(board.board_path(folder, "shop", "tests.json"))["searches"]
    return board_holds(folder, wanted) and len(board.read_board(folder, "shop")) == 4 * rows and len(searches) == 4


def test_leaderboards(tmp_path):
    assert board_race(tmp_path)
    other = SimpleNamespace(**vars(SPLIT) | dict(sha="def"))
    with pytest.raises(UserError, match="is of split abc"): put(tmp_path, 9, 9, other)


def board_kills(folder, rounds):
    acknowledged = set()
    def work(tell): # rows that no process before wrote
        for seed in range(100): tell(put(folder, len(acknowledged), seed))
    for done in killed(work, rounds):
        acknowledged |= set(done)
        assert done and board_holds(folder, acknowledged), "a row is lost"
    return len(acknowledged)


def test_leaderboards_under_kills(tmp_path): assert board_kills(tmp_path, 6)


# Folders of runs

class Student: # stands in for what a run serves
    def save(self, folder):
        folder.mkdir()
        for n in range(3): (folder / f"{n}.txt").write_text(str(n) * 2000)


@pytest.fixture
def light(monkeypatch, tmp_path):
    "Runs without a training."
    monkeypatch.setattr(run, "build_recommender", lambda *a, **k: Student())
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path


def publish(output, who=0):
    cfg = run.RunConfig.from_dict(dict(output_dir=str(output)))
    ready = SimpleNamespace(split=SimpleNamespace(train=0, valid=0, test=0), reviews=SimpleNamespace(text_encoder=None), data=SimpleNamespace(sha="abc"))
    return run.RunFolder(cfg, "id").publish(dict(who=who, values=list(range(500))), None, ready)


def run_is_whole(path):
    return len(read_json(path / "run.json")["values"]) == 500 and all((path / "student" / f"{n}.txt").stat().st_size == 2000 for n in range(3))


def runs_race(output):
    def work(who):
        for _ in range(5):
            if not run_is_whole(publish(output, who)): return False
        return True
    right = race(work)
    return right == [True] * 4 and {p.name for p in (output / "sample").iterdir()} == {"id", ".id.lock"}


def test_equal_runs_at_once(light): assert runs_race(light / "out")


def run_kills(output, rounds):
    path, gone = publish(output), []
    def watch():
        while not stop.is_set(): gone.extend([] if path.exists() else [time.time()]); time.sleep(.0002)
    stop, watcher = threading.Event(), threading.Thread(target=watch)
    watcher.start()
    def work(tell):
        for k in range(10_000): publish(output, k); tell(k)
    total = 0
    for done in killed(work, rounds):
        assert run_is_whole(path), "a kill lost the run"
        total += len(done)
    stop.set(); watcher.join()
    return total, len(gone)


def test_a_run_made_again_under_kills(light):
    total, gone = run_kills(light / "out", 6)
    assert total and not gone # there was no moment without the run


def test_a_grid_job_is_done_once(tmp_path, monkeypatch):
    job, done = grid.Job(), tmp_path / "done"
    monkeypatch.setattr(grid, "check_record", read_json)
    def train(job, folder, outputs):
        with open(done, "a") as f: f.write("once\n")
        time.sleep(.02)
        return dict(format=3)
    monkeypatch.setattr(grid, "run_job", train)
    assert len(set(race(lambda who: str(grid.work(job, tmp_path))))) == 1 and done.read_text() == "once\n"


# The teachers of a grid

def teachers_race(folder, made):
    folder.mkdir()
    def make():
        with open(made, "a") as f: f.write("once\n")
        time.sleep(.01)
        return dict(rows=np.arange(12.).reshape(3, 4))
    def work(who): return grid.cached(folder, "teacher", make)["rows"].tolist()
    return race(work) == [np.arange(12.).reshape(3, 4).tolist()] * 4 and made.read_text() == "once\n"


def test_teachers(tmp_path): assert teachers_race(tmp_path / "teachers", tmp_path / "made")


def test_no_flipped_bit_of_a_teacher_is_read(tmp_path):
    value, r = dict(rows=np.arange(12.).reshape(3, 4), pair=(1.5, "two")), random.Random(0)
    grid.cached(tmp_path, "teacher", lambda: value)
    raw, path = (tmp_path / "teacher.safetensors").read_bytes(), tmp_path / "flipped.safetensors"
    for _ in range(300):
        flipped, at = bytearray(raw), r.randrange(len(raw))
        flipped[at] ^= 1 << r.randrange(8)
        path.write_bytes(flipped)
        got = grid._read_state(path)
        assert got is None or (got["rows"].tolist() == value["rows"].tolist() and got["pair"] == value["pair"]), at


def test_an_encoder_is_adapted_once(tmp_path, monkeypatch):
    import pandas as pd
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path))
    def adapt(split, base, folder, cfg):
        with open(tmp_path / "made", "a") as f: f.write("once\n")
        time.sleep(.02)
        return folder, pd.DataFrame(dict(step=[0], loss=[np.nan]))
    monkeypatch.setattr(encoder_adapting, "adapt_encoder", adapt)
    answers = race(lambda who: len(encoder_adapting.adapted_encoder(SPLIT)[1]))
    assert answers == [1] * 4 and (tmp_path / "made").read_text() == "once\n"


# Searches

@functools.cache
def toy_fits():
    from sharp_distill.data.interactions import make_sample
    from sharp_distill.data.split import make_split
    from sharp_distill.models.registry import Fits
    from sharp_distill.text.reviews import encode_reviews
    split = make_split(make_sample(seed=1, n_users=60, n_items=40), seed=0)
    return Fits(split, encode_reviews(split, "none"))


def settings(study): return [(t.number, sorted(t.params.items())) for t in search.ended_trials(study)]


def search_race(folder):
    budget, fits = search.Budget(n_trials=3), toy_fits()
    alone = settings(search.tune("ease", fits, budget, folder / "alone"))
    together = race(lambda who: settings(search.tune("ease", fits, budget, folder / "together")))
    return together == [alone] * 4 and len(alone) == 3


def test_searches(tmp_path): assert search_race(tmp_path)


def search_kills(folder, rounds):
    budget, most = search.Budget(n_trials=10_000, tune_s=1e9), 0
    fits, last = toy_fits(), []
    def work(tell):
        tell(0)
        search.tune("ease", fits, budget, folder)
    for _ in killed(work, rounds, .4):
        now = settings(search.open_study("ease", fits, budget, folder))
        assert now[:len(last)] == last, "a trial is lost"
        last, most = now, max(most, len(now))
    defaults = sorted(search.first_setting(search.method("ease")).items())
    assert last[0][1] == defaults
    return most


def test_searches_under_kills(tmp_path): assert search_kills(tmp_path, 5)


# Downloads

class Slow(BaseHTTPRequestHandler):
    "Serves one body in small pieces and counts how often it was asked."
    body, asked = b"", 0

    def do_GET(self):
        type(self).asked += 1
        self.send_response(200)
        self.send_header("Content-Length", len(self.body))
        self.end_headers()
        for at in range(0, len(self.body), 4000): self.wfile.write(self.body[at:at + 4000]); time.sleep(.002)

    def log_message(self, *args): pass


@contextlib.contextmanager
def served(body): # -> (address, handler)
    handler = type("Handler", (Slow,), dict(body=body))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=.01), daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}/reviews.json.gz", handler
    finally: server.shutdown(); server.server_close()


def a_file(seed): return gzip.compress(b'{"reviewerID": "a", "asin": "b"}\n' + random.Random(seed).randbytes(30_000).hex().encode())


def download_race(folder):
    with served(a_file(0)) as (url, handler):
        right = race(lambda who: sources.download(url, folder / "reviews.json.gz").read_bytes() == handler.body)
        return right == [True] * 4 and handler.asked == 1


def test_one_download_for_all(tmp_path): assert download_race(tmp_path / "d")


def test_downloads_under_kills(tmp_path):
    with served(a_file(0)) as (url, handler):
        def work(tell):
            tell(0)
            sources.download(url, target)
        for k in range(4):
            target = tmp_path / str(k) / "reviews.json.gz"
            for _ in killed(work, 2, .04): assert not target.exists() or target.read_bytes() == handler.body
            assert sources.download(url, target).read_bytes() == handler.body


def test_a_changed_file_is_not_trusted(tmp_path, monkeypatch):
    target = tmp_path / "reviews.json.gz"
    with served(a_file(0)) as (url, handler):
        sources.download(url, target).unlink()
        handler.body = a_file(1)
        with pytest.raises(UserError, match="it was changed, and nothing was kept"): sources.download(url, target)
        assert {p.suffix for p in tmp_path.iterdir()} == {".lock", ".json"} # neither the file nor a part of it
        target.with_name(target.name + ".source.json").unlink()
        monkeypatch.setitem(sources.KNOWN_SHA256, url, "0" * 64)
        with pytest.raises(UserError, match="000000000000... was expected"): sources.download(url, target)
        monkeypatch.delitem(sources.KNOWN_SHA256, url)
        assert sources.download(url, target).read_bytes() == handler.body


def test_an_address_with_https_leads_nowhere_else(monkeypatch):
    answer = SimpleNamespace(url="http://elsewhere/x", close=lambda: None)
    monkeypatch.setattr(sources.urllib.request, "urlopen", lambda *a, **k: answer)
    with pytest.raises(UserError, match="anybody on the way could change"): sources._request("https://server/x", 0, {})
    assert sources._request("http://server/x", 0, {}) is answer
    assert all(url.startswith("https://") for url in (*sources.BASES.values(), *sources.PAGES.values()))
