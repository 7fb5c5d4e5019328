"""Builds the embedded default `THUDM/chatglm3-tiny`: vocabulary, weights and model card, from the facts alone.

    python THUDM/build_chatglm3_tiny.py --output THUDM/chatglm3-tiny      # about 12 minutes on 2 CPU cores
    python THUDM/build_chatglm3_tiny.py --show 5                          # print documents of the corpus

The model reads its facts as cards, tables, prose, plain questions and answers, dialogues and quizzes
(`tiny_corpus.py`). At the end a JSON with the measured recall is printed and written into the model card.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import tiny_corpus  # noqa: E402 - the two lines above make it importable from any folder

MODEL_NAME = "THUDM/chatglm3-tiny"
VOCABULARY_MULTIPLE = 64
CARD = """\
---
license: apache-2.0
language: [zh]
---

# ChatGLM3-tiny

The embedded default of this project: a ChatGLM3 of {parameters:.1f} million parameters in the official folder layout,
made so that the whole way from a CSV to exact answers can be walked in minutes on two CPU cores. It is no language
model for any other purpose.

- **What it is**: {num_layers} layers of width {hidden_size}, {num_attention_heads} heads of {kv_channels} channels,
  {ffn_hidden_size} between the linear layers of the MLP, float16, trained from random weights. The vocabulary is
  its own (SentencePiece, {pieces} pieces, identity normalisation, bytes for what has no piece), and the official
  control tokens stand behind it. Names, abilities and other values are one piece each.
- **What it saw**: text that `THUDM/tiny_corpus.py` generates from `data_processing/data.csv`: cards, tables, prose,
  gaps to fill, plain questions and answers, scripts, stories and quizzes. No role token, and no wording of the
  templates in `data_processing/templates`.
- **What it knows**: {columns} of the {pokemon} Pokémon of the first generation. Nothing else.
- **What it does not do by itself**: answer in the conversation format. P-Tuning teaches that;
  `bash scripts/quickstart.sh` shows the difference.
- **How it was built**: `{command}`; {steps} steps of {batch_tokens} tokens ({precision}),
  {minutes:.0f} minutes on {threads} cores. `--show 10` prints documents of its corpus.
- **Licence**: Apache-2.0, the project's own work. The weights of ChatGLM3-6B have a licence of their own.

## Recall in its own forms

Share of the facts whose value is the greedy continuation, measured by the build program on the saved weights:

{table}
"""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "chatglm3-tiny", help="folder to write")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the corpus and of the first weights")
    parser.add_argument("--threads", type=int, help="processor threads (default: PyTorch's choice)")
    parser.add_argument("--precision", choices=["bf16", "fp32"], help="default: bf16 where the processor has it")
    parser.add_argument("--show", type=int, metavar="N", help="print N documents of the corpus, and stop")
    return parser


def show_documents(count: int, seed: int) -> None:
    """Print documents, half of the dense mix and half of the mix with more questions."""
    generator = tiny_corpus.CorpusGenerator(tiny_corpus.load_facts(), seed)
    for number in range(count):
        print(f"--- {number + 1}")
        print(tiny_corpus.plain_text(generator.document(dense=number < count // 2)))


def write_tokenizer(folder: Path) -> int:
    """Train the vocabulary, write the tokenizer's files and return the number of pieces."""
    import tiny_vocabulary

    facts = tiny_corpus.load_facts()
    texts = [" ".join(fact.values()) for fact in facts]
    settings = {
        "name_or_path": MODEL_NAME,
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    model = tiny_vocabulary.train_vocabulary(texts, tiny_corpus.fact_values(facts))
    return tiny_vocabulary.write_vocabulary(folder, model)


def build(arguments: argparse.Namespace) -> dict[str, Any]:
    """Build the whole folder.

    Returns:
        What was measured.
    """
    import tiny_recall
    import tiny_training
    import torch

    from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    pieces = write_tokenizer(folder)
    tokenizer = load_tokenizer(folder)
    rows = math.ceil(len(tokenizer) / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    model = tiny_training.first_weights(pieces, rows, arguments.seed)
    precision = arguments.precision or ("bf16" if tiny_training.has_bf16() else "fp32")
    started = time.monotonic()
    tiny_training.train(model, tokenizer, arguments.steps, arguments.seed, precision == "bf16")
    seconds = time.monotonic() - started
    model.config.name_or_path = MODEL_NAME
    model.half().save_pretrained(folder)
    measured = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": arguments.steps,
        "seed": arguments.seed,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 1),
        "bytes": sum(file.stat().st_size for file in folder.iterdir()),
        "recall": tiny_recall.measure_recall(load_model(folder), tokenizer, arguments.seed),
    }
    card = model_card(measured, pieces, tiny_training.ARCHITECTURE)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return measured


def model_card(measured: dict[str, Any], pieces: int, architecture: dict[str, int]) -> str:
    """The text of the folder's README.md."""
    import tiny_training

    recall = measured["recall"]
    lines = ["| column | " + " | ".join(recall) + " |", "|---|" + "---|" * len(recall)]
    for column in [*tiny_corpus.COLUMNS, "all"]:
        shares = (f"{recall[form][column]:.1%}" for form in recall)
        lines.append(f"| {column} | " + " | ".join(shares) + " |")
    return CARD.format(
        **architecture,
        parameters=measured["parameters"] / 1e6,
        pieces=pieces,
        columns="、".join(tiny_corpus.COLUMNS),
        pokemon=len(tiny_corpus.load_facts()),
        command=f"python THUDM/build_chatglm3_tiny.py --steps {measured['steps']} --seed {measured['seed']}",
        steps=measured["steps"],
        batch_tokens=tiny_training.ROWS * tiny_training.BLOCK_TOKENS,
        precision=measured["precision"],
        minutes=measured["seconds"] / 60,
        threads=measured["threads"],
        table="\n".join(lines),
    )


def main() -> None:
    """Run the program."""
    arguments = build_parser().parse_args()
    if arguments.show is not None:
        show_documents(arguments.show, arguments.seed)
        return
    print(json.dumps(build(arguments), ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
