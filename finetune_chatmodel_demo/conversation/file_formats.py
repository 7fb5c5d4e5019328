"""The records of people's own data files, told by their keys: every format becomes what `validation` checks.

`--formatting` says which format a file has to be in. The table in `data_processing/README.md` has an example line of
each. Data sets of a registry are converted by `formats`, which asks their entries.
"""

import itertools
import json
from typing import Any, Literal, get_args

from finetune_chatmodel_demo.conversation.validation import RecordError, shorten

Formatting = Literal["conversations", "prompt", "alpaca", "sharegpt", "openai", "xtuner", "firefly", "swift"]
FORMATTINGS = get_args(Formatting)
MESSAGE_KEYS = ("conversations", "messages", "conversation")
# What a question is put together from, in this order, and where its reply stands.
QUESTION_KEYS = ("instruction", "prompt", "query", "input")
REPLY_KEYS = ("response", "output", "completion")
PAIR_KEYS = ("chosen", "rejected", "rejected_response")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "observation": "observation",
    "tool": "observation",
}
ROUND_ROLES = {"system": "system", "input": "user", "human": "user", "output": "assistant", "assistant": "assistant"}
OPENAI_ROLES = {"developer": "system", "function": "observation"}
# Keys of a message, or of a round of messages, that mean something.
MESSAGE_PARTS = frozenset(
    (
        *("role", "content", "from", "value", "loss", "weight", "loss_weight", "metadata", "column"),
        *("tools", "tool_calls", "function_call", "tool_call_id", "name", "parameters", "observation"),
        *("human", "assistant", "system", "input", "output", "output_with_loss"),
    )
)
TOP_KEYS = frozenset((*MESSAGE_KEYS, *QUESTION_KEYS, *REPLY_KEYS, *PAIR_KEYS, "history", "system", "tools", "text"))


def tell_formatting(row: dict[str, Any]) -> str | None:
    """The format of a record, one of FORMATTINGS; None where no key tells it."""
    for key in MESSAGE_KEYS:
        items = row.get(key)
        if isinstance(items, list):
            first = next((item for item in items if isinstance(item, dict)), {})
            if "from" in first or "value" in first:
                return "sharegpt"
            if "role" not in first and ("human" in first or "assistant" in first):
                return "firefly"
            if "role" not in first and ("input" in first or "output" in first):
                return "xtuner"
            return "openai" if key == "messages" else "conversations"
    for key, name in (("instruction", "alpaca"), ("query", "swift"), ("prompt", "prompt")):
        if key in row:
            return name
    has_lists = all(isinstance(row.get(key), list) for key in ("chosen", "rejected"))
    return "openai" if has_lists else None


def read_record(row: Any, kind: str, where: str, formatting: str | None = None) -> Any:
    """Turns a row of a file into a record of a kind; what no key tells is left for `validation` to explain.

    Args:
        row: What the file held.
        kind: One of `validation.RecordKind`.
        where: Its place, for messages.
        formatting: The format that it has to be in; None: told by its keys.

    Raises:
        RecordError: Says the place, the key, what was expected and what was found.
    """
    if not isinstance(row, dict) or kind == "text":
        return row
    if "kto_tag" in row or isinstance(row.get("label"), bool):
        raise RecordError(
            f"{where}: 'label' says whether a reply is good (KTO), and there is no KTO stage; make pairs of a chosen "
            "and a rejected reply, for rm and dpo"
        )
    found = tell_formatting(row)
    if formatting is not None and found != formatting:
        raise RecordError(f"{where}: expected --formatting {formatting}, found {found or 'none'} (keys {_keys(row)})")
    if found is None:
        return row
    if kind == "input-output":
        return _read_single(row, where)
    record: dict[str, Any] = {}
    if tools := read_tools(row.get("tools"), where, unwraps=found == "openai"):
        record["tools"] = tools
    messages = _system(row, where) + read_history(row.get("history"), where)
    key = next((key for key in MESSAGE_KEYS if isinstance(row.get(key), list)), None)
    if key is not None:
        messages = _join_system(messages, read_messages(row[key], f"{where}: {key}", found == "openai"), where)
    elif isinstance(row.get("prompt"), list):
        messages = _join_system(messages, read_messages(row["prompt"], f"{where}: prompt", True), where)
    elif any(key in row for key in QUESTION_KEYS):
        messages.append({"role": "user", "content": _question(row, where)})
    if kind == "preference":
        return record | _read_pair(row, messages, where)
    is_prompt = not row.keys() - {*QUESTION_KEYS, "history", "system", "tools"}  # ppo needs no reply
    if key is None and not is_prompt:
        messages.append({"role": "assistant", "content": _reply(row, where)})
    return record | {"conversations": messages}


