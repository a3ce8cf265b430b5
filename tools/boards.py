"""Bring a leaderboard up to date from a shell; called again, it goes on where it stopped.

    python tools/boards.py sample --split temporal --cuts 2 --models popularity,ease --trials 4 --seeds 2
    python tools/boards.py steam --split temporal --cuts 3 --trials 30 --tune-s 600 --only-cuts 0,1 --limit-s 3000

Several processes may work on one leaderboard at the same time, on different models or different windows.
"""
import argparse
import os
import time
from pathlib import Path

from sharp_distill.core import UserError, numbers
from sharp_distill.experiments.board import BoardConfig, model_names, run_board
from sharp_distill.experiments.rows import board_frame, is_timed, temporal_frame

OPTIONS = (("--split", "temporal", "protocol of the split"), ("--cuts", 3, "test windows of a temporal split"),
           ("--eval-targets", "all", "held-out rows of a user that count under a temporal split"),
           ("--models", "all", "models, separated by commas"), ("--trials", 12, "settings a model, over all windows"),
           ("--tune-s", 60., "seconds of trials a model and window, after which no further one begins"),
           ("--seeds", 5, "rows of a trained model, in each window"), ("--encoder", "tfidf", "review vectors"),
           ("--min-rating", 0., "leave out lower ratings; 0 keeps all"),
           ("--limit-s", float("inf"), "seconds after which nothing is begun"),
           ("--only-cuts", "", "windows of this process, such as 0,1; empty: all"),
           ("--board-dir", str(Path(__file__).parent.parent / "outputs/leaderboard"), "folder of the leaderboards"))


def main(words=None) -> list: # The rows
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="name, or path of a file")
    for name, default, about in OPTIONS:
        parser.add_argument(name, default=default, type=type(default), help=f"{about} (default: {default})")
    given, began = parser.parse_args(words), time.time()
    cfg = BoardConfig.from_dict(dict(
        dataset=given.dataset, split=given.split, cuts=given.cuts, eval_targets=given.eval_targets,
        encoder=given.encoder, min_rating=given.min_rating, n_trials=given.trials, tune_s=given.tune_s,
        n_seeds=given.seeds))
    cuts, names = numbers(given.only_cuts, "only-cuts", int) if given.only_cuts else None, model_names(given.models)
    report = lambda line: print(f"{time.time() - began:6.0f} s  {line}", flush=True)
    rows = run_board(given.board_dir, cfg.name, cfg.fits(cuts), names, cfg.budget, given.limit_s, report)
    table = temporal_frame(rows) if is_timed(rows) else board_frame(rows)[["seeds", "mean", "low", "high"]]
    print(table.round(4).to_string())
    return rows


if __name__ == "__main__":
    os.environ.setdefault("SHARP_DISTILL_QUIET", "1") # lines, no bars
    try: main()
    except UserError as e: raise SystemExit(f"error: {e}") from None
