"""SHARP-Distill: hypergraphs and reviews distilled into a one-layer recommender. Every module is exported from a notebook in nbs/."""

__version__ = "0.1.0"
__all__ = ["main", "load_and_split_data", "create_hypergraphs_and_incidence_matrices", "initialize_models", "train_models"]


def __getattr__(name):
    "Load the quick-start functions when they are first asked for: importing the package itself stays instant."
    if name in __all__:
        from .app import quickstart
        return getattr(quickstart, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
