"""What the tests of the memory plan measure with: the peak of live tensors in real steps of small models."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config
from finetune_chatmodel_demo.training.deciding import read_settings
from finetune_chatmodel_demo.training.memory import PeakCounter, Step, build_model


def step_of(config: ChatGLM3Config, method: str, policy: str = "none", **facts: Any) -> Step:
    """A step on the CPU, in bfloat16 unless `facts` say otherwise; half of its tokens are supervised.

    Args:
        facts: attributes of the step, and the flag `prefix_projection`.
    """
    flags = {"finetuning_type": method, "lora_rank": 8, "freeze_trainable_layers": 2}
    if method == "ptuning":
        flags |= {"pre_seq_len": 32, "prefix_projection": facts.pop("prefix_projection", False)}
    facts = {"rows": 1, "tokens": 512, **facts}
    supervised = facts["rows"] * facts["tokens"] // 2
    return Step(config, read_settings(flags), policy=policy, supervised=supervised, is_cuda=False, **facts)


def measure_peak(step: Step, model: nn.Module | None = None) -> int:
    """Peak bytes of the second of two whole steps with real tensors, in which the optimizer has its state."""
    model = model or build_model(step).to_empty(device="cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    batch, counter = batch_of(step), PeakCounter()
    for tensor in [*model.parameters(), *model.buffers()]:
        counter.add(tensor)
    with counter:
        for _ in range(2):
            counter.restart("")
            for _ in range(2 if step.accumulates else 1):
                half = step.precision != "float32"
                with torch.autocast("cpu", dtype=torch.bfloat16) if half else nullcontext():
                    loss = model(**batch).loss
                loss.backward()
                del loss
            optimizer.step()
            optimizer.zero_grad()
    return counter.peak


def batch_of(step: Step) -> dict[str, Any]:
    """Inputs of one batch: of each row the last tokens are supervised."""
    ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    labels[:, step.tokens - step.supervised // step.rows :] = 1
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if step.segments:
        length = step.tokens // step.segments
        batch["segment_lengths"] = [length] * step.segments
        batch["position_ids"] = torch.arange(length).repeat(step.segments)[None]
    return batch
