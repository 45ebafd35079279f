"""Trains the tiny model's SentencePiece vocabulary on conversations that the demo does not use.

python assets/train_tokenizer.py --src ShareGPT.json --dst runs/tiny_tokenizer
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from eabf_jax.cli import run
from eabf_jax.data.chat import VICUNA_SYSTEM
from eabf_jax.data.cleaning import clean_conversation, language
from eabf_jax.data.forms import SHAREGPT, Passage
from eabf_jax.data.index import Index
from eabf_jax.data.sharegpt import fraction, order_key
from eabf_jax.interop.directory import new_directory

CONVERSATIONS = 3_000
VOCAB_SIZE = 4_096
# Vicuna's, which the demo prepares its data with (`eabf prepare --template vicuna`). The spaces after special tokens
# are those that SentencePiece puts before a text.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set spoken = messages[1:] %}"
    "{% else %}"
    f"{{% set system = {VICUNA_SYSTEM!r} %}}{{% set spoken = messages %}}"
    "{% endif %}"
    "{{ ' ' + system }}"
    "{% for message in spoken %}"
    "{% if message['role'] == 'user' %}{{ ' USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}"
    "{% endfor %}"
)


def texts(source: Path) -> Iterator[str]:
    """Turns of English conversations from the part of the file that the base model is trained on."""
    index = Index((source,), form=SHAREGPT, keep_complete=True)
    chosen = [c for c in index.conversations if fraction(c.place) < 0.9]
    chosen.sort(key=lambda conversation: order_key(0, conversation))
    used = 0
    for conversation in chosen:
        content = index.read(conversation)
        assert not isinstance(content, Passage)
        turns, fault = clean_conversation(content)
        if fault is None and language(turns) == "en":
            used += 1
            yield from (line for turn in turns for line in turn.text.split("\n") if line.strip())
        if used == CONVERSATIONS:
            return


def train(source: Path, destination: Path) -> None:
    """Writes tokenizer.model with LLaMA's settings (BPE, digits apart, byte fallback) and its HF configuration."""
    lines = list(texts(source))
    random.Random(0).shuffle(lines)
    with new_directory(destination) as directory:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(directory / "tokenizer"),
            model_type="bpe",
            vocab_size=VOCAB_SIZE,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            character_coverage=0.9995,
            max_sentence_length=16_384,
            pad_id=-1,
            num_threads=1,  # more would make the result depend on their timing
        )
        (directory / "tokenizer.vocab").unlink()
        settings = {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", type=Path, required=True, help="ShareGPT file")
    parser.add_argument("--dst", type=Path, required=True, help="directory to write")
    arguments = parser.parse_args()
    run(lambda: train(arguments.src, arguments.dst))
