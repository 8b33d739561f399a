"""Check, before training starts, everything that the run will read: texts and labels of all splits, unknown words.

A vocabulary spells most words with its pieces. A word with letters that it lacks becomes [UNK]: the model cannot read
or write it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mplug2.data.record_fields import short
from mplug2.data.records import Record, available, raise_all, read_records
from mplug2.data.samples import Sample, SampleList, sample_of, stream_kind, text_problem, text_problems
from mplug2.data.text import Tokenizer, clean, split_words
from mplug2.tasks import BATCH_TYPES, EVALUATED, RECORD_FIELDS, TASKS, parse_tasks

EVAL_SPLITS = ("val", "test")
EXAMPLES = 5
"""Number of unknown words that a message shows."""
PROMPT_TOKENS = 8
"""At least as many as a prompt has."""
FEW_NUMBERS = 20
"""Labels that are at most this many different whole numbers may be meant as classes."""
ADVICE = "train with a vocabulary that has them (train.py --tokenizer), or name a checkpoint that was trained with one"


def check_run_texts(
    samples: Mapping[str, Sequence[Sample]], eval_root: Path | None, task: str, tokenizer: Tokenizer, limit: int,
    max_words: int, max_unknown: float, classes: Mapping[str, tuple[str, ...]],
) -> tuple[list[str], dict[str, int]]:
    """Check the training samples, by stream, and the splits in `eval_root` that a run of `task` evaluates on.

    Raises RecordError, which lists every text without words or with more than `limit` tokens, every label that is not
    among `classes`, every answer of unknown words only, and every file with more than the fraction `max_unknown` of
    unknown words. Returns lines that report fewer unknown words; and for each stream the tokens of its longest text to
    write, [SEP] included (see `_suspicious`).
    """
    problems, reports, longest = [], [], {}
    for stream, of_stream in samples.items():
        words: Counter[str] = Counter()
        longest[stream] = 0
        for sample in _suspicious(of_stream, words, longest, stream, tokenizer, limit, max_words):
            problems += text_problems(sample, stream_kind(stream), tokenizer, limit, max_words)
            problems += _label_problem(sample.source, sample.label, BATCH_TYPES[stream_kind(stream)].task, classes)
            answers = [answer for question in sample.qa for answer in question.answers]
            problems += _unknown_answers(sample.source, answers, tokenizer, max_words)
        if "label" in BATCH_TYPES[stream_kind(stream)].fields:
            reports += filter(None, [describe_numbers(f"{stream}, train", (sample.label for sample in of_stream))])
        report_unknown(f"{stream}, train", words, tokenizer, max_unknown, problems, reports)
    for name, split in _evaluated(eval_root, task):
        words = Counter()
        records = read_records(eval_root, name, split)
        if TASKS[name].output == "ranking" and (equal := equal_captions(records)):
            reports.append(describe_equal(f"{name}, {split}", equal))
        for record in records:
            problems += record_text_problems(record, name, tokenizer, limit, max_words)
            problems += _unknown_answers(
                record.source, [answer for question in record.qa for answer in question.answers], tokenizer, max_words)
            problems += _label_problem(record.source, record.label, name, classes)
            words.update(word for text in record_texts(record) for word in clean(text, max_words).split())
        report_unknown(f"{name}, {split}", words, tokenizer, max_unknown, problems, reports)
    raise_all(problems)
    return reports, longest


class TokenCounts(dict[str, int]):
    """The number of tokens of each word, found when it is first asked for."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> int:
        self[word] = self.tokenizer.lengths([word])[0] - 2
        return self[word]


def _suspicious(
    samples: Sequence[Sample], words: Counter[str], longest: dict[str, int], stream: str, tokenizer: Tokenizer,
    limit: int, max_words: int
) -> Iterator[Sample]:
    """The samples that need a close look: a text that may be too long or empty, an answer of unknown words, or a label.

    On the way, counts the words of all samples, and notes the `longest` of the texts that the decoder learns to write:
    answers, or in files without questions all texts. Most texts are short and have words, which is quick to see.
    """
    short = limit - 2 - PROMPT_TOKENS
    tokens = TokenCounts(tokenizer)
    known: set[str] = set()  # answers with a known word

    def length(text: str) -> int:
        cleaned = split_words(text)[:max_words]
        words.update(cleaned)
        return sum(map(tokens.__getitem__, cleaned))

    def is_known(answer: str) -> bool:
        if answer not in known and not all(map(tokenizer.is_unknown, split_words(answer)[:max_words])):
            known.add(answer)
        return answer in known

    if not isinstance(samples, SampleList):
        for sample in samples:
            answers = [answer for question in sample.qa for answer in question.answers]
            texts = [*sample.captions, *sample.texts, *(question.question for question in sample.qa), *answers]
            words.update(word for text in texts for word in split_words(text)[:max_words])
            yield sample
        return
    for records in samples.files:
        labels, asked = (name in RECORD_FIELDS[records.task] for name in ("label", "qa"))
        for index, texts, answers in records.texts():
            lengths = [length(text) for text in texts + answers]
            longest[stream] = max(longest[stream], 1 + max(lengths[len(texts) * asked:], default=-1))
            fine = not lengths or 0 < min(lengths) <= max(lengths) <= short
            if labels or not fine or not all(map(is_known, answers)):
                yield sample_of(records[index])


