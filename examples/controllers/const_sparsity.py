"""A sparse model is trained on: its zeros stay zeros."""

from common import load_data, run, train

from coreai_opt.controllers import create_compressed_model

ALGORITHMS = [{"algorithm": "const_sparsity"}]

if __name__ == "__main__":
    # The sparse model comes from magnitude sparsity, stripped of everything but its zeros.
    sparse = {"algorithm": "magnitude_sparsity", "sparsity_init": 0.7, "params": {"sparsity_target": 0.7}}
    controller, _ = run(sparse)
    again, model = create_compressed_model(controller.strip(), {"compression": ALGORITHMS})
    train(model, load_data(seed=0), 2, again)
    print(again.statistics().to_str())
