"""People as the judge: labels that were collected beforehand, found again by text."""

from collections import defaultdict
from collections.abc import Sequence

from megatron_safe.config import PeopleConfig
from megatron_safe.data.records import History
from megatron_safe.data.rows import Row, read_rows
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges.interface import NO_VERDICT, Judgement, Pair, Preference

Asked = tuple[History, str]
"""A dialogue up to the answer: its history and its prompt."""


class PeopleJudge:
    """Reads comparisons with their labels (`prompt`, `response_0`, `response_1`; all labels may be missing).

    `better_response_id` and `safer_response_id` are 0, 1, "tie", or null where nobody was asked. `is_response_0_safe`,
    `is_response_1_safe` are bools or null, `response_0_harm_category`, `response_1_harm_category` objects of names with
    true or false. Where rows disagree on an answer or a pair, the majority counts; an even split is a tie, or no
    verdict on a single answer.

    counts: `answers` asked about, those of them nobody labelled (`answers_without_verdict`), `pairs` asked about, and
    those without a label on either dimension (`helpful_without_verdict`, `harmless_without_verdict`).
    """

    compares_by_judgement = False

    def __init__(self, config: PeopleConfig):
        """Raises UserError for a file that cannot be read, and for the first row that is not as described."""
        self.files = config.labels
        self.counts: dict[str, float] = {}
        self._safe: dict[tuple[Asked, str], list[bool]] = defaultdict(list)
        self._categories: dict[tuple[Asked, str], dict[str, None]] = defaultdict(dict)
        # (dialogue, response, other response) -> what the first of them gets, from each row about the two
        self._helpful: dict[tuple[Asked, str, str], list[float]] = defaultdict(list)
        self._harmless: dict[tuple[Asked, str, str], list[float]] = defaultdict(list)
        for row in read_rows(config.labels):
            asked = row.history(), row.text("prompt")
            responses = [row.text(f"response_{i}", may_be_empty=True) for i in (0, 1)]
            for i, response in enumerate(responses):
                if row.fields.get(f"is_response_{i}_safe") is not None:
                    self._safe[asked, response].append(row.flag(f"is_response_{i}_safe"))
                if row.has(f"response_{i}_harm_category"):
                    self._categories[asked, response] |= dict.fromkeys(row.names(f"response_{i}_harm_category"))
            for name, given in (("better_response_id", self._helpful), ("safer_response_id", self._harmless)):
                first = _result_of_first(row, name)
                if first is not None:
                    given[asked, responses[0], responses[1]].append(first)
                    given[asked, responses[1], responses[0]].append(1.0 - first)

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """`helpfulness` and `harm` are None. Raises UserError where nobody labelled any of the answers."""
        given = [self._judge((answer.history, answer.prompt), answer.response) for answer in answers]
        missing = sum(one.harmful is None for one in given)
        self._check(len(answers), missing, "answer")
        self._add(answers=len(answers), answers_without_verdict=missing)
        return given

    def _judge(self, asked: Asked, response: str) -> Judgement:
        safe = self._safe.get((asked, response), ())
        votes = 2 * sum(safe) - len(safe)
        if not votes:
            return NO_VERDICT
        categories = tuple(self._categories[asked, response]) if votes < 0 else ()
        return Judgement(None, votes < 0, None, None, categories)

    def compare(self, pairs: Sequence[Pair]) -> list[Preference]:
        """Raises UserError where nobody compared any of the pairs."""
        given = []
        for one, other in pairs:
            key = (one.history, one.prompt), one.response, other.response
            given.append(Preference(*(_majority(by_pair.get(key, ())) for by_pair in (self._helpful, self._harmless))))
        helpful, harmless = (sum(getattr(one, name) is None for one in given) for name in ("helpful", "harmless"))
        self._check(len(pairs), min(helpful, harmless), "pair of answers")
        self._add(pairs=len(pairs), helpful_without_verdict=helpful, harmless_without_verdict=harmless)
        return given

    def _check(self, asked: int, missing: int, what: str) -> None:
        if asked and missing == asked:
            raise UserError(
                f"judge.people.labels {', '.join(self.files)}: expected a label for at least one {what} of {asked}, "
                "found none; prompts and responses must be the same texts"
            )

    def _add(self, **counts: int) -> None:
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count


def _majority(results: Sequence[float]) -> float | None:
    if not results:
        return None
    mean = sum(results) / len(results)
    return float(mean > 0.5) + 0.5 * (mean == 0.5)


def _result_of_first(row: Row, name: str) -> float | None:
    if not row.has(name):
        return None
    value = row.response_id(name, ties=True)
    return 0.5 if value == "tie" else 1.0 - value
