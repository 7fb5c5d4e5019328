"""Runs command lines of finetune.py one after the other in each process that torchrun starts: they import once.

torchrun --standalone --nproc_per_node=2 tests/run_several.py COMMANDS.json
"""

import gc
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from finetune_chatmodel_demo import finetune

if __name__ == "__main__":
    for argv in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        if status := finetune.main(argv):
            sys.exit(status)
        gc.collect()  # transformers looks at the DeepSpeed configuration that is still alive
