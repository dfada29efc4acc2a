"""A conversation as one text: the paper's format, or the tokenizer's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsegrad.errors import UserError, first_line

ROLES = ("user", "assistant")

Written = tuple[str, list[tuple[int, int]]]
"""A text, and the (start, end) of what the assistant says in it, in characters."""


@dataclass(frozen=True)
class Turn:
    """What one side says: `role` is user or assistant."""

    role: str
    text: str


def write_inst(turns: list[Turn], tokenizer: Any = None) -> Written:
    """`[INST] question [/INST] answer [INST] ...`, one space between all parts (paper, section 5.2)."""
    text, answers = "", []
    for turn in turns:
        start = len(text)
        part = f"[INST] {turn.text} [/INST]" if turn.role == "user" else turn.text
        text += f" {part}" if text else part
        if turn.role == "assistant":
            answers.append((start, len(text)))
    return text, answers


def write_chat(turns: list[Turn], tokenizer: Any) -> Written:
    """The tokenizer's own chat template.

    Raises:
        UserError: when it has none, refuses the conversation, or does not write turn after turn.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("task.format=chat is not allowed: this tokenizer has no chat template; use inst")
    text, answers = _render(turns, tokenizer), []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            before = _render(turns[:index], tokenizer, add_generation_prompt=True)
            after = _render(turns[: index + 1], tokenizer)
            if not (after.startswith(before) and text.startswith(before)):
                raise UserError("this tokenizer's chat template does not write turn after turn: use task.format=inst")
            answers.append((len(before), len(after)))
    return text, answers


def _render(turns: list[Turn], tokenizer: Any, **options: Any) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template may raise anything
        raise UserError(
            f"the chat template refuses a conversation ({first_line(error)}): use task.format=inst"
        ) from None
