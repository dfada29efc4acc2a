"""The model card of an adapter. It is rewritten at each save until somebody edits it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from sparsegrad.files import unwritable, write_text
from sparsegrad.hashing import text_sha256

logger = logging.getLogger(__name__)
_CARD = """---
library_name: sparsegrad
{base_model}tags: [sparsegrad, peft]
---

# Adapter for {title}

Fine-tuned with [SparseGrad](https://arxiv.org/abs/2410.07383). The adapter stores the weights that differ from the base
and restores the trained `{model}` {exact}. Loading fails if the target weights of the base have
another SHA-256.

```python
import sparsegrad

adapter = sparsegrad.load_adapter(model, ".")  # or the name of a repository; model: the base, a {model}
adapter.merge()  # adapter.unmerge() restores the base
```
{loading}
Size: {size}.

Data, training settings, results and limitations: to be added by whoever trained it.
"""
_LOADING = """
The target weights of the base are numbers of `{0}`: load it with `dtype={0}`. To call the merged model
without `torch.autocast`, load the adapter into `model.float()`.
"""
# The last line contains the sha256 of all lines above it. A card that somebody edited no longer matches.
# Existing cards contain these lines as well: do not change their text.
_MARK = "\n<!-- save_adapter wrote this card and replaces it as long as it is unchanged: {} -->\n"
LORA_MARK = "\n<!-- save_lora wrote this card and replaces it as long as it is unchanged: {} -->\n"
_KEPT = "%s stays as it is, because it was written or edited by hand; its size and base may be outdated"


def write_card(
    folder: Path, source: str | None, model: str, size: str, tolerance: float, narrow: object = None
) -> None:
    """Write README.md, unless there is one that was written or edited by hand; in that case log a warning.

    Args:
        folder: folder of the adapter.
        source: name of the base; None if it is unknown.
        model: class name of the model.
        size: description of what is stored, in how many bytes.
        tolerance: as given to `save_adapter`.
        narrow: the dtype in which the base's target weights have the same values; None: that of the training.

    Raises:
        UserError: when the file cannot be read or written.
    """
    loading = "" if narrow is None else _LOADING.format(narrow)
    exact = "bit for bit" if not tolerance else f"up to {tolerance:g} of each target weight's change"
    text = _CARD.format(**describe_base(source, model), model=model, exact=exact, size=size, loading=loading)
    write_unless_edited(folder / "README.md", text, _MARK)


def describe_base(source: str | None, model: str) -> dict[str, str]:
    """The parts of a card that name the base. One without a name has no `base_model`, which has to be loadable."""
    base_model = "" if source is None else f"base_model: {json.dumps(source)}\n"
    return {"base_model": base_model, "title": source or f"a {model}"}


def write_unless_edited(path: Path, text: str, mark: str) -> None:
    """Write `text` and, below it, `mark` with its sha256, unless the file there was written or edited by hand.

    Args:
        path: the card.
        text: its content.
        mark: last line of the card, with {} for the sha256.

    Raises:
        UserError: when the file cannot be read or written.
    """
    if _is_unedited(path):
        write_text(path, text + mark.format(text_sha256(text)))
    else:
        logger.warning(_KEPT, path)


def remove_card(folder: Path) -> None:
    """Delete README.md, which describes an earlier adapter, unless it was written or edited by hand.

    Raises:
        UserError: when the file cannot be read or deleted.
    """
    path = folder / "README.md"
    if not _is_unedited(path):
        logger.warning(_KEPT, path)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None


def _is_unedited(path: Path) -> bool:
    """Whether there is no file at `path`, or one whose last line, of either format, matches the text above it."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise unwritable(path, error) from None
    return any(_has_mark(content, mark) for mark in (_MARK, LORA_MARK))


def _has_mark(content: str, mark: str) -> bool:
    text = content.rpartition(mark.partition("{")[0])[0]
    return content == text + mark.format(text_sha256(text))
