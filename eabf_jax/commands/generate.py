"""`eabf generate`: continues prompts, or holds a conversation, on the terminal."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from eabf_jax.commands.options import check_positive
from eabf_jax.data.chat import TEMPLATES, Turn
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.hardware import GIB, device_at_hand
from eabf_jax.inference.chat import Format, chat_format
from eabf_jax.inference.generate import Completion, Generator
from eabf_jax.inference.sampling import Sampling
from eabf_jax.inference.text import TRUNCATIONS, encode_text, only_text, truncated
from eabf_jax.interop.directory import write_json
from eabf_jax.interop.loading import DTYPES, open_weights, split_scheme
from eabf_jax.interop.tokenizer import Tokenizer
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.kv_cache import CACHE_DTYPES, empty_cache
from eabf_jax.parallel.mesh import MeshConfig, gpu_memory_defaults, make_mesh
from eabf_jax.rope import Scheme


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command line."""
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="texts to continue, as one batch; - or none reads standard input")
    add(
        "--model",
        required=True,
        metavar="DIR[@SCHEME]",
        help="a Hugging Face or native directory; @ and a rotary scheme in YAML replace the model's own: "
        "'models/tiny@{type: yarn, factor: 4, pretrained_window: 512}'",
    )
    add("--file", action="append", default=[], help="a file with a text to continue; repeatable")
    add("--chat", action="store_true", help="hold a conversation; PROMPT is the first message")
    names = ", ".join(TEMPLATES)
    add("--template", help=f"chat template: {names}, or own (default): the tokenizer's")
    add("--system", help="system prompt of the conversation")
    add("--max-new-tokens", type=int, default=256, help="maximum number of new tokens (default: 256)")
    add("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token, more samples")
    add("--top-k", type=int, default=0, help="sample from the k likeliest tokens (default: all)")
    add("--top-p", type=float, default=1.0, help="sample from the likeliest tokens that sum up to p (default: 1)")
    add("--repetition-penalty", type=float, default=1.0, help="for tokens already in the text (default: 1, none)")
    add(
        "--seed",
        type=int,
        default=0,
        help="random seed; each further prompt of a batch, or answer of a conversation, takes the next number",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="stop where this text appears; repeatable")
    add("--window", type=int, help="maximum tokens of a prompt and its continuation (default: the model's)")
    add("--truncate", choices=TRUNCATIONS, help="shorten a prompt that is too long, in its middle or at its left end")
    add("--cache", default="model", help="keys and values in the model's dtype (model, default) or int8")
    add("--prefill-chunk", type=int, default=8192, help="tokens of a prompt read at a time (default: 8192)")
    add(
        "--rope-length",
        type=int,
        help="a fixed length for dynamic_ntk, dynamic_yarn and longrope, for speed (default: the text's own length; "
        "past the pretrained window, the whole text is then read again for every token)",
    )
    add("--tensor", type=int, default=1, help="devices that share the model's heads (default: 1)")
    add("--dtype", default="bfloat16", help="bfloat16 (default), float16 or float32")
    add("--json", help="write settings, texts, tokens and speeds to this file")


def run(arguments: argparse.Namespace) -> None:
    """Continues the prompts or holds a conversation, and writes the figures."""
    gpu_memory_defaults()
    texts = None if arguments.chat else _read_prompts(arguments)
    session = _Session(arguments)
    answers = _converse(session, arguments) if texts is None else _continue_prompts(session, texts)
    figures = {
        "model": arguments.model,
        "window": session.window,
        "dtype": arguments.dtype,
        "cache": arguments.cache,
        "sampling": vars(session.sampling) | {"seed": arguments.seed},
        "device": jax.devices()[0].device_kind,
        "answers": [_as_json(answer) for answer in answers],
    }
    if arguments.json:  # silently, because standard output holds only the texts
        write_json(Path(arguments.json), figures)


class _Answer(NamedTuple):
    """The result of one prompt."""

    prompt_tokens: int  # after truncation
    cut_tokens: int  # removed because the prompt was too long
    completion: Completion
    first_token_seconds: float
    tokens_per_second: float | None  # after the first token; None if there are fewer than two


