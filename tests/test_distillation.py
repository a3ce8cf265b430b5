"""Teacher, student, distillation and the published forms: what their notebooks do not assert."""
import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sharp_distill.core import Config, UserError
from sharp_distill.experiments.grid import TARGETS, Change, config_from, make_job
from sharp_distill.experiments.run import RunConfig
from sharp_distill.data.evaluation import evaluate
from sharp_distill.data.interactions import make_sample
from sharp_distill.data.split import make_split
from sharp_distill.models import teacher as teacher_module
from sharp_distill.models.distillation import (
    NoDistillationConfig, StudentConfig, TargetConfig, distill, gather_targets)
from sharp_distill.models.published import PublishedTargetConfig, with_switches
from sharp_distill.models.rank_distillation import RankTargetConfig
from sharp_distill.models.student import student_scorer, user_row
from sharp_distill.models.teacher import PartsConfig, TeacherConfig, teacher_scorer, train_teacher
from sharp_distill.models import training
from sharp_distill.models.training import History
from sharp_distill.text.reviews import encode_reviews

SHORT = dict(epochs=2, batch_size=256)
SMALL = StudentConfig(emb_dim=8, epochs=2, batch_size=64)


@pytest.fixture(scope="module")
def small(): # A split and its reviews
    split = make_split(make_sample(seed=2, n_users=150, n_items=80), seed=0)
    return split, encode_reviews(split, "tfidf")


@pytest.fixture(scope="module")
def teacher(small): return train_teacher(*small, TeacherConfig(emb_dim=8, **SHORT))


@pytest.fixture(scope="module")
def printed(small): # Teacher and student with every setting of the paper but the epochs
    teacher = train_teacher(*small, TeacherConfig.published().replace(epochs=1))
    return teacher, distill(teacher, *small, StudentConfig.published().replace(epochs=1), TargetConfig.published())


def same(a, b): return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("user_emb", "item_emb"))


def plain(x):
    "Say whether a value is made of arrays, configs, dictionaries and numbers only."
    if dataclasses.is_dataclass(x): return all(plain(getattr(x, f.name)) for f in dataclasses.fields(x))
    if isinstance(x, dict): return all(map(plain, x.values()))
    if isinstance(x, (list, tuple)): return all(map(plain, x))
    return x is None or sp.issparse(x) or isinstance(x, (np.ndarray, np.generic, Config, History, int, float, str))


def test_states_are_plain_values(small, teacher, printed):
    targets = gather_targets(teacher, 8)
    student = distill(teacher, *small, SMALL, targets=targets)
    assert all(map(plain, (teacher, targets, student, *printed)))


def test_the_papers_settings_train_and_rank_beside_the_module(small, printed):
    split, reviews = small
    teacher, student = printed
    assert teacher.head and student.head and teacher.item_filter is None
    scorers = teacher_scorer(teacher), student_scorer(student)
    for scorer, state in zip(scorers, printed):
        assert np.isfinite(evaluate(scorer, split, "valid").mean()) and scorer.user_emb is None
        assert scorer.n_params > state.user_emb.size + state.item_emb.size
        some = np.array([40, 3, 77])
        assert np.allclose(scorer(some), scorer(np.arange(split.n_users))[some], atol=1e-5)     # whatever the batch
    u = 5
    row = user_row(student, split.train.to_csr()[u].indices, reviews.user[u], is_new=False)
    assert np.allclose(row, student.user_emb[u], atol=1e-4)


def test_shared_targets_and_a_shared_ridge_change_nothing(small, teacher):
    targets = gather_targets(teacher, 8)
    arrays = (targets.users, targets.items, targets.soft.items, targets.soft.scores)
    before = [a.copy() for a in arrays]
    for target_cfg in (TargetConfig(), PublishedTargetConfig(gamma=.5, contrast="modified")):
        assert same(distill(teacher, *small, SMALL, target_cfg), distill(teacher, *small, SMALL, target_cfg, targets))
    assert all(np.array_equal(a, b) for a, b in zip(before, arrays))
    ridge = teacher_module.fit_item_filter(*small, teacher_module.teacher_sessions(small[0]))
    late = dataclasses.replace(ridge, train_s=1000.)
    again = train_teacher(*small, teacher.config, item_filter=late)
    assert same(again, teacher) and (again.item_filter != teacher.item_filter).nnz == 0
    assert again.weights == teacher.weights and teacher.train_s < 1000
    assert again.train_s > 1000 + again.history.train_s                # and the choice of the weight


