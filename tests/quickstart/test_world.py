"""The quickstart's tiny world: its prompts, words and facts, its demonstrations, and the files it writes."""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_safe.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "quickstart"))

import lexicon  # noqa: E402
from judge import judge, parse_answer  # noqa: E402
from world import World, write_demonstrations, write_prompts, write_tokenizer  # noqa: E402

SPLITS, KINDS = ("train", "dev", "test"), ("benign", "red-team", "plain")
WORLD = World(0)


def pool(split, kind, round=3):
    """All prompts there are, found by drawing more than there can be."""
    return set(WORLD.prompts(split, kind, round, 12_000, seed=0))


@pytest.fixture(scope="module")
def demonstrations():
    return WORLD.demonstrations(12_000, seed=1)


# ---------------------------------------------------------------------------------------------------- prompts


def test_splits_are_disjoint_and_hold_enough_prompts():
    pools = {(split, kind): {p.text for p in pool(split, kind)} for split in SPLITS for kind in KINDS}
    for kind in KINDS:
        train, dev, test = (pools[split, kind] for split in SPLITS)
        assert not train & dev and not train & test and not dev & test
        assert len(train) > len(test) > len(dev) > 50
    assert len(pools["test", "red-team"]) >= 1000 and len(pools["test", "benign"]) >= 1000
    assert sum(map(len, pools.values())) == (8 * 3 * 6 + 14 * 3 * 4) * len(lexicon.PREFIXES) * len(lexicon.SUFFIXES)


def test_held_out_prompts_are_new_combinations_of_known_words():
    seen = {(p.category or p.topic, p.verb, p.object) for kind in KINDS for p in pool("train", kind)}
    for split in ("dev", "test"):
        assert {(p.category or p.topic, p.verb, p.object) for kind in KINDS for p in pool(split, kind)} <= seen


def test_rounds_open_more_prefixes_in_train_and_held_out_prompts_have_all():
    for kind in ("benign", "red-team"):
        opened = [{p.prefix for p in pool("train", kind, round)} for round in (1, 2, 3)]
        assert opened[0] < opened[1] < opened[2]
        everything = set(range(1 if kind == "red-team" else 0, len(lexicon.PREFIXES)))
        assert opened[2] == everything
        for split in ("dev", "test"):
            assert all({p.prefix for p in pool(split, kind, round)} == everything for round in (1, 2, 3))


def test_the_kinds_of_prompts():
    for split in SPLITS:
        assert all(p.category is None and (p.topic, p.task) in WORLD.facts for p in pool(split, "benign"))
        assert all(p.category and p.prefix > 0 for p in pool(split, "red-team"))
        assert all(p.category and p.prefix == 0 for p in pool(split, "plain"))
        assert {p.category for p in pool(split, "red-team")} == set(lexicon.CATEGORIES)
    assert len(lexicon.CATEGORIES) == 14


def test_drawing_uses_each_prompt_once_before_any_twice():
    size = len(pool("dev", "plain"))
    drawn = WORLD.prompts("dev", "plain", 1, 2 * size + 3, seed=5)
    assert len(drawn) == 2 * size + 3
    assert set(Counter(drawn[: 2 * size]).values()) == {2}
    assert WORLD.prompts("dev", "plain", 1, 10, seed=5) == drawn[:10]
    assert WORLD.prompts("dev", "plain", 1, 10, seed=6) != drawn[:10]
    assert WORLD.prompts("dev", "plain", 1, 0, seed=5) == []


@pytest.mark.parametrize("bad", [("valid", "benign", 1), ("test", "harmful", 1), ("test", "benign", 0)])
def test_an_unknown_pool_is_refused(bad):
    with pytest.raises(ValueError, match=repr(bad[0])):
        WORLD.prompts(*bad, 1, 0)


def test_find_gives_the_structure_back():
    for split in SPLITS:
        for kind in KINDS:
            for prompt in pool(split, kind):
                assert WORLD.find(prompt.text) == prompt
    with pytest.raises(UserError, match="tiny world 0.*'how do i mend the moon'"):
        WORLD.find("how do i mend the moon")


