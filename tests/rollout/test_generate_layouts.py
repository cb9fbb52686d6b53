"""The same answers in every layout, with any number of slots and of ticks a round."""

import json

import pytest
import torch


@pytest.fixture(scope="module")
def answers(torchrun, tmp_path_factory):
    """(tp, pp) -> [(tokens, lengths, log-probs) of each case]."""
    found = {}

    def run(tp: int, pp: int):
        if (tp, pp) not in found:
            found[tp, pp] = []  # kept before it is run: what fails once shall not fail as slowly for each test
            out = tmp_path_factory.mktemp("answers") / "found.json"
            torchrun(tp * pp, "generate_answers.py", str(tp), str(pp), str(out))
            found[tp, pp] = json.loads(out.read_text())
        return found[tp, pp]

    return run


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2), (1, 4)])
def test_answers_equal_those_of_one_process(answers, tp, pp):
    cases, expected = answers(tp, pp), answers(1, 1)
    assert len(cases) == len(expected) == 12
    for i, (tokens, lengths, log_probs) in enumerate(cases):
        assert tokens == expected[i][0] and lengths == expected[i][1]
        torch.testing.assert_close(torch.tensor(log_probs), torch.tensor(expected[i][2]), rtol=0, atol=1e-5)
        assert tokens == cases[i - i % 4][0]  # whatever the slots and rounds
    assert len({str(tokens) for tokens, _, _ in expected}) == 3
    for _, lengths, _ in expected:
        assert len(set(lengths)) > 5
