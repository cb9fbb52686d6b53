"""Data entries of a config as records, and the order in which training takes them: all alike, or in proportions.

Legend: k entries, n_i rows of entry i taken so far.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from megatron_safe.data.rows import BadRows, Row, describe, read_rows
from megatron_safe.data.sampler import ShuffledStream
from megatron_safe.data.sources import QUESTIONS, SOURCES, Kind, Question, Reading, question_of
from megatron_safe.errors import UserError

_LONGEST_SCHEDULE = 100_000  # positions before the proportions come out even: half a second to plan


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a data list.

    path: a file, a folder or a hub name (see `read_rows`). source: its form, a key of `SOURCES`. split: of a folder or
    a hub name. weight: its part of every batch, beside those of the other entries. question: what hh-rlhf's annotators
    were asked.
    """

    path: str
    source: str = "plain"
    split: str | None = None
    weight: Fraction | None = None
    question: Question | None = None


def parse_entries(name: str, values: Sequence[str | dict[str, Any]], kind: Kind, weighted: bool) -> list[Entry]:
    """The entries of a list such as `data.train`, each a path to rows of our own form or a mapping of `Entry`'s fields.

    name: of the list, for messages. kind: what its stage wants. weighted: whether its stage mixes with proportions.
    Raises UserError for the first entry that is not as described.
    """
    entries = [_parse_entry(f"{name}[{at}]", value, kind, weighted) for at, value in enumerate(values)]
    if not entries:
        raise UserError(f"{name}: expected at least one path or {{source, path, ...}}, found an empty list")
    without = [at for at, entry in enumerate(entries) if entry.weight is None]
    if 0 < len(without) < len(entries):
        raise UserError(f"{name}[{without[0]}].weight: expected a weight, because other entries have one; found none")
    if not without:
        _whole_weights(name, [entry.weight for entry in entries])
    return entries


def _parse_entry(where: str, value: str | dict[str, Any], kind: Kind, weighted: bool) -> Entry:
    if isinstance(value, str):
        value = {"path": value}
    names = [field.name for field in dataclasses.fields(Entry)]
    for key in value:
        if key not in names:
            raise UserError(f"{where}: expected {', '.join(names)}, found {key!r}")
    value = {key: given for key, given in value.items() if given is not None}
    if "path" not in value:
        raise UserError(f"{where}.path: expected a file, a folder or a hub name, found none")
    for key in ("path", "source", "split", "question"):
        if key in value and not isinstance(value[key], str):
            raise UserError(f"{where}.{key}: expected a string, found {describe(value[key])}")
    entry = Entry(**{key: given for key, given in value.items() if key != "weight"})
    if entry.source not in SOURCES:
        raise UserError(f"{where}.source: expected one of {', '.join(SOURCES)}, found {entry.source!r}")
    if kind not in SOURCES[entry.source]:
        able = ", ".join(name for name, kinds in SOURCES.items() if kind in kinds)
        raise UserError(f"{where}.source: expected one that gives {kind} ({able}), found {entry.source}")
    weight = _weight(where, value["weight"], weighted) if "weight" in value else None
    return dataclasses.replace(entry, weight=weight, question=_question(where, entry, kind))


def _weight(where: str, value: Any, weighted: bool) -> Fraction:
    if not weighted:
        raise UserError(f"{where}.weight: expected none, because every row is used once here; found {value}")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{where}.weight: expected a number above 0, found {describe(value)}")
    return Fraction(str(value))  # 0.1 is a tenth, as written


def _question(where: str, entry: Entry, kind: Kind) -> Question | None:
    """What `chosen` of an hh-rlhf entry answers: as given, or as its path says."""
    if entry.question is not None and entry.question not in QUESTIONS:
        raise UserError(f"{where}.question: expected {' or '.join(QUESTIONS)}, found {entry.question!r}")
    if entry.source != "hh-rlhf":
        if entry.question is not None:
            raise UserError(f"{where}.question: expected none for source {entry.source}, found {entry.question}")
        return None
    found = entry.question or question_of(entry.path)
    if found is None and kind != "demonstrations":
        raise UserError(
            f"{where}.question: expected {' or '.join(QUESTIONS)}, whichever 'chosen' answers, because no name on the "
            f"path {entry.path} says helpful or harmless; found none"
        )
    return found


def check_entries(stage: str, data: Any) -> None:
    """Raise UserError for the first entry in the `data` section of a stage's config that cannot be right. What only the
    files can tell is left to the stage."""
    rows: Kind = "comparisons" if stage in ("reward", "cost") else "demonstrations"
    kinds: dict[str, Kind] = {"train": rows, "eval": rows, "prompts": "prompts", "ptx": "demonstrations"}
    for name, kind in kinds.items():
        if values := getattr(data, name, None):
            weighted = name != "eval" and stage not in ("generate", "evaluate", "red-team")
            parse_entries(f"data.{name}", values, kind, weighted)


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """Records of several entries.

    records: all of them, entry after entry. entries: with or without weights. name: of the list, for messages.
    """

    name: str
    entries: list[Entry]
    records: list[Any]
    _entry_of: dict[int, int]  # id of a record -> place of its entry

    def stream(
        self, kept: Sequence[Any], batch_size: int, seed: int, may_lack: bool = False
    ) -> "ShuffledStream | MixtureStream":
        """The order in which to take the records `kept`, some of `records` (the objects themselves): `indices(step)`
        gives the places in `kept` of a global batch, a pure function of seed and step.

        Without weights all are shuffled together. Else each entry is shuffled by itself, and its part of the batches is
        as its weight says.

        Raises UserError where nothing is kept of an entry with a weight, unless `may_lack`.
        """
        if self.entries[0].weight is None:
            return ShuffledStream(len(kept), batch_size, seed)
        groups: list[list[int]] = [[] for _ in self.entries]
        for place, record in enumerate(kept):
            groups[self._entry_of[id(record)]].append(place)
        for at, (entry, group) in enumerate(zip(self.entries, groups, strict=True)):
            if not group and not may_lack:
                raise UserError(
                    f"{self.name}[{at}] {entry.path}: expected a row that is short enough, because the entry has a "
                    "weight; found none"
                )
        weights = _whole_weights(self.name, [entry.weight for entry in self.entries])
        present = [at for at, group in enumerate(groups) if group]
        return MixtureStream([groups[at] for at in present], [weights[at] for at in present], batch_size, seed)


