"""The original README: its snippets word for word, its dictionaries, and the public names of the package."""
import subprocess
import sys
import warnings

import pytest

import sharp_distill

pytestmark = pytest.mark.xdist_group("quickstart") # one training for all
SETUP = "from sharp_distill import *"
CUSTOM_DATASET = """
# Load and split data
train_data, validation_data, test_data = load_and_split_data(interactions_path)

# Create hypergraph incidence matrices
user_hypergraph, item_hypergraph, user_to_index, item_to_index = create_hypergraphs_and_incidence_matrices(train_data)

# Initialize models
lightgcn_model, hypergraph_model, mlp_model = initialize_models(num_nodes, user_hypergraph.shape[1])

# Train with knowledge distillation
mlp_model, hypergraph_model = train_models(
    mlp_model, hypergraph_model, 
    user_hypergraph, item_hypergraph
)
"""
MODEL_PARAMETERS = """
# Hypergraph Neural Network
hypergraph_config = {
    'input_dim': 768,        # DeBERTa embedding dimension
    'hidden_dim': 64,        # HGNN hidden dimension  
    'output_dim': 64,        # Final embedding dimension
    'T_max': 10.0,          # Maximum temperature
    'T_min': 1.0,           # Minimum temperature
    'total_epochs': 200      # Training epochs
}

# CompactGCN Student
compactgcn_config = {
    'input_dim': 64,         # Input embedding dimension
    'hidden_dim': 64,        # Hidden layer dimension
    'num_layers': 1,         # Single layer for efficiency
    'activation': None       # No non-linear activation
}

# Knowledge Distillation
distillation_config = {
    'temperature': 1.0,       # Soft label temperature
    'contrastive_temp': 0.1,  # Contrastive learning temperature
    'alpha': 0.5,            # Embedding vs positional similarity weight
    'gamma': 0.5,            # Interpolation coefficient
    'lambda_1': 1.0,         # KL divergence loss weight
    'lambda_2': 1.0,         # User contrastive loss weight  
    'lambda_3': 1.0          # Item contrastive loss weight
}
training_config = {
    'learning_rate': 0.001,
    'batch_size': 256,
    'epochs': 200,
    'reg_lambda': 0.001,
    'gamma': 0.5  # Interpolation factor
}
"""
CUSTOM_EXPERIMENT = """
# Test disentangled attention impact
configs = ['content_only', 'position_only', 'full_disentangled']
results = []

for config in configs:
    model = train_with_attention_config(config)
    metrics = evaluate_model(model, test_data)
    results.append(metrics)
"""


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    "The names of a person who has run the README's custom data set on a small CSV."
    from sharp_distill.data.interactions import make_sample
    path = tmp_path_factory.mktemp("readme") / "dataset.csv"
    make_sample(n_users=120, n_items=60).to_frame()[["user_id", "item_id", "review"]].to_csv(path, index=False)
    names = dict(interactions_path=str(path), num_nodes=180)
    exec(SETUP + CUSTOM_DATASET + MODEL_PARAMETERS, names)
    return names


def test_import_is_instant():
    code = "import sys, sharp_distill; sys.exit(len({'numpy', 'pandas', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_can_be_imported():
    for name in sharp_distill.__all__: assert getattr(sharp_distill, name) is not None, name
    assert set(sharp_distill.__all__) <= set(dir(sharp_distill))
    from sharp_distill.serve.recommender import Recommender
    assert sharp_distill.Recommender is Recommender
    with pytest.raises(AttributeError, match="no attribute 'Recomender'"): sharp_distill.Recomender
    names = sum((v.split() for v in sharp_distill.PUBLIC.values()), [])
    assert len(names) == len(set(names))


def test_the_custom_data_set_is_distilled(space):
    n_train = len(space["train_data"])
    assert space["user_hypergraph"].shape == (120, 60) and space["user_hypergraph"].nnz == n_train
    student, teacher = space["mlp_model"].result, space["hypergraph_model"].result
    assert student.mean("NDCG@10") > .8 * teacher.mean("NDCG@10") > 0
    lists = space["mlp_model"].recommender.recommend(space["train_data"].user_id.unique(), k=5)
    pairs = lambda frame: set(zip(frame.user_id, frame.item_id))
    known = set().union(*(pairs(space[part]) for part in ("train_data", "validation_data", "test_data")))
    assert len(lists) == 600 and not known & pairs(lists)


