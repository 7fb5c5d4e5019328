"""--do_predict: answers to the validation data beside the references, and how alike they are.

    python finetune_chatmodel_demo/finetune.py --do_predict True --ptuning_checkpoint output/pokemon \\
        --model_name_or_path THUDM/chatglm3-6b --validation_file formatted_data/pokemon_validation.jsonl \\
        --output_dir output/pokemon-predictions

writes `generated_predictions.jsonl` ({"prompt", "predict", "label"} a line, in the order of the data) and the scores
into `predict_results.json` and `all_results.json`. A reply is a run of labels that count; what stands before it in its
row is its prompt, whatever the data was made from. `--eval_questions N` asks some of the validation data while
training, `--overfit_check N` all of the chosen rows: does greedy decoding write them token by token?
"""

import functools
import importlib.util
import json
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import write_whole
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.generation.batch import generate_all, generate_replies
from finetune_chatmodel_demo.generation.replies import read_reply
from finetune_chatmodel_demo.generation.session import build_settings
from finetune_chatmodel_demo.training.results import save_results
from finetune_chatmodel_demo.training.settings import Settings

PREDICTIONS = "generated_predictions.jsonl"
SPARE_TOKENS = 8  # for a reply that spells the same text in more pieces
ROWS_OF_SAMPLE = 50_000  # a sample is drawn from at most so many rows
# Module → its name for pip.
PACKAGES = {"jieba": "jieba", "nltk": "nltk", "rouge_chinese": "rouge-chinese"}
SCORES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reply:
    """One supervised reply.

    Args:
        row: the row that it is in.
        prompt_ids: everything before it.
        expected_ids: the reply without the token that ends it.
        is_whole: whether it ends with a stop token; a length limit may have cut it off.
    """

    row: int
    prompt_ids: tuple[int, ...]
    expected_ids: tuple[int, ...]
    is_whole: bool


def find_replies(row: int, item: dict[str, Any], stop_ids: Iterable[int]) -> list[Reply]:
    """The supervised replies of one row, in their order.

    Args:
        row: its number.
        item: `input_ids` and `labels` of the row.
        stop_ids: tokens that end a reply.
    """
    ids, labels = list(item["input_ids"]), list(item["labels"])
    stops, replies, start = set(stop_ids), [], None
    for position in range(1, len(ids) + 1):
        counts = position < len(ids) and labels[position] != IGNORED_LABEL
        if counts and start is None:
            start = position
        if start is not None and (not counts or ids[position] in stops):
            is_whole = counts and ids[position] in stops
            if position > start:
                replies.append(Reply(row, tuple(ids[:start]), tuple(ids[start:position]), is_whole))
            start = None
    return replies


