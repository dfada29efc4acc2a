"""The model card of an adapter: written anew as long as nobody has touched it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from sparsegrad.files import unwritable, write_text
from sparsegrad.hashing import text_sha256

logger = logging.getLogger(__name__)
_CARD = """---
library_name: sparsegrad
base_model: {quoted}
tags: [sparsegrad, peft]
---

# Adapter for {source}

Fine-tuned with [SparseGrad](https://arxiv.org/abs/2410.07383). It holds the weights that differ from the base and gives
the trained `{model}` {exact}. It refuses a base whose weights have another sha256.

```python
import sparsegrad

adapter = sparsegrad.load_adapter(model, ".")  # model: the base, a {model}
adapter.merge()  # and adapter.unmerge()
```

Size: {size}.

Data, training settings, results and limits: to be added by whoever trained it.
"""
# Its last line has the sha256 of all above it: a card that somebody completed has another.
_MARK = "\n<!-- save_adapter wrote this card and replaces it as long as it is unchanged: {} -->\n"


def write_card(folder: Path, source: str, model: str, size: str, tolerance: float) -> None:
    """Write README.md, unless one lies there that is not as a call of this left it; then say so in the log.

    Args:
        folder: of the adapter.
        source: what the base is called.
        model: the class of the model.
        size: what is stored in how many bytes, in words.
        tolerance: of `save_adapter`.

    Raises:
        UserError: when it cannot be written.
    """
    path = folder / "README.md"
    if not _is_ours(path):
        logger.warning("%s stays as it is: it was written or edited by hand; its size and base may be old", path)
        return
    exact = "bit for bit" if not tolerance else f"but for {tolerance:g} of each MLP weight's change"
    text = _CARD.format(quoted=json.dumps(source), source=source, model=model, exact=exact, size=size)
    write_text(path, text + _MARK.format(text_sha256(text)))


def _is_ours(path: Path) -> bool:
    """Whether nothing is lost by writing there: no file, or one whose last line fits all above it."""
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise unwritable(path, error) from None
    text = content.rpartition(_MARK.partition("{")[0])[0]
    return content == text + _MARK.format(text_sha256(text))
