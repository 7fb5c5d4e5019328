"""What pre-training and supervised fine-tuning achieve on the embedded model, with each method: numbers, not just runs.

The proofs of the other stages are in test_rm.py, test_dpo.py and test_ppo_proof.py.
"""

import math

import pytest
from training_helpers import read_log

from finetune_chatmodel_demo import finetune

pytestmark = pytest.mark.slow

# Learning rates for so small a model; see tests/benchmarks/compare_methods.py.
METHODS = {
    "ptuning": {"pre_seq_len": 64, "prefix_init_std": 0.5, "learning_rate": 0.15},
    "lora": {"learning_rate": 5e-3},
    "freeze": {"learning_rate": 1e-3},
    "full": {"learning_rate": 5e-4},
}


def run(model, output, method, **options):
    """A run of finetune.py on the registry that comes along; returns its log."""
    options = {
        "finetuning_type": method,
        "model_name_or_path": model,
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 32,
        "lr_scheduler_type": "cosine",
        "max_seq_length": 512,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": True,
        "logging_steps": 50,
        "plot_loss": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
        **METHODS[method],
        **options,
    }
    assert finetune.main([part for name, value in options.items() for part in (f"--{name}", str(value))]) == 0
    return read_log(output)


@pytest.mark.parametrize(("method", "factor"), [("ptuning", 300), ("lora", 3000), ("freeze", 3000), ("full", 3000)])
def test_pt_lowers_the_perplexity_of_held_out_text(method, factor, tiny_folder, tmp_path):
    """Prose on 121 Pokémon is trained, in wordings that the model has not seen; prose on 30 others is held out.

    The base model is sure of its own wordings and finds these all but impossible, so the factors are large.
    """
    data = {"stage": "pt", "dataset": "pokemon_text", "eval_dataset": "pokemon_text_validation"}
    log = run(tiny_folder, tmp_path / "o", method, **data, max_steps=100, max_seq_length=256)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    before, after = math.exp(losses[0]), math.exp(losses[-1])
    print(f"{method}: perplexity {before:.1f} → {after:.2f}")
    assert before / after > factor


@pytest.mark.parametrize(
    ("method", "steps", "share"), [("ptuning", 450, 0.7), ("lora", 250, 0.8), ("freeze", 250, 0.8), ("full", 250, 0.8)]
)
def test_sft_teaches_the_model_to_answer(method, steps, share, tiny_folder, tmp_path):
    """Replies that equal the reference, to questions in wordings of their own; the base model has none."""
    data = {"stage": "sft", "dataset": "pokemon", "eval_dataset": "pokemon_validation", "eval_questions": 100}
    log = run(tiny_folder, tmp_path / "o", method, **data, max_steps=steps)
    exact = [entry["eval_exact"] for entry in log if "eval_exact" in entry]
    print(f"{method}: exact {exact[0]:.0%} → {exact[-1]:.0%}")
    assert exact[0] < 0.05
    assert exact[-1] > share
