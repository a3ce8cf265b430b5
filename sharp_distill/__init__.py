"""SHARP-Distill: hypergraphs and reviews distilled into a one-layer recommender; every module comes from a notebook."""

__version__ = "0.1.0"

PUBLIC = { # module -> names that stand here; they stay when a module moves
    "core": "UserError",
    "data.sources": "datasets",
    "data.interactions": "Interactions from_frame load_interactions make_sample",
    "data.split": "Split make_split split_from_column split_from_files split_from_parts",
    "data.evaluation": "EvalResult Scorer compare evaluate",
    "text.encoders": "ReviewConfig download_encoder",
    "text.reviews": "ReviewEmbeddings encode_reviews",
    "models.baselines": "LightGCNConfig",
    "models.teacher": "TeacherConfig teacher_scorer train_teacher",
    "models.student": "student_scorer",
    "models.distillation": "DistilledConfig NoDistillationConfig StudentConfig TargetConfig distill",
    "models.registry": "Fits Method fit_method method methods register",
    "serve.recommender": "Recommender build_recommender",
    "experiments.run": "RunConfig",
    "app.front": "FittedModel fit load",
    "app.served": "Served",
    "app.quickstart": "create_hypergraphs_and_incidence_matrices evaluate_model initialize_models load_and_split_data "
                      "main train_lightgcn train_models",
    "app.formulas": "build_item_user_incidence build_user_item_incidence compute_hypergraph_position "
                    "contrastive_learning contrastive_losses generate_soft_labels get_temperature info_nce_loss",
    "app.layers": "CompactGCN DisentangledAttention HypergraphNN train_with_attention_config",
    "app.options": "translate_config",
}
_MODULE = {name: module for module, names in PUBLIC.items() for name in names.split()}
__all__ = sorted(_MODULE)


def __getattr__(name):
    "Load a public name when it is first asked for: importing the package itself stays instant."
    if name not in _MODULE: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})
