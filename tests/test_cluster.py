"""Work by blocks on two real worker processes: the same bits, nothing lost with a killed worker, and one line for what goes wrong."""
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import refused

from sharp_distill.cluster import connect, map_blocks, on_cluster, ranges
from sharp_distill.core import UserError
from sharp_distill.data.interactions import load_interactions, make_sample
from sharp_distill.data.large import LargeConfig, load_partitioned, partition_interactions
from sharp_distill.data.synthetic import sample_frame
from sharp_distill.models import item_filter
from sharp_distill.serve.batch import recommend_all
from sharp_distill.serve.recommender import Recommender

pytestmark = pytest.mark.xdist_group("cluster") # one cluster for all


@pytest.fixture(scope="session")
def two_workers():
    from distributed import LocalCluster
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster: yield cluster.scheduler_address


@pytest.fixture
def own_worker(request):
    "One worker of 1500 MiB, or as much as is asked, for tests that kill it; a block is given up with the second death."
    import dask
    from distributed import LocalCluster
    memory = getattr(request, "param", "1500MiB") # what this module imports, torch among it, takes some 600
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}):
        with LocalCluster(n_workers=1, threads_per_worker=1, memory_limit=memory, dashboard_address=None) as cluster: yield cluster.scheduler_address


def products(span, X, killer=None):
    "A block that takes its worker down the first time it is run."
    if killer and span[0] == 40 and not Path(killer).exists():
        Path(killer).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return X[slice(*span)] @ X.T, os.getpid()


def too_large(span):
    held = np.ones(2000 * 2**17) # 2000 MiB
    time.sleep(20)
    return len(held)


def same(found, wanted): return len(found) == len(wanted) and all(np.array_equal(a, b) for (a, _), (b, _) in zip(found, wanted))


@pytest.fixture(scope="module")
def X(): return np.random.default_rng(0).normal(size=(100, 30)).astype(np.float32)


def test_two_workers_give_the_bits_of_one_process(two_workers, X, capsys):
    here = list(map_blocks(products, ranges(100, 7), X))
    connect(two_workers)
    with on_cluster(two_workers): there = list(map_blocks(products, ranges(100, 7), X))
    assert same(there, here) and {p for _, p in here} == {os.getpid()}
    assert len({p for _, p in there} - {os.getpid()}) == 2 # both worked, and not this process


def test_the_dashboard_is_printed_once(two_workers, capsys):
    from sharp_distill import cluster
    cluster._CLIENTS.pop(two_workers, None)
    connect(two_workers); connect(two_workers)
    said = capsys.readouterr().out.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"cluster {two_workers}: 2 workers, 2 threads") and "dashboard http://127.0.0.1:" in said[0]


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1:1", "tcp://127.0.0.1", "http://127.0.0.1:1", "inproc://127.0.0.1/1/1"])
def test_an_address_that_does_not_answer_is_one_line_within_seconds(address):
    start = time.perf_counter()
    with pytest.raises(UserError, match="where no dask scheduler answers .*: expected the address") as e: connect(address, timeout_s=1.)
    assert "\n" not in str(e.value) and repr(address) in str(e.value) and time.perf_counter() - start < 4


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    "Rows in four files of three formats, with repeated pairs across files and a text that needs care."
    import pandas as pd
    folder = tmp_path_factory.mktemp("shops")
    tables = [sample_frame(s, 150, 80) for s in range(3)]
    tables.append(tables[0].iloc[::3].assign(rating=1.0, timestamp=tables[0]["timestamp"].iloc[::3] + 86_400, review='late, "quoted" 很好用'))
    tables[0].to_parquet(folder / "0.parquet", row_group_size=700); tables[1].to_csv(folder / "1.csv", index=False)
    tables[2].to_json(folder / "2.jsonl", orient="records", lines=True, date_unit="s"); tables[3].to_parquet(folder / "3.parquet")
    return folder, pd.concat(tables)


