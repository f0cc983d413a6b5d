"""A tiny seeded Llama with a byte tokenizer, built on the spot: for mechanics, never for the promise."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def near_ties(folder: Path) -> Path:
    """A model of two of every token, which differ by the last bits of their float32 weights: rounding chooses between them.

    Its one layer is wide, since a product of few columns is split among threads only where its sum is long.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=2048, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=0, pad_token_id=0, bos_token_id=None,
        tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        head = model.lm_head.weight
        head[129:] = head[1:129] * (1 + (torch.randint(0, 3, (128, 64)) - 1) * 2.0**-23)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def build(
    folder: Path, *, seed: int = 0, tied: bool = False, bias: bool = False, context: int = 512, heads: int = 4
) -> Path:
    """A model directory of about 200 kB; the same seed gives the same bytes."""
    fast = _tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=heads // 2, max_position_embeddings=context, eos_token_id=0, pad_token_id=0, bos_token_id=None,
        tie_word_embeddings=tied, attention_bias=bias, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer.bias is not None:
            torch.nn.init.normal_(layer.bias)  # freshly made ones are zero, and would hide what a bias does
    model.to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and an end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{char: i + 1 for i, char in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = TEMPLATE
    return fast
