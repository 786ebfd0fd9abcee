"""Chats as their files have them, brought into the one form that chat templates read."""

from __future__ import annotations

import json
from typing import Any

from msplora.errors import nearest

from .data_files import DataError, Row

Message = dict[str, Any]

# The names that chat data goes by -> the roles that chat templates know.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}

# Roles whose text is a call of a function, written as JSON.
_CALLING = ("function_call", "tool_call")

# A turn's role and text, by the names that each has.
_ROLE = ("role", "from")
_TEXT = ("content", "value")

# Axolotl's flags of whether a turn is learnt, and those of which characters of it are.
FLAGS = ("train", "training")
_PARTS = ("train_detail", "training_detail")

# What a row may not say of how its chat is rendered, since it is not for the template.
_NOT_OF_TEMPLATES = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
)

# What else of a turn templates read: the call a result answers, and thoughts before an answer.
THOUGHTS = ("reasoning_content", "thinking")
_KEPT = ("name", "tool_call_id", *THOUGHTS)


def read_chat(row: Row, unanswered: bool) -> tuple[tuple[Message, ...], tuple[Message, ...] | None]:
    """Return (messages, tools) of a row; of `unanswered` ones, without the answer at the end."""
    turns = parsed(row.values.get("messages"), row.place, "'messages'")
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{row.place}: 'messages' (or 'conversations') must be a list of turns and hold at "
            f"least one."
        )
    messages = [_turn(row.place, number, turn) for number, turn in enumerate(turns, 1)]
    system = row.values.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if unanswered:
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise DataError(
                f"{row.place}: nothing but the assistant's answer, so there is no prompt. Put the "
                f"turn before it that it answers."
            )
    else:
        said = [message for message in messages if message["role"] == "assistant"]
        if all(message.get("weight") == 0 for message in said):
            weighed = ", or only such of weight 0 or train false" * bool(said)
            raise DataError(f"{row.place}: no turn of the assistant{weighed}, so nothing to learn.")
    return tuple(messages), _tools(row)


def template_options(row: Row) -> Message | None:
    """What a row's `chat_template_kwargs` tell the template, such as `enable_thinking`."""
    what = "'chat_template_kwargs'"
    options = parsed(row.values.get("chat_template_kwargs") or {}, row.place, what)
    if not isinstance(options, dict):
        raise DataError(f"{row.place}: {what} is a {type(options).__name__}, not an object.")
    options = _without_nulls(options)
    ours = [name for name in options if name in _NOT_OF_TEMPLATES]
    if ours:
        raise DataError(
            f"{row.place}: {what} sets {', '.join(ours)}, which is not for a row to say. Leave it "
            f"out."
        )
    return options or None


def is_empty(message: Message) -> bool:
    """Whether a turn says nothing, and calls nothing."""
    return not message["content"].strip() and "tool_calls" not in message


def calls_as_text(message: Message) -> Message:
    """The same turn for a template that knows no calls: they stand in the content, as JSON."""
    if "tool_calls" not in message:
        return message
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    content = "\n".join([message["content"]] * bool(message["content"]) + calls)
    return {key: value for key, value in message.items() if key != "tool_calls"} | {
        "content": content
    }


def chat_text(messages: tuple[Message, ...]) -> str:
    """All that is said in a chat, to tell whether two are the same."""
    plain = map(calls_as_text, messages)
    return "\n".join(f"{message['role']}: {message['content']}" for message in plain)


def role_of(turn: Message) -> Any:
    """What a turn calls its speaker; None where it does not."""
    return _first_there(turn, _ROLE)


def _turn(place: str, number: int, turn: Any) -> Message:
    place = f"{place}, turn {number}"
    if not isinstance(turn, dict):
        raise DataError(f"{place}: found a {type(turn).__name__}, not an object.")
    role = role_of(turn)
    calls = _calls(turn, place)
    if role is None or not (calls or any(name in turn for name in _TEXT)):
        raise DataError(
            f"{place}: a turn has role and content (or from and value); found "
            f"{', '.join(str(key) for key in turn) or 'nothing'}. Rename its keys."
        )
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"{place}: role {role!r} is none of {', '.join(ROLES)}."
            + nearest(str(role), ROLES, count=1)
        )
    content = _content(_first_there(turn, _TEXT), place, may_be_empty=bool(calls))
    if role in _CALLING and not calls:
        calls, content = _calls_in_text(content, place)
    kept = {key: turn[key] for key in _KEPT if isinstance(turn.get(key), str)}
    message = {"role": ROLES[role], "content": content, **kept}
    if not _counts(turn, message["role"], place):
        message["weight"] = 0
    return message | {"tool_calls": calls} if calls else message


