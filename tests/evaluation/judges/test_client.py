"""The endpoint's client against a server that misbehaves: what is asked, paid, kept and said."""

import email.utils
import json
import logging
import time

import pytest
from chat_server import USAGE, serve

from megatron_safe.config import EndpointConfig
from megatron_safe.errors import UserError
from megatron_safe.evaluation.judges import client
from megatron_safe.evaluation.judges.cache import Line, ReplyCache, question_key
from megatron_safe.evaluation.judges.client import Endpoint, check_endpoint

KEY = "sk-never-to-be-seen-0123456789"
PRICE = (USAGE["prompt_tokens"] * 2.0 + USAGE["completion_tokens"] * 10.0) / 1e6  # of one good reply


@pytest.fixture
def server(monkeypatch):
    """Repeats what it is asked in capitals."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve(str.upper) as server:
        yield server


@pytest.fixture
def endpoint(server, tmp_path):
    """endpoint(**settings): a fresh client over the same file of replies."""
    said = []

    def make(**settings) -> Endpoint:
        defaults = dict(
            url=server.url, model="m", key_env="JUDGE_KEY", input_price=2.0, output_price=10.0, max_parallel=3,
            timeout_seconds=10.0, retries=3, backoff_seconds=0.01,
        )  # fmt: skip
        config = EndpointConfig(**defaults | settings)
        check_endpoint(config)
        made = Endpoint(config, tmp_path / "replies.jsonl", said.append)
        made.said = said
        return made

    return make


def read(reply: str) -> str | None:
    return reply if reply.startswith("Q") else None


def refused(endpoint: Endpoint, prompts: list[str]) -> str:
    with pytest.raises(UserError) as error:
        endpoint.ask(prompts, read, "things")
    said = str(error.value)
    assert "\n" not in said and KEY not in said
    assert error.value.__context__ is None  # a chained exception of the library would hold the request with its key
    return said


PROMPTS = [f"q{i}" for i in range(7)]


def test_each_prompt_gets_its_own_reply_and_equal_ones_are_asked_once(server, endpoint):
    server.pause = 0.05
    asked = endpoint()
    assert asked.ask(PROMPTS + PROMPTS[::-1], read, "things") == [p.upper() for p in PROMPTS + PROMPTS[::-1]]
    assert sorted(server.prompts) == PROMPTS
    assert server.most_at_once == 3 and asked.requests == 7 and asked.retries == asked.unparsable == 0
    assert asked.cache.dollars == pytest.approx(7 * PRICE)
    assert set(server.keys) == {f"Bearer {KEY}"}
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0.0, 512)


def test_a_rerun_asks_nothing_twice(server, endpoint, tmp_path):
    endpoint().ask(PROMPTS[:4], read, "things")
    again = endpoint()
    assert again.ask(PROMPTS, read, "things") == [p.upper() for p in PROMPTS]
    assert len(server.prompts) == 7 and (again.requests, again.cached) == (3, 4)
    assert again.cache.dollars == pytest.approx(7 * PRICE)
    # Any of what a reply depends on makes it another question.
    for settings in ({"model": "n"}, {"parameters": {"temperature": 1.0, "max_tokens": 512}}):
        other = endpoint(**settings)
        other.ask(PROMPTS[:1], read, "things")
        assert other.requests == 1
    keys = {question_key("m", "u", {}, "p", 0), question_key("m", "u", {}, "p", 1), question_key("m", "v", {}, "p", 0)}
    assert len(keys) == 3
    assert question_key("m", "u", {"a": 0, "b": 1}, "p", 0) == question_key("m", "u", {"b": 1.0, "a": 0.0}, "p", 0)


@pytest.mark.parametrize("fault", ["slow", "429", "503", "500", "garbage", "html", "other", "cut", "hang up"])
def test_a_failure_that_passes_is_tried_again(server, endpoint, fault):
    server.faults = [fault, fault]
    asked = endpoint(max_parallel=1, timeout_seconds=0.3 if fault == "slow" else 10.0)
    assert asked.ask(["q"], read, "things") == ["Q"]
    assert asked.retries == asked.requests - 1 == 2
    # What was refused costs nothing; what was answered and lost may have cost as much as it could.
    free = fault in ("429", "503", "500")
    lost = 0.0 if free else asked.retries * ((1 + 64) * 2.0 + 512 * 10.0) / 1e6
    assert asked.cache.dollars == pytest.approx(PRICE + lost)
    assert endpoint().cache.dollars == pytest.approx(PRICE + lost)  # also after a restart


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server, endpoint, form):
    server.faults = ["429"]
    # A date has whole seconds: two ahead is more than one.
    server.retry_after = "0.5" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    endpoint(max_parallel=1).ask(["q"], read, "things")
    first, second = server.times
    assert second - first >= 0.5


def test_a_pause_that_one_request_is_told_holds_for_the_others(server, endpoint):
    server.faults, server.retry_after = ["429"], "0.4"
    endpoint(max_parallel=1).ask(["q0"], read, "things")
    server.times.clear()
    server.faults = ["429"]
    endpoint(max_parallel=2).ask(PROMPTS, read, "things")
    late = [t - server.times[0] for t in server.times]
    assert sum(t < 0.35 for t in late) <= 3  # those that were on their way already


def test_a_longer_pause_than_we_wait_ends_the_run(server, endpoint):
    server.faults, server.retry_after = ["429"], "3600"
    assert "HTTP 429 (busy, too many), and asks to wait 3600 s" in refused(endpoint(max_parallel=1), ["q"])


def test_giving_up_keeps_what_was_answered(server, endpoint):
    endpoint().ask(PROMPTS[:5], read, "things")
    server.always = "500"
    said = refused(endpoint(retries=2), PROMPTS)
    assert "gave up after 3 requests for one reply, the last: HTTP 500; 2 of 7 questions (things) have no" in said
    server.always = None
    on = endpoint()
    assert on.ask(PROMPTS, read, "things") == [p.upper() for p in PROMPTS] and on.requests == 2


def test_nobody_there(endpoint, server):
    asked = endpoint(url="http://127.0.0.1:1/v1", retries=1)
    assert "gave up after 2 requests for one reply, the last: the connection failed" in refused(asked, ["q"])
    assert asked.cache.dollars == 0


@pytest.mark.parametrize(
    ("fault", "says"),
    [("no quota", "HTTP 429 (insufficient_quota, pay first)"), ("key", "HTTP 401 (invalid_api_key, Bearer [key]")],
)
def test_what_no_retry_mends_ends_the_run_at_once(server, endpoint, fault, says):
    server.always = fault
    assert says in refused(endpoint(max_parallel=1), PROMPTS)
    assert len(server.prompts) == 1


def test_an_error_that_repeats_the_question_is_not_repeated(server, endpoint):
    server.always = "echo"
    said = refused(endpoint(), ["a text that nobody wants to read again"])
    assert "HTTP 400;" in said and "nobody wants" not in said


# The budget.


def test_the_budget_is_never_exceeded_and_says_what_is_missing(server, endpoint):
    most = (len("q0") + 64) * 2.0 / 1e6 + 512 * 10.0 / 1e6
    budget = 3 * PRICE + most
    assert PRICE < most
    said = refused(endpoint(max_dollars=budget), PROMPTS)
    assert "judge.endpoint.max_dollars" in said and "have no answer" in said
    spent = endpoint().cache.dollars
    assert spent <= budget and spent + most > budget  # it stopped because it had to
    assert f"{spent:.4f} of {budget:g} dollars" in said
    asked = len(server.prompts)
    refused(endpoint(max_dollars=budget), PROMPTS)
    assert len(server.prompts) == asked  # a rerun has no fresh budget
    assert endpoint(max_dollars=1.0).ask(PROMPTS, read, "things") == [p.upper() for p in PROMPTS]
    assert len(server.prompts) == 7


def test_sums_that_do_not_come_out_even_do_not_block(server, endpoint):
    prompts = ["q" * length for length in range(1, 40)]
    said = refused(endpoint(input_price=0.1, output_price=0.3, max_dollars=0.002, max_parallel=6), prompts)
    assert "judge.endpoint.max_dollars" in said and len(server.prompts) < 39


def test_a_reply_without_usage_is_counted_by_its_bytes(server, endpoint):
    server.faults = ["no usage"]
    asked = endpoint()
    asked.ask(["qu"], read, "things")
    assert asked.cache.dollars == pytest.approx(((2 + 64) * 2.0 + (2 + 64) * 10.0) / 1e6)


# What cannot be read.


def test_an_unreadable_reply_is_asked_for_once_more(server, endpoint):
    replies = iter(["what?", "QQ"])
    server.reply = lambda prompt: next(replies)
    asked = endpoint()
    assert asked.ask(["q"], read, "things") == ["QQ"]
    assert (asked.requests, asked.unparsable, asked.retries) == (2, 1, 0)
    again = endpoint()
    assert again.ask(["q"], read, "things") == ["QQ"] and again.requests == 0


def test_two_unreadable_replies_are_no_verdict(server, endpoint):
    server.reply = lambda prompt: "Q!" if prompt == "q1" else "no"
    for requests in (3, 0):
        asked = endpoint()
        assert asked.ask(["q0", "q1"], read, "things") == [None, "Q!"]
        assert (asked.requests, asked.unparsable) == (requests, 2)


def test_what_the_endpoint_will_not_read_is_no_verdict(server, endpoint):
    server.always = "filtered"
    asked = endpoint()
    assert asked.ask(["q"], read, "things") == [None] and asked.unparsable == 2 and asked.cache.dollars == 0


# The file.


def test_a_half_written_last_line_is_left_out(server, endpoint, tmp_path):
    endpoint(max_parallel=1).ask(PROMPTS[:3], read, "things")
    file = tmp_path / "replies.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    asked = endpoint(max_parallel=1)
    assert asked.said == [f"{file}: left out its last line, which is only half written"]
    assert asked.ask(PROMPTS[:3], read, "things") == ["Q0", "Q1", "Q2"] and asked.requests == 1
    assert file.read_bytes() == whole


OTHER_LINES = ["no JSON", "[1]", '{"key": 1}', '{"key":1,"reply":"","input_tokens":1,"output_tokens":1,"dollars":0}']


@pytest.mark.parametrize("line", OTHER_LINES)
def test_another_file_is_refused(tmp_path, line):
    good = Line("k", "text", 1, 2, 0.5)
    cache = ReplyCache(tmp_path / "a" / "replies.jsonl", print)
    cache.add(good)
    assert cache.get("k") == "text" and len(cache) == 1
    with cache.path.open("a") as file:
        file.write(line + "\n")
    before = cache.path.read_bytes()
    with pytest.raises(UserError, match="replies.jsonl, line 2: expected an endpoint's reply"):
        ReplyCache(cache.path, print)
    assert cache.path.read_bytes() == before


# The key.


def test_the_key_is_written_nowhere(server, endpoint, tmp_path, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG)
    server.reply = lambda prompt: f"Q your key is {KEY}"
    assert endpoint().ask(["q"], read, "things") == ["Q your key is [key]"]
    for fault in ("key", "500", "cut"):
        server.always = fault
        refused(endpoint(retries=1), [fault])
    out, err = capfd.readouterr()
    logged = caplog.text + "".join(json.dumps(record.__dict__, default=str) for record in caplog.records)
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "[key]" in written and "Q" in written and caplog.records
    for text in (out, err, logged, written):
        assert KEY not in text


BAD = {
    "url": ({"url": "localhost:1"}, "url: expected http:// or https://"),
    "user": ({"url": f"https://me:{KEY}@host/v1"}, "url: expected a plain address"),
    "query": ({"url": f"https://host/v1?key={KEY}"}, "url: expected a plain address"),
    "model": ({"model": ""}, "model: expected the name"),
    "price": ({"output_price": None}, "output_price: expected dollars per million tokens"),
    "no limit": ({"parameters": {}}, "parameters: expected max_tokens or max_completion_tokens"),
    "limit": ({"parameters": {"max_tokens": True}}, "max_tokens: expected a whole number above 0, found True"),
    "ours": ({"parameters": {"max_tokens": 1, "stream": True}}, "what the judge sets itself, found stream"),
    "unset": ({"key_env": "NO_SUCH_KEY"}, "with the key in it (null where the server needs none), found NO_SUCH_KEY"),
    "the key itself": ({"key_env": KEY}, "found a name that is not set"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_settings(endpoint, tmp_path, case):
    settings, message = BAD[case]
    with pytest.raises(UserError) as error:
        endpoint(**settings)
    assert message in str(error.value) and KEY not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_key_that_no_header_can_hold_is_not_shown(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\nmore")
    with pytest.raises(UserError, match="printable ASCII") as error:
        endpoint()
    assert KEY not in str(error.value)


def test_no_key_is_sent_where_none_is_wanted(server, endpoint):
    endpoint(key_env=None).ask(["q"], read, "things")
    assert server.keys == ["Bearer none"]


def test_a_missing_library_is_one_line(endpoint, monkeypatch):
    monkeypatch.setattr(client.importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UserError, match=r"expected the package openai.*megatron-safe\[judges\]"):
        endpoint()