def test_the_lightgcn_is_trained_when_asked(space):
    model = space["lightgcn_model"]
    with pytest.raises(sharp_distill.UserError, match="not trained"): model([0])
    sharp_distill.train_lightgcn(model, space["user_hypergraph"])
    assert sharp_distill.evaluate_model(model, space["test_data"]).mean("NDCG@10") == model.result.mean("NDCG@10") > 0


def test_the_formulas_take_the_readmes_arguments(space):
    exec("""
import torch
P = compute_hypergraph_position(user_hypergraph, max_steps=3, beta=0.5)
hgnn_embeddings, deberta_embeddings, lightgcn_embeddings = torch.randn(3, 8, 5)
combined_embeddings = contrastive_learning(hgnn_embeddings, deberta_embeddings, lightgcn_embeddings)
user_loss = info_nce_loss(hgnn_embeddings, deberta_embeddings, temperature=0.1)
users = train_data['user_id'].unique()
items = train_data['item_id'].unique()
H_U = build_user_item_incidence(users, items, train_data)
H_I = build_item_user_incidence(items, users, train_data)
soft = generate_soft_labels(hgnn_embeddings, current_epoch=100)
""", space)
    assert space["P"].shape[0] == 120 and space["combined_embeddings"].shape == (8, 15)
    losses = sharp_distill.contrastive_losses(*(space[f"{n}_embeddings"] for n in ("hgnn", "deberta", "lightgcn")))
    assert losses["user"] == space["user_loss"]
    assert (space["H_U"] != space["H_I"].T).nnz == 0 and space["H_U"].nnz == len(space["train_data"])
    assert sharp_distill.get_temperature(100) == 5.5 and space["soft"].sum(1).allclose(space["P"].new_ones(8))


def test_the_layers_take_the_readmes_dictionaries(space):
    exec("""
import torch
model = HypergraphNN(**hypergraph_config, num_layers=3, gradient_checkpointing=True)
output = model(user_hypergraph, torch.randn(120, 768))
student_model = CompactGCN(64, 64)
embeddings = student_model(user_hypergraph @ user_hypergraph.T, output)
soft = model.generate_soft_labels(output, current_epoch=10)
""", space)
    assert space["output"].shape == space["embeddings"].shape == (120, 64)
    assert space["model"].get_temperature(10) == pytest.approx(9.55)


@pytest.mark.slow # a compiler runs
def test_the_student_layer_can_be_compiled(space):
    import torch
    A, x, layer = torch.rand(6, 6).round(), torch.randn(6, 4), sharp_distill.CompactGCN(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(layer, mode="reduce-overhead")
        assert torch.allclose(compiled(A, x), layer(A, x), atol=1e-6)


def test_the_dictionaries_reach_the_training(space):
    dictionaries = {f"{n}_config": space[f"{n}_config"] for n in
                    ("hypergraph", "compactgcn", "distillation", "training")}
    dictionaries["hypergraph_config"] = {k: v for k, v in space["hypergraph_config"].items() if k != "total_epochs"}
    dictionaries["training_config"] = space["training_config"] | {"epochs": 2}
    H_U, H_I = space["user_hypergraph"], space["item_hypergraph"]
    models = sharp_distill.initialize_models(180, 60, **sharp_distill.translate_config(**dictionaries))
    student, teacher = sharp_distill.train_models(models[2], models[1], H_U, H_I)
    assert len(teacher.state.history.to_frame()) == 2 and teacher.state.config.layer == "relu"
    assert student.state.target_config.contrast == "published" and student.state.target_config.t_max == 10.
    assert student.recommender is None and 0 <= student.result.mean("NDCG@10") <= 1


@pytest.mark.slow # three encodings of sample and six trainings
def test_the_custom_experiment():
    names = {}
    exec(SETUP + "\ntrain_data, validation_data, test_data = load_and_split_data('sample')" + CUSTOM_EXPERIMENT, names)
    values = [r.mean("NDCG@10") for r in names["results"]]
    assert len(set(values)) == 3 and min(values) > .05


@pytest.mark.slow # three trainings on sample
def test_main_prints_what_it_found(capsys):
    student, teacher = sharp_distill.main()
    said = capsys.readouterr().out
    assert f"student    test NDCG@10 {student.result.mean('NDCG@10'):.4f}" in said and "lightgcn" in said
