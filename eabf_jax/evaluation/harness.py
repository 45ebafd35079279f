"""The model class that lm-evaluation-harness runs our models with.

`python -m eabf_jax.evaluation.harness` is the harness's own command line with the model type `eabf`, which is
registered when this module is imported.

Tokens, texts and sums of every request are those of the harness's Hugging Face backend. The only addition is that
prompts can be shortened in the middle.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    truncate_tokens,
)
from tqdm import tqdm

from eabf_jax.data.chat import Turn
from eabf_jax.errors import InputError, unknown_name
from eabf_jax.evaluation.scorer import Scorer, Span, evaluation_mesh
from eabf_jax.inference import Generator, Sampling
from eabf_jax.inference.chat import render
from eabf_jax.inference.text import TRUNCATIONS
from eabf_jax.interop.loading import load, open_weights, parse_entry
from eabf_jax.interop.tokenizer import load_tokenizer
from eabf_jax.parallel.mesh import use_every_core
from eabf_jax.parallel.rules import batch_ways

# Settings of `generate_until` that change how tokens are sampled.
_DRAWING = ("temperature", "top_k", "top_p", "repetition_penalty")


@register_model("eabf")
class EabfLM(TemplateLM):
    """A model directory as lm-evaluation-harness sees it: text in; log-likelihoods or text out."""

    def __init__(
        self,
        pretrained: str,
        rope: str | Mapping[str, Any] | None = None,
        dtype: str = "bfloat16",
        batch_size: int | str = 1,
        window: int | None = None,
        truncate: str = "left",
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        tensor: int = 1,
        max_gen_toks: int = 256,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        """Opens the model; its weights are read at the first request.

        Args:
          pretrained: a Hugging Face or native directory; @ and a rotary scheme in YAML replace the model's own.
          rope: a scheme that replaces both: a mapping, or YAML.
          dtype: bfloat16, float16 or float32.
          batch_size: requests that each device takes at a time; `tensor` devices count as one.
          window: maximum tokens of a prompt and its continuation; None means the model's own window.
          truncate: longer prompts lose their "middle", or their "left" end as in the harness's other backends.
          add_bos_token: whether texts begin with the tokenizer's BOS; None means as the tokenizer does.
          prefix_token_id: the context of a text that has none; None means BOS, or EOS if there is no BOS.
          tensor: devices that share the model's heads.
          max_gen_toks: maximum number of new tokens if a task sets none.
          seed: random seed of the first request of `generate_until`; each further request takes the next number.
          max_batch_size, device: ignored; the harness passes them to every model.

        Raises:
          InputError: as for `load`; no tokenizer; an invalid number or name.
        """
        super().__init__()
        entry = parse_entry(pretrained)
        self._directory, self._dtype = entry.directory, dtype
        self._rope = entry.rope if rope is None else _mapping(rope)
        self.batch_size = _positive("batch_size", batch_size)
        if truncate not in TRUNCATIONS:
            raise unknown_name("truncate", truncate, TRUNCATIONS)
        self._truncate = truncate
        self.tokenizer = load_tokenizer(self._directory)
        self._add_bos = self.tokenizer.adds_bos if add_bos_token is None else bool(add_bos_token)
        self._prefix = prefix_token_id
        if self.prefix_token_id is None or self.eot_token_id is None:
            raise InputError(f"{self._directory}: the tokenizer has no token that ends a text; scoring needs one")
        config = entry.config
        self.window: int = config.max_position_embeddings if window is None else _positive("window", window)
        self.max_gen_toks = _positive("max_gen_toks", max_gen_toks)
        self._seed = int(seed)
        self._mesh = evaluation_mesh(config, dtype, _positive("tensor", tensor))
        self._weights, _ = open_weights(self._directory, self._rope, dtype)
        self._scorer: Scorer | None = None
        self._generator: Generator | None = None

    def _scoring(self) -> Scorer:
        if self._scorer is None:
            self._generator = None  # so that the devices do not hold the weights twice
            self._scorer = Scorer(load(self._directory, self._rope, self._dtype, self._mesh)[0])
        return self._scorer

    def _generating(self) -> Generator:
        if self._generator is None:
            self._scorer = None
            self._generator = Generator(self._weights, mesh=self._mesh)
        return self._generator

    @property
    def _rows(self) -> int:
        """Requests per batch, over all devices."""
        return self.batch_size * batch_ways(self._mesh)

    @property
    def max_length(self) -> int:
        """The window, under the harness's name for it."""
        return self.window

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_id  # type: ignore[return-value]  # checked at the start

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing precedes."""
        if self._prefix is not None:
            return self._prefix
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The name that identifies the tokenizer in the harness's cache of requests."""
        return self._directory.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encodes text; the spelling of a special token, such as `<s>`, becomes that token.

        Args:
          add_special_tokens: False never adds BOS; True adds it if the model's setting does; None does the same unless
            the text already begins with it.
        """
        ids = self.tokenizer.encode(string, special=True)
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        opens = add_special_tokens and self._add_bos and self.tokenizer.bos_id is not None
        return [self.tokenizer.bos_id, *ids] if opens else ids  # type: ignore[list-item]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation with the model's template; drops the system prompt if the template refuses it.

        Args:
          chat_history: messages with role and content.
          add_generation_prompt: whether the text ends with the opening of the assistant's answer; if not, it ends with
            the last message, which the model continues.

        Raises:
          InputError: no template, or one that refuses the conversation.
        """
        source = self.tokenizer.chat_template
        if source is None:
            raise InputError(f"{self._directory} has no chat template, which --apply-chat-template needs; leave it out")
        turns = [Turn(message["role"], message["content"]) for message in chat_history]  # type: ignore[arg-type]
        try:
            text = render(source, turns, self.tokenizer, add_generation_prompt=add_generation_prompt)
        except InputError:
            spoken = [turn for turn in turns if turn.role != "system"]
            text = render(source, spoken, self.tokenizer, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = turns[-1].text
        begin = text.rindex(last.strip())
        return text[: begin + len(last if text.startswith(last, begin) else last.strip())]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Scores continuations.

        Args:
          requests: each with its key in the harness's cache, the tokens of its context and of its continuation.

        Returns:
          For each, the sum of the continuation's log-probabilities, and whether each of its tokens is the likeliest.
        Raises:
          InputError: a continuation longer than the window.
        """
        spans = [self._fit(context, continuation) for _, context, continuation in requests]
        found: list[tuple[float, bool]] = [(0.0, False)] * len(spans)
        scores = self._scoring()(spans, self.batch_size)
        for index, log_probs, is_greedy in tqdm(scores, total=len(spans), disable=disable_tqdm, desc="scoring"):
            found[index] = float(log_probs.sum(dtype=np.float64)), bool(is_greedy.all())
            key = requests[index][0]
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, found[index])
        return found

    def _fit(self, context: list[int], continuation: list[int]) -> Span:
        """Returns a continuation after as much of its context as the window has room for."""
        room = self.window + 1 - len(continuation)
        if room < 1:
            raise InputError(f"a continuation of {len(continuation)} tokens exceeds the window of {self.window}")
        context = self._cut(context, room)
        return Span([*context, *continuation[:-1]], len(context) - 1, continuation)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts, window by window.

        Args:
          requests: the harness's instances, whose argument is a text.

        Returns:
          For each, the sum of its tokens' log-probabilities.
        """
        owners, windows = [], []
        for number, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.window,
                context_len=1,
            )
            for pair in pairs:
                owners.append(number)
                windows.append((None, *utils.make_disjoint_window(pair)))
        totals = [0.0] * len(requests)
        for owner, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues texts.

        Args:
          requests: the harness's instances, whose arguments are a text and its generation settings.

        Returns:
          The continuations, each up to its stop string.
        Raises:
          InputError: an unknown setting, or no room for a prompt in the window.
        """
        asked = [(self.tok_encode(context), settings, context) for context, settings in (r.args for r in requests)]
        # Grouped by settings and, within a group, sorted by length.
        collator = Collator(
            asked,
            sort_fn=lambda item: (-len(item[0]), item[2]),
            group_by="gen_kwargs",
            group_fn=lambda item: item[1],
        )
        texts: list[str] = []
        before: tuple[Any, int] = (None, 0)
        with tqdm(total=len(asked), disable=disable_tqdm, desc="generating") as bar:
            for batch in collator.get_batched(n=self._rows):
                settings = batch[0][1]
                # The last batch is filled up to the size of the others, so that it needs no program of its own.
                size = before[1] if before[0] == settings else len(batch)
                made = self._continue([tokens for tokens, *_ in batch], settings, size, self._seed + len(texts))
                for (_, _, context), text in zip(batch, made, strict=True):
                    self.cache_hook.add_partial("generate_until", (context, settings), text)
                before = settings, size
                texts += made
                bar.update(len(batch))
        return collator.get_original(texts)

    def _continue(self, prompts: Sequence[list[int]], settings: Mapping[str, Any], size: int, seed: int) -> list[str]:
        """Continues prompts that share their settings, in a batch that is filled up to `size`."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.max_gen_toks))
        new = options.pop("max_gen_toks")
        until = handle_stop_sequences(options.pop("until"), eos=self.tokenizer.decode([self.eot_token_id]))
        sampling = _sampling(options)
        room = self.window - new
        if room < 2:
            raise InputError(f"{new} new tokens, as the task sets them, leave no room in a window of {self.window}")
        fitted = [self._cut(prompt or [self.prefix_token_id], room) for prompt in prompts]
        stream = self._generating().stream(
            [*fitted, *fitted[-1:] * (size - len(fitted))],
            new,
            sampling=sampling,
            seeds=range(seed, seed + size),
            stop_tokens=tuple(dict.fromkeys((*self.tokenizer.eos_ids, self.eot_token_id))),
        )
        for completions in stream:
            whole = [self.tokenizer.decode(completion.tokens, special=False) for completion in completions]
            texts = [postprocess_generated_text(text, until, None) for text in whole]
            if all(
                completion.finish or len(text) < len(made)
                for completion, text, made in zip(completions, texts, whole, strict=True)
            ):
                break
        return texts[: len(prompts)]

    def _cut(self, prompt: list[int], room: int) -> list[int]:
        return prompt if len(prompt) <= room else truncate_tokens(prompt, room, side=self._truncate)