def record_texts(record: Record) -> Iterator[str]:
    """All texts of a record except the name of its class."""
    yield from (*record.captions, *record.texts, *((record.text,) if record.text else ()))
    for question in record.qa:
        yield from (question.question, *question.answers)


def equal_captions(records: Iterable[Record]) -> list[str]:
    """Captions that records with different `positive_id` share, after cleaning. Texts without words are no captions."""
    ids: dict[str, set[str]] = {}
    for record in records:
        for caption in record.captions:
            ids.setdefault(clean(caption), set()).add(record.positive_id)
    return [caption for caption, of_caption in ids.items() if caption and len(of_caption) > 1]


def describe_equal(name: str, captions: Sequence[str]) -> str:
    """One line: how many captions different records share, and some of them."""
    examples = ", ".join(map(repr, captions[:EXAMPLES]))
    return (f"{name}: {len(captions):,} captions belong to several records, such as {examples}; each record counts as "
            "wrong for the other. If they are right answers, give them the same positive_id")


def describe_numbers(name: str, labels: Iterable[str | float | None]) -> str:
    """One line if the labels are a few whole numbers, which may be meant as classes; otherwise an empty string."""
    found = set(labels) - {None}
    if not 0 < len(found) <= FEW_NUMBERS or not all(isinstance(one, float) and one.is_integer() for one in found):
        return ""
    shown = ", ".join(f"{one:g}" for one in sorted(found)[:EXAMPLES])
    return (f"{name}: the labels {shown} are read as numbers to predict (regression). If they are classes, write them "
            f'as texts: "label": "{min(found):g}"')


def unknown_words(texts: Iterable[str], tokenizer: Tokenizer, max_words: int = 30) -> Counter[str]:
    """The words of cleaned texts that become [UNK], and how often they occur."""
    words = Counter(word for text in texts for word in clean(text, max_words).split())
    return Counter({word: count for word, count in words.items() if tokenizer.is_unknown(word)})


def describe_unknown(name: str, unknown: Counter[str], total: int) -> str:
    """One line: the fraction of unknown words, and the most frequent ones."""
    examples = ", ".join(repr(word) for word, _ in unknown.most_common(EXAMPLES))
    return f"{name}: {unknown.total() / total:.1%} of the words are unknown to the vocabulary, such as {examples}"


def _evaluated(root: Path | None, task: str) -> Iterator[tuple[str, str]]:
    """The files, as (task, split), that a run of `task` evaluates on."""
    tasks = parse_tasks(task)
    if "pretrain" in tasks:
        tasks = [name for name in EVALUATED if TASKS[name].output in ("caption", "answer", "ranking")
                 and (name in tasks or TASKS[name].modality != "text")]
    for name, splits in (available(root) if root else {}).items():
        yield from ((name, split) for split in splits if name in tasks and split in EVAL_SPLITS)


def record_text_problems(
    record: Record, task: str, tokenizer: Tokenizer, limit: int, max_words: int
) -> Iterator[str]:
    """An error message for each text of a record to evaluate that has no words, or that the model has to read and is
    longer than `limit` tokens. Captions and answers that are only compared may have any length."""
    encoded = limit if TASKS[task].output == "ranking" else 10**9
    for text, of_text in (
        *((caption, encoded) for caption in record.captions), *((question.question, limit) for question in record.qa),
        *((answer, 10**9) for question in record.qa for answer in question.answers),
        *(((record.texts or record.text, limit),) if record.texts or record.text else ()),
    ):
        yield from text_problem(record.source, text, tokenizer, of_text, max_words)


def _label_problem(
    source: str, label: str | float | None, task: str, classes: Mapping[str, tuple[str, ...]]
) -> Iterator[str]:
    names = classes.get(task)
    if label is not None and names is not None:
        if isinstance(label, float) == bool(names) or (names and label not in names):
            expected = f"one of {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}" if names else "a number"
            yield f"{source}: label {label!r}: the model expects {expected}; fix it, or train with this label"


def _unknown_answers(source: str, answers: Sequence[str], tokenizer: Tokenizer, max_words: int) -> Iterator[str]:
    for answer in dict.fromkeys(answers):
        if nothing_known(answer, tokenizer, max_words):
            yield (f"{source}: the answer {short(answer)} has only words that are unknown to the vocabulary; {ADVICE}")


def nothing_known(text: str, tokenizer: Tokenizer, max_words: int) -> bool:
    """Whether a text has words, and all of them are unknown to the vocabulary: then the model can never write it."""
    words = clean(text, max_words).split()
    return bool(words) and all(map(tokenizer.is_unknown, words))


def report_unknown(
    name: str, words: Counter[str], tokenizer: Tokenizer, max_unknown: float, problems: list[str], reports: list[str]
) -> None:
    """Add a line about the unknown ones among `words`, if there are any: to `problems` if their fraction is above
    `max_unknown`, otherwise to `reports`."""
    unknown = Counter({word: count for word, count in words.items() if tokenizer.is_unknown(word)})
    if unknown:
        line = describe_unknown(name, unknown, words.total())
        if unknown.total() > max_unknown * words.total():
            problems.append(f"{line}. At most {max_unknown:.0%} are allowed (--max-unknown); {ADVICE}")
        else:
            reports.append(line)
