"""Measure the item-item ridge against the number of items; outputs/speed/item_filter.json goes on where it stopped.

    python tools/ridge_sizes.py                        # 4,362 to 65,430 items, on a machine that does nothing else
    python tools/ridge_sizes.py --shops 2,4 --device cuda
    python tools/ridge_sizes.py --shops "" --datasets steam,ratebeer --neighbours 50,100,200,400,800
"""
import argparse
from pathlib import Path

from sharp_distill.core import numbers
from sharp_distill.experiments.sizes import measure_ridge_sizes, ridge_growth

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shops", default="2,4,9,18,30", help="bookshops side by side, 2,181 books each")
    parser.add_argument("--datasets", default="", help="data sets, on their validation parts")
    parser.add_argument("--neighbours", default="100,200")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", default=str(Path(__file__).parent.parent / "outputs/speed/item_filter.json"))
    given = parser.parse_args()
    shops, neighbours = (numbers(text, name, int) if text else () for text, name in
                         ((given.shops, "shops"), (given.neighbours, "neighbours")))
    datasets = [n.strip() for n in given.datasets.split(",") if n.strip()]
    rows = measure_ridge_sizes(given.out, shops, neighbours, given.device, datasets=datasets)
    print(ridge_growth(rows).to_string(index=False))
