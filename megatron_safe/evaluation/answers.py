"""Answers of a policy to prompts, and their rewards and costs, as plain lists that are the same on every rank.

Legend: B rows on this data-parallel rank, N new tokens.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from megatron_safe.config import RolloutConfig
from megatron_safe.data.batches import collate, encode_contexts
from megatron_safe.data.datasets import PromptDataset
from megatron_safe.data.records import History, Prompt
from megatron_safe.data.sampler import shard
from megatron_safe.data.tokenizer import Tokenizer
from megatron_safe.errors import UserError
from megatron_safe.models.packing import Sequences
from megatron_safe.models.pipeline import forward
from megatron_safe.models.roles import Role
from megatron_safe.rollout.generate import generate
from megatron_safe.runtime import Runtime

SCORE_TOKENS = 16384
"""Of a scoring forward: enough to fill a GPU."""
_LINE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer to one prompt.

    response: text without special tokens; may be empty.
    ended: whether EOS followed it; False where it was cut off at a length limit.
    red_team, category: the prompt's.
    sample: which of the answers to this prompt, from 0.
    history: the prompt's, as far as the policy read it.
    """

    prompt: str
    response: str
    ended: bool = True
    red_team: bool = False
    category: str | None = None
    sample: int = 0
    history: History = ()


def each_turn(answer: Answer) -> list[Answer]:
    """The assistant's turns of a dialogue, oldest first: each an answer to what came before it, the last the answer."""
    earlier = [
        replace(answer, prompt=prompt, response=response, ended=True, history=answer.history[:turn])
        for turn, (prompt, response) in enumerate(answer.history)
    ]
    return [*earlier, answer]


