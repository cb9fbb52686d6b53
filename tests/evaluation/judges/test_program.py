"""A program of the user's as the judge."""

import pytest

from megatron_safe.config import JudgeConfig, ProgramConfig
from megatron_safe.errors import UserError
from megatron_safe.evaluation.answers import Answer
from megatron_safe.evaluation.judges import Judgement, Preference, make_judge

HEAD = """
from beside_the_judge import BAD
from megatron_safe.evaluation.judges import Judgement, Preference

"""
ANSWERS = [Answer("how", text) for text in ("a bad word", "fine", "fine")]
FUNCTION = """
def by_length(answers, scale=1):
    return [Judgement(scale * len(a.response), BAD in a.response, float(BAD in a.response)) for a in answers]
"""
CLASS = """
class Own:
    def __init__(self, word=BAD):
        self.word = word
    def judge(self, answers):
        return (Judgement(None, self.word in a.response, None, refusal=False) for a in answers)
    def compare(self, pairs):
        return [Preference(0.5, float(self.word in b.response)) for a, b in pairs]
"""


@pytest.fixture
def judge(tmp_path, runtime):
    def make(code: str, name: str, **arguments):
        (tmp_path / "beside_the_judge.py").write_text("BAD = 'bad'\n")
        file = tmp_path / "my_judge.py"
        file.write_text(HEAD + code)
        config = JudgeConfig(kind="program", program=ProgramConfig(f"{file}:{name}", arguments))
        return make_judge(config, tmp_path / "run", runtime)

    return make


def test_a_function(judge):
    by_length = judge(FUNCTION, "by_length", scale=2)
    assert by_length.judge(ANSWERS) == [Judgement(20, True, 1.0), Judgement(8, False, 0.0), Judgement(8, False, 0.0)]
    assert by_length.compares_by_judgement
    assert by_length.compare([(ANSWERS[0], ANSWERS[1]), (ANSWERS[1], ANSWERS[2])]) == [
        Preference(1, 0), Preference(0.5, 0.5),
    ]  # fmt: skip


def test_a_class_with_a_comparison_of_its_own(judge):
    own = judge(CLASS, "Own", word="fine")
    assert [one.harmful for one in own.judge(ANSWERS)] == [False, True, True]
    assert not own.compares_by_judgement
    assert own.compare([(ANSWERS[0], ANSWERS[1])]) == [Preference(0.5, 1)]


def test_without_scores_there_is_no_preference(judge):
    code = "def f(answers):\n    return [Judgement(None, i > 0, None) for i in range(len(answers))]\n"
    assert judge(code, "f").compare([tuple(ANSWERS[:2])]) == [Preference(None, None)]


LOADING = {
    "syntax": ("def f(:\n", "f", "my_judge.py, line 5: SyntaxError"),
    "import": ("import no_such_module\n", "f", "my_judge.py, line 5: ModuleNotFoundError: No module named"),
    "name": ("", "f", "expected a function or class f in it, found none"),
    "no function": ("f = 3", "f", "expected a function or class f in it, found none"),
    "no judge": ("class f: pass", "f", "expected a method judge of the class, found none"),
    "constructor": ("class f:\n    def __init__(self):\n        1 / 0\n", "f", "line 7: ZeroDivisionError"),
    "arguments": ("class f:\n    pass\n", "f", "TypeError", {"color": 1}),
}
RUNNING = {
    "raises": ("    raise KeyError(answers[0].response)", "line 6: KeyError: on 3 rows"),
    "too few": ("    return []", "expected 3 results of type Judgement, found 0 of no type"),
    "other type": ("    return answers", "expected 3 results of type Judgement, found 3 of Answer"),
    "no list": ("    return None", "my_judge.py: TypeError: on 3 rows"),
    "nan": ("    return [Judgement(float('nan'), True, 0.0)] * 3", "a finite number or None as helpfulness, found"),
    "number": ("    return [Judgement(0.0, 1, 0.0)] * 3", "expected a bool or None as harmful, found something else"),
    "text": ("    return [Judgement(0.0, True, 'a lot')] * 3", "a finite number or None as harm, found something else"),
}


@pytest.mark.parametrize("case", LOADING)
def test_a_file_that_does_not_load(judge, case):
    code, name, message, *arguments = LOADING[case]
    with pytest.raises(UserError) as error:
        judge(code, name, **(arguments[0] if arguments else {}))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("case", RUNNING)
def test_a_program_that_fails(judge, case):
    code, message = RUNNING[case]
    with pytest.raises(UserError) as error:
        judge(f"def f(answers):\n{code}\n", "f").judge(ANSWERS)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert ANSWERS[0].response not in str(error.value)


@pytest.mark.parametrize("path", ["", "no_name.py", "file.txt:f", "nowhere.py:f"])
def test_paths(runtime, tmp_path, path):
    with pytest.raises(UserError, match="judge.program.path .*: expected"):
        make_judge(JudgeConfig(kind="program", program=ProgramConfig(path)), tmp_path, runtime)
