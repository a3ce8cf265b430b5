"""Competing models: what each may read, and that all of them learn."""
from dataclasses import replace

import numpy as np
import pytest

from sharp_distill.core import UserError
from sharp_distill.data.evaluation import evaluate
from sharp_distill.data.interactions import make_sample
from sharp_distill.data.split import make_split
from sharp_distill.models import competitors as c
from sharp_distill.models.baselines import LightGCNConfig, fit_lightgcn, fit_popularity
from sharp_distill.text.reviews import encode_reviews

# name -> (fit, config class, reads text, learns from a teacher)
MODELS = {"lightgcn+text": (c.fit_text_lightgcn, LightGCNConfig, True, False),
          "alpharec": (c.fit_alpharec, c.AlphaRecConfig, True, False),
          "hccf": (c.fit_hccf, c.HCCFConfig, False, False),
          "hgatt": (c.fit_hgatt, c.HGAttConfig, False, False),
          "simrec": (c.fit_simrec, c.SimRecConfig, False, True),
          "lighthgnn": (c.fit_lighthgnn, c.LightHGNNConfig, True, True)}
TEXT, STUDENTS = ([n for n, m in MODELS.items() if m[k]] for k in (2, 3))


@pytest.fixture(scope="module")
def split(): return make_split(make_sample(seed=2, n_users=200, n_items=150), seed=0)


@pytest.fixture(scope="module")
def reviews(split): return encode_reviews(split, "tfidf")


@pytest.fixture(scope="module")
def teacher(split): return fit_lightgcn(split, LightGCNConfig(epochs=2))


@pytest.fixture(scope="module")
def fitted(split, reviews, teacher): return {n: fit(n, split, reviews, teacher) for n in MODELS}


def fit(name, split, reviews, teacher, **options):
    fn, config, text, student = MODELS[name]
    return fn(split, *[reviews] * text, *[teacher] * student, config(**{"epochs": 1, **options}))


@pytest.mark.parametrize("name", MODELS)
def test_repeats_and_reads_no_test_row(split, reviews, teacher, fitted, name):
    other = replace(split, test=split.test.take(np.arange(len(split.test)) % 2 == 0))
    again = fit(name, other, replace(reviews, split_sha=other.sha), teacher)
    assert np.array_equal(again.item_emb, fitted[name].item_emb)
    assert np.array_equal(again.user_emb, fitted[name].user_emb)
    assert fitted[name].name == name and MODELS[name][1].from_dict(again.config) == MODELS[name][1](epochs=1)


@pytest.mark.parametrize("name", MODELS)
def test_text_moves_those_that_read_it(split, reviews, teacher, fitted, name):
    other = fit(name, split, replace(reviews, item=reviews.item[::-1].copy()), teacher)
    assert np.allclose(other.item_emb, fitted[name].item_emb) == (name not in TEXT)
    if name in TEXT:
        with pytest.raises(UserError, match="encode the reviews of this split"):
            fit(name, split, replace(reviews, split_sha="x"), teacher)


@pytest.mark.parametrize("name", STUDENTS)
def test_students_learn_from_their_teacher_only_where_they_are_told_to(split, reviews, teacher, fitted, name):
    other = replace(teacher, user_emb=-teacher.user_emb, score=lambda u: -teacher(u))
    assert not np.allclose(fit(name, split, reviews, other).item_emb, fitted[name].item_emb)
    alone = dict(kd_weight=0., align_weight=0.) if name == "simrec" else dict(kd_weight=0.)
    a, b = (fit(name, split, reviews, t, **alone) for t in (teacher, other))
    assert np.array_equal(a.item_emb, b.item_emb)


@pytest.mark.slow
def test_every_competing_model_beats_popularity():
    larger = make_split(make_sample(seed=2, n_users=500), seed=0)
    reviews, graph_teacher = encode_reviews(larger, "tfidf"), fit_lightgcn(larger, LightGCNConfig(epochs=8))
    popular = evaluate(fit_popularity(larger), larger).mean("NDCG@10")
    for name in MODELS:
        scorer = fit(name, larger, reviews, graph_teacher, epochs=25, patience=25)
        assert evaluate(scorer, larger).mean("NDCG@10") > 1.1 * popular, name