def generate_answers(
    actor: Role,
    records: Sequence[Prompt],
    tokenizer: Tokenizer,
    template: str,
    rollout: RolloutConfig,
    batch_size: int,
    samples_per_prompt: int,
    seed: int,
) -> list[Answer]:
    """`samples_per_prompt` answers to each prompt, on every rank, in the order of the prompts.

    Sample s of prompt i draws from randomness keyed by `seed` and i x `samples_per_prompt` + s, so an answer depends
    neither on the layout nor on the batch. Dialogues beyond `rollout.max_prompt_length` lose their oldest turns, and
    prompts beyond it are left out; a line says how many, and i counts those kept.

    Args:
        batch_size: answers generated at a time, over all data-parallel ranks; a multiple of their number.

    Raises:
        UserError: a bad template, no prompt short enough, or a batch size that does not divide.
    """
    runtime = actor.runtime
    prompts = PromptDataset(records, tokenizer, template, rollout.max_prompt_length)
    kept = prompts.shortened()
    if kept != list(records):
        runtime.print(prompts.report())
    total = len(prompts) * samples_per_prompt
    answers = []
    for start in _progress(range(0, total, batch_size), "generate", runtime):
        wanted = list(range(start, min(start + batch_size, total)))
        sample_ids = shard(_filled(wanted, runtime.dp_size), runtime.dp_rank, runtime.dp_size)
        batch = prompts.batch([i // samples_per_prompt for i in sample_ids]).to(runtime.device).tokens
        trajectories = generate(
            actor, batch, torch.tensor(sample_ids, device=runtime.device), rollout, seed, tokenizer.eos_id,
            tokenizer.pad_id,
        )  # fmt: skip

        batch = trajectories.batch
        counts_B = batch.lengths_B - batch.prompt_lengths_B
        # As wide as any answer can be, so that the ranks agree on a shape without asking.
        new_tokens_BN = batch.tokens_BL.new_full((len(batch), rollout.max_new_tokens), tokenizer.pad_id)
        taken_BN = torch.arange(rollout.max_new_tokens, device=runtime.device) < counts_B[:, None]
        # Row-major order of both masks is sample by sample, token by token.
        new_tokens_BN[taken_BN] = batch.tokens_BL[:, 1:][trajectories.mask_BT]
        packed = torch.cat([counts_B[:, None], trajectories.ended_B.long()[:, None], new_tokens_BN], dim=1)
        rows = runtime.gather_over_data_parallel(packed)[: len(wanted)].tolist()
        for sample_id, (count, ended, *tokens) in zip(wanted, rows, strict=True):
            record = kept[sample_id // samples_per_prompt]
            answers.append(
                Answer(
                    prompt=record.prompt,
                    response=tokenizer.decode(tokens[: count - ended]),
                    ended=bool(ended),
                    red_team=record.red_team,
                    category=record.category,
                    sample=sample_id % samples_per_prompt,
                    history=record.history,
                )
            )
    return answers


def score_answers(
    roles: Mapping[str, Role],
    answers: Sequence[Answer],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    batch_size: int,
) -> dict[str, list[float]]:
    """What each scoring role says of each answer, on every rank: {key in `roles`: scores in the order of `answers`}.

    An answer is read after its history, with the EOS that ended it, and without one where it was cut off. As in
    training, a dialogue too long for `max_length` loses its oldest turns; what is still too long is cut and loses its
    EOS; where the prompt alone leaves no room, the score is NaN. A line says how many of each there were. Equal rows
    are scored once: their scores are equal to the last bit, so that they tie in a comparison.

    Args:
        roles: at least one role with a scalar head.
        batch_size: rows scored at a time, over all data-parallel ranks.

    Raises:
        UserError: a bad template, a prompt of no tokens, or no answer that fits.
    """
    runtime = next(iter(roles.values())).runtime
    responses = tokenizer.encode_batch([answer.response for answer in answers])
    endings = [[tokenizer.eos_id] if answer.ended else [] for answer in answers]
    responses = [response + ending for response, ending in zip(responses, endings, strict=True)]
    contexts = encode_contexts(tokenizer, template, answers, [max_length - len(response) for response in responses])
    places: dict[tuple[tuple[int, ...], int], list[int]] = {}  # row -> the answers that read so
    left_out = cut = lost_turns = 0
    for i, (context, response) in enumerate(zip(contexts, responses, strict=True)):
        prompt, tokens = context.tokens, context.tokens + response
        if len(prompt) < max_length:
            places.setdefault((tuple(tokens[:max_length]), len(prompt)), []).append(i)
            cut += len(tokens) > max_length
            lost_turns += context.dropped > 0
        else:
            left_out += 1
    if cut or left_out or lost_turns:
        runtime.print(
            f"answers: scored {len(answers) - left_out} of {len(answers)} rows, up to {max_length} tokens for prompt "
            f"and response; {left_out} left out (prompt too long), {cut} responses cut, {lost_turns} lost their oldest "
            "turns"
        )
    if answers and not places:
        raise UserError(f"answers: expected a prompt of fewer than {max_length} tokens, found none in {len(answers)}")
    # Alike lengths share a batch, which saves padding; the longest come first, so that what fits once fits to the end.
    rows = sorted(places, key=lambda row: -len(row[0]))

    scores = {name: [math.nan] * len(answers) for name in roles}
    for start in _progress(range(0, len(rows), batch_size), "score", runtime):
        wanted = rows[start : start + batch_size]
        mine = shard(_filled(wanted, runtime.dp_size), runtime.dp_rank, runtime.dp_size)
        batch = collate(mine, tokenizer.pad_id).to(runtime.device)
        sequences = Sequences.to_last(batch.tokens_BL, batch.lengths_B)
        for name, role in roles.items():
            scores_B = forward(role, sequences, SCORE_TOKENS, lambda scores_n, _: scores_n)
            gathered = runtime.gather_over_data_parallel(scores_B)[: len(wanted)].tolist()
            for row, score in zip(wanted, gathered, strict=True):
                for i in places[row]:
                    scores[name][i] = score
    return scores


def _filled(rows: list, multiple: int) -> list:
    """The rows, and the last one again until their number is a multiple; a shape for every rank, dropped afterwards."""
    return rows + rows[-1:] * (-len(rows) % multiple)


def _progress(starts: range, what: str, runtime: Runtime) -> Iterator[int]:
    """The batches, with a bar on a terminal and else a line every few seconds, on rank 0."""
    if not runtime.is_main:
        yield from starts
    elif sys.stderr.isatty():
        yield from tqdm(starts, desc=what, unit="batch", dynamic_ncols=True, file=sys.stderr)
    else:
        printed_at = time.monotonic()
        for done, start in enumerate(starts, start=1):
            yield start
            if done == len(starts) or time.monotonic() - printed_at >= _LINE_SECONDS:
                print(f"{what} {done}/{len(starts)} batches", file=sys.stderr, flush=True)
                printed_at = time.monotonic()
