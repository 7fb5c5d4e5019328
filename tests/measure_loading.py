"""Memory of each process while load_model reads a model that ZeRO-3 shares out: JSON lines, one for each rank.

torchrun --standalone --nproc_per_node=4 tests/measure_loading.py MODEL_FOLDER CONFIG.json
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import TrainingArguments

from finetune_chatmodel_demo.chatglm3 import load_model
from finetune_chatmodel_demo.training.zero import connect


def read_memory() -> int:
    """Bytes that belong to this process alone (a file that is mapped belongs to nobody)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Looks at the memory every few milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak_bytes = read_memory()
        self.is_over = False

    def run(self) -> None:
        while not self.is_over:
            self.peak_bytes = max(self.peak_bytes, read_memory())
            time.sleep(0.002)

    def stop(self) -> int:
        self.is_over = True
        self.join()
        return self.peak_bytes - self.start_bytes


if __name__ == "__main__":
    folder, config = sys.argv[1:]
    # What decide_settings makes; it has to be alive while the model is loaded.
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, deepspeed=config, report_to=[])
    connect()
    torch.distributed.barrier()
    peak = Peak()
    peak.start()
    model = load_model(folder, device="cpu")
    torch.distributed.barrier()
    grown = peak.stop()
    elements = sum(parameter.ds_tensor.numel() for parameter in model.parameters() if hasattr(parameter, "ds_tensor"))
    result = {"rank": int(os.environ["RANK"]), "peak_bytes": grown, "kept_bytes": 4 * elements}
    sys.stdout.write(json.dumps(result) + "\n")  # in one piece: the ranks share the stream
    sys.stdout.flush()
