"""A student that reads time: asked at a later moment, saved with its times, and rows that are added for good."""
import dataclasses

import numpy as np
import pandas as pd
import pytest
from conftest import refused

from sharp_distill.data.interactions import make_sample
from sharp_distill.data.split import make_split
from sharp_distill.data.time import decayed_popularity
from sharp_distill.models.distillation import StudentConfig, distill
from sharp_distill.models.teacher import PartsConfig, TeacherConfig, train_teacher
from sharp_distill.serve.recommender import Recommender, build_recommender
from sharp_distill.text.reviews import encode_reviews


@pytest.fixture(scope="module")
def timed():
    "A student that reads time, of a small shop, with the train rows it knows."
    split = make_split(make_sample(seed=3, n_users=150, n_items=60), "temporal")
    reviews = encode_reviews(split, "tfidf")
    parts = PartsConfig(half_life=90., trend_half_life=30., weights="ridge=1,networks=1,trend=0.5", ridge=100.,
                        text_weight=1., n_neighbours=20, sequence="none")
    teacher = train_teacher(split, reviews, TeacherConfig(emb_dim=8, epochs=1, parts=parts))
    state = distill(teacher, split, reviews, StudentConfig(emb_dim=8, epochs=1))
    return build_recommender(state, split.train), split, state


def test_a_student_that_reads_time_is_asked_later_and_keeps_its_times(timed, tmp_path):
    rec, split, state = timed
    assert rec.half_life == 90 and rec.trend_weight and rec.at == int(split.train.timestamp.max()) + 1
    who, month = list(split.train.user_ids[:20]), 30 * 86_400
    now, then = rec.recommend(who, 5), rec.recommend(who, 5, at=rec.at)
    assert now["item_id"].tolist() == then["item_id"].tolist()
    assert rec.recommend(who, 5, at=rec.at + 20 * month)["score"].tolist() != now["score"].tolist()
    loaded = Recommender.load(rec.save(tmp_path / "student"))
    assert np.array_equal(loaded.times, rec.times)
    later = dict(k=5, at=rec.at + month)
    assert loaded.recommend(who, **later).equals(rec.recommend(who, **later))
    assert "expected a later moment" in refused(rec.recommend, who, at=rec.at - 1)
    assert "expected unix seconds or a date" in refused(rec.recommend, who, at="soon")
    bare = dataclasses.replace(rec, facts={k: v for k, v in rec.facts.items() if k != "half_life"})
    assert "reads no time" in refused(bare.recommend, who, at=rec.at + 1)


def test_rows_that_are_added_count_as_if_they_had_been_there(timed):
    rec, split, state = timed
    day = 86_400
    user, new = split.train.user_ids[0], str(split.train.user_ids[0]) + "-new"
    item = split.train.item_ids[int(np.setdiff1d(np.arange(60), rec.train[0].indices)[0])]
    more = rec.add_interactions(pd.DataFrame(dict(user_id=[user, new], item_id=[item, item],
                                                  timestamp=[rec.at + day, rec.at + 2 * day])))
    assert more.at == rec.at + 2 * day + 1 and len(more.user_ids) == len(rec.user_ids) + 1
    assert item not in more.recommend(user, 60)["item_id"].tolist() and rec.train.nnz + 2 == more.train.nnz
    popular = decayed_popularity(split.train, 30., more.at)
    popular[rec.item_number[item]] += 2 ** (-(day + 1) / day / 30) + 2 ** (-1 / day / 30)
    assert np.allclose(more.item_emb[:, -1], (popular - popular.mean()) / popular.std(), atol=1e-4)
    once = rec.fold_in([item], user)[0]                         # the same purchase, made at the moment of training
    at_once = rec.add_interactions(pd.DataFrame(dict(user_id=[user], item_id=[item], timestamp=[rec.at - 1])))
    assert np.allclose(at_once.user_emb[0], once, atol=1e-4)
    other = np.flatnonzero(rec.train[1:, rec.item_number[item]].toarray()[:, 0])[0] + 1
    assert not np.allclose(at_once.user_emb[other], rec.user_emb[other], atol=1e-7), "the item's degree has grown"
    strange = pd.DataFrame(dict(user_id=[user], item_id=["nothing"], timestamp=[1]))
    assert "unknown item" in refused(rec.add_interactions, strange)
    assert "no column timestamp" in refused(rec.add_interactions, pd.DataFrame(dict(user_id=[user], item_id=[item])))
