"""Small tokenizers and models for tests: built in memory, the same every time, without network."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

ModelKind: TypeAlias = Literal["llama", "qwen2", "gpt_neox", "qwen3", "gemma", "mistral", "gemma3"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
DEFAULT_SYSTEM_PROMPT = "You are a tiny model."
CHATML_WITH_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{% endif %}" + CHATML
)

VOCAB_SIZE = 300
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_SENTENCES = [
    "The bridge over the river was painted orange in the morning.",
    "What is the best way to learn a new language, and how long does it take?",
    "You are a helpful assistant. The user asks a question and the assistant answers it.",
    "It takes about ten minutes; let it rest, then stir it well and serve.",
]


def tiny_tokenizer(
    chat_template: str | None = CHATML,
    *,
    bos_token: str = "<|im_start|>",
    eos_token: str = "<|im_end|>",
    add_prefix_space: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens that encodes any text. Padding is ``<|endoftext|>``, token 0."""
    tokenizer = Tokenizer(models.BPE())
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos_token, eos_token=eos_token, pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": _SPECIAL})
    fast.chat_template = chat_template
    return fast


def tiny_model(
    kind: ModelKind = "llama",
    *,
    num_layers: int = 4,
    hidden: int = 32,
    vocab_size: int = VOCAB_SIZE,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A causal language model with random weights, in eval mode. ``hidden`` is a multiple of 8; 4 heads.

    Weights are drawn wider than a real initialisation (0.1), so that layers matter and tests of what changes them
    cannot pass by the change being tiny. The global random state is left as it was.
    """
    config = _config(kind, num_layers=num_layers, hidden=hidden, vocab_size=vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval()


def _config(kind: ModelKind, *, num_layers: int, hidden: int, vocab_size: int) -> PretrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    grouped = {**common, "num_key_value_heads": 2}
    match kind:
        case "llama":
            return LlamaConfig(**grouped, tie_word_embeddings=True)  # as SmolLM2
        case "qwen2":
            return Qwen2Config(**grouped, tie_word_embeddings=True)
        case "qwen3":
            return Qwen3Config(**grouped, head_dim=hidden // 4, tie_word_embeddings=True)
        case "gemma":
            return GemmaConfig(**grouped, head_dim=hidden // 4, tie_word_embeddings=True)
        case "gemma3":  # the language model is a part: a vision tower stands beside it
            text = {**grouped, "head_dim": hidden // 4, "sliding_window": 64}
            vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": num_layers}
            vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
            return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        case "mistral":
            return MistralConfig(**grouped, head_dim=hidden // 4, tie_word_embeddings=False)
        case "gpt_neox":
            return GPTNeoXConfig(**common, tie_word_embeddings=False)
