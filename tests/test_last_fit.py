"""The last fit, on train and validation, repeats what validation chose: sessions, batch size, epochs, the sequential part."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from sharp_distill.data.evaluation import EvalResult, Scorer, recommend_topk
from sharp_distill.data.interactions import make_sample
from sharp_distill.data.protocol import over_cuts, refit_split, with_popularity_fallback
from sharp_distill.data.split import make_split
from sharp_distill.models import item_filter, teacher, training
from sharp_distill.models.registry import Fits, refit
from sharp_distill.text.reviews import encode_reviews


@pytest.fixture(scope="module")
def split(): return make_split(make_sample(seed=2, n_users=150, n_items=60), "temporal")


@pytest.fixture(scope="module")
def fits(split): return lambda **options: Fits(split, encode_reviews(split, "tfidf"), {"teacher": dict(emb_dim=8, epochs=3, **options)})


def test_a_ridge_without_sessions_leaves_the_networks_theirs(fits, split, monkeypatch):
    read, choose, build = [], item_filter.choose_local, teacher.build_network
    def first_wins(*given): # the gram without sessions comes first
        options, valid = choose(*given)
        first_wins.asked = getattr(first_wins, "asked", 0) + 1
        return options, valid + (first_wins.asked == 1)
    def spy(cfg, train, reviews, device="cpu", sessions=None):
        read.append(sessions is not None and cfg.parts.session_weight)
        return build(cfg, train, reviews, device, sessions)
    monkeypatch.setattr(item_filter, "choose_local", first_wins)
    monkeypatch.setattr(teacher, "build_network", spy)
    here = fits(row_half_life=0.)
    chosen = here.fit("teacher", 0)
    assert chosen.chosen["filter_session_weight"] == 0 and read == [2.]
    last = refit("teacher", here, chosen)
    assert read == [2., 2.] and last.state.valid["filter_options"]["session_weight"] == 0


def test_a_ridge_that_is_told_its_sessions_is_the_one_that_was_chosen(split):
    reviews, sessions = encode_reviews(split, "tfidf"), teacher.teacher_sessions(split)
    grid = dict(ridge=(100.,), text_weight=(1.,), n_neighbours=(20,))
    found = item_filter.fit_item_filter(split, reviews, sessions, grid=grid)
    told = {k: v for k, v in found.options.items() if k != "edge_power"}
    again = item_filter.fit_item_filter(split, reviews, sessions, grid=grid, chosen=told)
    assert (abs(again.B - found.B)).max() < 1e-6 and again.told == found.told
    for weight in (0., 2.):
        at = item_filter.fit_item_filter(split, reviews, sessions, grid=grid, chosen=told | dict(session_weight=weight))
        assert at.options["session_weight"] == weight


@pytest.mark.parametrize("rows", [46_000, 47_000]) # about the rows at which a step doubles
def test_the_last_fit_keeps_the_batch_that_validation_saw(rows):
    cfg = training.TrainConfig(lr=.1, epochs=2)
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__(); self.x = torch.nn.Parameter(torch.zeros(1))
    def train(cfg, n):
        nothing = lambda *given: (torch.zeros(1, requires_grad=True).sum(), {})
        return training.fit(Model(), (np.zeros(n), np.zeros(n)), nothing, lambda: .5, cfg)
    history = train(cfg, rows)
    assert history.told["batch_size"] == training.resolve_batch_size(cfg, rows) and "lr" not in history.told
    known = cfg.replace(batch_size=history.told["batch_size"])
    assert "batch_size" not in train(known, 47_000).told, "what was told is not decided again"
    assert training.resolve_batch_size(known, 47_000) == history.told["batch_size"]


def test_the_fallback_is_asked_wherever_scores_lie(split):
    joined = refit_split(split)
    new = np.flatnonzero(np.diff(joined.train.to_csr().indptr) == 0)
    if not len(new): joined = replace(joined, train=joined.train.take(joined.train.user_idx != 0)); new = np.array([0])
    upwards = lambda u: np.tile(np.arange(joined.n_items, dtype=np.float32), (len(u), 1))
    lists = [recommend_topk(with_popularity_fallback(Scorer("m", upwards, on_device=there), joined), new[:1], joined.train.to_csr(), 5)
             for there in (None, lambda u: torch.from_numpy(upwards(u)))]
    assert np.array_equal(*lists) and lists[0].tolist() != recommend_topk(upwards, new[:1], joined.train.to_csr(), 5).tolist()


def test_users_who_are_asked_often_add_no_spread():
    same = lambda n, value: EvalResult(np.arange(n), np.zeros((n, 1), int), {"NDCG@10": np.full(n, value)}, "test", str(n))
    both = over_cuts([same(40, .5), same(160, .5)])
    assert both.mean() == pytest.approx(.5) and np.ptp(both.ci95()) < 1e-12 and both.summary()["NDCG@10"]["ci95"] == pytest.approx([.5, .5])
    r = np.random.default_rng(0)
    drawn = [EvalResult(np.arange(n), np.zeros((n, 1), int), {"NDCG@10": r.random(n)}, "test", str(n)) for n in (40, 160)]
    low, high = over_cuts(drawn).ci95()
    each = np.sqrt(sum(np.var(x.values("NDCG@10")) / len(x.user_idx) for x in drawn)) / 2
    assert (high - low) / (2 * 1.96 * each) == pytest.approx(1, abs=.25)


def test_a_sequential_part_is_fitted_once_and_told_its_epochs(split, monkeypatch):
    from sharp_distill.experiments.grid import JobFits
    from sharp_distill.models import registry
    fitted, fit = [], registry.fit_sasrec
    def spy(at, cfg, **more):
        fitted.append((len(at.train), cfg.epochs)); return fit(at, cfg, **more)
    monkeypatch.setattr(registry, "fit_sasrec", spy)
    monkeypatch.setattr(teacher, "fit_sasrec", lambda *given, **more: pytest.fail("fitted beside the method of that name"))
    reviews = encode_reviews(split, "tfidf")
    here = JobFits(split, reviews, {"teacher": teacher.TeacherConfig.from_dict(dict(emb_dim=8, epochs=2, row_half_life=0., item_filter="none",
                   sequence="sasrec+text", weights="networks=1,sequence=1")), "sasrec+text": dict(emb_dim=8, epochs=4, patience=1)})
    last = refit("teacher", here, here.fit("teacher", 0))
    assert [n for n, _ in fitted] == [len(split.train), len(here.refitted.split.train)] and fitted[1][1] <= fitted[0][1] and last.state.sequence
