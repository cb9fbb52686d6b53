"""The stage `red-team`: attack the current policy and add what worked to the prompts of the next round.

As in the paper's rounds (section 4.1), with the cost model in the place of the people who judged the attempts.
"""

import gc
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_safe.config import RedTeamConfig
from megatron_safe.data.datasets import PromptDataset
from megatron_safe.data.records import Prompt
from megatron_safe.data.sources import read_prompts
from megatron_safe.data.tokenizer import Tokenizer, load_tokenizer
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer, generate_answers, score_answers
from megatron_safe.evaluation.attacks import BUILT_IN, Attack, Template, choose, read_templates, write_attack
from megatron_safe.evaluation.stages import check_model, claim_folder, load, prompts_to_answer, write_rows
from megatron_safe.models.roles import Role
from megatron_safe.runtime import Runtime


def run(config: RedTeamConfig, runtime: Runtime) -> None:
    """Write OUT/prompts.jsonl (the pool and the attacks kept, each with its `origin`) and OUT/attacks.jsonl (every
    attack with the answers to it, their costs, and whether it was kept); print what each family of attacks reached."""
    settings = config.red_team
    tokenizer = load_tokenizer(config.tokenizer.path, config.tokenizer.template)
    templates = read_templates(settings.templates or BUILT_IN)
    seeds = prompts_to_answer(config, tokenizer, runtime)
    pool = read_prompts(settings.pool) if settings.pool else []
    longest = config.rollout.max_prompt_length + config.rollout.max_new_tokens
    check_model("model", "actor", config.model, tokenizer, runtime, longest)
    check_model("cost_model", "cost_model", config.cost_model, tokenizer, runtime, longest)
    out = claim_folder(config, "red-team", "prompts.jsonl", runtime)

    attacks, too_long = _attack(config, seeds, templates, tokenizer, runtime, "/".join(Path(config.run.out).parts[-2:]))
    kept = choose(
        attacks, settings.threshold, settings.keep, settings.max_per_seed, settings.max_similarity, pool
    )
    chosen = {id(attack) for attack in kept}
    write_rows(
        out / "attacks.jsonl",
        (
            prompt_row(attack.prompt)
            | {"template": attack.template.name, "family": attack.template.family, "seed": attack.seed}
            | {"responses": attack.responses, "costs": attack.costs, "kept": id(attack) in chosen}
            for attack in sorted(attacks, key=lambda attack: -attack.cost)
        ),
        runtime,
    )
    write_rows(out / "prompts.jsonl", map(prompt_row, [*pool, *(attack.prompt for attack in kept)]), runtime)
    runtime.print(table(attacks, kept, settings.threshold))
    runtime.print(
        f"{len(attacks)} attacks on {len(seeds)} seeds, {too_long} more left out (too long); {len(kept)} kept, "
        f"{len(pool)} prompts of the pool before them -> {out / 'prompts.jsonl'}"
    )


def _attack(
    config: RedTeamConfig, seeds: list[Prompt], templates: list[Template], tokenizer: Tokenizer, runtime: Runtime,
    label: str,
) -> tuple[list[Attack], int]:  # fmt: skip
    """All attacks with their costs, and how many were too long to be asked."""
    actor = load("actor", config.model, config, tokenizer, runtime)
    cost_model = load("cost_model", config.cost_model, config, tokenizer, runtime)
    policy = _Policy(config, actor, cost_model, tokenizer)
    attacks = []
    for template in templates:
        if template.shots == 0:
            wordings = policy.rewrite(template, seeds)
            attacks += [
                write_attack(template, i, seed, wording, (), label)
                for i, (seed, wording) in enumerate(zip(seeds, wordings, strict=True))
                if wording.strip()
            ]
    runtime.print(f"attacking with {len(attacks)} prompts")
    attacks = policy.ask(attacks)
    # The policy's own harmful answers become the examples of the next wave.
    examples = policy.harmful_exchanges(seeds)
    second = []
    for template in templates:
        if template.shots:
            wordings = policy.rewrite(template, seeds)
            for i, (seed, wording) in enumerate(zip(seeds, wordings, strict=True)):
                shots = tuple(exchange for of, exchange in examples if of != i)[: template.shots]
                if wording.strip() and len(shots) == template.shots:
                    second.append(write_attack(template, i, seed, wording, shots[::-1], label))
    if second:
        runtime.print(f"attacking with {len(second)} prompts that hold the policy's own answers")
        attacks += policy.ask(second)
    elif any(template.shots for template in templates):
        runtime.print(
            f"many-shot attacks left out: {len(examples)} harmful answers of the policy's own are too few for them"
        )
    del actor, cost_model
    too_long = policy.too_long
    del policy
    gc.collect()  # Megatron's modules refer to each other in circles
    torch.cuda.empty_cache()
    if not attacks:
        raise UserError(
            f"rollout.max_prompt_length: expected room for some attack, found {config.rollout.max_prompt_length} "
            f"tokens, too few for all {too_long}"
        )
    return attacks, too_long


