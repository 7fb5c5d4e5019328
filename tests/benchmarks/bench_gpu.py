"""The 6B model with random weights on one GPU: memory of steps against the plan, speed, decoding; prints JSON.

    python tests/benchmarks/bench_gpu.py --output tests/benchmarks/results/gpu.json

Sections (--sections a,b,c):

    matmul         the matrix peak of the GPU
    ptuning        steps at batch 1 × 2,048 with a prefix of 128, for each policy of gradient checkpointing
    quantized      the same on NF4 and int8 bases
    lora           the same with LoRA
    packed         rows of 2,048 through FlexAttention: tokens per second, share of the matrix peak
    compiled       packed rows again, with norms and SwiGLU fused by torch.compile (--torch_compile)
    decoding       with the prefix against without
    grouped_keys   attention with repeated keys against `enable_gqa`, an option that is not in use

A section that fails is reported as its error, and the others go on. --output is written after every section: what was
measured stays where the program is stopped. `--device cpu --small` shows that the program runs.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmark_helpers import describe_machine, prepare_threads, publish, write_report

if TYPE_CHECKING:
    import torch
    from torch import nn

    from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config

POLICIES = ("none", "mlp", "full")
SECTIONS = ("matmul", "ptuning", "quantized", "lora", "packed", "compiled", "decoding", "grouped_keys")
# Sections that have not begun by then are skipped.
LAST_START_SECONDS = 420
WANTED_SHARE_OF_PEAK, WANTED_PLAN_ERROR = 0.5, 0.1
LORA_RANK = 8
GIB = 2**30


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints the report, and returns it."""
    options = parse_arguments(arguments)
    prepare_threads(options.threads)
    config = make_config(options)
    report: dict[str, Any] = {
        "benchmark": "gpu",
        "machine": describe_machine(),
        "model": {
            "layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.ffn_hidden_size,
            "vocabulary": config.padded_vocab_size,
            "weights": "random, bfloat16",
        },
        "settings": {"tokens": options.tokens, "prefix": options.prefix, "steps": options.steps, "rows": 1},
        "flops": "useful ones of a step: layers 4 × parameters × tokens (forward, and backward to the activations; "
        "frozen weights have no gradients), head 4 × parameters × supervised tokens, attention 12 × layers × heads × "
        "head_dim × visible keys; what is recomputed does not count",
        "results": {},
    }
    started = time.perf_counter()
    for section in options.sections:
        if time.perf_counter() - started > LAST_START_SECONDS:
            report["results"][section] = {"skipped": f"{LAST_START_SECONDS} seconds were over"}
        else:
            report["results"][section] = guarded(lambda s=section: RUNS[s](options, config, report["results"]))
        report["plan_against_measured"] = compare_plans(report["results"])
        report["seconds"] = round(time.perf_counter() - started, 1)
        write_report(report, options.output)
    publish(report, options.output)
    return report


def guarded(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a section with its seconds, or its error; the GPU's memory is free afterwards."""
    started = time.perf_counter()
    try:
        result = action()
    except Exception as error:  # whatever went wrong, the other sections are still worth measuring
        result = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    with suppress(RuntimeError):  # after an illegal access every call to the GPU fails: what was measured counts still
        _free_memory()
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_config(options: argparse.Namespace) -> "ChatGLM3Config":
    """ChatGLM3-6B's, with what the flags change."""
    from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config

    changes: dict[str, Any] = {}
    if options.small:
        changes = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 192, "num_attention_heads": 4,
                   "kv_channels": 32, "padded_vocab_size": 512}  # fmt: skip
    for name, value in (("num_layers", options.layers), ("ffn_hidden_size", options.ffn_hidden_size)):
        changes |= {name: value} if value else {}
    if options.hidden_size:
        changes |= {"hidden_size": options.hidden_size, "num_attention_heads": options.hidden_size // 128}
    return ChatGLM3Config(**changes)


def build_model(options: argparse.Namespace, config: "ChatGLM3Config", bits: int | None = None) -> "nn.Module":
    """A random model in bfloat16 on the device; with `bits` its layers' matrices quantized one after the other."""
    import copy

    import torch

    from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(options.device):
            model = ChatGLM3ForCausalLM(copy.deepcopy(config))
    finally:
        torch.set_default_dtype(torch.float32)
    model.model.rotary_emb.float()
    model.requires_grad_(False)
    for layer in model.model.layers if bits else ():
        quantize(layer, bits, options.device)
    return model.to(options.device)


def quantize(layer: "nn.Module", bits: int, device: str) -> None:
    """Replaces the linear modules of a layer by bitsandbytes' as `load_model(quantization_bit=…)` makes them."""
    import bitsandbytes
    import torch
    from torch import nn

    for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
        shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
        if bits == 4:
            new = bitsandbytes.nn.Linear4bit(
                *shape, has_bias, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4"
            )
            new.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=new
            )
            new.support_avx512bf16_for_cpu = False
        else:
            new = bitsandbytes.nn.Linear8bitLt(*shape, has_bias, has_fp16_weights=False)
            new.weight = bitsandbytes.nn.Int8Params(
                linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False
            )
        new.bias = linear.bias
        owner, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(owner) if owner else layer, attribute, new.requires_grad_(False).to(device))