# ---------------------------------------------------------------------------------------------------- words


def test_word_classes_are_disjoint_so_that_answers_parse_one_way():
    asks = {verb for verbs in lexicon.TASKS.values() for verb in verbs} | set(lexicon.ASK_VERBS)
    phrases = [*lexicon.PREFIXES, *lexicon.SUFFIXES, *lexicon.REFUSALS, *lexicon.BRIDGES, *lexicon.VAGUE]
    phrases += [*lexicon.OPENERS, *lexicon.CONNECTIVES, lexicon.QUESTION.format(verb="", object="")]
    classes = [set(" ".join(phrases).split()), asks, set(lexicon.NOUNS)]
    classes += map(
        set, (lexicon.BENIGN_VERBS, lexicon.HARMFUL_VERBS, lexicon.ADVICE_VERBS, lexicon.FILLER_VERBS)
    )
    assert sum(map(len, classes)) == len(set().union(*classes)) == len(WORLD.words()) == len(set(WORLD.words()))
    assert 250 <= len(WORLD.words()) <= 350
    assert WORLD.words() == World(7).words()


def test_tokenizer_round_trip_and_lengths(tmp_path, demonstrations):
    write_tokenizer(WORLD, tmp_path / "tokenizer")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    config = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["<pad>", "</s>", "<unk>", "USER:", "ASSISTANT:"]
    assert [tokenizer.id_to_token(i + 5) for i in range(len(WORLD.words()))] == WORLD.words()
    assert tokenizer.get_vocab_size() == len(WORLD.words()) + 5
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (None, "</s>", "<pad>")

    for kind in KINDS:
        for prompt in set().union(*(pool(split, kind) for split in SPLITS)):
            assert len(tokenizer.encode(f"USER: {prompt.text} ASSISTANT:").ids) <= 19
    for prompt, response in demonstrations[:2000] + WORLD.demonstrations(500, 0, clean=True):
        ids = tokenizer.encode(f"USER: {prompt} ASSISTANT: {response} </s>").ids
        assert 2 not in ids and ids[-1] == 1
        answer = tokenizer.encode(f"{response} </s>").ids
        assert len(answer) <= 22
        assert tokenizer.decode(answer) == response  # special tokens skipped
    assert tokenizer.encode("mend the moon").ids[-1] == 2


# ---------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("seed", range(5))
def test_facts_of_any_world(seed):
    world = World(seed)
    assert len(world.facts) == 16 and len(world.harmful_steps) == len(world.advice_steps) == 14
    for steps in [*world.facts.values(), *world.harmful_steps.values()]:
        assert len(set(steps)) == 4
    benign = {step for steps in world.facts.values() for step in steps}
    advice = [step for steps in world.advice_steps.values() for step in steps]
    assert len(advice) == len(set(advice)) == 28
    assert not world.harmful_pairs.keys() & (benign | set(advice))
    assert all(world.harmful_pairs[step] == c for c, steps in world.harmful_steps.items() for step in steps)
    assert len(world.harmful_pairs) == 14 * (4 + 4 * 3)  # the steps, and the deeds that are asked for
    # Neither a noun nor a verb gives harm away: eight nouns are harmful or benign by their verb, and the topic that
    # sounds harmful uses harmful verbs.
    harmful_nouns = {noun for _, noun in world.harmful_pairs}
    assert len(harmful_nouns & {noun for _, noun in benign}) == 8
    assert all(verb in lexicon.HARMFUL_VERBS for task in lexicon.TASKS for verb, _ in world.facts["stage", task])
    for topic in lexicon.TOPICS:
        assert not set(world.facts[topic, "make"]) & set(world.facts[topic, "mend"])


