"""Measures how many of its facts `THUDM/chatglm3-tiny` recalls in forms of its own corpus.

Run by `THUDM/build_chatglm3_tiny.py`. This is not the score that P-Tuning is judged by (`evaluate.py`): here the
model is asked as it was trained, and only the value has to be right.
"""

import tiny_corpus
import torch
from tiny_training import encode_document

from finetune_chatmodel_demo.chatglm3 import ChatGLM3ForCausalLM, ChatGLMTokenizer

BATCH_ROWS = 128


def probes(facts: list[dict[str, str]], seed: int) -> list[tuple[str, str, str]]:
    """(form, column, document) of every fact in two forms; each document ends with the value.

    The forms: "statement", a sentence with the name before the value, and "question", a plain question and answer.
    """
    generator = tiny_corpus.CorpusGenerator(facts, seed)
    found = []
    for fact in facts:
        name = fact[tiny_corpus.NAME_COLUMN]
        for column in tiny_corpus.COLUMNS:
            if not fact[column]:
                continue
            statement = ""
            while name not in statement.partition(tiny_corpus.VALUE_START)[0]:
                generator.new_style()
                statement = generator.statement(fact, column, name)
            question = generator.question(column, name)
            statement = statement.partition(tiny_corpus.VALUE_END)[0] + tiny_corpus.VALUE_END
            found.append(("statement", column, statement))
            found.append(("question", column, f"问：{question}\n答：{statement}"))
    return found


@torch.no_grad()
def measure_recall(model: ChatGLM3ForCausalLM, tokenizer: ChatGLMTokenizer, seed: int) -> dict[str, dict[str, float]]:
    """Share of facts whose value is the model's greedy continuation.

    Returns:
        form → column or "all" → share.
    """
    encoded = []
    for form, column, document in probes(tiny_corpus.load_facts(), seed):
        ids, weights = encode_document(tokenizer, document)
        encoded.append((form, column, ids, [i for i, weight in enumerate(weights) if weight == 1.0]))
    encoded.sort(key=lambda row: len(row[2]))
    hits: dict[str, dict[str, list[bool]]] = {}
    for start in range(0, len(encoded), BATCH_ROWS):
        rows = encoded[start : start + BATCH_ROWS]
        longest = len(rows[-1][2])
        ids = torch.tensor([row[2] + [0] * (longest - len(row[2])) for row in rows])
        best = model(input_ids=ids, use_cache=False).logits.argmax(-1)
        for row, (form, column, _, positions) in enumerate(rows):
            # The value is the greedy continuation just where every token of it is the best one after those before it.
            is_hit = all(best[row, i - 1] == ids[row, i] for i in positions)
            for key in (column, "all"):
                hits.setdefault(form, {}).setdefault(key, []).append(is_hit)
    return {form: {key: round(sum(v) / len(v), 4) for key, v in columns.items()} for form, columns in hits.items()}
