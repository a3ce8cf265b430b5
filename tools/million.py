"""Make a planted set of one million reviews, dense as few are: 12,562 users, 4,575 books, about 80 purchases a user.

    python tools/million.py million.parquet
    /usr/bin/time -v papermill nbs/run.ipynb out.ipynb --cwd nbs -p dataset ../million.parquet

Tastes and reviews are those of `sample`; nothing but the counts is like any real set.
"""
import argparse

import numpy as np

from sharp_distill.core import Stopwatch, peak_mib, rng, whole_file
from sharp_distill.data.synthetic import sample_frame

USERS, BOOKS, ROWS = 12_562, 4_575, 1_010_000


def dense_frame(n_users: int = USERS, n_books: int = BOOKS, n_rows: int = ROWS, seed: int = 0): # As `sample_frame`
    "Make a bookshop with so many purchases: more are drawn, and a user's after the fifth are thinned out."
    frame = sample_frame(seed, n_users, n_books, rows_per_user=1.4 * n_rows / n_users)
    if len(frame) <= n_rows: return frame
    place = frame.groupby("user_id").cumcount().to_numpy()
    spare = np.flatnonzero(place >= 5)
    drop = rng(seed, "dense").choice(spare, min(len(frame) - n_rows, len(spare)), replace=False)
    return frame.drop(index=drop).reset_index(drop=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the Parquet file that is written")
    parser.add_argument("--share", type=float, default=1., help="of the users, books and rows, for a trial")
    given = parser.parse_args()
    with Stopwatch() as t:
        frame = dense_frame(*(round(n * given.share) for n in (USERS, BOOKS, ROWS)))
        with whole_file(given.out) as tmp: frame.to_parquet(tmp)
    users, books = (frame[c].nunique() for c in ("user_id", "item_id"))
    print(f"{given.out}: {users:,} users, {books:,} books, {len(frame):,} rows, {t.s:.0f} s, {peak_mib():.0f} MiB")