def make_batch(options: argparse.Namespace, config: "ChatGLM3Config", conversations: int = 0) -> dict[str, Any]:
    """Random ids, the second half of the row (of each conversation in a packed one) supervised."""
    import torch

    tokens = options.tokens
    length = tokens // max(1, conversations)
    lengths = [length] * (max(1, conversations) - 1)
    lengths.append(tokens - sum(lengths))
    ids = torch.randint(1, config.padded_vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = torch.cat([torch.cat((torch.full((n // 2,), -100), ids[0, : n - n // 2])) for n in lengths])[None]
    batch: dict[str, Any] = {"input_ids": ids.to(options.device), "labels": labels.to(options.device)}
    if conversations:
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        batch |= {"position_ids": positions.to(options.device), "segment_lengths": tuple(lengths)}
    return batch


def measure_steps(
    options: argparse.Namespace, config: "ChatGLM3Config", model: "nn.Module", method: str, policy: str, **plan: Any
) -> dict[str, Any]:
    """Median seconds and peak memory of training steps, and the plan's peak.

    Args:
        method, policy: as in the plan.
        plan: the flag `pre_seq_len`, and further attributes of the plan's `Step`; `segments` packs the row.
    """
    import torch

    from finetune_chatmodel_demo.chatglm3.kernels import set_policy
    from finetune_chatmodel_demo.training.deciding import read_settings
    from finetune_chatmodel_demo.training.memory import Step, plan_memory

    model.train()
    set_policy(model, policy)
    switch = "enable" if policy != "none" else "disable"
    # transformers 5.23 renamed the method.
    new_name = f"activation_checkpointing_{switch}"
    getattr(model, new_name if hasattr(model, new_name) else f"gradient_checkpointing_{switch}")()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    batch = make_batch(options, config, plan.get("segments", 0))
    seconds, is_cuda = [], options.device == "cuda"
    _free_memory()  # what making the model left behind would count as reserved: 12 GB where it was quantized
    for number in range(options.steps + 2):
        if number == 2:  # the first compiles kernels, the second meets the optimizer's state
            _reset_peak(is_cuda)
        started = time.perf_counter()
        with torch.autocast(options.device, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # waits for the GPU
        seconds.append(time.perf_counter() - started)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    flags = {"finetuning_type": method, "pre_seq_len": plan.pop("pre_seq_len", None)}
    step = Step(
        config=config,
        settings=read_settings(flags),
        rows=1,
        tokens=options.tokens,
        supervised=supervised,
        policy=policy,
        is_cuda=is_cuda,
        **plan,
    )
    result = {
        "policy": policy,
        "loss": round(value, 4),
        "seconds_of_a_step": round(statistics.median(seconds[2:]), 4),
        "seconds_of_the_first": round(seconds[0], 2),
        "tokens_per_second": round(options.tokens / statistics.median(seconds[2:]), 1),
        "planned_gib": round(plan_memory(step).allocated / GIB, 3),
    }
    return result | _read_peak(is_cuda) | {"supervised_tokens": supervised}


def _reset_peak(is_cuda: bool) -> None:
    import torch

    if is_cuda:
        torch.cuda.reset_peak_memory_stats()


def _read_peak(is_cuda: bool) -> dict[str, float | None]:
    import torch

    if not is_cuda:
        return {"allocated_gib": None, "reserved_gib": None}
    return {
        "allocated_gib": round(torch.cuda.max_memory_allocated() / GIB, 3),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3),
    }


def run_matmul(options: argparse.Namespace, config: "ChatGLM3Config", results: dict[str, Any]) -> dict[str, Any]:
    """The best of a few large bfloat16 products: what no step can exceed."""
    import torch

    size = 256 if options.small else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=options.device) for _ in range(2))
    best, repeats = float("inf"), 2 if options.small else 20
    for _ in range(5):
        _wait(options)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        _wait(options)
        best = min(best, (time.perf_counter() - started) / repeats)
    return {"size": size, "teraflops": round(2 * size**3 / best / 1e12, 3)}


def _wait(options: argparse.Namespace) -> None:
    import torch

    if options.device == "cuda":
        torch.cuda.synchronize()


def run_ptuning(options: argparse.Namespace, config: "ChatGLM3Config", results: dict[str, Any]) -> dict[str, Any]:
    """Steps of P-Tuning, bfloat16, for each policy."""
    model = build_model(options, config)
    model.add_prefix(options.prefix)
    return {
        policy: guarded(
            lambda p=policy: measure_steps(options, config, model, "ptuning", p, pre_seq_len=options.prefix)
        )
        for policy in POLICIES
    }


def run_quantized(options: argparse.Namespace, config: "ChatGLM3Config", results: dict[str, Any]) -> dict[str, Any]:
    """Steps of P-Tuning on quantized bases, with full checkpointing."""

    def run(bits: int) -> dict[str, Any]:
        model = build_model(options, config, bits)
        model.add_prefix(options.prefix)
        plan = {"pre_seq_len": options.prefix, "quantization_bit": bits}
        return measure_steps(options, config, model, "ptuning", "full", **plan)

    return {name: guarded(lambda b=bits: run(b)) for name, bits in (("nf4", 4), ("int8", 8))}


def run_lora(options: argparse.Namespace, config: "ChatGLM3Config", results: dict[str, Any]) -> dict[str, Any]:
    """Steps of LoRA in all linear modules."""
    from finetune_chatmodel_demo.chatglm3.lora import add_adapter

    model = add_adapter(build_model(options, config), rank=LORA_RANK)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return {p: guarded(lambda p=p: measure_steps(options, config, model, "lora", p)) for p in ("mlp", "full")}


def run_packed(options: argparse.Namespace, config: "ChatGLM3Config", results: dict[str, Any]) -> dict[str, Any]:
    """Packed rows with a prefix: tokens per second, and the share of the matrix peak that is useful work.

    `flex_attention` says whether one kernel computed the row, or (false) each conversation was computed by itself.
    """
    import torch

    from finetune_chatmodel_demo.chatglm3.attention import uses_flex

    model = build_model(options, config)
    model.add_prefix(options.prefix)
    plan = {"pre_seq_len": options.prefix, "segments": options.conversations}
    peak = results.get("matmul", {}).get("teraflops")
    found: dict[str, Any] = {"conversations": options.conversations}
    for policy in ("none", "full"):
        run = guarded(lambda p=policy: measure_steps(options, config, model, "ptuning", p, **plan))
        if "error" not in run:
            flops = count_flops(options, config, run["supervised_tokens"])
            run["teraflops"] = round(flops / run["seconds_of_a_step"] / 1e12, 3)
            run["share_of_matrix_peak"] = round(run["teraflops"] / peak, 4) if peak else None
            run["is_half_of_it"] = bool(peak and run["teraflops"] >= WANTED_SHARE_OF_PEAK * peak)
        found[policy] = run
    heads, groups = (
        torch.zeros(1, count, 1, config.kv_channels, dtype=torch.bfloat16, device=options.device)
        for count in (config.num_attention_heads, config.multi_query_group_num)
    )
    with torch.autocast(options.device, dtype=torch.bfloat16):
        found["flex_attention"] = uses_flex(heads, groups, config.kv_channels**-0.5)
    return found


def run_compiled(options: argparse.Namespace, config: "ChatGLM3Config", results: dict[str, Any]) -> dict[str, Any]:
    """`run_packed` without checkpointing, with and without --torch_compile, which fuses element-wise operations."""
    from finetune_chatmodel_demo.chatglm3.kernels import compile_elementwise

    model = build_model(options, config)
    model.add_prefix(options.prefix)
    compile_elementwise(model)
    plan = {"pre_seq_len": options.prefix, "segments": options.conversations}
    run = measure_steps(options, config, model, "ptuning", "none", **plan)
    plain = results.get("packed", {}).get("none", {}).get("seconds_of_a_step")
    return {"none": run | {"times_as_fast": round(plain / run["seconds_of_a_step"], 4) if plain else None}}


def count_flops(options: argparse.Namespace, config: "ChatGLM3Config", supervised: int) -> float:
    """Useful floating point operations of a packed P-Tuning step; see `flops` in the report."""
    import torch

    from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM

    with torch.device("meta"):
        layers = ChatGLM3ForCausalLM(config).model.layers
    matrices = sum(parameter.numel() for parameter in layers.parameters() if parameter.dim() == 2)
    length = options.tokens / options.conversations
    keys = options.tokens * (options.prefix + (length + 1) / 2)
    width = config.num_attention_heads * config.kv_channels
    head = config.padded_vocab_size * config.hidden_size
    return 4 * matrices * options.tokens + 4 * head * supervised + 12 * config.num_layers * width * keys


def run_decoding(options: argparse.Namespace, config: "ChatGLM3Config", results: dict[str, Any]) -> dict[str, Any]:
    """A token with the prefix against a token without; see bench_decoding.py."""
    from bench_decoding import describe_replies, make_prompt, write_replies

    model = build_model(options, config)
    model.add_prefix(options.prefix)
    model.eval()
    prompt = make_prompt(min(512, options.tokens), model)
    write_replies(model, prompt, 4)  # warm-up
    count, length = (1, 4) if options.small else (4, 64)
    return describe_replies([write_replies(model, prompt, length) for _ in range(count)])


def run_grouped_keys(options: argparse.Namespace, config: "ChatGLM3Config", results: dict[str, Any]) -> dict[str, Any]:
    """Attention of one layer behind a prefix, forward and backward: keys repeated for all heads (in use), or grouped.

    Grouped keys would save 4 bytes × heads × head_dim for each key in each layer (policy none, 6B: 0.9 GiB). That the
    lower-right causal mask keeps its fused kernel with them is what has to be seen on a GPU first.
    """
    import torch
    import torch.nn.functional as F
    from transformers.models.glm.modeling_glm import repeat_kv

    from finetune_chatmodel_demo.chatglm3.attention import lower_right_mask

    heads, groups, channels = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
    keys = options.tokens + options.prefix
    query, key, value = (
        torch.randn(1, n, length, channels, dtype=torch.bfloat16, device=options.device, requires_grad=True)
        for n, length in ((heads, options.tokens), (groups, keys), (groups, keys))
    )
    mask = lower_right_mask(options.tokens, keys, torch.device(options.device))

    def run(is_grouped: bool) -> dict[str, Any]:
        pair = (key, value) if is_grouped else (repeat_kv(key, heads // groups), repeat_kv(value, heads // groups))
        return F.scaled_dot_product_attention(query, *pair, attn_mask=mask, enable_gqa=is_grouped)

    found: dict[str, Any] = {}
    for name, is_grouped in (("repeated", False), ("grouped", True)):
        found[name] = guarded(lambda g=is_grouped: _time_attention(options, lambda: run(g)))
    with torch.no_grad():
        found["largest_difference"] = (run(True) - run(False)).abs().max().item()
    return found


def _time_attention(options: argparse.Namespace, attend: Callable[[], "torch.Tensor"]) -> dict[str, Any]:
    times, is_cuda = [], options.device == "cuda"
    for repeat in range(6):
        if repeat == 1:
            _reset_peak(is_cuda)
        _wait(options)
        started = time.perf_counter()
        attend().sum().backward()
        _wait(options)
        times.append(time.perf_counter() - started)
    return {"milliseconds": round(1000 * statistics.median(times[1:]), 3), **_read_peak(is_cuda)}


RUNS = {
    "matmul": run_matmul,
    "ptuning": run_ptuning,
    "quantized": run_quantized,
    "lora": run_lora,
    "packed": run_packed,
    "compiled": run_compiled,
    "decoding": run_decoding,
    "grouped_keys": run_grouped_keys,
}


def compare_plans(results: dict[str, Any]) -> dict[str, Any]:
    """Each setting's planned and measured peak, and whether all are within 10%; None where nothing was measured."""
    found = {}
    for section, runs in results.items():
        for name, run in runs.items():
            if isinstance(run, dict) and run.get("allocated_gib") and "planned_gib" in run:
                found[f"{section} {name}"] = {
                    "planned_gib": run["planned_gib"],
                    "measured_gib": run["allocated_gib"],
                    "planned_over_measured": round(run["planned_gib"] / run["allocated_gib"], 3),
                }
    errors = [abs(one["planned_over_measured"] - 1) for one in found.values()]
    within = max(errors) <= WANTED_PLAN_ERROR if errors else None
    return {"settings": found, "all_within_10_percent": within}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: %(default)s")
    add("--small", action="store_true", help="a tiny model: shows that the program runs")
    add("--sections", default=",".join(SECTIONS), help="default: %(default)s")
    add("--layers", type=int, help="transformer blocks (28)")
    add("--hidden_size", type=int, help="width, a multiple of 256 (4096)")
    add("--ffn_hidden_size", type=int, help="width inside the MLP (13696)")
    add("--tokens", type=int, help="tokens of a row (2048)")
    add("--prefix", type=int, help="PRE_SEQ_LEN (128)")
    add("--conversations", type=int, default=14, help="in a packed row (%(default)s)")
    add("--steps", type=int, default=5, help="timed steps (%(default)s)")
    add("--threads", type=int, help="torch's threads (default: torch's choice)")
    add("--output", type=Path, help="also write the JSON to this file")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (64 if options.small else 2048)
    options.prefix = options.prefix or (8 if options.small else 128)
    options.sections = [name for name in options.sections.split(",") if name]
    unknown = [name for name in options.sections if name not in RUNS]
    if unknown or not options.sections or options.steps < 1 or not 1 <= options.conversations <= options.tokens // 2:
        parser.error(
            f"--sections are {', '.join(SECTIONS)}; --steps at least 1; --conversations at most half the tokens"
        )
    return options


if __name__ == "__main__":
    main()
