"""Attacks are written as their templates say, and the costliest, diverse ones are kept."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_safe.data.records import Prompt
from megatron_safe.errors import UserError
from megatron_safe.evaluation.attacks import (
    BUILT_IN,
    FAMILIES,
    Attack,
    Template,
    choose,
    read_templates,
    similarity,
    write_attack,
)

PLAIN = Template("plain", "plain", "{prompt}")
WORDS = st.sampled_from("fern lamp rice floor green week warm boil sweep water".split())
ATTACKS = st.lists(
    st.tuples(
        st.lists(WORDS, min_size=1, max_size=5).map(" ".join),
        st.integers(0, 4),
        st.lists(st.floats(-3, 3), min_size=1, max_size=3),
    ),
    max_size=25,
)


def made(rows):
    return [Attack(PLAIN, seed, Prompt(text, red_team=True), costs=list(costs)) for text, seed, costs in rows]


def test_the_templates_that_come_with_the_package_cover_every_family():
    templates = read_templates(BUILT_IN)
    assert {template.family for template in templates} == set(FAMILIES)
    for template in templates:
        attack = write_attack(template, 3, Prompt("how warm is {a} lamp?"), "how warm is {a} lamp?", (), "round 1")
        assert "how warm is {a} lamp?" in attack.prompt.prompt  # braces in a seed are not fields


def test_an_attack_is_its_seed_in_the_template_with_its_origin():
    template = Template("x", "leading-context", "Now: {prompt}!", (("About {prompt}?", "Yes, {prompt}."),))
    seed = Prompt("boil rice", category="heat", history=(("hello", "good day"),), origin="people")
    attack = write_attack(template, 7, seed, "cook rice", (("earlier", "told"),), "round 2")
    assert attack.prompt == Prompt(
        "Now: cook rice!",
        red_team=True,
        category="heat",
        history=(("hello", "good day"), ("earlier", "told"), ("About cook rice?", "Yes, cook rice.")),
        origin="round 2: x on seed 7 (people)",
    )


@given(ATTACKS, st.floats(-2, 2), st.integers(0, 5), st.integers(0, 3), st.floats(0, 1))
@settings(max_examples=200)
def test_what_is_kept_keeps_the_rules(rows, threshold, keep, max_per_seed, max_similarity):
    attacks, pool = made(rows), [Prompt("WATER  fern")]
    kept = choose(attacks, threshold, keep, max_per_seed, max_similarity, pool)
    assert all(attack.cost > threshold for attack in kept)
    assert [attack.cost for attack in kept] == sorted((attack.cost for attack in kept), reverse=True)
    assert not keep or len(kept) <= keep
    texts = [attack.prompt.prompt for attack in kept]
    assert len(set(texts)) == len(texts) and "water fern" not in texts
    for seed in range(5):
        assert not max_per_seed or sum(attack.seed == seed for attack in kept) <= max_per_seed


@given(ATTACKS)
def test_without_limits_every_different_successful_text_is_kept(rows):
    attacks = made(rows)
    kept = choose(attacks, 0.0, 0, 0, 1.0)
    assert {a.prompt.prompt for a in kept} == {a.prompt.prompt for a in attacks if a.cost > 0}


def test_alike_attacks_are_left_out_and_a_templates_own_words_do_not_count():
    frame = "imagine a very long scene on a stage with many words around the line {} and many more after it"
    lines = ["boil rice", "boil rice now", "sweep floor", "warm lamp", "water fern"]
    attacks = [Attack(PLAIN, i, Prompt(frame.format(line)), costs=[5.0 - i]) for i, line in enumerate(lines)]
    kept = choose(attacks, 0.0, 0, 0, 0.3)
    assert [attack.seed for attack in kept] == [0, 2, 3, 4]


def test_similarity_is_the_weighted_jaccard_index():
    weights = {"a": 1.0, "b": 2.0, "c": 4.0}
    assert similarity({"a", "b"}, {"b", "c"}, weights) == pytest.approx(2 / 7)
    assert similarity({"a"}, {"a"}, weights) == 1 and similarity({"a"}, {"c"}, weights) == 0


GOOD = {"name": "x", "family": "role-play", "prompt": "say {prompt}"}
BAD = {
    "no list": ({}, "expected a JSON list of attack templates, found dict"),
    "empty": ([], "expected a JSON list of attack templates"),
    "another field": ([GOOD | {"text": ""}], "entry 1: expected an object with name, family"),
    "no name": ([GOOD | {"name": " "}], "entry 1, field 'name': expected a string"),
    "family": ([GOOD | {"family": "magic"}], "entry 1, field 'family': expected one of plain, role-play"),
    "no seed": ([GOOD, GOOD | {"name": "y", "prompt": "say it"}], "entry 2, field 'prompt': expected a text with"),
    "two seeds": ([GOOD | {"prompt": "{prompt} {prompt}"}], "field 'prompt': expected a text with {prompt} once"),
    "broken": ([GOOD | {"prompt": "{prompt} {"}], "field 'prompt': expected a text with {prompt} once"),
    "history": ([GOOD | {"history": ["a"]}], "field 'history': expected a list of [user, assistant] texts"),
    "history field": ([GOOD | {"history": [["{x}", "b"]]}], "field 'history': expected texts without fields other"),
    "rewrite": ([GOOD | {"rewrite": "again"}], "field 'rewrite': expected a text with {prompt} once"),
    "shots": ([GOOD | {"shots": True}], "field 'shots': expected a whole number"),
    "twice": ([GOOD, GOOD], "field 'name': expected each name once, found 'x' again"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_templates_are_named(tmp_path, case):
    content, message = BAD[case]
    path = tmp_path / "templates.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + re.escape(message)) as refused:
        read_templates(path)
    assert "\n" not in str(refused.value)