def read_messages(items: list[Any], where: str, unwraps_tools: bool = False) -> list[Any]:
    """Canonical messages of a list in any of the formats; calls of tools take the results that follow them."""
    messages: list[Any] = []
    waiting: list[dict[str, Any]] = []  # calls without a result
    ids: dict[str, dict[str, Any]] = {}
    for index, item in enumerate(items):
        place = f"{where}[{index}]"
        if not isinstance(item, dict):
            messages.append(item)
            continue
        role, content = _role_and_content(item, place)
        if role is None:
            messages += _read_round(item, place)
            continue
        if role == "observation" and waiting:
            call = ids.get(item.get("tool_call_id")) or waiting[0]
            call["observation"] = content
            waiting = [other for other in waiting if other is not call]
            continue
        if waiting:
            raise RecordError(f"{place}: the call of {waiting[0]['name']!r} has no result; put it behind the call")
        calls = _read_calls(item, role, content, place)
        if not calls or (isinstance(content, str) and content.strip() and role == "assistant"):
            messages.append(_with_loss(_plain(item, role, content, place, unwraps_tools), item, place))
        for call_id, call in calls:
            messages.append(_with_loss(call, item, place))
            waiting.append(messages[-1])
            if call_id is not None:
                ids[call_id] = messages[-1]
    if len(waiting) > 1:
        raise RecordError(f"{where}: {len(waiting)} calls at the end have no result; put the results behind them")
    return messages


def read_content(content: Any, where: str) -> Any:
    """A content that is a list of text parts as one text; anything else as it stands."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
            raise RecordError(
                f"{where}: 'content' has a part that is no text, {shorten(part)}; ChatGLM3 reads text alone"
            )
        texts.append(text)
    return "".join(texts)


def read_loss(message: dict[str, Any], where: str) -> bool | None:
    """What a message says about its loss: `loss`, or `weight` or `loss_weight` of 0 or 1; None: nothing."""
    for key in ("weight", "loss_weight"):
        if message.get(key) is not None:
            if message[key] not in (0, 1):
                raise RecordError(f"{where}: {key!r} is {shorten(message[key])}; a message counts (1) or does not (0)")
            if message.get("loss") not in (None, bool(message[key])):
                raise RecordError(f"{where}: 'loss' and {key!r} contradict each other; keep one")
            return bool(message[key])
    return message.get("loss")


def read_tools(value: Any, where: str, unwraps: bool = False) -> list[Any]:
    """Tools as a list, or as JSON text of one; [] where there are none. `unwraps`: takes OpenAI's wrappers off."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{where}: 'tools' must be a list or JSON text of one ({error}), got {shorten(value)}"
            ) from None
    if isinstance(value, str) or not value:
        return []
    if not isinstance(value, list):
        raise RecordError(f"{where}: 'tools' must be a list, got {shorten(value)}")
    if unwraps:
        value = [
            tool["function"] if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else tool
            for tool in value
        ]
    return value