class _Session:
    """A loaded model with the settings of the command line."""

    def __init__(self, arguments: argparse.Namespace):
        """Checks the command line, then loads the model."""
        self.sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.repetition_penalty)
        _check(arguments)
        directory, scheme, window = split_scheme(arguments.model)
        rope = None if scheme is None else Scheme.from_dict(scheme)
        weights, tokenizer = open_weights(directory, rope=rope, dtype=arguments.dtype)
        if tokenizer is None:
            raise InputError(f"{directory} has no tokenizer: copy tokenizer.json or tokenizer.model into it")
        self.tokenizer: Tokenizer = tokenizer
        self.window: int = arguments.window or window or weights.config.max_position_embeddings
        if self.window > weights.config.max_position_embeddings:
            _check_window(self.window, weights.config, arguments)
        self.format: Format | None = chat_format(tokenizer, arguments.template) if arguments.chat else None
        self.seed: int = arguments.seed
        self._arguments = arguments
        ways = arguments.tensor
        mesh = make_mesh(MeshConfig(1, 1, ways), jax.devices()[:ways]) if ways > 1 else None
        self._generator = Generator(
            weights,
            tokenizer,
            mesh=mesh,
            cache=arguments.cache,
            prefill_chunk=arguments.prefill_chunk,
            rope_length=arguments.rope_length,
        )

    def fit(self, tokens: Sequence[int], name: str) -> tuple[list[int], int]:
        """Fits a prompt and its new tokens into the window; returns the prompt and the number of tokens it lost."""
        new, how = self._arguments.max_new_tokens, self._arguments.truncate
        room = self.window - new
        excess = len(tokens) - room
        if excess <= 0:
            return list(tokens), 0
        if room < 2:
            raise InputError(
                f"--max-new-tokens {new} leaves no room for a prompt in the window of {self.window} tokens"
            )
        if how is None:
            raise InputError(
                f"{name} has {len(tokens)} tokens: with {new} new ones it exceeds the window of {self.window} by "
                f"{excess}; --truncate middle or left cuts it, --window allows more"
            )
        return truncated(tokens, room, how, self.tokenizer.bos_id), excess

    def stream(self, prompts: Sequence[Sequence[int]], cut: Sequence[int], seed: int) -> Iterator[list[_Answer]]:
        """Continues prompts from `fit`, a few tokens at a time; row i uses the random seed `seed` + i."""
        begun, first = time.perf_counter(), 0.0
        stream = self._generator.stream(
            prompts,
            self._arguments.max_new_tokens,
            sampling=self.sampling,
            seeds=range(seed, seed + len(prompts)),
            stop_tokens=None if self.format is None else self.format.stop_tokens,
            stop_strings=self._arguments.stop,
        )
        for completions in stream:
            elapsed = time.perf_counter() - begun
            first = first or elapsed
            yield [
                _Answer(len(prompt), lost, completion, first, _rate(len(completion.tokens), elapsed - first))
                for prompt, lost, completion in zip(prompts, cut, completions, strict=True)
            ]


def _rate(tokens: int, seconds: float) -> float | None:
    return (tokens - 1) / seconds if tokens > 1 and seconds > 0 else None


def _check(arguments: argparse.Namespace) -> None:
    """Checks the options before the model is loaded."""
    check_positive(arguments, ("max_new_tokens", "window", "prefill_chunk", "rope_length", "tensor"))
    if arguments.dtype not in DTYPES:
        raise unknown_name("--dtype", arguments.dtype, DTYPES)
    if arguments.cache not in CACHE_DTYPES:
        raise unknown_name("--cache", arguments.cache, CACHE_DTYPES)
    if "" in arguments.stop:
        raise InputError("--stop is empty; some text is needed")
    if arguments.tensor > jax.device_count():
        raise InputError(f"--tensor {arguments.tensor}: {jax.device_count()} devices are available")
    for option in ("template", "system"):
        if getattr(arguments, option) is not None and not arguments.chat:
            raise InputError(f"--{option} is for conversations: add --chat, or leave it out")
    if arguments.chat and (arguments.file or len(arguments.prompt) > 1):
        raise InputError("--chat holds one conversation: give one PROMPT or none, and no --file")


