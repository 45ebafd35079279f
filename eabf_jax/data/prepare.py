"""Prepares a dataset of tokens and loss masks from conversations or texts, and counts what each stage keeps."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import DownloadColumn

from eabf_jax.console import progress_bar, track
from eabf_jax.data import chat
from eabf_jax.data.cleaning import Copies, clean_conversation, clean_passage, language, passage_turns
from eabf_jax.data.dataset import DatasetWriter, tokenizer_digest
from eabf_jax.data.forms import AUTO, FORMATS, Content, Passage, Unusable
from eabf_jax.data.index import Index
from eabf_jax.data.passage import encode_passage, split_passage
from eabf_jax.data.sharegpt import Conversation, fraction, order_key
from eabf_jax.errors import InputError, unknown_name

TRAIN = "train"
HELD_OUT = "held_out"
LANGUAGES = ("en", "any")


@dataclass(frozen=True)
class Options:
    """Options of `prepare`."""

    sources: tuple[Path, ...]  # files, or directories of files
    destination: Path  # directory of the dataset
    format: str = AUTO  # form of the entries, a name in `forms.FORMATS`
    template: str = "llama-2"  # chat template: a name in `chat.TEMPLATES`, or `chat.OWN`
    min_tokens: int = 10_000  # fewest tokens of a training record
    max_tokens: int = 16_384  # most tokens of a record; longer conversations are split between exchanges
    num_conversations: int | None = None  # training records wanted; None for all, 0 for none
    held_out: int = 0  # held-out records wanted
    # Fewest tokens of a held-out conversation, whose first `max_tokens` become its record. None for `max_tokens`, so
    # that every held-out record covers every position.
    held_out_min_tokens: int | None = None
    language: str = "en"  # or "any" for no filter
    seed: int = 0  # determines the order of conversations
    portion: tuple[float, float] = (0.0, 1.0)  # which of them to use: a range in [0, 1) of a hash of their ids
    keep_complete: bool = False  # accepts trailing commas, and uses the complete entries of a broken file
    overwrite: bool = False  # replaces a dataset at the destination

    def check(self) -> None:
        """Refuses contradictory options.

        Raises:
          InputError: an option is wrong; the message names the first one.
        """
        chat.check_template(self.template)
        if self.format not in FORMATS:
            raise unknown_name("format", self.format, FORMATS)
        if self.language not in LANGUAGES:
            raise unknown_name("language filter", self.language, LANGUAGES)
        if not self.sources:
            raise InputError("no source file given: name at least one file or directory with --src")
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise InputError(
                f"--min-tokens {self.min_tokens} --max-tokens {self.max_tokens}: expected 1 <= minimum <= maximum"
            )
        if self.held_out < 0 or (self.num_conversations is not None and self.num_conversations < 0):
            raise InputError(
                f"--num-conversations {self.num_conversations} --held-out {self.held_out}: neither may be negative"
            )
        if self.num_conversations == 0 and self.held_out == 0:
            raise InputError("--num-conversations 0 --held-out 0: nothing to prepare; ask for at least one record")
        if self.held_out_min_tokens is not None and self.held_out_min_tokens < 2:
            raise InputError(f"--held-out-min-tokens {self.held_out_min_tokens}: expected at least 2, to predict one")
        start, end = self.portion
        if not 0.0 <= start < end <= 1.0:
            raise InputError(f"--portion {start}:{end}: expected 0 <= START < END <= 1, such as 0.9:1.0")


@dataclass
class SplitCounts:
    """Size of a split."""

    records: int = 0
    conversations: int = 0
    tokens: int = 0
    response_tokens: int = 0


@dataclass
class Report:
    """Numbers of entries or conversations that each stage kept.

    From `examined` on, the counts stop as soon as there are enough records.
    """

    entries: int = 0  # complete entries of the files
    conversations: int = 0  # after joining parts; a prompt with its answer, or a document, counts as one
    in_portion: int = 0
    examined: int = 0  # read and cleaned
    cleaned: int = 0  # with at least one question and its answer left
    distinct: int = 0  # not copies of earlier conversations
    in_language: int = 0
    long_enough: int = 0  # with enough tokens for a record of one of the splits
    forms: dict[str, int] = field(default_factory=dict)  # number of entries per form
    unusable: dict[str, int] = field(default_factory=dict)  # number of other entries per reason
    kept_apart: int = 0  # conversations that only look like parts of one (see `sharegpt.Parts`)
    dropped_in_cleaning: dict[str, int] = field(default_factory=dict)  # dropped conversations per reason
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    broken_files: list[str] = field(default_factory=list)  # faults of files whose complete entries were used
    skipped_files: list[str] = field(default_factory=list)  # skipped files and folders in the given directories
    shortages: list[str] = field(default_factory=list)  # splits with fewer records than requested
    destination: str = ""

    def stages(self) -> list[tuple[str, int]]:
        """Returns the stages in order, each with its count."""
        return [
            ("entries in the files", self.entries),
            ("conversations, parts joined", self.conversations),
            ("in the portion", self.in_portion),
            ("examined", self.examined),
            ("after cleaning", self.cleaned),
            ("after removing copies", self.distinct),
            ("in the language", self.in_language),
            ("long enough", self.long_enough),
        ]

    def notes(self, stage: str) -> list[tuple[str, int]]:
        """Returns additional notes on a stage in `stages`, each with its count."""
        apart = {"ids that look like parts, kept apart": self.kept_apart} if self.kept_apart else {}
        notes = {
            "entries in the files": _prefixed("read as ", self.forms) | _prefixed("not used: ", self.unusable),
            "conversations, parts joined": apart,
            "after cleaning": _prefixed("dropped: ", self.dropped_in_cleaning),
        }
        return list(notes.get(stage, {}).items())


def _prefixed(prefix: str, counts: dict[str, int]) -> dict[str, int]:
    return {f"{prefix}{name}": count for name, count in counts.items()}


def prepare(options: Options, tokenizer: chat.Tokenizer, console: Console | None = None) -> Report:
    """Makes a dataset of tokens and loss masks from files of conversations or texts.

    Conversations are taken in an order that depends only on the seed and their ids. The first `held_out` that are long
    enough are held out, whatever the size of the training set. The others are split between exchanges into training
    records, until there are `num_conversations` records. If two runs differ only in this number, the smaller training
    set is the beginning of the larger one, and both hold out the same conversations.

    Args:
      console: where to show progress (default: stderr).

    Returns:
      The counts of every stage.

    Raises:
      InputError: options are contradictory, files are unreadable or broken, the destination is in use, the disk is
        full, or no records are left (with the counts of every stage).
    """
    options.check()
    console = console or Console(stderr=True)
    report = Report(destination=str(options.destination))
    with DatasetWriter(options.destination, overwrite=options.overwrite, sources=options.sources) as writer:
        index = _index(options, console)
        report.broken_files = [str(fault) for fault in index.broken]
        report.skipped_files = index.skipped
        report.entries = index.entries
        report.forms, report.unusable = dict(index.forms), dict(index.unusable)
        report.kept_apart = index.kept_apart
        report.conversations = len(index.conversations)
        start, end = options.portion
        chosen = [c for c in index.conversations if start <= fraction(c.place) < end]
        chosen.sort(key=lambda c: order_key(options.seed, c))
        report.in_portion = len(chosen)
        used_template = _fill(options, tokenizer, console, report, writer, index, chosen)
        _check_filled(options, report)
        writer.finish(_metadata(options, tokenizer, report, used_template))
    return report


def _index(options: Options, console: Console) -> Index:
    """Runs the first pass over the files, with a progress bar in bytes."""
    size = sum(path.stat().st_size for path in options.sources if path.is_file())
    with progress_bar(amount=DownloadColumn(), console=console) as bar:
        advance = track(bar, "reading", size)
        return Index(options.sources, form=options.format, keep_complete=options.keep_complete, progress=advance)


def _fill(
    options: Options,
    tokenizer: chat.Tokenizer,
    console: Console,
    report: Report,
    writer: DatasetWriter,
    index: Index,
    chosen: list[Conversation],
) -> bool:
    """Runs the second pass until both splits are full; returns whether a template was used."""
    used_template = False
    wanted = {HELD_OUT: options.held_out, TRAIN: options.num_conversations}
    dropped: Counter[str] = Counter()
    copies = Copies()
    with progress_bar(console=console) as bar:
        # The bar counts records if their number is limited, and conversations otherwise.
        train_wanted = options.num_conversations
        records_wanted = None if train_wanted is None else options.held_out + train_wanted
        unit = "conversations examined" if records_wanted is None else "records"
        advance = track(bar, unit, len(chosen) if records_wanted is None else records_wanted)
        for conversation in chosen:
            open_splits = {
                split for split, number in wanted.items() if number is None or _records(report, split) < number
            }
            if not open_splits:
                break
            report.examined += 1
            try:
                content, turns = _clean(index, conversation)
            except Unusable as fault:
                dropped[fault.reason] += 1
                continue
            report.cleaned += 1
            if not copies.is_new(turns):
                continue
            report.distinct += 1
            if options.language != "any" and language(turns) != options.language:
                continue
            report.in_language += 1
            split, pieces = _assign(content, options, tokenizer, open_splits)
            if pieces:
                report.long_enough += 1
                used_template |= not isinstance(content, Passage)
                counts = report.splits.setdefault(split, SplitCounts())
                counts.conversations += 1
                limit = wanted[split]
                for number, piece in enumerate(pieces[: None if limit is None else limit - counts.records]):
                    writer.add(split, piece, f"{conversation.id}#{number}")
                    counts.records += 1
                    counts.tokens += len(piece.tokens)
                    counts.response_tokens += int(piece.loss_mask.sum())
            records = _records(report, TRAIN) + _records(report, HELD_OUT)
            advance(report.examined if records_wanted is None else records)
    report.dropped_in_cleaning = dict(sorted(dropped.items()))
    return used_template


def _clean(index: Index, conversation: Conversation) -> tuple[Content, list[chat.Turn]]:
    """Returns cleaned content, also as turns for `Copies` and `language`; raises Unusable if nothing is left."""
    content = index.read(conversation)
    if isinstance(content, Passage):
        passage = clean_passage(content)
        return passage, passage_turns(passage)
    turns, fault = clean_conversation(content, from_pages=index.form_of(conversation).from_pages)
    if fault is not None:
        raise Unusable(fault)
    return turns, turns


def _records(report: Report, split: str) -> int:
    return report.splits[split].records if split in report.splits else 0


def _assign(
    content: Content, options: Options, tokenizer: chat.Tokenizer, open_splits: set[str]
) -> tuple[str, list[chat.Encoded]]:
    """Assigns a conversation to a split and cuts it into that split's records."""
    if HELD_OUT in open_splits:
        needed = options.max_tokens if options.held_out_min_tokens is None else options.held_out_min_tokens
        if isinstance(content, Passage):
            beginning = encode_passage(content, tokenizer)
        else:
            # Usually the first exchanges decide whether a conversation can be held out.
            enough = max(options.max_tokens, needed)
            beginning = chat.encode_beginning(content, options.template, tokenizer, enough)
        document = chat.truncate(beginning, options.max_tokens)
        if len(beginning.tokens) >= needed and document.loss_mask.any():
            return HELD_OUT, [document]
    if TRAIN not in open_splits:
        return TRAIN, []
    limits = {"min_tokens": options.min_tokens, "max_tokens": options.max_tokens}
    if isinstance(content, Passage):
        return TRAIN, split_passage(content, tokenizer, **limits)
    return TRAIN, chat.split_conversation(content, options.template, tokenizer, **limits)


