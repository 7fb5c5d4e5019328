"""What a P-Tuning prefix costs while decoding: tokens per second with the prefix and without; prints JSON.

    python tests/benchmarks/bench_decoding.py --threads 1 --output tests/benchmarks/results/decoding.json

One model, one prompt, greedy, batch 1; the prefix is switched off by `prefix_disabled()`. Runs with and without
alternate (with, without, without, with, …), and the result is the median of the pairs' ratios. The time until the first
token, in which the prompt is read, is reported apart.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark_helpers import ModelSize, describe_machine, prepare_threads, publish, summarize

if TYPE_CHECKING:
    import torch

    from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM

# What the project promises: decoding with a prefix takes at most 3% longer.
PROMISED_OVERHEAD = 0.03
FIRST_TEXT_ID = 1000


@dataclass(frozen=True)
class Run:
    """One reply.

    Attributes:
        first_token: seconds until the first token, in which the prompt is read.
        token_wall: seconds of each token after it; their median is what an interruption does not change.
        decode_cpu: processor seconds of all threads for these tokens together.
        token_ids: the reply.
    """

    first_token: float
    token_wall: list[float]
    decode_cpu: float
    token_ids: list[int]

    @property
    def decode_wall(self) -> float:
        """Seconds for all tokens after the first."""
        return sum(self.token_wall)


# What is compared, run by run. The first is the one that the promise is held to.
MEASURES = {
    "median_token_wall": lambda run: statistics.median(run.token_wall),
    "all_tokens_wall": lambda run: run.decode_wall,
    "all_tokens_cpu": lambda run: run.decode_cpu,
    "first_token_wall": lambda run: run.first_token,
}


class Ticks:
    """Notes the time at each new token; handed to `generate` as a stopping criterion that never stops."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __call__(self, input_ids: "torch.Tensor", scores: Any, **kwargs: Any) -> "torch.Tensor":
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the report, and returns it."""
    options = parse_arguments(arguments)
    threads = prepare_threads(options.threads)
    machine = describe_machine()
    model, description = build_model(options)
    prompt = make_prompt(options.prompt_tokens, model)
    runs: dict[str, list[Run]] = {"with_prefix": [], "without_prefix": []}
    for name in runs:
        decode(model, prompt, options.new_tokens, name == "with_prefix")  # warm-up
    for pair in range(options.pairs):
        for name in runs if pair % 2 == 0 else reversed(runs):
            runs[name].append(decode(model, prompt, options.new_tokens, name == "with_prefix"))
    report = {
        "benchmark": "decoding",
        "machine": machine,
        "model": description,
        "settings": {
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "pairs": options.pairs,
            "threads": threads,
            "decoding": "greedy, batch 1, generate() with its dynamic cache",
            "order": "with, without; in every second pair without, with",
        },
        "results": describe_runs(runs, options.new_tokens),
    }
    publish(report, options.output)
    return report


def build_model(options: argparse.Namespace) -> tuple["ChatGLM3ForCausalLM", dict[str, Any]]:
    """The model of `--model` with a new random prefix, or the random one; and what a report says of it."""
    import torch

    from finetune_chatmodel_demo.chatglm3 import load_model

    if options.model is not None:
        model = load_model(options.model, pre_seq_len=options.prefix, device=options.device)
        description = {"folder": options.model.name, "pre_seq_len": options.prefix}
    else:
        size = ModelSize(
            options.layers, options.hidden_size, options.ffn_hidden_size, options.vocabulary, options.prefix
        )
        model, description = size.build().eval().to(options.device), size.describe()
    model.generation_config.eos_token_id = None
    return model, description | {"device": torch.device(options.device).type, "dtype": str(model.dtype)}


def make_prompt(tokens: int, model: "ChatGLM3ForCausalLM") -> "torch.Tensor":
    """Ids without meaning, (1, tokens): what they are does not change the time."""
    import torch

    ids = torch.arange(tokens) * 7 % (model.config.padded_vocab_size - FIRST_TEXT_ID) + FIRST_TEXT_ID
    return ids.unsqueeze(0).to(model.device)


def decode(model: "ChatGLM3ForCausalLM", prompt: "torch.Tensor", new_tokens: int, has_prefix: bool) -> Run:
    """One reply of `new_tokens` tokens."""
    import torch
    from transformers import StoppingCriteriaList

    ticks = Ticks(model.device)
    start = time.perf_counter()
    with nullcontext() if has_prefix else model.prefix_disabled():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([ticks]),
        )
    assert len(ticks.wall) == new_tokens, "the reply ended early"
    token_wall = [later - earlier for earlier, later in zip(ticks.wall, ticks.wall[1:])]
    reply = ids[0, prompt.shape[1] :].tolist()
    return Run(ticks.wall[0] - start, token_wall, ticks.cpu[-1] - ticks.cpu[0], reply)


def describe_runs(runs: dict[str, list[Run]], new_tokens: int) -> dict[str, Any]:
    """Tokens per second of both, and what the prefix adds (0.01 = 1%), pair by pair."""
    results: dict[str, Any] = {}
    for name, series in runs.items():
        results[name] = {
            "tokens_per_second": summarize([(new_tokens - 1) / run.decode_wall for run in series]),
            "tokens_per_cpu_second": summarize([(new_tokens - 1) / run.decode_cpu for run in series]),
            "median_seconds_of_a_token": summarize([statistics.median(run.token_wall) for run in series]),
            "seconds_to_first_token": summarize([run.first_token for run in series]),
        }
    overhead: dict[str, Any] = {
        name: summarize([measure(a) / measure(b) - 1 for a, b in zip(runs["with_prefix"], runs["without_prefix"])])
        for name, measure in MEASURES.items()
    }
    overhead["promised_at_most"] = PROMISED_OVERHEAD
    overhead["is_kept"] = overhead["median_token_wall"]["median"] <= PROMISED_OVERHEAD
    results["overhead_of_prefix"] = overhead
    results["replies_differ"] = runs["with_prefix"][0].token_ids != runs["without_prefix"][0].token_ids
    return results


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ModelSize()
    parser.add_argument("--model", type=Path, help="folder of a ChatGLM3 (default: a random model)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    numbers = {
        "--prompt_tokens": (128, "tokens of the prompt"),
        "--new_tokens": (64, "tokens of the reply"),
        "--pairs": (40, "replies with and without"),
        "--prefix": (default.pre_seq_len, "PRE_SEQ_LEN"),
        "--layers": (default.layers, "transformer blocks of the random model"),
        "--hidden_size": (default.hidden_size, "its width, a multiple of 128"),
        "--ffn_hidden_size": (default.ffn_hidden_size, "its width inside the MLP"),
        "--vocabulary": (default.vocabulary, "its columns of the logits"),
    }
    for flag, (value, text) in numbers.items():
        parser.add_argument(flag, type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's choice)")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    if options.new_tokens < 2 or options.pairs < 1:
        parser.error(f"--new_tokens {options.new_tokens} --pairs {options.pairs}: at least 2 tokens and 1 pair")
    return options


if __name__ == "__main__":
    main()
