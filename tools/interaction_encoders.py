"""Train text encoders on who chose what: one of all shops, and one without each shop, to which it is never seen.

    python tools/interaction_encoders.py encoders amazon_musical_instruments,steam,ratebeer --steps 160
    papermill nbs/carry_over.ipynb out.ipynb --cwd nbs -p window test -p datasets steam \\
        -p encoders "shipped,all shops=$PWD/encoders/all" -p trained "$PWD/encoders/without_{dataset}"

Each is a folder that every option for an encoder takes. A training that was stopped goes on where it was.
"""
import argparse

from sharp_distill.core import UserError
from sharp_distill.data.interactions import load_interactions
from sharp_distill.data.sources import bare_name
from sharp_distill.text.encoders import ReviewConfig, load_encoder
from sharp_distill.text.interaction_rows import token_rows
from sharp_distill.text.interaction_training import InteractionTrainingConfig, train_on_interactions

OPTIONS = (("--base", "shipped", "encoder to start from: shipped, a folder or a hub name"),
           ("--steps", 160, "optimiser steps of each"), ("--looks", 4, "looks at held-out items, and checkpoints"),
           ("--keep-weight", 0., "weight of staying near the starting vectors"),
           ("--device", "auto", "auto, cpu, cuda"),
           ("--only", "", "which of all and without_<set>, separated by commas; empty: every one"))


def main(words=None) -> dict: # Name -> its log
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder of the encoders")
    parser.add_argument("datasets", help="names or paths of two sets or more, separated by commas")
    for name, default, about in OPTIONS:
        parser.add_argument(name, default=default, type=type(default), help=f"{about} (default: {default})")
    given = parser.parse_args(words)
    paths = {bare_name(d.strip()): d.strip() for d in given.datasets.split(",") if d.strip()}
    if len(paths) < 2: raise UserError(f"datasets is {given.datasets!r}: expected two or more, with commas.")
    left_out = {"all": None} | {f"without_{n}": n for n in paths}
    asked = [n.strip() for n in given.only.split(",") if n.strip()] or list(left_out)
    if unknown := [n for n in asked if n not in left_out]:
        raise UserError(f"only has {unknown[0]!r}: expected some of {', '.join(left_out)}.")
    cfg = InteractionTrainingConfig(steps=given.steps, n_looks=given.looks, keep_weight=given.keep_weight,
                                    device=given.device)
    tokenizer = load_encoder(given.base, ReviewConfig(device="cpu"))[0]
    sets = {n: token_rows(load_interactions(p), n, tokenizer, cfg.texts) for n, p in paths.items()}
    logs = {}
    for name in asked:
        seen = [s for n, s in sets.items() if n != left_out[name]]
        folder, logs[name] = train_on_interactions(seen, given.base, f"{given.out}/{name}", cfg)
        table = logs[name].drop(columns="seconds").round(4).to_string(index=False)
        print(f"{folder}: held-out items, NDCG@10\n{table}", flush=True)
    return logs


if __name__ == "__main__":
    try: main()
    except UserError as e: raise SystemExit(f"error: {e}") from None
