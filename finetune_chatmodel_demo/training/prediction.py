"""--do_predict: answers to the validation data beside the references, and how alike they are.

    python finetune_chatmodel_demo/finetune.py --do_predict True --ptuning_checkpoint output/pokemon \\
        --model_name_or_path THUDM/chatglm3-6b --validation_file formatted_data/pokemon_validation.jsonl \\
        --output_dir output/pokemon-predictions

writes `generated_predictions.jsonl` ({"prompt", "predict", "label"} a line, in the order of the data) and the scores
into `predict_results.json` and `all_results.json`.
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.rendering import IGNORED_LABEL
from finetune_chatmodel_demo.generation.batch import generate_replies
from finetune_chatmodel_demo.generation.replies import read_reply
from finetune_chatmodel_demo.training.run_logs import publish_text, save_results
from finetune_chatmodel_demo.training.settings import Settings
from finetune_chatmodel_demo.training.text_scores import mean_scores

PREDICTIONS = "generated_predictions.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exercise:
    """What the model is asked: `prompt_ids` ends where the reply begins, `label_ids` is the reference, its end token
    left out."""

    prompt_ids: list[int]
    label_ids: list[int]


def run_prediction(
    model: Any, tokenizer: Any, rows: Sequence[dict[str, list[int]]], settings: Settings, output_dir: str | Path
) -> dict[str, float]:
    """Answers the last reply of every row, given the true conversation before it, and scores the answers.

    With several processes each answers its share; the first writes.

    Args:
        model: a ChatGLM3 with or without prefix or adapter.
        tokenizer: its tokenizer.
        rows: validation rows of `input_ids` and `labels`, as sft has them.
        settings: the run: how answers are generated, in which batches and precision.
        output_dir: where the files go.

    Returns:
        `predict_bleu-4`, `predict_rouge-1`, `predict_rouge-2`, `predict_rouge-l`, `predict_runtime`,
        `predict_samples_per_second`.

    Raises:
        UserError: for a row that leaves no room for an answer.
    """
    started = time.monotonic()
    exercises = [take_last_reply(row, tokenizer) for row in rows]
    answers = _answer(model, tokenizer, exercises, settings)
    lines = [
        {
            "prompt": tokenizer.decode(exercise.prompt_ids),
            "predict": answer,
            "label": read_reply(tokenizer, exercise.label_ids, settings.prompt_format).text,
        }
        for exercise, answer in zip(exercises, answers)
    ]
    scores = mean_scores((line["predict"], line["label"]) for line in lines)
    seconds = time.monotonic() - started
    metrics = {f"predict_{name}": value for name, value in scores.items()}
    metrics["predict_runtime"] = round(seconds, 4)
    metrics["predict_samples_per_second"] = round(len(lines) / max(seconds, 1e-9), 3)
    if settings.training.should_save:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        publish_text(Path(output_dir) / PREDICTIONS, text)
        save_results(output_dir, "predict", metrics)
    return metrics


def take_last_reply(row: dict[str, list[int]], tokenizer: Any) -> Exercise:
    """Divides a row where its last supervised reply begins.

    A reply of `chatglm3` begins behind `<|assistant|>`; of a template of text alone it is the last run of supervised
    ids. It ends with eos or a role token.

    Raises:
        ValueError: nothing of the row is supervised.
    """
    ids, labels = row["input_ids"], row["labels"]
    assistant, stops = tokenizer.get_command("<|assistant|>"), set(tokenizer.stop_token_ids)
    is_target = [label != IGNORED_LABEL for label in labels]
    if not any(is_target):
        raise ValueError("the row has no supervised token")
    starts = [i + 1 for i, token in enumerate(ids[:-1]) if token == assistant and is_target[i + 1]]
    if not starts:  # eos ends a reply of text, also where the next one follows at once
        starts = [
            i for i, wanted in enumerate(is_target) if wanted and (not i or not is_target[i - 1] or ids[i - 1] in stops)
        ]
    start = end = starts[-1]
    while end < len(ids) and is_target[end] and ids[end] not in stops and ids[end] != assistant:
        end += 1
    return Exercise(list(ids[:start]), list(ids[start:end]))


def _answer(model: Any, tokenizer: Any, exercises: Sequence[Exercise], settings: Settings) -> list[str]:
    """The answers, in the order of the exercises, in every process."""
    from accelerate.utils import gather_object

    args, generation = settings.training, settings.generation
    limit = choose_answer_length(model, exercises, settings)
    mine = list(range(len(exercises)))[args.process_index :: args.world_size]
    sampling = {}
    if generation.do_sample:
        names = ("do_sample", "temperature", "top_p", "top_k")
        sampling = {name: getattr(generation, name) for name in names}
        torch.manual_seed(args.seed + args.process_index)
    was_training = model.training
    model.eval()
    with torch.autocast(model.device.type, getattr(torch, settings.precision), settings.precision != "float32"):
        replies = generate_replies(
            model,
            tokenizer,
            [exercises[i].prompt_ids for i in mine],
            max_new_tokens=limit,
            batch_size=args.per_device_eval_batch_size,
            prompt_format=settings.prompt_format,
            sampling=sampling,
            progress=args.should_log and not args.disable_tqdm,
            description="predicting",
        )
    model.train(was_training)
    answers = dict(gather_object([(i, reply.text) for i, reply in zip(mine, replies)]))
    return [answers[i] for i in range(len(exercises))]


def choose_answer_length(model: Any, exercises: Sequence[Exercise], settings: Settings) -> int:
    """--max_new_tokens, or less where the context of the model ends earlier and the flag was not given.

    Raises:
        UserError: a prompt leaves no room for an answer, or less than was asked for.
    """
    longest = max((len(exercise.prompt_ids) for exercise in exercises), default=0)
    room, wanted = model.config.seq_length - longest, settings.generation.max_new_tokens
    if wanted <= room:
        return wanted
    if room < 1 or "max_new_tokens" in settings.given:
        raise UserError(
            f"the longest prompt has {longest} tokens, and the model's context {model.config.seq_length}: "
            f"--max_new_tokens {wanted} does not fit; give a smaller number, or cut the rows with --max_seq_length"
        )
    logger.info("answers have at most %d tokens: the longest prompt leaves no more of the model's context", room)
    return room
