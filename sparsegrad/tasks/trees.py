"""OpenAssistant's conversation trees: read, check and filter them, and list their root-to-leaf paths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsegrad.errors import UserError, fail
from sparsegrad.tasks.dialogue import Turn

_ROLES = {"prompter": "user", "assistant": "assistant"}
_FINISHED = "ready_for_export"  # state of a tree that is complete
_MAX_DEPTH = 200  # messages from root to leaf: below Python's recursion limit; real conversations have about ten


@dataclass
class Message:
    """One message with its replies; `dropped` is the reason why it is left out (see `conversations`), or None."""

    id: str
    turn: Turn
    lang: str
    dropped: str | None
    replies: list[Message] = field(default_factory=list)


@dataclass(frozen=True)
class Tree:
    """A conversation tree; `finished` is false for one that OpenAssistant aborted."""

    id: str
    root: Message
    finished: bool


def nested_tree(row: Mapping[str, Any], where: str) -> Tree:
    """Build a tree from the export format: `prompt` is the root message, `replies` are its answers, and so on.

    Args:
        row: one line of the export.
        where: file and line, for error messages.

    Raises:
        UserError: with `where` and the message, if the tree is malformed, or has neither a message_tree_id nor a
            root with a message_id: without any id, two trees could not be distinguished.
    """
    root = row.get("prompt")
    if not isinstance(root, Mapping):
        raise UserError(
            f"{where}: a conversation tree needs the field prompt, but this line has {', '.join(row)}: add it, or "
            "remove the line"
        )
    message = _build_message(root, None, where)
    tree_id = row.get("message_tree_id") or root.get("message_id")  # OpenAssistant gives both the same value
    if tree_id in (None, ""):
        raise UserError(f"{where}: the conversation tree has no message_tree_id: add one that no other tree has")
    return Tree(str(tree_id), message, row.get("tree_state", _FINISHED) == _FINISHED)


def _build_message(row: Any, parent: str | None, where: str, depth: int = 1) -> Message:
    message, replies = _read_message(row, where), row.get("replies") or ()
    _check_depth(depth, where, message)
    if not isinstance(replies, list | tuple):
        raise UserError(
            f"{where}: the replies of message {message.id} are a {type(replies).__name__}: give a list of messages"
        )
    given = row.get("parent_id")  # optional here: the nesting already says it
    if given is not None and given != parent:
        raise UserError(
            f"{where}: message {message.id} answers {given}, which is missing: the message above it is {parent}; "
            "correct its parent_id, or remove the tree"
        )
    message.replies = [_build_message(reply, message.id, where, depth + 1) for reply in replies]
    return message


def _check_depth(depth: int, where: str, message: Message) -> None:
    if depth > _MAX_DEPTH:
        raise UserError(
            f"{where}: message {message.id} has more than {_MAX_DEPTH} messages above it: split the conversation"
        )


def flat_trees(rows: Iterable[Mapping[str, Any]], where: str) -> list[Tree]:
    """Build trees from single messages in any order, the format of the hub.

    Args:
        rows: one per message.
        where: file or data set, for error messages.

    Raises:
        UserError: with `where` and the message, if a tree is malformed.
    """
    found: dict[str, tuple[Message, Mapping[str, Any]]] = {}
    for row in rows:
        message = _read_message(row, where)
        if row.get("message_id") is None:
            raise UserError(f"{where}: a message has no message_id ({message.turn.text[:40]!r}): add one")
        if message.id in found:
            raise UserError(f"{where}: message {message.id} occurs twice: remove one of them")
        found[message.id] = (message, row)
    # Replies are attached only now: a reply may come before the message that it answers.
    trees = []
    for message, row in found.values():
        parent = row.get("parent_id")
        if parent is None:
            tree_id = str(row.get("message_tree_id") or message.id)
            trees.append(Tree(tree_id, message, (row.get("tree_state") or _FINISHED) == _FINISHED))
        elif isinstance(parent, str) and parent in found:
            found[parent][0].replies.append(message)
        else:
            raise UserError(
                f"{where}: message {message.id} answers {parent}, which is missing: add it, or remove the tree"
            )
    _check_reached(trees, found, where)
    return trees


def _check_reached(trees: list[Tree], found: Mapping[str, Any], where: str) -> None:
    """Refuse messages that answer each other in a circle, and trees that are too deep for recursion."""
    # Level by level, without recursion. Messages in a circle have no root, so no tree reaches them.
    level, depth, reached = [tree.root for tree in trees], 1, 0
    while level:
        _check_depth(depth, where, level[0])
        level, depth, reached = [reply for one in level for reply in one.replies], depth + 1, reached + len(level)
    if reached < len(found):
        raise UserError(
            f"{where}: {len(found) - reached} messages answer each other in a circle: correct their parent_id"
        )


def _read_message(row: Any, where: str) -> Message:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: a message is a {type(row).__name__}: give a JSON object")
    name, role = str(row.get("message_id")), row.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise fail(f"{where}: role of message {name}", role, f"choose one of {', '.join(_ROLES)}")
    dropped, text = _find_reason_to_drop(row), row.get("text")
    for value in (name, text, row.get("lang"), row.get("message_tree_id")):
        check_unicode(value, f"{where}: message {name!a}")
    if dropped is None and (not isinstance(text, str) or not text.strip()):
        raise UserError(f"{where}: message {name} has no text: give one, or mark the message deleted")
    return Message(name, Turn(_ROLES[role], str(text)), str(row.get("lang")), dropped)


def check_unicode(value: Any, where: str) -> None:
    """Raise `UserError` if the text has half a surrogate pair, which no file in UTF-8 can hold."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has {value!a}: half a Unicode pair; write both halves") from None