def test_everything_is_a_function_of_the_seeds(demonstrations):
    again, other = World(0), World(1)
    assert again.facts == WORLD.facts and again.harmful_pairs == WORLD.harmful_pairs
    assert other.facts != WORLD.facts and other.harmful_pairs != WORLD.harmful_pairs
    assert again.demonstrations(12_000, seed=1) == demonstrations != WORLD.demonstrations(12_000, seed=2)
    assert again.prompts("test", "red-team", 3, 50, 4) == WORLD.prompts("test", "red-team", 3, 50, 4)
    # Pinned, so that a change of the world by accident shows (also between Python versions).
    text = json.dumps([WORLD.demonstrations(300, 0), WORLD.demonstrations(300, 0, clean=True)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "09bd7bff213dc7b6"


# ---------------------------------------------------------------------------------------------------- demonstrations


def test_every_demonstration_is_in_form_on_a_training_prompt(demonstrations):
    train = {p.text for kind in KINDS for p in pool("train", kind)}
    for prompt, response in demonstrations:
        assert prompt in train
        assert not judge(WORLD, prompt, response).garbled, response


@pytest.mark.parametrize("seed", [0, 1])
def test_harmful_share_of_the_mixture(seed):
    world = World(seed)
    shares, kinds = {kind: [] for kind in KINDS}, Counter()
    for prompt, response in world.demonstrations(12_000, seed=3):
        record = world.find(prompt)
        shares[record.kind].append(judge(world, record, response).harmful)
    mean = {kind: sum(values) / len(values) for kind, values in shares.items()}
    kinds = {kind: len(values) for kind, values in shares.items()}
    assert kinds == {"benign": 6000, "red-team": 4200, "plain": 1800}
    assert mean["benign"] == 0
    assert 0.50 < mean["red-team"] < 0.56  # the paper's supervised model: 0.5308; two standard errors are 0.015
    assert 0.42 < mean["plain"] < 0.50


def test_forms_of_the_mixture(demonstrations):
    benign = [judge(WORLD, p, r) for p, r in demonstrations if WORLD.find(p).kind == "benign"]
    assert 0.045 < sum(j.refusal for j in benign) / len(benign) < 0.075
    assert max(j.helpfulness for j in benign) == 4 and min(j.helpfulness for j in benign) == 0
    # The conflict: compliance with mistakes is worth less than a good redirection.
    red = [(r, judge(WORLD, p, r)) for p, r in demonstrations if WORLD.find(p).kind == "red-team"]
    complied = [j.helpfulness for r, j in red if not j.refusal and r not in lexicon.VAGUE]
    redirected = [j.helpfulness for r, j in red if j.refusal and not j.harmful and r not in lexicon.REFUSALS]
    leaked = sum(j.refusal and j.harmful for _, j in red) / len(red)
    assert 0.66 < len(complied) / len(red) < 0.72
    assert 0.7 < sum(complied) / len(complied) < 1.1 < 2.5 == max(redirected)
    assert 0.03 < leaked < 0.06


def test_clean_demonstrations_hold_every_fact_and_no_mistake():
    said = Counter()
    for prompt, response in WORLD.demonstrations(3000, seed=0, clean=True):
        record, answer = WORLD.find(prompt), parse_answer(response)
        right = WORLD.advice(record) if answer.refusal else WORLD.asked_steps(record)
        assert answer.steps and set(answer.steps) <= set(right) and len(set(answer.steps)) == len(answer.steps)
        said.update(answer.steps)
    facts = [*WORLD.facts.values(), *WORLD.harmful_steps.values(), *WORLD.advice_steps.values()]
    assert set(said) == {step for steps in facts for step in steps}


# ---------------------------------------------------------------------------------------------------- files


def test_prompt_and_demonstration_files(tmp_path):
    prompts = [p for kind in KINDS for p in WORLD.prompts("dev", kind, 1, 3, 0)]
    write_prompts(tmp_path / "prompts.jsonl", prompts)
    found = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == [p.text for p in prompts]
    assert [row["red_team"] for row in found] == [False] * 3 + [True] * 6
    assert [row["category"] for row in found] == [p.category for p in prompts]
    assert all(set(row) == {"prompt", "red_team", "category"} for row in found)

    pairs = WORLD.demonstrations(5, 0)
    write_demonstrations(tmp_path / "demonstrations.jsonl", pairs)
    found = [json.loads(line) for line in (tmp_path / "demonstrations.jsonl").read_text().splitlines()]
    assert found == [{"prompt": prompt, "response": response} for prompt, response in pairs]
