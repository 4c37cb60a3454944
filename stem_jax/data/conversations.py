"""Conversations as documents: read from JSON, and made ids of which the answers are scored.

With a template that writes a turn as <role>text<end>, E eos, and the ids of one word each

    ids      <user> Hi <end> <assistant> Hello <end> E
    scored     0    0    0        0        1     1   0

What is scored is what the model shall say: an assistant's words and the token that ends its turn.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from stem_jax.data.chat_template import Chat, check_messages
from stem_jax.errors import BadRecord, InputError

# Of ShareGPT, where turns are {"from": ..., "value": ...}.
_SHARED_ROLES = {"human": "user", "gpt": "assistant"}
_SHOWN_CHARS = 40


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """ids: [n] with eos at the end. scored: [n] bool. num_bytes: UTF-8 bytes of what is scored."""

    ids: np.ndarray
    scored: np.ndarray
    num_bytes: int


def conversation_text(record: Any) -> str:
    """The conversation in a JSON object, as JSON: its `messages`, or ShareGPT's `conversations`.

    What else there is of it for a template are its `tools`.
    Raises BadRecord for what is no conversation that answers could be learned from.
    """
    if not isinstance(record, dict):
        raise BadRecord("is no object: put one with messages on each line")
    if "messages" not in record and "conversations" not in record:
        named = ", ".join(map(repr, record)) or "nothing"
        raise BadRecord(f"has no field 'messages' (it has {named}): give the conversation as that")
    messages = record["messages"] if "messages" in record else _shared(record["conversations"])
    check_messages(messages)
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers:
        raise BadRecord("the conversation has no turn of the assistant: nothing would be scored")
    for index, message in enumerate(messages):
        empty = not (message.get("content") or "").strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and empty:
            raise BadRecord(f"message {index}, of the assistant, is empty: take it out")
    if messages[0]["role"] == "assistant":
        raise BadRecord("message 0 is the assistant's: begin with what it answers")
    text = json.dumps({"messages": messages, "tools": record.get("tools")}, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            f"the conversation holds the lone surrogate {text[error.start]!r}: replace it by U+FFFD"
        ) from error
    return text


def encode_conversation(chat: Chat, text: str) -> EncodedConversation:
    """The ids of what `conversation_text` made.

    They are those of the whole conversation, cut where an answer begins as they would be if it
    were still to come: what a model sees before it speaks does not depend on what it says.

    Raises:
        BadRecord: messages that the template refuses, or that hold the text of a special token.
        InputError: a template that writes the beginning of a conversation in another way once it
            goes on, or ends an answer with no token that ends completions.
    """
    record = json.loads(text)
    messages, tools = record["messages"], record["tools"]
    _check_plain(chat, messages)
    chat.check_roles(messages, tools)
    whole = chat.text(messages, tools=tools)
    spans = []
    before = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = chat.text(messages[:index], add_generation_prompt=True, tools=tools)
        answered = chat.text(messages[: index + 1], tools=tools)
        for shorter, longer in ((before, asked), (asked, answered)):
            _check_prefix(chat, shorter, longer, index)
        spans.append((len(asked), len(answered)))
        before = answered
    _check_prefix(chat, before, whole, len(messages))
    return _encoded(chat, whole, spans)


def texts_of(text: str) -> list[str]:
    """What is said in the turns of what `conversation_text` made."""
    return [m["content"] for m in json.loads(text)["messages"] if m.get("content")]


def _shared(turns: Any) -> Any:
    """ShareGPT's turns as messages; what is none is left for `check_messages`."""
    if not isinstance(turns, list):
        return turns
    return [
        {"role": _SHARED_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
        if isinstance(turn, dict) and isinstance(turn.get("from"), str)
        else turn
        for turn in turns
    ]


def _check_plain(chat: Chat, messages: list[dict[str, Any]]) -> None:
    """Raises BadRecord for the text of a special token, which would become the token."""
    for index, message in enumerate(messages):
        # Calls of tools are written, too.
        said = (message.get("content") or "") + json.dumps(message, ensure_ascii=False)
        for special in chat.tokenizer.special_texts:
            if special in said:
                raise BadRecord(
                    f"message {index} holds {special!r}, the text of a special token: take it out"
                )


def _check_prefix(chat: Chat, shorter: str, longer: str, index: int) -> None:
    if longer.startswith(shorter):
        return
    same = next(
        (n for n, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), len(longer)
    )
    one, other = (text[same : same + _SHOWN_CHARS] for text in (shorter, longer))
    raise InputError(
        f"{chat.name} writes the beginning of a conversation in another way once message {index} "
        f"is there: at character {same} {one!r} becomes {other!r}; so it is not known which text "
        "is the assistant's; give a template that only adds (--chat-template=FILE)"
    )


def _encoded(chat: Chat, whole: str, spans: list[tuple[int, int]]) -> EncodedConversation:
    """spans: characters of each of the assistant's turns, ascending."""
    tokenizer = chat.tokenizer
    starts, ids = _cut(chat, whole, [start for start, _ in spans])
    stops = set(tokenizer.special.stop_ids)
    text_of = {number: text for text, number in tokenizer.special_texts.items()}
    scored = np.zeros(len(ids) + 1, bool)
    num_bytes = 0
    for first, next_first, (start, end) in zip(starts, [*starts[1:], len(ids)], spans, strict=True):
        turn = whole[start:end]
        last = next((n for n in range(first, next_first) if ids[n] in stops), None)
        stop = None if last is None else text_of.get(ids[last], "")
        if last is None or not stop or stop not in turn:
            names = ", ".join(repr(text_of.get(n, n)) for n in sorted(stops))
            raise InputError(
                f"{chat.name} ends a turn of the assistant with {turn[-_SHOWN_CHARS:]!r}, in which "
                f"no token ends a completion ({names} do): name the one that shall by --stop"
            )
        scored[first : last + 1] = True
        num_bytes += len(turn[: turn.index(stop)].encode())
    if ids[-1] == tokenizer.eos_id:
        return EncodedConversation(np.array(ids, np.int64), scored[:-1], num_bytes)
    # Ends the document for whoever reads the store; nothing is learned of it.
    return EncodedConversation(np.array([*ids, tokenizer.eos_id], np.int64), scored, num_bytes)


def _cut(chat: Chat, whole: str, places: list[int]) -> tuple[list[int], list[int]]:
    """(first token behind each place of a text, ids of the text), no token across a place."""
    encode = chat.tokenizer.encode_special
    ids = encode(whole)
    starts = []
    for place in places:
        before = encode(whole[:place])
        if ids[: len(before)] != before:
            break
        starts.append(len(before))
    else:
        return starts, ids
    # A token goes across: the parts by themselves.
    starts, ids = [], encode(whole[: places[0]])
    for place, end in zip(places, [*places[1:], len(whole)], strict=True):
        starts.append(len(ids))
        ids += chat.tokenizer.encode_behind(whole[place:end], special=True)
    return starts, ids