@pytest.mark.parametrize("large", [False, True])
def test_a_gpus_way_reaches_what_arrays_reach(small, monkeypatch, large):
    "Tables that stay on a device: this processor plays the GPU, so that only the order of sums differs."
    import sharp_distill.device as device
    import sharp_distill.models.item_filter as ridge
    import sharp_distill.models.teacher_products as products
    from sharp_distill.models.baselines import LightGCNConfig, fit_lightgcn, fit_rp3beta
    from sharp_distill.text import likeness
    if large:
        split = make_split(make_sample(seed=2, n_users=150, n_items=260), seed=0)
        small = split, encode_reviews(split, "tfidf")
        for module in (ridge, likeness): monkeypatch.setattr(module, "WHOLE", 32)
        monkeypatch.setattr(likeness.text_likeness, "__defaults__", ("cpu", 32, 16))
        monkeypatch.setattr(ridge.nearest_items, "__defaults__", (3., 32))
        monkeypatch.setattr(ridge, "SOME_ITEMS", 40), monkeypatch.setattr(products, "BLOCKS_UP_TO", 0)
        monkeypatch.setattr(device, "MOST_DENSE", 0)
    split = small[0]
    def everything():
        teacher = train_teacher(*small, TeacherConfig(emb_dim=8, **SHORT))
        targets = gather_targets(teacher, 8)
        student = distill(teacher, *small, SMALL, targets=targets)
        alone = distill(None, *small, NoDistillationConfig(emb_dim=8, epochs=2, batch_size=64, n_negatives=20))
        lightgcn = fit_lightgcn(split, LightGCNConfig(emb_dim=8, epochs=2, batch_size=256, n_negatives=20))
        scorers = teacher_scorer(teacher), student_scorer(student), student_scorer(alone), lightgcn, fit_rp3beta(split)
        values = [student.valid["start"], student.valid["fidelity"], teacher.valid["filter"],
                  np.abs(targets.users @ targets.items.T).mean(), *(evaluate(s, split).mean() for s in scorers)]
        return values, teacher.valid["filter_options"], scorers
    values, options, scorers = everything()
    assert not any(s.on_device for s in scorers)
    monkeypatch.setattr(device, "HELD", ("cuda", "cpu"))
    held, chosen, scorers = everything()
    assert all(s.on_device for s in scorers) and chosen == options
    assert np.allclose(held, values, atol=.01), (held, values)


def test_a_device_without_memory_says_what_to_lower(small, monkeypatch):
    def loss(*a): raise torch.OutOfMemoryError("Tried to allocate 9.00 GiB")
    monkeypatch.setattr(teacher_module, "teacher_loss", loss)
    with pytest.raises(UserError, match="batches of 256 rows: lower batch_size, such as to 64, or choose device='cpu'"):
        train_teacher(*small, TeacherConfig(emb_dim=8, **SHORT))


def test_a_large_catalogue_takes_factors_and_drawn_negatives(small, teacher, monkeypatch):
    import sharp_distill.models.teacher_products as products
    import sharp_distill.models.training as training
    whole = gather_targets(teacher, 8, TargetConfig(score_exponent=1.))
    monkeypatch.setattr(products, "BLOCKS_UP_TO", 0)
    monkeypatch.setattr(products, "ScoreBlocks", lambda *a: pytest.fail("users times items scores were made"))
    large = gather_targets(teacher, 8, TargetConfig(score_exponent=1.5))
    product = lambda t: t.users @ t.items.T
    assert np.abs(product(large) - product(whole)).max() < .02 * np.abs(product(whole)).max()
    monkeypatch.setattr(training, "ALL_ITEMS", 10), monkeypatch.setattr(training, "DRAWN", 7)
    assert len(training.sample_candidates(11, 0, torch.Generator())) == 7
    assert len(training.sample_candidates(10, 0, torch.Generator())) == 10


