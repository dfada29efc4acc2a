"""Text generation with a causal language model, one batch of conversations at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from sparsegrad.device import pick_device
from sparsegrad.errors import UserError, check_choice, first_line
from sparsegrad.models.source import Source
from sparsegrad.trainer.bfloat16 import fast_bfloat16

FORMATS = ("auto", "chat", "inst")
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The number type called `name`; `auto` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        UserError: for another name, or a device that does not exist.
    """
    default = torch.bfloat16 if pick_device(device, "--device").type == "cuda" else torch.float32
    return DTYPES[check_choice("dtype", name, DTYPES)] or default


def write_prompt(turns: Sequence[str], tokenizer: Any, chosen: str) -> str:
    """The prompt for the next answer of a conversation.

    Args:
        turns: question, answer, question, ...
        tokenizer: the model's tokenizer.
        chosen: `chat`, the tokenizer's chat template; `inst`, the paper's `[INST] question [/INST] answer` (section
            5.2); `auto`, `chat` if the tokenizer has a template, else `inst`.

    Raises:
        UserError: when there is no template, or it rejects the conversation.
    """
    if chosen == "inst" or (chosen == "auto" and not tokenizer.chat_template):
        return " ".join(turn if index % 2 else f"[INST] {turn} [/INST]" for index, turn in enumerate(turns))
    if not tokenizer.chat_template:
        raise UserError("format=chat is not allowed: this tokenizer has no chat template; use --format inst")
    messages = [{"role": "assistant" if index % 2 else "user", "content": turn} for index, turn in enumerate(turns)]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates are code of others and may raise anything
        raise UserError(f"the chat template rejects a conversation ({error}): use --format inst") from None


@dataclass
class Writer:
    """A loaded model that continues conversations."""

    model: Any
    tokenizer: Any
    format: str = "auto"
    max_new_tokens: int = 1024

    @classmethod
    def load(cls, source: Source, *, format: str, max_new_tokens: int, device: str, dtype: torch.dtype) -> Writer:
        """Load model and tokenizer; from the hub, what is missing on this machine is downloaded.

        Raises:
            UserError: when they cannot be loaded, or the device does not exist.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place = pick_device(device, "--device")
        folder = str(source.fetch())
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
            model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"model {folder} cannot be read: {first_line(error)}") from None
        if missing := sorted(found["missing_keys"]):
            lacks = ", ".join(missing[:3])
            raise UserError(f"model {folder} lacks {lacks}, which would be random: give a causal language model")
        return cls(model.to(place).eval(), tokenizer, format, max_new_tokens)

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        if self.tokenizer.pad_token_id is None:
            raise UserError("this tokenizer has neither a padding nor an end token: batches cannot be padded")
        self.tokenizer.padding_side = "left"  # new tokens are appended on the right

    @torch.inference_mode()
    def write(self, conversations: Sequence[Sequence[str]], temperature: float, seed: int) -> list[str]:
        """The next answer of each conversation; on a CPU, the same batch, temperature and seed give the same answers.

        Raises:
            UserError: when a conversation fills the model's context window.
        """
        batch = self._encode(conversations)
        torch.manual_seed(seed)
        options: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            options = {"do_sample": True, "temperature": temperature}
        length = batch["input_ids"].shape[1]
        options |= {"max_new_tokens": self._count_new_tokens(length), "pad_token_id": self.tokenizer.pad_token_id}
        fast = fast_bfloat16(self.model.device) if self.model.dtype == torch.bfloat16 else nullcontext()
        with fast:
            found = self.model.generate(**batch, **options)
        texts = self.tokenizer.batch_decode(found[:, length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _encode(self, conversations: Sequence[Sequence[str]]) -> Any:
        prompts = [write_prompt(turns, self.tokenizer, self.format) for turns in conversations]
        # A chat template adds the special tokens itself.
        special = self.format == "inst" or not self.tokenizer.chat_template
        batch = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=special)
        names = ("input_ids", "attention_mask")
        return {name: batch[name].to(self.model.device) for name in names}

    def _count_new_tokens(self, length: int) -> int:
        """`max_new_tokens`, or fewer if the model's context window ends before."""
        architecture = self.model.config.get_text_config()
        window = getattr(architecture, "max_position_embeddings", None) or length + self.max_new_tokens
        if window <= length:
            raise UserError(
                f"a conversation of {length} tokens fills the model's window of {window}: "
                "lower --max-new-tokens, so that first answers are shorter, or omit the question"
            )
        return min(self.max_new_tokens, int(window) - length)
