"Rules that every figure function keeps, held against all of them: also against one that is added later."
import inspect

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from sharp_distill.plots import boards, data, results, style

ODD = "a$b^$_{c" # as a formula this stops matplotlib
MODELS = ["student_no_kd", "teacher", "student", ODD]
ENDS = dict(low=[.05, .35, .25, np.nan], high=[.15, .45, .35, np.nan])
VALUES = pd.DataFrame(dict(model=MODELS, mean=[.1, .4, .3, .2], **ENDS))
SPEED, TABLE = VALUES.assign(latency_ms=[1., 50., 2., 3.], p95_ms=[2., 80., 3., 5.]), VALUES.set_index("model")
EPOCHS = VALUES.merge(pd.DataFrame(dict(epoch=[0, 1])), how="cross").assign(valid=.1, fidelity=.5)
SIZES = SPEED.merge(pd.DataFrame(dict(x=[10, 1000])), how="cross")
USERS = VALUES[["model"]].merge(pd.DataFrame(dict(value=[0., .5, 1.])), how="cross")
VARIANTS = pd.DataFrame(dict(variant=["full model", ODD, "none"], mean=[0., 3., -4.],
                             low=[0., 2., np.nan], high=[0., 4., np.nan]))
SWEEP = pd.DataFrame(dict(param=[ODD] * 2 + ["lr"] * 2, value=[1, 2, .1, .2], mean=[.2, .3, .3, .2],
                          chosen=[True, False] * 2))
RUNS = pd.DataFrame({ODD: [1, 2], "retention": [.9, .95], "latency_ms": [1., 2.], "chosen": [True, False]})
ENCODERS = pd.DataFrame(dict(dataset=ODD, encoder=["words", ODD], mean=[100., 90.], low=[95., 85.],
                             high=[105., 95.], few=[False, True]))
RATIOS = pd.DataFrame(dict(name=[ODD, "b"], ratio=[.5, 20.], group=[ODD, "c"]))
LOG = pd.DataFrame(dict(step=[0, 1], quantity=ODD, value=[.1, .2]))
PAIRS = pd.DataFrame(dict(a=["student", "student", ODD], b=[ODD, "text", "text"], cka=[.9, .5, .1]))
REGIMES = pd.concat([SPEED.assign(regime=r, p50_ms=SPEED["latency_ms"]) for r in ("incremental", ODD)])
GROUPS = pd.DataFrame({"tail": [.1, .2, .3, .1], ODD: [.2, .3, .4, .2]}, index=MODELS)
TAIL = pd.DataFrame(dict(side=["users"] * 2 + ["items"] * 2, place=[1., 100.] * 2, rows=[9, 1, 5, 2]))
LENGTHS, RATINGS = pd.DataFrame(dict(words=[0, 1, 2], rows=[3, 2, 1])), pd.Series({1.: 2, 5.: 9})
WAITS = pd.DataFrame(dict(request=[ODD] * 2, clients=[1, 8], p50_ms=[1., 9.], p95_ms=[2., 20.]))
MONTHS = pd.Series([3, 4], index=pd.period_range("2020-01", periods=2, freq="M"))


def case(n_axes, *args, **options): return n_axes, args, options


CASES = {
    "plot_quality": case(1, VALUES), "plot_user_distribution": case(1, USERS), "plot_latency": case(1, SPEED),
    "plot_tradeoff": case(1, SPEED.assign(dataset=ODD)), "plot_history": case(2, EPOCHS),
    "plot_retention": case(1, pd.DataFrame(dict(dataset=[ODD], mean=[.9])), published={ODD: .94}),
    "plot_sensitivity": case(2, SWEEP, references={"teacher": .4, ODD: .1}), "plot_differences": case(1, VARIANTS),
    "plot_growth": case(2, SIZES, {"mean": ODD, "latency_ms": "ms"}, title=ODD, log=("latency_ms",)),
    "plot_hyperparameters": case(2, RUNS, ODD),
    "plot_board": case(1, TABLE.assign(group=ODD, **{"user low": .1, "user high": .4})),
    "plot_search": case(1, TABLE.rename(columns=dict(low="default_valid", mean="best_valid"))),
    "plot_groups": case(1, GROUPS), "plot_regimes": case(1, REGIMES),
    "plot_new_items": case(2, TABLE.rename(columns=dict(low="new items", mean="full catalogue")), title=ODD),
}
WITHOUT_STUDENT = {
    "plot_training": case(1, LOG, title=ODD, reference=(ODD, .3)), "plot_encoders": case(1, ENCODERS),
    "plot_alignment": case(1, PAIRS), "plot_ratios": case(1, RATIOS), "plot_tail": case(1, TAIL),
    "plot_lengths": case(1, LENGTHS), "plot_ratings": case(1, RATINGS), "plot_times": case(1, MONTHS),
    "plot_card": case(4, TAIL, LENGTHS, RATINGS, MONTHS),
    "plot_clients": case(1, WAITS, title=ODD),
}
FIGURES = {name: f for module in (boards, data, results) for name, f in inspect.getmembers(module, inspect.isfunction)
           if name.startswith("plot_")}


def colours(axes):
    "Every colour that something is drawn in."
    lines = [l.get_color() for ax in axes for l in ax.lines]
    areas = [np.atleast_2d(p.get_facecolor()) for ax in axes for p in (*ax.patches, *ax.collections)]
    return {to_hex(c) for c in lines + [c for area in areas for c in area if len(c)]}


def test_every_figure_function_is_tried(): assert CASES.keys() | WITHOUT_STUDENT.keys() == FIGURES.keys()


@pytest.mark.parametrize("name", [*CASES, *WITHOUT_STUDENT])
def test_a_figure_keeps_the_rules(name):
    plt.close("all")
    n_axes, args, options = (CASES | WITHOUT_STUDENT)[name]
    figure, axes = plt.subplots(1, n_axes, squeeze=False)
    many, before = "axes" in inspect.signature(FIGURES[name]).parameters, dict(plt.rcParams)
    drawn = np.ravel(FIGURES[name](*args, **{"axes": axes[0]} if many else {"ax": axes[0, 0]}, **options))
    assert dict(plt.rcParams) == before                                         # no global state
    assert list(drawn) == list(axes[0]) and plt.get_fignums() == [figure.number] # on the axes passed, on no other
    figure.canvas.draw()                                                        # names from data are no formulas
    for ax in drawn:
        bars = [p for p in ax.patches if isinstance(p, Rectangle)]
        assert not bars or ax.get_xscale() == ax.get_yscale() == "linear"       # no bars on a log axis
        assert all(0 in (b.get_x(), b.get_y()) for b in bars)                   # bars from zero
        assert not {"student_no_kd", "latency_ms"} & {t.get_text() for t in ax.findobj(Text)} # labels, not keys
    if name in CASES: assert style.model_style("student")["color"] in colours(drawn)
    plt.close("all")