def _check_window(window: int, config: LlamaConfig, arguments: argparse.Namespace) -> None:
    """Refuses a window whose key-value cache exceeds the device's memory; says that it is longer than the model's."""
    shape = (1, config.num_key_value_heads, 1, config.head_dim, jnp.dtype(arguments.dtype), arguments.cache)
    layer = jax.eval_shape(lambda: empty_cache(*shape))
    per_token = config.num_hidden_layers * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layer))
    needed, memory = per_token * window / arguments.tensor, device_at_hand().memory
    if needed > memory:
        raise InputError(
            f"a window of {window} tokens needs a key-value cache of {needed / GIB:,.1f} GiB a device; "
            f"{memory / GIB:,.1f} GiB are there: a window of {int(memory * arguments.tensor / per_token)} is the most"
        )
    own = config.max_position_embeddings
    print(f"note: the window of {window} tokens is longer than the model's own {own}", file=sys.stderr)


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    """Returns the texts to continue, at least one; removes the final newline of files and standard input."""
    texts = [_standard_input() if prompt == "-" else prompt for prompt in arguments.prompt]
    for path in arguments.file:
        with only_text(f"--file {path}"):
            texts.append(Path(path).read_text(encoding="utf-8").removesuffix("\n"))
    if not texts:
        if sys.stdin.isatty():
            raise InputError("no prompt: give it as PROMPT, with --file, or on standard input")
        texts.append(_standard_input())
    if "" in texts:
        raise InputError("the prompt is empty; some text to continue is needed")
    return texts


def _standard_input() -> str:
    with only_text("standard input"):
        return sys.stdin.read().removesuffix("\n")


def _continue_prompts(session: _Session, texts: Sequence[str]) -> list[_Answer]:
    """Continues texts; prints a single one as it grows, and several once they are complete."""
    names = ["the prompt"] if len(texts) == 1 else [f"prompt {number}" for number in range(1, len(texts) + 1)]
    fitted = [session.fit(encode_text(session.tokenizer, text), name) for text, name in zip(texts, names, strict=True)]
    prompts, cut = zip(*fitted, strict=True)
    stream = session.stream(prompts, cut, session.seed)
    if len(texts) == 1:
        return [_print_as_it_comes(stream)]
    *_, answers = stream
    for name, answer in zip(names, answers, strict=True):
        print(f"--- {name} ---\n{answer.completion.text}")
    return answers


def _print_as_it_comes(stream: Iterator[list[_Answer]], *, strip: bool = False) -> _Answer:
    """Prints the one text of a stream as it grows; `strip` drops its leading space."""
    printed = 0
    for (answer,) in stream:
        text = answer.completion.text.lstrip() if strip else answer.completion.text
        print(text[printed:], end="", flush=True)
        printed = len(text)
    print(flush=True)
    return answer


def _converse(session: _Session, arguments: argparse.Namespace) -> list[_Answer]:
    """Holds a conversation until standard input ends."""
    assert session.format is not None
    turns = [] if arguments.system is None else [Turn("system", arguments.system)]
    answers: list[_Answer] = []
    for question in _questions(arguments.prompt):
        turns.append(Turn("user", question))
        prompt, cut = session.fit(session.format.encode(turns), "the conversation")
        answer = _print_as_it_comes(session.stream([prompt], [cut], session.seed + len(answers)), strip=True)
        answers.append(answer)
        turns.append(Turn("assistant", answer.completion.text.strip()))
    if not answers:
        raise InputError("the conversation is empty: give a PROMPT, or lines on standard input")
    return answers


def _questions(first: Sequence[str]) -> Iterator[str]:
    """Yields the user's messages, one line each."""
    yield from first
    shown = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            with only_text("standard input"):
                line = input(shown)
        except EOFError:
            return
        if line.strip():
            yield line


def _as_json(answer: _Answer) -> dict[str, Any]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "cut_tokens": answer.cut_tokens,
        "text": answer.completion.text,
        "tokens": answer.completion.tokens,
        "finish": answer.completion.finish,
        "first_token_seconds": answer.first_token_seconds,  # compilation included
        "tokens_per_second": answer.tokens_per_second,
    }