def _first_there(turn: Message, names: tuple[str, ...]) -> Any:
    """What a turn has under the first of the names; tables give it nulls under the others."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _counts(turn: Message, role: str, place: str) -> bool:
    """Whether a turn of the assistant is learnt: files say which are not by a weight or a flag."""
    said: dict[str, bool] = {}
    for name in FLAGS:
        flag = turn.get(name)
        if flag is None:
            continue
        if not isinstance(flag, bool):
            raise DataError(f"{place}: {name!r} of a turn is true or false; found {flag!r}.")
        said[name] = flag
        if flag and role != "assistant":
            raise DataError(
                f"{place}: {name!r} asks for a turn of the {role} to be learnt, and only the "
                f"assistant's are. Take it off."
            )
    parts = [name for name in _PARTS if turn.get(name)]
    if parts:
        raise DataError(
            f"{place}: {parts[0]!r} asks for parts of a turn to be learnt, and a turn is learnt "
            f"whole or not at all. Take it off, or use train."
        )
    if role != "assistant":
        return True
    weight = turn.get("weight")
    if weight is not None:
        if weight not in (0, 1):
            raise DataError(f"{place}: a weight of a turn is 0 or 1; found {weight!r}.")
        said["weight"] = bool(weight)
    if len(set(said.values())) > 1:
        found = " and ".join(f"{name}: {json.dumps(turn[name])}" for name in said)
        raise DataError(f"{place}: {found} contradict each other. Keep one.")
    return all(said.values())


def _content(content: Any, place: str, may_be_empty: bool) -> str:
    """The text of a turn; of a list of parts, as some chats have it, their texts together."""
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        raise DataError(f"{place}: the content has parts that are not text; only text is read.")
    if isinstance(content, str):
        return content
    if content is None:
        raise DataError(f"{place}: the content is null, not text.")
    raise DataError(f"{place}: the content is a {type(content).__name__}, not text.")


def _calls(turn: Message, place: str) -> list[Message]:
    """The calls that a turn lists, or the one that older files have as `function_call`."""
    calls = parsed(turn.get("tool_calls") or [], place, "'tool_calls'")
    if turn.get("function_call"):
        calls = [parsed(turn["function_call"], place, "'function_call'")]
    if not isinstance(calls, list):
        raise DataError(f"{place}: 'tool_calls' is a {type(calls).__name__}, not a list.")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{place}: a call is an object with the name of a function and its arguments; "
                f"found {json.dumps(call, default=str)[:80]}."
            )
        its = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(its | _call(function, place))
    return found


def _calls_in_text(content: str, place: str) -> tuple[list[Message], str]:
    """The calls that a text of JSON is, with no text left; or none, and the text as it is."""
    try:
        parsed = json.loads(content)
    except json.JSONDecodeError:
        return [], content
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(
        isinstance(its, dict) and isinstance(its.get("name"), str) for its in calls
    ):
        return [], content
    return [_call(its, place, padded=False) for its in calls], ""


def _call(function: Message, place: str, padded: bool = True) -> Message:
    given = function.get("arguments") or {}
    # An object, not its text: templates write it as JSON themselves.
    arguments = parsed(given, place, "the arguments of a call")
    if padded and arguments is given:  # in a text of JSON a null was meant
        arguments = _without_nulls(arguments)
    its = {"name": function["name"], "arguments": arguments}
    return {"type": "function", "function": its}


def _tools(row: Row) -> tuple[Message, ...] | None:
    """The tools as templates expect them: each an object with its `function`."""
    tools = parsed(row.values.get("tools") or [], row.place, "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{row.place}: 'tools' is not a list of objects.")
    wrapped = [
        tool if "function" in tool else {"type": "function", "function": tool}
        for tool in map(_without_nulls, tools)
    ]
    return tuple(wrapped) or None


def parsed(value: Any, place: str, what: str) -> Any:
    """Return the value, or what its text says where a file has it as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: {what} is not valid JSON: {error.msg}.") from None


def _without_nulls(value: Any) -> Any:
    """Tables give every object the fields of all, with nulls for those it never had."""
    if isinstance(value, dict):
        return {key: _without_nulls(its) for key, its in value.items() if its is not None}
    return [_without_nulls(its) for its in value] if isinstance(value, list) else value