def _sampling(options: dict[str, Any]) -> Sampling:
    """Converts a task's generation settings."""
    draws = options.pop("do_sample")
    if options.pop("num_beams", 1) != 1:
        raise InputError("a task sets num_beams; expected 1, because there is no beam search")
    for name in options:
        if name not in _DRAWING:
            raise unknown_name("generation setting", name, ("do_sample", "until", "max_gen_toks", *_DRAWING))
    if not draws:
        return Sampling(repetition_penalty=float(options.get("repetition_penalty", 1.0)))
    return Sampling(**{name: type(getattr(Sampling, name))(value) for name, value in options.items()})


def _positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if number < 1:
        raise InputError(f"{name} is {value!r}; a positive number is needed")
    return number


def _mapping(rope: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a scheme as a mapping; text is parsed as YAML."""
    try:
        values = yaml.safe_load(rope) if isinstance(rope, str) else rope
    except yaml.YAMLError:
        values = None
    if not isinstance(values, Mapping):
        raise InputError(f"rope is {rope!r}; a scheme such as {{type: yarn, factor: 4}} is needed")
    return values


def main() -> None:
    """Runs lm-evaluation-harness's own command line, with the model type `eabf`."""
    from lm_eval.__main__ import cli_evaluate

    use_every_core()
    try:
        cli_evaluate()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