def read_history(value: Any, where: str) -> list[dict[str, Any]]:
    """What was said before: pairs of question and reply, or messages."""
    if not value:
        return []
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return read_messages(value, f"{where}: history")
    messages = []
    for index, pair in enumerate(value if isinstance(value, list) else [value]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RecordError(f"{where}: history[{index}] must be a list [question, reply], got {shorten(pair)}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def read_call(name: Any, arguments: Any, where: str) -> dict[str, Any]:
    """The canonical message of a call; its result is not there yet."""
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError as error:
            raise RecordError(
                f"{where}: the arguments of {name!r} are no JSON ({error}), got {shorten(arguments)}"
            ) from None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise RecordError(f"{where}: expected a call with a name and an object of arguments, got {shorten(arguments)}")
    return {"role": "tool", "name": name, "parameters": arguments, "observation": ""}


def _role_and_content(item: dict[str, Any], where: str) -> tuple[str | None, Any]:
    """Role in our words ("call": a function call as text) and content; no role: an item that is a whole round."""
    if "from" in item:
        role = SHAREGPT_ROLES.get(item["from"]) if isinstance(item["from"], str) else None
        if role is None:
            raise RecordError(f"{where}: 'from' is {shorten(item['from'])}; use {', '.join(SHAREGPT_ROLES)}")
        return role, read_content(item.get("value"), where)
    if "role" not in item:
        return (None if {"human", "assistant", "input", "output"} & item.keys() else ""), item.get("content")
    role, content = item["role"], read_content(item.get("content"), where)
    if role == "tool" and "parameters" not in item and "observation" not in item:
        return "observation", content  # OpenAI's word for the result of a call
    return OPENAI_ROLES.get(role, role) if isinstance(role, str) else role, content


def _read_calls(item: dict[str, Any], role: Any, content: Any, where: str) -> list[tuple[str | None, dict[str, Any]]]:
    """(id, call) of every call that a message makes, in OpenAI's forms and in sharegpt's."""
    if role == "call":
        call = _from_json(content, "a call", where) if isinstance(content, str) else content
        found = call if isinstance(call, list) else [call]
        if not all(isinstance(each, dict) for each in found):
            raise RecordError(f'{where}: expected a call {{"name": ..., "arguments": {{...}}}}, got {shorten(content)}')
        return [(None, read_call(each.get("name"), each.get("arguments"), where)) for each in found]
    calls = item.get("tool_calls") or ([{"function": item["function_call"]}] if item.get("function_call") else [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RecordError(f"{where}: 'tool_calls' must be a list of calls, got {shorten(calls)}")
    functions = [call["function"] if isinstance(call.get("function"), dict) else call for call in calls]
    return [
        (call.get("id"), read_call(function.get("name"), function.get("arguments"), where))
        for call, function in zip(calls, functions)
    ]


def _plain(item: dict[str, Any], role: str, content: Any, where: str, unwraps_tools: bool) -> dict[str, Any]:
    """A message that is no call: our own keys alone."""
    kept = {key: item[key] for key in item if key not in ("from", "value", "tool_calls", "function_call")}
    if "from" in item or "role" in kept:
        kept |= {"role": role, "content": content} if "content" in kept or "from" in item else {"role": role}
    if role == "system" and "tools" in kept:
        kept["tools"] = read_tools(kept["tools"], where, unwraps_tools)
        if not kept["tools"]:
            del kept["tools"]
    return kept


def _read_round(item: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of a round: xtuner's {system, input, output}, Firefly's {human, assistant}."""
    messages = []
    for key, role in (
        ("system", "system"),
        ("input", "user"),
        ("human", "user"),
        ("output", "assistant"),
        ("assistant", "assistant"),
    ):
        if item.get(key) not in (None, ""):
            messages.append({"role": role, "content": item[key]})
    if messages and messages[-1]["role"] == "assistant":
        loss = item.get("output_with_loss", read_loss(item, where))
        messages[-1] |= {} if loss is None else {"loss": loss}
    return messages


def _with_loss(message: dict[str, Any], item: dict[str, Any], where: str) -> dict[str, Any]:
    kept = {key: message[key] for key in message if key not in ("weight", "loss_weight")}
    loss = read_loss(item, where)
    return kept if loss is None else kept | {"loss": loss}


def _system(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    text = row.get("system")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise RecordError(f"{where}: 'system' must be a string, got {shorten(text)}")
    return [{"role": "system", "content": text}]


def _join_system(before: list[dict[str, Any]], messages: list[Any], where: str) -> list[Any]:
    """The system prompt of a record in front of its messages, which may begin with the same one."""
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if before and first.get("role") == "system":
        if first.get("content") != before[0]["content"]:
            raise RecordError(f"{where}: two system prompts, in 'system' and in the first message; keep one")
        return messages[:1] + before[1:] + messages[1:]
    return before + messages


def _question(row: dict[str, Any], where: str) -> str:
    """Instruction, prompt, query and input, one below the other as far as they are there."""
    texts = []
    for key in QUESTION_KEYS:
        text = read_content(row.get(key), where)
        if text is not None and not isinstance(text, str):
            raise RecordError(f"{where}: {key!r} must be a string, got {shorten(text)}")
        if text and text.strip():
            texts.append(text)
    if not texts:
        found = next(key for key in QUESTION_KEYS if key in row)
        raise RecordError(f"{where}: {found!r} is empty; a question needs text")
    return "\n".join(texts)


def _reply(row: dict[str, Any], where: str) -> str:
    given = [key for key in REPLY_KEYS if row.get(key) is not None]
    if len(given) != 1:
        what = (
            f"{' and '.join(map(repr, given))} are both there; keep one"
            if given
            else f"the reply is missing; found {_keys(row)}; name it 'response'"
        )
        raise RecordError(f"{where}: {what}")
    if not isinstance(row[given[0]], str):
        raise RecordError(f"{where}: {given[0]!r} must be a string, got {shorten(row[given[0]])}")
    return row[given[0]]


def _read_single(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A record of --train_format input-output, which knows one question and one reply."""
    for key in ("history", "system", "tools"):
        if row.get(key):
            raise RecordError(
                f"{where}: {key!r} has no place in --train_format input-output; use --train_format multi-turn"
            )
    is_flat = tell_formatting(row) in ("prompt", "alpaca", "swift")
    is_plain = not any(row.get(key) for key in (*QUESTION_KEYS, *REPLY_KEYS) if key not in ("prompt", "response"))
    if is_plain or not is_flat or all(row.get(key) is None for key in REPLY_KEYS):
        return row
    return {"prompt": _question(row, where), "response": _reply(row, where)}


def _read_pair(row: dict[str, Any], messages: list[Any], where: str) -> dict[str, Any]:
    """The conversation that both replies follow, and the replies."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if rejected is None and chosen is None and isinstance(row.get("rejected_response"), str):
        chosen, rejected = _reply(row, where), row["rejected_response"]
    pair = next((row[key] for key in REPLY_KEYS if isinstance(row.get(key), list)), None)
    if chosen is None and rejected is None and pair is not None:
        if len(pair) < 2:
            raise RecordError(f"{where}: a list of {len(pair)} replies; expected the better one and a worse one")
        chosen, rejected = pair[0], pair[1]
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _split_pair(messages, chosen, rejected, where)
    replies = {}
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if value is not None:
            replies[key] = _one_reply([value], f"{where}: {key}")
    return {"conversations": messages, **replies}


def _split_pair(messages: list[Any], chosen: list[Any], rejected: list[Any], where: str) -> dict[str, Any]:
    """Two whole conversations: their common beginning is the prompt, and one reply follows it in each."""
    both = [
        read_messages(items, f"{where}: {name}", True) for name, items in (("chosen", chosen), ("rejected", rejected))
    ]
    common = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*both))]
    if common and messages and common[-len(messages) :] != messages:
        raise RecordError(f"{where}: the prompt is not how 'chosen' and 'rejected' begin; keep one of them")
    rest = [items[len(common) :] for items in both]
    if any(len(items) != 1 for items in rest):
        lengths = " and ".join(str(len(items)) for items in rest)
        raise RecordError(
            f"{where}: 'chosen' and 'rejected' part behind message {len(common)} and go on with {lengths} messages; "
            "expected one reply in each"
        )
    return {"conversations": common or messages, "chosen": rest[0][0], "rejected": rest[1][0]}


def _one_reply(value: list[Any], where: str) -> Any:
    if isinstance(value[0], str):
        return {"role": "assistant", "content": value[0]}
    if isinstance(value[0], list):
        value = value[0]
    found = read_messages(value, where, True)
    if len(found) != 1:
        raise RecordError(f"{where}: expected one reply, got {len(found)} messages")
    return found[0]


def _from_json(text: str, what: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: expected {what}, as JSON ({error}), got {shorten(text)}") from None


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no keys"