@pytest.mark.parametrize("k, min_rating", [(1, 0.), (26, 0.), (20, 3.)])
def test_partitions_hold_what_one_file_would(shops, k, min_rating, tmp_path):
    folder, table = shops
    partition_interactions(folder, tmp_path / "out", LargeConfig(k_core=k, min_rating=min_rating), cluster="")
    data, wanted = load_partitioned(tmp_path / "out"), load_interactions(table, k_core=k, min_rating=min_rating)
    assert data.sha == wanted.sha and 0 < len(data) < len(table) and (data.n_users < 150) == (k > 1)


@pytest.mark.parametrize("when", ["dates", "milliseconds", "text", "none"])
def test_times_of_parquet_folders_are_seconds(when, tmp_path):
    frame = make_sample(n_users=40, n_items=20).to_frame()[["user_id", "item_id", "timestamp"]]
    date = pd.to_datetime(frame["timestamp"], unit="s")
    forms = dict(dates=date, milliseconds=frame["timestamp"] * 1000, text=date.astype(str), none=None)
    (tmp_path / "in").mkdir()
    (frame.assign(timestamp=forms[when]) if when != "none" else frame.drop(columns="timestamp")).to_parquet(tmp_path / "in" / "a.parquet")
    partition_interactions(str(tmp_path / "in"), tmp_path / "out", cluster="")
    data = load_partitioned(tmp_path / "out")
    assert data.has_time.all() == (when != "none") and (when == "none" or sorted(data.timestamp) == sorted(frame["timestamp"]))


def test_two_workers_write_the_same_partitions(shops, two_workers, tmp_path):
    cfg = LargeConfig(k_core=12)
    here, there = (partition_interactions(shops[0], tmp_path / name, cfg, cluster=c) for name, c in (("here", ""), ("there", two_workers)))
    assert here == there and contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.parametrize("fault", ["cut", "garbage", "value"])
def test_a_bad_partition_is_named(shops, two_workers, tmp_path, fault):
    import shutil
    folder = shutil.copytree(shops[0], tmp_path / "in")
    whole = (folder / "3.parquet").read_bytes()
    if fault == "cut": (folder / "3.parquet").write_bytes(whole[:-200])
    if fault == "garbage": (folder / "3.parquet").write_bytes(whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2:])
    if fault == "value": (folder / "4.csv").write_text("user_id,item_id,rating\nu1,i1,5\nu2,i2,many\n")
    with pytest.raises(UserError, match="partition 4.csv .*many" if fault == "value" else "partition 3.parquet") as e:
        partition_interactions(folder, tmp_path / "out", cluster=two_workers)
    assert "\n" not in str(e.value) and not (tmp_path / "out" / "partitions.json").exists()


@pytest.mark.slow # both workers import transformers
def test_reviews_are_encoded_on_workers(two_workers, tmp_path, monkeypatch):
    from conftest import WORDS, written_split
    from sharp_distill.text.deberta import tiny_deberta
    from sharp_distill.text.encoders import ReviewConfig
    from sharp_distill.text.reviews import encode_reviews
    encoder, found = tiny_deberta(tmp_path / "tiny", WORDS), []
    for address in ("", two_workers):
        monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path / f"cache{len(found)}")) # nothing is known
        with on_cluster(address): found.append(encode_reviews(written_split(), encoder, ReviewConfig(max_tokens=12, device="cpu")))
    assert np.array_equal(found[0].item, found[1].item) and np.array_equal(found[0].user, found[1].user) and found[0].item.any()


def test_a_run_reads_a_folder_on_its_cluster(two_workers, shops, tmp_path, monkeypatch):
    from sharp_distill.experiments.run import RunConfig, prepare
    monkeypatch.setenv("SHARP_DISTILL_CACHE", str(tmp_path))
    cfg = RunConfig.from_dict(dict(dataset=str(shops[0]), cluster=two_workers, k_core=20))
    assert prepare(cfg).data.sha == load_interactions(shops[1], k_core=20).sha
    with pytest.raises(UserError, match="no dask scheduler answers"): prepare(cfg.replace(cluster="nowhere"))


