"""Write a conversation as one text: in the paper's format, or by the tokenizer's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsegrad.errors import UserError, first_line

Written = tuple[str, list[tuple[int, int]]]
"""A text, and the (start, end) in characters of each of the assistant's turns in it."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; `role` is user or assistant."""

    role: str
    text: str


def write_inst(turns: list[Turn], tokenizer: Any = None) -> Written:
    """Write `[INST] question [/INST] answer [INST] ...`, the parts joined by one space (paper, section 5.2)."""
    text, answers = "", []
    for turn in turns:
        start = len(text)  # before the space: tokenizers count it as part of the next token
        part = f"[INST] {turn.text} [/INST]" if turn.role == "user" else turn.text
        text += f" {part}" if text else part
        if turn.role == "assistant":
            answers.append((start, len(text)))
    return text, answers


def write_chat(turns: list[Turn], tokenizer: Any) -> Written:
    """Write the conversation by the tokenizer's own chat template.

    Raises:
        UserError: if the tokenizer has no template, or the template refuses the conversation or does not write the
            turns one after the other.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise UserError("task.format=chat is not allowed: this tokenizer has no chat template; use task.format=inst")
    text, answers = _render(turns, tokenizer), []
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            # A template reports no positions: a turn starts where the conversation before it, with its generation
            # prompt, ends.
            before = _render(turns[:index], tokenizer, add_generation_prompt=True)
            after = _render(turns[: index + 1], tokenizer)
            if not (after.startswith(before) and text.startswith(before)):
                raise UserError(
                    "task.format=chat is not allowed: this tokenizer's chat template does not write the turns one "
                    "after the other; use task.format=inst"
                )
            answers.append((len(before), len(after)))
    return text, answers


def _render(turns: list[Turn], tokenizer: Any, **options: Any) -> str:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template may raise anything
        raise UserError(
            f"task.format=chat is not allowed: the chat template refuses a conversation ({first_line(error)}); "
            "use task.format=inst"
        ) from None