def _check_filled(options: Options, report: Report) -> None:
    """Raises InputError for an empty split, and reports a split that is smaller than requested."""
    for split, wanted in ((TRAIN, options.num_conversations), (HELD_OUT, options.held_out)):
        found = _records(report, split)
        if wanted == 0 or (wanted is not None and found >= wanted):
            continue
        if found == 0:
            stages = [line for stage in report.stages() for line in (stage, *report.notes(stage[0]))]
            raise InputError(
                f"no conversation is left for split {split!r} ({', '.join(f'{name} {n}' for name, n in stages)}): "
                "lower --min-tokens, widen --portion, set --language any, or give more files"
            )
        if wanted is not None:
            report.shortages.append(f"{split}: {found} records found, {wanted} requested")


def _metadata(options: Options, tokenizer: chat.Tokenizer, report: Report, used_template: bool) -> dict[str, object]:
    """Returns the metadata of the dataset."""
    return {
        "forms": report.forms,
        "template": options.template if used_template else None,
        "min_tokens": options.min_tokens,
        "max_tokens": options.max_tokens,
        "language": options.language,
        "seed": options.seed,
        "portion": list(options.portion),
        "tokenizer": tokenizer_digest(tokenizer),
        "vocab_size": tokenizer.vocab_size,
        "sources": [path.name for path in options.sources],
        "counts": {name: count for name, count in asdict(report).items() if isinstance(count, int)},
        "dropped_in_cleaning": report.dropped_in_cleaning,
    }