def sample_replies(rows: Any, count: int, seed: int, stop_ids: Iterable[int], room: int) -> list[Reply]:
    """`count` whole replies of a data set, spread over its rows; the same for the same seed.

    Args:
        rows: map-style items with `input_ids` and `labels`.
        count: replies wanted; fewer where the data has fewer.
        seed: of the draw.
        stop_ids: tokens that end a reply.
        room: most tokens of prompt and reply together.
    """
    draw = random.Random(seed)
    order = draw.sample(range(len(rows)), min(len(rows), ROWS_OF_SAMPLE))
    first: list[Reply] = []
    later: list[Reply] = []
    for row in order:
        replies = [
            reply
            for reply in find_replies(row, rows[row], stop_ids)
            if reply.is_whole and len(reply.prompt_ids) + len(reply.expected_ids) + SPARE_TOKENS <= room
        ]
        draw.shuffle(replies)
        share = -(-len(replies) // 3)
        first += replies[:share]
        later += replies[share:]
        if len(first) >= count:
            break
    return (first + later)[:count]


def share_out(replies: Sequence[Reply], process: int, processes: int) -> list[tuple[Reply, bool]]:
    """The replies of one process, and whether they count: all get equally many, so some are asked twice."""
    each = -(-len(replies) // processes)
    places = [process + i * processes for i in range(each)]
    return [(replies[place % len(replies)], place < len(replies)) for place in places]


def write_replies(
    model: Any, tokenizer: Any, replies: Sequence[Reply], batch_size: int, spare: int = SPARE_TOKENS
) -> list[list[int]]:
    """What the model writes for each prompt, greedily, without the token that ends it.

    Args:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        replies: the questions.
        batch_size: prompts at a time; those of similar length go together.
        spare: tokens that may be written beyond the longest expected reply of a batch.
    """
    limits = [len(reply.expected_ids) + spare for reply in replies]
    settings = build_settings(tokenizer, max_new_tokens=max(limits, default=1))
    prompts = [list(reply.prompt_ids) for reply in replies]
    written = generate_all(model, prompts, settings, batch_size, limits=limits)
    return [ids[:-1] if ids[-1] in settings.eos_token_id else ids for ids in written]


def is_reproduced(tokenizer: Any, reply: Reply, written: Sequence[int]) -> bool:
    """Whether the model wrote the reply: the same tokens, or the same text in other pieces.

    Of a reply that was cut off only the beginning is known.
    """
    if not reply.is_whole:
        return tuple(written[: len(reply.expected_ids)]) == reply.expected_ids
    if tuple(written) == reply.expected_ids:
        return True
    return tokenizer.decode(list(written)).strip() == tokenizer.decode(list(reply.expected_ids)).strip()


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
    asked = [take_last_reply(row, tokenizer) for row in rows]
    answers = _answer(model, tokenizer, asked, settings)
    lines = [
        {
            "prompt": tokenizer.decode(list(reply.prompt_ids)),
            "predict": answer,
            "label": read_reply(tokenizer, list(reply.expected_ids), settings.prompt_format).text,
        }
        for reply, answer in zip(asked, answers)
    ]
    scores = mean_scores((line["predict"], line["label"]) for line in lines)
    seconds = time.monotonic() - started
    metrics = {f"predict_{name}": value for name, value in scores.items()}
    metrics["predict_runtime"] = round(seconds, 4)
    metrics["predict_samples_per_second"] = round(len(lines) / max(seconds, 1e-9), 3)
    if settings.training.should_save:
        write_whole(
            Path(output_dir) / PREDICTIONS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        )
        save_results(output_dir, "predict", metrics)
    return metrics


def take_last_reply(row: dict[str, list[int]], tokenizer: Any) -> Reply:
    """The last supervised reply of a row, and everything before it.

    Raises:
        ValueError: nothing of the row is supervised.
    """
    found = find_replies(0, row, [*tokenizer.stop_token_ids, tokenizer.get_command("<|assistant|>")])
    if not found:
        raise ValueError("the row has no supervised reply")
    return found[-1]


def _answer(model: Any, tokenizer: Any, replies: Sequence[Reply], settings: Settings) -> list[str]:
    """The answers, in the order of the replies, in every process."""
    from accelerate.utils import gather_object

    args, generation = settings.training, settings.generation
    limit = choose_answer_length(model, replies, settings)
    mine = list(range(len(replies)))[args.process_index :: args.world_size]
    sampling = {}
    if generation.do_sample:
        names = ("do_sample", "temperature", "top_p", "top_k")
        sampling = {name: getattr(generation, name) for name in names}
        torch.manual_seed(args.seed + args.process_index)
    was_training = model.training
    model.eval()
    with torch.autocast(model.device.type, getattr(torch, settings.precision), settings.precision != "float32"):
        written = generate_replies(
            model,
            tokenizer,
            [list(replies[i].prompt_ids) for i in mine],
            max_new_tokens=limit,
            batch_size=args.per_device_eval_batch_size,
            prompt_format=settings.prompt_format,
            sampling=sampling,
            progress=args.should_log and not args.disable_tqdm,
            description="predicting",
        )
    model.train(was_training)
    answers = dict(gather_object([(i, reply.text) for i, reply in zip(mine, written)]))
    return [answers[i] for i in range(len(replies))]


def choose_answer_length(model: Any, replies: Sequence[Reply], settings: Settings) -> int:
    """--max_new_tokens, or less where the context of the model ends earlier and the flag was not given.

    Raises:
        UserError: a prompt leaves no room for an answer, or less than was asked for.
    """
    longest = max((len(reply.prompt_ids) for reply in replies), default=0)
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


def check_packages() -> None:
    """Refuses a run whose answers could not be scored, before the model is loaded.

    Raises:
        UserError: names all packages that are missing.
    """
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"--do_predict computes BLEU and ROUGE with {', '.join(missing)}: pip install {' '.join(missing)}"
        )


def score_pair(predicted: str, label: str) -> dict[str, float]:
    """Scores one answer, 0 to 100.

    BLEU-4 is nltk's `sentence_bleu` over characters with smoothing method 3 (Chen and Cherry, 2014), ROUGE the F1 of
    rouge-chinese over jieba's words. An answer or reference without any word has no ROUGE: 0, where the package fails.

    Returns:
        `bleu-4`, `rouge-1`, `rouge-2`, `rouge-l`, rounded to 4 places.
    """
    cut, sentence_bleu, smoothing, get_rouge = _load_packages()
    words, expected = " ".join(cut(predicted)), " ".join(cut(label))
    scores = {"bleu-4": 100 * sentence_bleu([list(label)], list(predicted), smoothing_function=smoothing)}
    rouge: dict[str, Any] = {}
    if words.split() and expected.split():
        (rouge,) = get_rouge(words, expected)
    for name in ("rouge-1", "rouge-2", "rouge-l"):
        scores[name] = 100 * rouge[name]["f"] if rouge else 0.0
    return {name: round(float(value), 4) for name, value in scores.items()}


def mean_scores(pairs: Iterable[tuple[str, str]]) -> dict[str, float]:
    """The mean of `score_pair` over (answer, reference); 0 for no pair at all."""
    scores = [score_pair(predicted, label) for predicted, label in pairs]
    return {name: sum(each[name] for each in scores) / max(1, len(scores)) for name in SCORES}


@functools.cache
def _load_packages() -> tuple[Callable, Callable, Callable, Callable]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's regular expressions are of an older Python
        import jieba
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        from rouge_chinese import Rouge
    jieba.setLogLevel(logging.WARNING)  # it reports loading its dictionary as debugging, on standard error
    return jieba.cut, sentence_bleu, SmoothingFunction().method3, Rouge().get_scores
