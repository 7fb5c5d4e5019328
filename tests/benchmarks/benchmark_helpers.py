"""What the benchmarks share: the random model, stopwatches, statistics, the machine, and the JSON report.

A report's numbers come from one run on one machine; `machine` says which, and how busy it was.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
OFFICIAL_TOKENIZER_VARIABLE = "CHATGLM3_TOKENIZER"
HEAD_CHANNELS = 64
GROUPS = 2


@dataclass(frozen=True)
class ModelSize:
    """A random ChatGLM3: small layers under the official vocabulary. Heads have 64 channels, in 2 groups."""

    layers: int = 6
    hidden_size: int = 512
    ffn_hidden_size: int = 1376
    vocabulary: int = 65024
    pre_seq_len: int = 128

    def build(self, seed: int = 0) -> "ChatGLM3ForCausalLM":
        """The model in float32, with a N(0, 1) prefix; equal seeds give equal weights."""
        import torch

        from finetune_chatmodel_demo.chatglm3 import ChatGLM3Config, ChatGLM3ForCausalLM

        torch.manual_seed(seed)
        config = ChatGLM3Config(
            num_layers=self.layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            kv_channels=HEAD_CHANNELS,
            num_attention_heads=self.hidden_size // HEAD_CHANNELS,
            multi_query_group_num=GROUPS,
            padded_vocab_size=self.vocabulary,
        )
        model = ChatGLM3ForCausalLM(config)
        model.add_prefix(self.pre_seq_len)
        return model

    def describe(self) -> dict[str, Any]:
        """For a report."""
        return asdict(self) | {"weights": "random, float32"}


@dataclass(frozen=True)
class Elapsed:
    """Seconds of the clock, and processor seconds of all threads of this process."""

    wall: float
    cpu: float


class Stopwatch:
    """`with Stopwatch() as watch: …` → `watch.elapsed`."""

    elapsed: Elapsed

    def __enter__(self) -> "Stopwatch":
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.elapsed = Elapsed(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, extremes and count."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else ordered * 3
    return {
        "median": round(statistics.median(ordered), 6),
        "quarter": round(quartiles[0], 6),
        "three_quarters": round(quartiles[2], 6),
        "min": round(ordered[0], 6),
        "max": round(ordered[-1], 6),
        "count": len(ordered),
    }


def prepare_threads(threads: int | None) -> int:
    """Sets torch's threads (default: as torch chose) and returns how many there are."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def describe_machine() -> dict[str, Any]:
    """Processor, cores, versions, threads, and the load before the benchmark."""
    import torch
    import transformers

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch_threads": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        fields = {}
        for line in information.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()


def memory_of_this_process() -> dict[str, float] | None:
    """Resident MiB now and at the peak; None where the system has no /proc.

    `ru_maxrss` would not do: a child process inherits its parent's peak.
    """
    fields = _read_memory("self")
    return fields and {"now": fields["VmRSS"], "peak": fields["VmHWM"]}


def own_memory(process: int) -> float:
    """MiB of a process that belong to no file; 0: it is gone."""
    return (_read_memory(process) or {}).get("RssAnon", 0.0)


def _read_memory(process: int | str) -> dict[str, float] | None:
    """What the system says of a process's memory, in MiB; None where it says nothing."""
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    fields = (line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) / 1024 for name, value in fields}


def forget_memory_peak() -> None:
    """Makes the peak of `memory_of_this_process` start over."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def publish(report: dict[str, Any], output: Path | None) -> None:
    """Prints the report as JSON, and writes it to `output` if given."""
    print(_as_json(report))
    write_report(report, output)


def write_report(report: dict[str, Any], output: Path | None) -> None:
    """Writes the report to `output` if given; what was there is replaced in one step."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_name(f"{output.name}.part")
        unfinished.write_text(_as_json(report) + "\n", encoding="utf-8")
        unfinished.replace(output)


def _as_json(report: dict[str, Any]) -> str:
    return json.dumps(report, indent=2, ensure_ascii=False)