def read(
    kind: Kind,
    name: str,
    values: Sequence[str | dict[str, Any]],
    on_bad_row: Literal["fail", "skip"] = "fail",
    needs: str | None = None,
    weighted: bool = True,
    say: Callable[[str], None] = print,
    watch: Callable[[Iterator[Row]], Iterable[Row]] = iter,
) -> Mixture:
    """The records of a config's data list.

    on_bad_row: "skip" leaves bad rows out, and says how many for which reason and where the first are. needs: a label
    that a record must have; those without are left out, with a line. weighted: as `parse_entries`. say: what to do
    with a line about rows that were left out. watch: passes the rows on, to show how far the reading is.

    Raises UserError for entries or files that are not as described, for the first bad row where none are skipped, and
    for an entry that gives no record.
    """
    entries = parse_entries(name, values, kind, weighted)
    records: list[Any] = []
    entry_of: dict[int, int] = {}
    for at, entry in enumerate(entries):
        where = f"{name}[{at}] {entry.path}"
        reading = Reading(BadRows(on_bad_row == "skip"), entry.question)
        rows = watch(read_rows([entry.path], entry.split, reading.bad_rows))
        found = list(SOURCES[entry.source][kind](rows, reading))
        lines = reading.bad_rows.lines()
        lines += [f"{count} {why}, left out" for why, count in reading.left_out.items() if count]
        if not found:
            raise UserError(f"{where}: expected {kind}, found none" + (f": {'; '.join(lines)}" if lines else ""))
        if needs is not None:
            labelled = [record for record in found if getattr(record, needs) is not None]
            if not labelled:
                raise UserError(f"{where}: expected {kind} with {needs}, found none in {len(found)}")
            if len(labelled) < len(found):
                ties = f" ({reading.ties[needs]} of them ties)" if reading.ties[needs] else ""
                lines.append(f"{len(found) - len(labelled)} of {len(found)} {kind} have no {needs}{ties}, left out")
            found = labelled
        else:
            lines += [f"{count} ties in {name}, read as no label" for name, count in reading.ties.items()]
        for line in lines:
            say(f"{where}: {line}")
        records += found
        entry_of |= {id(record): at for record in found}
    return Mixture(name, entries, records, entry_of)


class MixtureStream:
    """An endless sequence of rows from several groups in fixed proportions, cut into full batches.

    A schedule says whose turn each position is; within a group the rows come as in `ShuffledStream`, in epochs of the
    group's own. After any number of positions each group's part differs from its share by less than one row.

    groups: the rows of each. weights: whole numbers above 0. batch_size: rows in a global batch.
    """

    def __init__(self, groups: Sequence[Sequence[int]], weights: Sequence[int], batch_size: int, seed: int):
        self.groups = groups
        self.batch_size = batch_size
        self._turns = schedule(weights)
        self._streams = [ShuffledStream(len(group), 1, seed, number) for number, group in enumerate(groups)]
        self._in_period = [0] * len(groups)
        self._before = []  # of each position in the period: how many of its group came before it
        for turn in self._turns:
            self._before.append(self._in_period[turn])
            self._in_period[turn] += 1

    def indices(self, step: int) -> list[int]:
        """The `batch_size` rows of a step (from 0), the same whatever was asked before."""
        rows = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            periods, place = divmod(position, len(self._turns))
            turn = self._turns[place]
            taken = periods * self._in_period[turn] + self._before[place]
            rows.append(self.groups[turn][self._streams[turn].index(taken)])
        return rows


def schedule(weights: Sequence[int]) -> list[int]:
    """Whose turn it is at each position of a period, after which it repeats: weights / gcd positions of each.

    After t positions, n_i differs from its share t w_i / Σw by at most 1 - 1 / (2k - 2) (R. Tijdeman, The chairman
    assignment problem, 1980): of those whose turn would not bring them too far ahead, the one that would first be too
    far behind. In whole numbers, so that it is the same on every machine.
    """
    common = math.gcd(*weights)
    weights = [weight // common for weight in weights]
    total, count = sum(weights), len(weights)
    if count == 1:
        return [0]
    scale = 2 * count - 2
    slack = (scale - 1) * total
    units = [math.lcm(*weights) // weight for weight in weights]  # dividing by a weight, up to a common factor
    behind = [0] * count  # scale x (t w_i - n_i Σw): how far behind its share
    turns = []
    for _ in range(total):
        behind = [owed + scale * weight for owed, weight in zip(behind, weights, strict=True)]
        able = [i for i in range(count) if behind[i] >= total]
        turn = min(able, key=lambda i: (slack - behind[i]) * units[i])
        behind[turn] -= scale * total
        turns.append(turn)
    return turns


def _whole_weights(name: str, weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportions; UserError where the schedule of them would be too long."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    common = math.gcd(*whole)
    if sum(whole) // common > _LONGEST_SCHEDULE:
        raise UserError(
            f"{name}: expected weights in proportions that come out even within {_LONGEST_SCHEDULE} rows, such as "
            f"numbers with three digits; found {', '.join(str(float(weight)) for weight in weights)}"
        )
    return [weight // common for weight in whole]