@pytest.fixture(scope="module")
def rec():
    r, data = np.random.default_rng(1), make_sample(n_users=400, n_items=120)
    shapes = dict(user_emb=(data.n_users, 8), item_emb=(data.n_items, 8), item_message=(data.n_items, 8), user_map=(5, 8), item_map=(4, 8))
    arrays = {name: r.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    return Recommender(**arrays, item_degree=np.ones(data.n_items), train=data.to_csr(), exclude=data.to_csr().astype(bool), user_ids=data.user_ids,
                       item_ids=data.item_ids, item_titles=data.item_titles)


def contents(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_lists_for_everyone_are_the_same_files_on_a_cluster(two_workers, rec, tmp_path):
    import pandas as pd
    here, there = (recommend_all(rec, tmp_path / name, 7, cluster=c, block=64) for name, c in (("here", ""), ("there", two_workers)))
    assert here == there and contents(tmp_path / "here") == contents(tmp_path / "there")
    written = pd.read_parquet(sorted((tmp_path / "there").glob("part-*")))
    once = rec.recommend(rec.user_ids, 7)
    assert all(written[c].tolist() == once[c].tolist() for c in once) and here["rows"] == len(once)


def test_stopped_lists_go_on_and_broken_or_other_parts_are_made_again(rec, tmp_path):
    wanted = recommend_all(rec, tmp_path, 5, block=100)
    whole, names = contents(tmp_path), sorted(p.name for p in tmp_path.glob("part-*"))
    (tmp_path / "manifest.json").unlink(); (tmp_path / names[1]).unlink(); (tmp_path / names[2]).write_bytes(whole[names[2]][:-50])
    kept = (tmp_path / names[0]).stat().st_mtime_ns
    assert recommend_all(rec, tmp_path, 5, block=100) == wanted and contents(tmp_path) == whole
    assert (tmp_path / names[0]).stat().st_mtime_ns == kept
    assert recommend_all(rec, tmp_path, 6, block=100)["rows"] > wanted["rows"] and contents(tmp_path).keys() == whole.keys()


def item_gram(n_items, n_rows=30_000):
    "What items share; beyond 8,192 of them the text is held by its directions."
    from sharp_distill.models.hypergraphs import random_interactions
    words = np.random.default_rng(2).normal(size=(n_items, 8)).astype(np.float32)
    R = random_interactions(2000, n_items, n_rows)
    return item_filter.ItemGram(item_filter.sparse_gram(R, .5), item_filter.text_likeness(words), R.nnz / n_items)


def ridge_of(gram, n, some=slice(None), **shared):
    near = item_filter.nearest_items(gram, n)
    B = item_filter.solve_local(gram, near, [dict(ridge=r, text_weight=1.) for r in (10., 100.)], gram.order()[some])
    return near, *(m.data for m in B), *(m.indices for m in B)


@pytest.mark.parametrize("n_items", [1500, 8500])
def test_the_local_ridge_has_the_same_bits_on_a_cluster(two_workers, n_items, monkeypatch):
    gram, some, asked = item_gram(n_items), slice(0, n_items, 1 + n_items // 1600), []
    here = ridge_of(gram, 40, some)
    monkeypatch.setattr(item_filter, "map_blocks", lambda fn, blocks, *a, **kw: asked.append((fn.__name__, len(blocks))) or map_blocks(fn, blocks, *a, **kw))
    with on_cluster(two_workers): there = ridge_of(gram, 40, some)
    assert all(map(np.array_equal, here, there)) and np.abs(here[1]).max() > 0
    assert [name for name, _ in asked] == ["nearest_rows", "solve_items"] and all(n > 1 for _, n in asked) # it went through workers, in blocks


def solve_and_die(span, gram, neighbours, items, options, killer):
    "The second block takes its worker down the first time it is run."
    if span[0] and not Path(killer).exists():
        Path(killer).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return item_filter.solve_items(span, gram, neighbours, items, options)


@pytest.mark.slow
def test_a_worker_killed_half_way_through_the_ridge_loses_nothing(two_workers, tmp_path, monkeypatch):
    gram, killer = item_gram(3000), str(tmp_path / "killed")
    here = ridge_of(gram, 40)
    dying = lambda fn, blocks, *a, **kw: map_blocks(solve_and_die, blocks, *a, killer, **kw) if fn is item_filter.solve_items else map_blocks(fn, blocks, *a, **kw)
    monkeypatch.setattr(item_filter, "map_blocks", dying)
    with on_cluster(two_workers): there = ridge_of(gram, 40)
    assert Path(killer).exists() and all(map(np.array_equal, here, there))


@pytest.fixture(scope="module")
def shop():
    from sharp_distill.data.split import make_split
    from sharp_distill.text.reviews import encode_reviews
    split = make_split(make_sample(seed=3, n_users=300, n_items=150), seed=0)
    return split, encode_reviews(split, "tfidf")


def test_a_run_fits_its_ridge_on_its_cluster(two_workers, shop):
    "Everything that is chosen, and the weights."
    found = []
    for address in ("", two_workers):
        with on_cluster(address):
            found.append(item_filter.fit_item_filter(*shop, grid=dict(ridge=(100., 300.), text_weight=(1.,), n_neighbours=(20, 60))))
    here, there = found
    assert (here.B != there.B).nnz == 0 and here.options == there.options and here.valid == there.valid > 0


def test_a_cluster_that_is_gone_is_one_line_within_seconds(shop):
    from distributed import LocalCluster
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None) as cluster:
        address, start = cluster.scheduler_address, time.perf_counter()
        connect(address)
    def fit():
        with on_cluster(address): item_filter.fit_item_filter(*shop)
    assert "no dask scheduler answers" in refused(fit) and time.perf_counter() - start < 10


def test_a_bad_partition_of_a_run_is_named(shops, two_workers, tmp_path):
    import shutil
    from sharp_distill.experiments.run import RunConfig, prepare
    folder = shutil.copytree(shops[0], tmp_path / "in")
    (folder / "3.parquet").write_bytes(b"PAR1 cut off")
    assert "partition 3.parquet is a broken Parquet file" in refused(prepare, RunConfig.from_dict(dict(dataset=str(folder), cluster=two_workers)))


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(two_workers, X, tmp_path):
    found = list(map_blocks(products, ranges(100, 4), X, str(tmp_path / "killed"), cluster=two_workers))
    assert (tmp_path / "killed").exists() and same(found, list(map_blocks(products, ranges(100, 4), X)))


@pytest.mark.slow
def test_the_only_worker_killed_with_all_it_was_sent(own_worker, X, tmp_path):
    found = list(map_blocks(products, ranges(100, 4), X, str(tmp_path / "killed"), cluster=own_worker))
    assert (tmp_path / "killed").exists() and same(found, list(map_blocks(products, ranges(100, 4), X)))


@pytest.mark.slow
def test_a_worker_out_of_memory_says_what_to_lower(own_worker):
    with pytest.raises(UserError, match="block 0 2 times, as they do when they run out of memory: lower block_users, or give workers more"):
        list(map_blocks(too_large, ranges(1, 1), cluster=own_worker, lower="block_users"))


@pytest.mark.slow
@pytest.mark.parametrize("own_worker", ["300MiB"], indirect=True)
def test_a_worker_without_memory_for_the_ridge_says_what_to_lower(own_worker):
    gram = item_gram(8000)
    with on_cluster(own_worker): said = refused(ridge_of, gram, 200) # 300 MiB do not even hold torch
    assert "run out of memory: lower n_neighbours, or give workers more" in said