def test_a_teacher_continues_from_its_checkpoint(small, tmp_path, monkeypatch):
    cfg, path = TeacherConfig(parts=PartsConfig(item_filter="none"), emb_dim=8, epochs=3, batch_size=256), tmp_path / "teacher.safetensors"
    whole, calls, loss = train_teacher(*small, cfg), [], teacher_module.teacher_loss
    def stops(*a):
        calls.append(1)
        if len(calls) > steps: raise KeyboardInterrupt
        return loss(*a)
    steps = 2 * -(-len(small[0].train) // 256) # the third epoch never ends
    monkeypatch.setattr(teacher_module, "teacher_loss", stops)
    with pytest.raises(KeyboardInterrupt): train_teacher(*small, cfg, path)
    monkeypatch.undo()
    resumed = train_teacher(*small, cfg, path)
    assert same(whole, resumed) and len(resumed.history.rows) == 3
    other = make_split(make_sample(seed=2, n_users=150, n_items=80), seed=1)
    with pytest.raises(UserError, match="other options"):
        train_teacher(other, encode_reviews(other, "tfidf"), cfg, path)


@pytest.mark.parametrize("options", [dict(n_negatives=20), dict(precision="bfloat16"), dict(loss="bpr"),
                                     dict(use_text=False)])
def test_options_of_the_student_train_to_finite_rows(small, teacher, options):
    state = distill(teacher, *small, SMALL.replace(**options), TargetConfig(kd_weight=.5))
    assert np.isfinite(state.user_emb).all() and len(state.history.rows) == 2
    assert state.history.rows[-1]["loss"] < state.history.rows[0]["loss"]


def test_a_student_follows_its_teacher_further_than_hard_labels_do(small, teacher):
    cfg = StudentConfig(emb_dim=8, epochs=15, batch_size=64)
    soft, hard = (distill(teacher, *small, cfg, t) for t in (TargetConfig(), TargetConfig(soft_labels="none")))
    assert soft.valid["fidelity"] > hard.valid["fidelity"] + .02 and soft.target_config == TargetConfig()
    without = distill(None, *small, StudentConfig.without_distillation().replace(emb_dim=8, epochs=2))
    assert without.target_config is None and "fidelity" not in without.valid
    assert without.n_params == soft.n_params and without.config.select_by == "validation"


@pytest.mark.parametrize("switch", [dict(soft_labels="published"), dict(contrast="published"),
                                    dict(contrast="modified"), dict(gamma=.5)])
def test_each_switch_changes_the_first_loss(small, teacher, switch):
    cfg, off = SMALL.replace(epochs=1), TargetConfig(init="random", kd_weight=.5)
    loss = [distill(teacher, *small, cfg, t).history.rows[0]["loss"] for t in (off, with_switches(off, **switch))]
    assert abs(loss[0] - loss[1]) > 1e-3


@pytest.mark.parametrize("ranks", ["rrd", "unkd"])
def test_losses_on_ranks_teach_the_order(small, teacher, ranks):
    form = RankTargetConfig(init="random", ranks=ranks, n_drawn=20)
    cfg = StudentConfig(emb_dim=8, epochs=12, batch_size=64)
    taught, untaught = (distill(teacher, *small, cfg.replace(epochs=n), form) for n in (12, 0))
    losses = [r["ranks"] for r in taught.history.rows]
    assert losses[-1] < losses[0] - .1 and taught.valid["fidelity"] > 1.5 * untaught.valid["fidelity"]
    assert type(taught.target_config) is RankTargetConfig


def test_experts_are_trained_and_thrown_away(small, teacher, tmp_path):
    form = RankTargetConfig(experts=2, n_drawn=20)
    cfg = StudentConfig(emb_dim=8, epochs=4, batch_size=64)
    whole = distill(teacher, *small, cfg, form)
    errors = [r["experts"] for r in whole.history.rows]
    assert errors[-1] < .9 * errors[0] and whole.n_params == distill(teacher, *small, cfg.replace(epochs=0)).n_params
    path, calls, write = tmp_path / "student", [], training.save_checkpoint
    def stop(*given):
        write(*given); calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt): distill(teacher, *small, cfg, form, checkpoint=path)
    resumed = distill(teacher, *small, cfg, form, checkpoint=path)
    assert np.array_equal(resumed.user_emb, whole.user_emb) and [r["experts"] for r in resumed.history.rows] == errors


def test_a_grid_finds_the_form_by_its_options():
    job = make_job(RunConfig(), Change("ranks", targets=dict(ranks="unkd")))
    assert config_from(job.targets, *TARGETS) == RankTargetConfig(ranks="unkd")
    assert config_from(make_job(RunConfig()).targets, *TARGETS) == TargetConfig()


@pytest.mark.parametrize("cfg", [TeacherConfig.published(), StudentConfig.published(), TargetConfig.published(),
                                 NoDistillationConfig(lr=.1), RankTargetConfig(ranks="unkd", experts=3)])
def test_configs_travel_as_dictionaries(cfg):
    assert type(cfg).from_dict(cfg.to_dict()) == cfg and cfg.sha() != type(cfg)().sha()


def test_without_a_teacher_fidelity_is_no_choice():
    with pytest.raises(UserError, match="expected one of 'validation'"): NoDistillationConfig(select_by="fidelity")
