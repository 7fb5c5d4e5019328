"""Writes preference_losses.json: what TRL computes for the pairs of test_dpo.py, with `pip install trl==1.16.0`.

python tests/golden/make_preference_losses.py
"""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

LENGTHS = {"chosen": [3, 7, 5, 1, 9], "rejected": [4, 2, 8, 6, 5]}
FIGURES = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
CASES = [
    {"pref_loss": "sigmoid", "pref_beta": 0.1},
    {"pref_loss": "sigmoid", "pref_beta": 0.5},
    {"pref_loss": "sigmoid", "pref_beta": 0.3, "dpo_label_smoothing": 0.1},
    {"pref_loss": "sigmoid", "pref_beta": 0.3, "dpo_label_smoothing": 0.4, "pref_ftx": 0.7},
    {"pref_loss": "sigmoid", "pref_beta": 0.1, "pref_ftx": 0.5},
    {"pref_loss": "hinge", "pref_beta": 0.2},
    {"pref_loss": "hinge", "pref_beta": 0.2, "pref_ftx": 1.5},
    {"pref_loss": "ipo", "pref_beta": 0.1},
    {"pref_loss": "ipo", "pref_beta": 0.6, "pref_ftx": 0.5},
    {"pref_loss": "orpo", "pref_beta": 0.1},
    {"pref_loss": "orpo", "pref_beta": 0.7},
    {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 0.5},
    {"pref_loss": "simpo", "pref_beta": 0.1, "simpo_gamma": 1.6},
]


def draw(seed: int) -> torch.Tensor:
    """Log-probabilities (10, 9) of the tokens of chosen, then rejected replies; 0 behind their ends."""
    values = -torch.rand(10, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
    lengths = torch.tensor(LENGTHS["chosen"] + LENGTHS["rejected"])
    return values * (torch.arange(9) < lengths[:, None])


def compute_dpo(case: dict, policy: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """TRL's loss and figures of the losses with a reference."""
    smoothing, ftx = case.get("dpo_label_smoothing", 0.0), case.get("pref_ftx", 0.0)
    loss_types = ["robust" if smoothing else case["pref_loss"]] + ["sft"] * bool(ftx)
    metrics: dict = {"eval": {name: [] for name in ("aux_loss", "entropy", "num_tokens", "mean_token_accuracy")}}
    metrics["eval"] |= {f"{kind}/{end}": [] for kind in ("logits", "rewards", "logps") for end in ("chosen", "rejected")}
    metrics["eval"] |= {"rewards/accuracies": [], "rewards/margins": []}
    lengths = torch.tensor(LENGTHS["chosen"] + LENGTHS["rejected"])
    mask = torch.cat([torch.zeros(10, 1), torch.arange(9) < lengths[:, None]], dim=1).long()
    outputs = SimpleNamespace(
        log_probs=policy,
        entropy=torch.zeros_like(policy),
        mean_logits=torch.zeros_like(policy),
        is_top1=torch.zeros_like(policy, dtype=torch.bool),
    )
    accelerator = MagicMock(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=[1.0, ftx][: len(loss_types)],
        beta=case["pref_beta"],
        label_smoothing=smoothing,
        use_weighting=False,
        _metrics=metrics,
        _total_train_tokens=0,
    )
    chosen, rejected = reference.sum(dim=1).chunk(2)
    batch = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, batch, False)
    return {"loss": loss.item(), **{name: metrics["eval"][name][-1] for name in FIGURES}}


def compute_without_reference(case: dict, policy: torch.Tensor) -> dict[str, float]:
    """TRL's loss and rewards of orpo and simpo."""
    chosen, rejected = policy.chunk(2)
    chosen_lengths, rejected_lengths = (torch.tensor(LENGTHS[name]) for name in LENGTHS)
    means = chosen.sum(dim=1) / chosen_lengths, rejected.sum(dim=1) / rejected_lengths
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=case["pref_beta"])
    if case["pref_loss"] == "orpo":
        ratios, better, worse, *_ = ORPOTrainer.odds_ratio_loss(trainer, *means)
        loss = (-means[0] - ratios).mean()
    else:
        vars(trainer).update(loss_type="simpo", simpo_gamma=case["simpo_gamma"], alpha=0.0, label_smoothing=0.0)
        losses, better, worse = CPOTrainer.cpo_loss(trainer, *means)
        loss = losses.mean()
    return {"loss": loss.item(), "rewards/chosen": better.mean().item(), "rewards/rejected": worse.mean().item()}


def main() -> None:
    """Writes the file beside this one."""
    policy, reference = draw(1), draw(2)
    cases = []
    for case in CASES:
        with_reference = case["pref_loss"] not in ("orpo", "simpo")
        found = compute_dpo(case, policy, reference) if with_reference else compute_without_reference(case, policy)
        cases.append({"flags": case, "expected": found})
    content = {
        "lengths": LENGTHS,
        "policy": policy.sum(dim=1).tolist(),
        "reference": reference.sum(dim=1).tolist(),
        "cases": cases,
    }
    text = json.dumps(content, indent=1)
    Path(__file__).with_name("preference_losses.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