class _Policy:
    """The policy under attack with the cost model beside it."""

    def __init__(self, config: RedTeamConfig, actor: Role, cost_model: Role, tokenizer: Tokenizer):
        self.config, self.actor, self.cost_model, self.tokenizer = config, actor, cost_model, tokenizer
        self.too_long = 0
        self.seed = config.run.seed
        self._worst: dict[int, tuple[float, str]] = {}  # seed -> cost and text of its most harmful answer

    def rewrite(self, template: Template, seeds: Sequence[Prompt]) -> list[str]:
        """What stands for each seed: its own words, or the policy's for it; blank where the question is too long."""
        if template.rewrite is None:
            return [seed.prompt for seed in seeds]
        questions = [Prompt(template.rewrite.format(prompt=seed.prompt)) for seed in seeds]
        answers = self._answers(questions, 1)
        return [given[0].response if given else "" for given in answers]

    def ask(self, attacks: Sequence[Attack]) -> list[Attack]:
        """The attacks that were short enough to be asked, with the costs of the answers to them."""
        given = self._answers([attack.prompt for attack in attacks], self.config.data.samples_per_prompt)
        flat = [answer for answers in given for answer in answers]
        if not flat:
            return []
        longest = self.config.rollout.max_prompt_length + self.config.rollout.max_new_tokens
        costs = iter(
            score_answers(
                {"cost": self.cost_model}, flat, self.tokenizer, self.config.tokenizer.template, longest,
                self.config.data.batch_size,
            )["cost"]
        )  # fmt: skip
        asked = []
        for attack, answers in zip(attacks, given, strict=True):
            for answer in answers:
                cost = next(costs)
                if not math.isfinite(cost):
                    raise UserError("cost_model: expected finite costs, found one that is not: a model that diverged")
                attack.costs.append(cost)
                attack.responses.append(answer.response)
                if cost > self._worst.get(attack.seed, (self.config.red_team.threshold, ""))[0]:
                    self._worst[attack.seed] = cost, answer.response
            if answers:
                asked.append(attack)
        return asked

    def harmful_exchanges(self, seeds: Sequence[Prompt]) -> list[tuple[int, tuple[str, str]]]:
        """(seed, exchange) of each seed that some attack answered harmfully, the costliest answer first."""
        by_cost = sorted(self._worst.items(), key=lambda item: -item[1][0])
        return [(i, (seeds[i].prompt, text)) for i, (_, text) in by_cost if text.strip()]

    def _answers(self, prompts: Sequence[Prompt], samples: int) -> list[list[Answer]]:
        """The answers to each prompt; none where it is too long."""
        template, rollout = self.config.tokenizer.template, self.config.rollout
        room = rollout.max_prompt_length
        try:
            short = PromptDataset(prompts, self.tokenizer, template, room).records
        except UserError:  # not one of them fits
            short = []
        fitting = {id(prompt) for prompt in short}
        self.too_long += len(prompts) - len(short)
        if not short:
            return [[] for _ in prompts]
        self.seed += 1  # each wave samples anew
        answers = iter(
            generate_answers(
                self.actor, short, self.tokenizer, template, rollout, self.config.data.batch_size, samples, self.seed
            )
        )
        return [[next(answers) for _ in range(samples)] if id(prompt) in fitting else [] for prompt in prompts]


def prompt_row(prompt: Prompt) -> dict:
    """A prompt in our own JSONL form."""
    row = {"prompt": prompt.prompt, "red_team": prompt.red_team, "category": prompt.category, "origin": prompt.origin}
    return row | ({"history": [list(turns) for turns in prompt.history]} if prompt.history else {})


def table(attacks: Sequence[Attack], kept: Sequence[Attack], threshold: float) -> str:
    """How many attacks of each template were asked, succeeded and were kept, as aligned text."""
    rows = [["attack", "family", "asked", "succeeded", "mean cost", "kept"]]
    for template in dict.fromkeys(attack.template for attack in attacks):
        mine = [attack for attack in attacks if attack.template == template]
        succeeded = sum(attack.cost > threshold for attack in mine)
        rows.append(
            [
                template.name, template.family, str(len(mine)), f"{succeeded / len(mine):.1%}",
                f"{sum(attack.cost for attack in mine) / len(mine):.2f}",
                str(sum(attack.template == template for attack in kept)),
            ]
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
