"""A model's own tokenizer: prompts as its chat template renders them, and the ids that end a text.

Engines that run the same model must give it the same token ids, whatever runs it.
"""

from __future__ import annotations

from typing import Any

from ..errors import EngineError
from ..suite import Prompt


def load_tokenizer(path: str) -> Any:
    """The tokenizer in a model's folder; no code of that folder is run."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)


def encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Chat template with the generation prompt, where there is one; the plain text otherwise.

    Raises:
        EngineError: the template cannot render the prompt.
    """
    if isinstance(prompt.content, str) and tokenizer.chat_template is None:
        return list(tokenizer(prompt.content)["input_ids"])
    messages = [{"role": "user", "content": prompt.content}] if isinstance(prompt.content, str) else prompt.content
    try:
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as exc:  # a template is a Jinja program of the model's author: anything may come out
        raise EngineError(f"the chat template cannot render prompt {prompt.id}: {exc}") from exc
    return list(encoded["input_ids"])


def eos(generation_config: Any, tokenizer: Any) -> list[int]:
    """Ids that end a text: the model's, or the tokenizer's where the model names none."""
    found = generation_config.eos_token_id
    if found is None:
        found = tokenizer.eos_token_id
    return [] if found is None else [found] if isinstance(found, int) else sorted(found)
