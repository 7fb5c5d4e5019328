"""What a DeepSpeed configuration says, read before anything is loaded.

finetune.py --deepspeed finetune_chatmodel_demo/configs/ds_zero3.json ...
"""

import json
from pathlib import Path

from finetune_chatmodel_demo.training.arguments import SettingsError


def read_stage(config: object) -> int:
    """The stage of a DeepSpeed configuration, 0 to 3.

    Args:
        config: what --deepspeed is given: a file, or JSON.

    Raises:
        SettingsError: for a configuration that is no JSON object.
    """
    try:
        text = str(config)
        values = json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
        return int(values.get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise SettingsError(f"--deepspeed {config} is not a DeepSpeed configuration ({error})") from error
