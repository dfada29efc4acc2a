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
and restores the trained `{model}` {exact}. Loading fails if the base weights have another SHA-256.

```python
import sparsegrad

adapter = sparsegrad.load_adapter(model, ".")  # or the name of a repository; model: the base, a {model}
adapter.merge()  # adapter.unmerge() restores the base
```

Size: {size}.

Data, training settings, results and limitations: to be added by whoever trained it.
"""
# The last line contains the sha256 of all lines above it. A card that somebody edited no longer matches.
# Existing cards contain this line as well: do not change its text.
_MARK = "\n<!-- save_adapter wrote this card and replaces it as long as it is unchanged: {} -->\n"


def write_card(folder: Path, source: str | None, model: str, size: str, tolerance: float) -> None:
    """Write README.md, unless there is one that was written or edited by hand; in that case log a warning.

    Args:
        folder: folder of the adapter.
        source: name of the base; None if it is unknown.
        model: class name of the model.
        size: description of what is stored, in how many bytes.
        tolerance: as given to `save_adapter`.

    Raises:
        UserError: when the file cannot be read or written.
    """
    exact = "bit for bit" if not tolerance else f"up to {tolerance:g} of each target weight's change"
    text = _CARD.format(**describe_base(source, model), model=model, exact=exact, size=size)
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
    if _is_unedited(path, mark):
        write_text(path, text + mark.format(text_sha256(text)))
    else:
        logger.warning(
            "%s stays as it is, because it was written or edited by hand; its size and base may be outdated", path
        )


def _is_unedited(path: Path, mark: str) -> bool:
    """Whether there is no file at `path`, or one whose last line matches the text above it."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise unwritable(path, error) from None
    text = content.rpartition(mark.partition("{")[0])[0]
    return content == text + mark.format(text_sha256(text))
