"""What a P-Tuning prefix costs while decoding: time per token with the prefix and without; prints JSON.

    python tests/benchmarks/bench_decoding.py --threads 1 --output tests/benchmarks/results/decoding.json

One model, one prompt, greedy, batch 1; the prefix is switched off by `prefix_disabled()`. Two replies grow side by
side, a token of the one, a token of the other, because other programs disturb a machine, and the result is the median
of such pairs' ratios. Only the model's step is timed; what `generate` does besides is the same for both and would make
the ratio look smaller. The time until the first token, in which the prompt is read, is reported apart.
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark_helpers import Elapsed, ModelSize, Stopwatch, describe_machine, prepare_threads, publish, summarize

if TYPE_CHECKING:
    import torch

    from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM

# What the project promises: decoding with a prefix takes at most 3% longer.
PROMISED_OVERHEAD = 0.03


class Reply:
    """A greedy reply that grows by a token at each `advance`, as `generate` would write it."""

    def __init__(self, model: "ChatGLM3ForCausalLM", prompt: "torch.Tensor", has_prefix: bool) -> None:
        """
        Args:
            prompt: (1, tokens).
        """
        self.model, self.has_prefix = model, has_prefix
        self.newest, self.mask, self.cache = prompt, prompt.new_ones(prompt.shape), None
        self.token_ids: list[int] = []
        self.times: list[Elapsed] = []

    def advance(self) -> None:
        """Reads what is new, the prompt or the last token, and adds a token."""
        import torch

        base_or_prefix = nullcontext() if self.has_prefix else self.model.prefix_disabled()
        with base_or_prefix, torch.no_grad(), Stopwatch() as watch:
            outputs = self.model(
                input_ids=self.newest,
                attention_mask=self.mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            self.newest = outputs.logits.argmax(-1)
            self.token_ids.append(self.newest.item())  # waits for a GPU
        self.times.append(watch.elapsed)
        self.cache = outputs.past_key_values
        self.mask = torch.cat((self.mask, self.mask.new_ones(1, 1)), dim=1)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the report, and returns it."""
    options = parse_arguments(arguments)
    threads = prepare_threads(options.threads)
    machine = describe_machine()
    model, description = build_model(options)
    prompt = make_prompt(options.prompt_tokens, model)
    write_replies(model, prompt, 2)  # warm-up
    replies = [write_replies(model, prompt, options.new_tokens) for _ in range(options.replies)]
    report = {
        "benchmark": "decoding",
        "machine": machine,
        "model": description,
        "settings": {
            "prompt_tokens": options.prompt_tokens,
            "new_tokens": options.new_tokens,
            "replies": options.replies,
            "threads": threads,
            "decoding": "greedy, batch 1, dynamic cache; times of the model's step alone",
            "order": "a token with, a token without; at every second token without, with",
        },
        "results": describe_replies(replies),
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
    return model, description | {"device": torch.device(options.device).type, "dtype": str(model.dtype)}


def make_prompt(tokens: int, model: "ChatGLM3ForCausalLM") -> "torch.Tensor":
    """Ids without meaning, (1, tokens): what they are does not change the time."""
    import torch

    return (torch.arange(tokens, device=model.device) * 7 % model.config.padded_vocab_size).unsqueeze(0)


def write_replies(model: "ChatGLM3ForCausalLM", prompt: "torch.Tensor", new_tokens: int) -> tuple[Reply, Reply]:
    """A reply with the prefix and one without, token by token."""
    replies = Reply(model, prompt, has_prefix=True), Reply(model, prompt, has_prefix=False)
    for token in range(new_tokens):
        for reply in replies if token % 2 == 0 else reversed(replies):
            reply.advance()
        assert model.model.prefix_enabled
    return replies


def describe_replies(replies: list[tuple[Reply, Reply]]) -> dict[str, Any]:
    """Tokens per second of both, and what the prefix adds (0.01 = 1%), pair by pair."""
    results: dict[str, Any] = {}
    for name, series in zip(("with_prefix", "without_prefix"), zip(*replies)):
        decoding = [elapsed for reply in series for elapsed in reply.times[1:]]
        results[name] = {
            "tokens_per_second": round(len(decoding) / sum(elapsed.wall for elapsed in decoding), 3),
            "tokens_per_cpu_second": round(len(decoding) / sum(elapsed.cpu for elapsed in decoding), 3),
            "milliseconds_of_a_token": summarize([1000 * elapsed.wall for elapsed in decoding]),
            "milliseconds_to_first_token": summarize([1000 * reply.times[0].wall for reply in series]),
        }
    pairs = [pair for a, b in replies for pair in list(zip(a.times, b.times))[1:]]
    first_pairs = [(a.times[0], b.times[0]) for a, b in replies]
    overhead = {
        "token_wall": summarize([a.wall / b.wall - 1 for a, b in pairs]),
        "token_cpu": summarize([a.cpu / b.cpu - 1 for a, b in pairs]),
        "first_token_wall": summarize([a.wall / b.wall - 1 for a, b in first_pairs]),
        "promised_at_most": PROMISED_OVERHEAD,
    }
    results["overhead_of_prefix"] = overhead
    overhead["is_kept"] = overhead["token_wall"]["median"] <= PROMISED_OVERHEAD
    results["replies_differ"] = replies[0][0].token_ids != replies[0][1].token_ids
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
        "--replies": (20, "replies with the prefix, and as many without"),
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
    if options.new_tokens < 2 or options.replies < 1:
        parser.error(f"--new_tokens {options.new_tokens} --replies {options.replies}: at least 2 tokens and 1 reply")
    return options


if __name__ == "__main__":
    main()
