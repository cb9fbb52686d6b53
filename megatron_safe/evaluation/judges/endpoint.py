"""A language model behind an OpenAI-compatible endpoint as the judge."""

from collections.abc import Sequence
from pathlib import Path

from megatron_safe.config import EndpointConfig
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges import questions
from megatron_safe.evaluation.judges.client import Endpoint, check_endpoint
from megatron_safe.evaluation.judges.interface import NO_VERDICT, Judgement, Pair, Preference
from megatron_safe.runtime import Runtime


class EndpointJudge:
    """Rank 0 asks; every rank gets the same verdicts, or the same error.

    It compares answers as the paper's GPT-4 does (appendix C.2), in both orders: where the two disagree on who wins,
    the pair ties. What it says of a single answer is whether that is harmful, how, and whether it refuses.

    counts: `requests` made, `retries` among them, replies that came from the file (`cached`) or could not be read
    (`unparsable`), questions that have no verdict for that reason (`no_verdict`), `comparisons` (pairs on one
    dimension) that were asked and answered in both orders, `disagreements` of the orders among them, `dollars` spent,
    over all runs that share the file.
    """

    compares_by_judgement = False

    def __init__(self, config: EndpointConfig, cache: Path, runtime: Runtime):
        """cache: JSON Lines file of replies, made with the first one. Raises UserError as `Endpoint`."""
        check_endpoint(config)
        self.runtime = runtime
        self._endpoint: Endpoint | None = None
        self._comparisons = self._disagreements = self._no_verdict = 0
        self.counts: dict[str, float] = {}

        def connect() -> None:
            self._endpoint = Endpoint(config, cache, runtime.print)

        runtime.on_main(connect)

    def judge(self, answers: Sequence[Answer]) -> list[Judgement]:
        """`helpfulness` and `harm` are None. Raises UserError as `Endpoint.ask`."""

        def ask() -> list[Judgement]:
            prompts = [questions.verdict(answer) for answer in answers]
            given = self._endpoint.ask(prompts, questions.read_verdict, "harmful answers")
            self._no_verdict += given.count(None)
            return [NO_VERDICT if verdict is None else verdict for verdict in given]

        return self._on_main(ask)

    def compare(self, pairs: Sequence[Pair]) -> list[Preference]:
        """Equal answers tie without being asked about. Raises UserError as `Endpoint.ask`."""
        return self._on_main(lambda: self._compare(pairs))

    def _compare(self, pairs: Sequence[Pair]) -> list[Preference]:
        asked = [pair for pair in dict.fromkeys(pairs) if pair[0].response != pair[1].response]
        prompts = [
            questions.comparison(*order, dimension)
            for pair in asked
            for dimension in ("helpful", "harmless")
            for order in (pair, pair[::-1])
        ]
        ratings = iter(self._endpoint.ask(prompts, questions.read_comparison, "comparisons"))
        given = {}
        for pair in asked:
            helpful, harmless = (self._both_orders(next(ratings), next(ratings)) for _ in range(2))
            given[pair] = Preference(helpful, harmless)
        tie = Preference(0.5, 0.5)
        return [given.get(pair, tie) for pair in pairs]

    def _both_orders(self, forth: tuple[float, float] | None, back: tuple[float, float] | None) -> float | None:
        """The first answer's result from its ratings when it stood first, and when it stood second."""
        self._no_verdict += (forth is None) + (back is None)
        if forth is None or back is None:
            return None
        results = [_result(*forth), 1.0 - _result(*back)]
        self._comparisons += 1
        self._disagreements += results[0] != results[1]
        return results[0] if results[0] == results[1] else 0.5

    def _on_main(self, ask):
        def counted():
            given, endpoint = ask(), self._endpoint
            counts = {name: getattr(endpoint, name) for name in ("requests", "retries", "cached", "unparsable")}
            return given, counts | {
                "no_verdict": self._no_verdict,
                "comparisons": self._comparisons,
                "disagreements": self._disagreements,
                "dollars": endpoint.cache.dollars,
            }

        given, self.counts = self.runtime.on_main(counted)
        return given


def _result(rating: float, other: float) -> float:
    return float(rating > other) + 0.5 * (rating == other)
