"""Conversations from a JSONL file: what its lines may be, and what is wrong with those that are something else.

A line is {"messages": [{"role", "content"}, ...]}, ShareGPT's {"conversations": [{"from", "value"}, ...]},
{"prompt", "completion"} or Alpaca's {"instruction", "input", "output"}; a JSON list of such objects will do as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError

SHAREGPT = {"human": "user", "gpt": "assistant"}  # other roles, such as system, are called so there as well


def read_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path:number, object) of every line that is not empty.

    Raises:
        DataError: no such file, no text in UTF-8, or a line that is no JSON object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"there is no JSONL file at {path}")
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line} is no text in UTF-8 ({error.reason}): save it as UTF-8") from None
    if text.lstrip().startswith("["):
        for number, line in enumerate(_parse(text, path), 1):
            yield _object(line, f"{path}, item {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _object(_parse(line, f"{path}:{number}"), f"{path}:{number}")


def messages_of(line: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return a line's messages, each with a role and content; the last is the assistant's.

    Raises:
        DataError: another form, or nothing to learn.
    """
    if "messages" in line:
        messages = line["messages"]
    elif "conversations" in line:
        turns = line["conversations"]
        whole = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
        if not whole or not all(isinstance(turn.get("from"), str) for turn in turns):
            raise DataError(f"{where}: 'conversations' is a list of objects with 'from' and 'value', both text")
        messages = [{"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn.get("value")} for turn in turns]
    elif "prompt" in line and "completion" in line:
        messages = [{"role": "user", "content": line["prompt"]}, {"role": "assistant", "content": line["completion"]}]
    elif "instruction" in line and "output" in line:
        asked = "\n\n".join(str(part) for part in (line["instruction"], line.get("input")) if part)
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": line["output"]}]
    else:
        raise DataError(
            f"{where}: give messages, conversations, prompt and completion, or instruction and output, not {list(line)}"
        )
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{where}: 'messages' is a list of objects with 'role' and 'content'")
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: every message has a role and content, both text, unlike {_short(message)}")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            half = message["content"][error.start].encode("ascii", "backslashreplace").decode()
            raise DataError(f"{where}: a message holds {half}, half of a character: write its text anew") from None
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(f"{where}: its last message is not the assistant's, so there is nothing to learn")
    return messages


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {error}") from None


def _object(line: Any, where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(line, dict):
        raise DataError(f"{where} is no JSON object")
    return where, line


def _short(message: dict[str, Any]) -> str:
    text = json.dumps(message, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
