"""Measure encoders, and with --datasets teacher and student, on a GPU: writes outputs/speed/gpu.json; offline."""
import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sharp_distill.core import Stopwatch, machine, peak_mib, write_json  # noqa: E402
from sharp_distill.data.synthetic import sample_frame  # noqa: E402
from sharp_distill.text import encoders  # noqa: E402
from sharp_distill.text.encoders import (  # noqa: E402
    ReviewConfig, clean_text, encode_texts, load_encoder, tokenise, tokenise_parts)
from sharp_distill.text.cores import cores, several  # noqa: E402

BASE = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
            relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False,
            max_position_embeddings=512, type_vocab_size=0)


def sample_texts(n: int) -> list: # Distinct reviews of the embedded shop, with other seeds until there are enough
    "Draw n reviews without reading a file."
    found, seed = {}, 0
    while len(found) < n:
        found.update(dict.fromkeys(t for t in map(clean_text, sample_frame(seed)["review"]) if t))
        seed += 1
    return list(found)[:n]


def base_encoder(tokenizer, cfg): # A DeBERTa of base size with drawn weights; speed does not depend on their values
    from transformers import DebertaV2Config, DebertaV2Model
    device = encoders.pick_device(cfg.device)
    with torch.device(device): model = DebertaV2Model(DebertaV2Config(vocab_size=len(tokenizer), **BASE))
    return model.eval().to(device, getattr(torch, cfg.precision) if device.type == "cuda" else None)


def gpu_mib() -> int: # MiB; 0 without a GPU
    "Return the most memory of the GPU that tensors took since this was last asked."
    if not torch.cuda.is_available(): return 0
    most = torch.cuda.max_memory_allocated() / 2**20
    torch.cuda.reset_peak_memory_stats()
    return round(most)


def row(what: str, n: int, s: float, cfg: ReviewConfig, **more) -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and cfg.device != "cpu" else "cpu"
    found = dict(what=what, reviews=n, seconds=round(s, 3), reviews_per_s=round(n / s), precision=cfg.precision,
                 peak_mib=round(peak_mib()), gpu_mib=gpu_mib(), device=device, **more)
    print(found, flush=True)
    return found


def timed(fn, again: int = 2) -> float: # Seconds of the fastest call, after one that warms up
    best = float("inf")
    for k in range(again + 1):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        with Stopwatch() as t: fn()
        if k: best = min(best, t.s)
    return best


def tokenising(tokenizer, texts, cfg) -> list:
    "Tokenising alone: one call with the library's threads, and processes where they are worth their start."
    rows = [row("tokenising", len(texts), timed(lambda: tokenise(tokenizer, texts, cfg), 1), cfg,
                threads=os.cpu_count())]
    if several(len(texts)):
        parts = [texts[at:at + 2048] for at in range(0, len(texts), 2048)]
        s = timed(lambda: list(tokenise_parts(tokenizer, parts, cfg)))
        rows.append(row("tokenising, processes", len(texts), s, cfg, threads=cores()))
    return rows


def encoding(texts: list, device: str, n_base: int) -> list:
    "Encode with the shipped encoder and with one of base size, in float32 and in half."
    rows, here = [], ReviewConfig(device="cpu")
    on_cpu = encoders.pick_device(device).type == "cpu" # where half precision is slower than none
    exact = encode_texts(texts[:2000], *load_encoder("shipped", here), here)
    for precision in ("float32",) if on_cpu else ("float32", "float16", "bfloat16"):
        cfg = ReviewConfig(device=device, precision=precision)
        tokenizer, model = load_encoder("shipped", cfg)
        if precision == "float32": rows += tokenising(tokenizer, texts, cfg)
        off = float(abs(encode_texts(texts[:2000], tokenizer, model, cfg) - exact).max())
        s = timed(lambda: encode_texts(texts, tokenizer, model, cfg))
        rows.append(row("shipped encoder", len(texts), s, cfg, off_from_cpu=off))
        if not n_base: continue
        base, some = base_encoder(tokenizer, cfg), texts[:n_base]
        s = timed(lambda: encode_texts(some, tokenizer, base, cfg), again=1)
        rows.append(row("DeBERTa of base size", n_base, s, cfg))
    return rows


def training(dataset: str, device: str) -> list:
    "Train teacher and student with the defaults, and say what each part took and reached."
    from sharp_distill.data.evaluation import evaluate
    from sharp_distill.data.interactions import load_interactions
    from sharp_distill.data.split import make_split
    from sharp_distill.models.distillation import StudentConfig, TargetConfig, distill, gather_targets
    from sharp_distill.models.item_filter import fit_item_filter
    from sharp_distill.models.student import student_scorer
    from sharp_distill.models.teacher import TeacherConfig, teacher_scorer, teacher_sessions, train_teacher
    from sharp_distill.text.reviews import encode_reviews
    rows, cfg, done = [], TeacherConfig(device=device), {}
    def step(what, fn, **more):
        with Stopwatch() as t:
            done[what] = fn()
            if torch.cuda.is_available(): torch.cuda.synchronize()
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and device != "cpu" else "cpu"
        rows.append(dict(dataset=Path(dataset).stem, what=what, seconds=round(t.s, 2), gpu_mib=gpu_mib(),
                         device=gpu, **more))
        print(rows[-1], flush=True)
        return done[what]
    split = step("reading and splitting", lambda: make_split(load_interactions(dataset)))
    reviews = step("words", lambda: encode_reviews(split, "tfidf", ReviewConfig(device=device)))
    given = teacher_sessions(split, cfg), cfg.parts.session_weight
    ridge = step("item-item ridge", lambda: fit_item_filter(split, reviews, *given, device=device))
    teacher = step("networks and fusion", lambda: train_teacher(split, reviews, cfg, item_filter=ridge))
    targets = step("targets", lambda: gather_targets(teacher, StudentConfig().emb_dim))
    student = step("student", lambda: distill(teacher, split, reviews, StudentConfig(device=device), TargetConfig(),
                                              targets))
    for scorer in (teacher_scorer(teacher), student_scorer(student)):
        found = step(f"test of the {scorer.name}", lambda s=scorer: evaluate(s, split))
        rows[-1] |= dict(ndcg=round(found.mean(), 4))
    rows[-1] |= dict(n_items=split.n_items, n_users=split.n_users, options=ridge.options, valid=teacher.valid,
                     epochs=len(teacher.history.rows), student_valid=student.valid, peak_mib=round(peak_mib()))
    print(rows[-2:], flush=True)
    return rows


def measure_gpu(device: str = "auto", n: int = 131_072, n_base: int = 24_576) -> list:
    "All rows of outputs/speed/gpu.json."
    return encoding(sample_texts(n), device, n_base)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--reviews", type=int, default=131_072)
    parser.add_argument("--base-reviews", type=int, default=24_576)
    parser.add_argument("--datasets", nargs="*", default=[], help="names or paths, such as sample_cds")
    parser.add_argument("--out", default=str(ROOT / "outputs/speed/gpu.json"))
    given = parser.parse_args()
    rows = measure_gpu(given.device, given.reviews, given.base_reviews) if given.reviews else []
    write_json(given.out, dict(rows=rows, machine=machine()))
    for name in given.datasets:
        rows += training(name, given.device)
        write_json(given.out, dict(rows=rows, machine=machine()))
