"""What the stages pt, sft, rm and dpo achieve on the embedded model: numbers, not just runs. ppo: test_ppo_proof.py."""

import json
import math
import shutil

import pytest
from conftest import REPOSITORY
from training_helpers import read_log

from data_processing import make_datasets
from data_processing.csv_rows import CsvRows
from data_processing.holding_out import is_held_out
from data_processing.template_reader import load_template
from finetune_chatmodel_demo import finetune

DATASETS = REPOSITORY / "data_processing" / "datasets"
PAIRS = "pokemon_preference"

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


@pytest.mark.parametrize(
    ("method", "factor"),
    [
        ("freeze", 3000),
        pytest.param("ptuning", 300, marks=pytest.mark.thorough),
        pytest.param("lora", 3000, marks=pytest.mark.thorough),
        pytest.param("full", 3000, marks=pytest.mark.thorough),
    ],
)
def test_pt_lowers_the_perplexity_of_held_out_text(method, factor, tiny_folder, tmp_path):
    """Prose on 113 Pokémon is trained, in wordings that the model has not seen; prose on 38 others is held out.

    The base model is sure of its own wordings and finds these all but impossible, so the factors are large.
    """
    data = {"stage": "pt", "dataset": "pokemon_text", "eval_dataset": "pokemon_text_validation"}
    log = run(tiny_folder, tmp_path / "o", method, **data, max_steps=100, max_seq_length=256)
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    before, after = math.exp(losses[0]), math.exp(losses[-1])
    print(f"{method}: perplexity {before:.1f} → {after:.2f}")
    assert before / after > factor


@pytest.mark.parametrize(
    ("method", "steps", "share"),
    [
        ("freeze", 250, 0.8),
        pytest.param("ptuning", 450, 0.7, marks=pytest.mark.thorough),
        pytest.param("lora", 250, 0.8, marks=pytest.mark.thorough),
        pytest.param("full", 250, 0.8, marks=pytest.mark.thorough),
    ],
)
def test_sft_teaches_the_model_to_answer(method, steps, share, tiny_folder, tmp_path):
    """Replies that equal the reference, to questions in wordings of their own; the base model has none."""
    data = {"stage": "sft", "dataset": "pokemon", "eval_dataset": "pokemon_validation", "eval_questions": 100}
    log = run(tiny_folder, tmp_path / "o", method, **data, max_steps=steps)
    exact = [entry["eval_exact"] for entry in log if "eval_exact" in entry]
    print(f"{method}: exact {exact[0]:.0%} → {exact[-1]:.0%}")
    assert exact[0] < 0.05
    assert exact[-1] > share


# Preferences: a true answer, and one that is true of another Pokémon


def write_more_pairs(folder):
    """Several draws of the registry's pairs, as a registry of their own; none of the validation's is among them."""
    held_out = [json.loads(line) for line in (DATASETS / f"{PAIRS}_validation.jsonl").read_text("utf-8").splitlines()]
    held_out = {tuple(record["output"]) for record in held_out}
    template = load_template(REPOSITORY / "data_processing" / "templates" / "pokemon_kanto.yaml")
    facts = CsvRows(REPOSITORY / "data_processing" / "data.csv")
    known = [
        row
        for row in facts
        if template.matches(row) and not is_held_out(row[make_datasets.NAME], make_datasets.HELD_OUT_SHARE)
    ]
    records = [
        record
        for seed in range(100, 106)
        for record in make_datasets.preferences(known, template, "train", seed)
        if tuple(record["output"]) not in held_out
    ]
    (folder / "more.jsonl").write_text(make_datasets.to_lines(iter(records)), encoding="utf-8")
    shutil.copy(DATASETS / f"{PAIRS}_validation.jsonl", folder / "validation.jsonl")
    entries = {name: {"file_name": f"{name}.jsonl", "ranking": True} for name in ("more", "validation")}
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


@pytest.mark.thorough  # by default test_ppo_proof.py trains a reward model
def test_rm_prefers_true_answers(tiny_folder, tmp_path):
    """About facts that it was trained on, in wordings and against false answers that it was not."""
    data = {"stage": "rm", "dataset_dir": write_more_pairs(tmp_path), "dataset": "more", "eval_dataset": "validation"}
    options = {"per_device_train_batch_size": 16, "learning_rate": 4e-4, "max_steps": 650}
    log = run(tiny_folder, tmp_path / "o", "full", **data, **options)
    accuracy = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    print(f"rm: accuracy {accuracy[0]:.1%} → {accuracy[-1]:.1%}")
    assert accuracy[0] < 0.65
    assert accuracy[-1] > 0.9


@pytest.mark.parametrize(
    ("method", "steps", "options"),
    [
        ("lora", 60, {"learning_rate": 1e-3}),
        pytest.param(
            "ptuning",
            120,
            {"pre_seq_len": 32, "prefix_init_std": 1.0, "learning_rate": 3e-2},
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_dpo_prefers_true_answers(method, steps, options, tiny_folder, tmp_path):
    data = {"stage": "dpo", "dataset": PAIRS, "eval_dataset": f"{PAIRS}_validation"}
    log = run(tiny_folder, tmp_path / "o", method, **data, **options, per_device_train_batch_size=16, max_steps=steps)
    first, last = (entry for entry in log if "eval_rewards/accuracies" in entry)
    names = ("rewards/accuracies", "rewards/margins", "logps/chosen")
    print(method, {name: (round(first[f"eval_{name}"], 3), round(last[f"eval_{name}"], 3)) for name in names})
    assert last["eval_rewards/accuracies"] > 0.9
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"] + 0.5
    assert last["eval_logps/chosen"] > first["eval_logps/chosen"]  # it does not collapse; it even rises