def _find_reason_to_drop(row: Mapping[str, Any]) -> str | None:
    """Return why a message is left out: deleted, refused by its reviewers (spam, low quality), or never reviewed."""
    if row.get("deleted"):
        return "deleted"
    review = row.get("review_result")
    return None if review is True else "unreviewed" if review is None else "spam"


def drop_unanswered(message: Message) -> None:
    """Mark as dropped, from `message` down, every user's message that no kept message answers."""
    for reply in message.replies:  # leaves first: what is below decides
        drop_unanswered(reply)
    if message.dropped is None and message.turn.role == "user" and _ends_path(message):
        message.dropped = "unanswered"


def _ends_path(message: Message) -> bool:
    """Whether no reply is kept: a message whose replies are all dropped ends a conversation, as a leaf does."""
    return all(reply.dropped is not None for reply in message.replies)


def conversations(
    trees: Iterable[Tree], langs: Iterable[str] | None, counts: Counter[str]
) -> Iterator[tuple[str, list[Turn]]]:
    """Yield (tree id, turns) of every root-to-leaf path; the replies below a dropped message are dropped too.

    Args:
        trees: any number.
        langs: languages to keep, by the tree's root; None keeps all.
        counts: is filled with what was found, why something was left out, and how many paths end with a user's turn.
    """
    wanted = None if langs is None else frozenset(langs)
    for tree in trees:
        counts["trees"] += 1
        if not tree.finished:
            counts["trees_unfinished"] += 1
        elif wanted is not None and tree.root.lang not in wanted:
            counts["trees_in_other_languages"] += 1
        else:
            for turns in _walk_paths(tree.root, (), counts):
                counts["conversations"] += 1
                counts["conversations_ending_with_question"] += turns[-1].role == "user"
                yield tree.id, list(turns)


def _walk_paths(message: Message, before: tuple[Turn, ...], counts: Counter[str]) -> Iterator[tuple[Turn, ...]]:
    if message.dropped is not None:
        counts[f"messages_{message.dropped}"] += 1
        return
    counts["messages"] += 1
    here = (*before, message.turn)
    if _ends_path(message):
        yield here
    for reply in message.replies:
        yield from _walk_paths(reply, here, counts)
