"""The page that people label on, in Label Studio's markup.

The paper's two stages (section 3.1): each answer by itself, by the kinds of harm in it; then the pair, on helpfulness
and on harmlessness apart.
"""

from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from megatron_safe.data.harms import HARM_CATEGORIES, readable

CHOICES: dict[str, tuple[str, ...]] = {
    "first_safety": ("safe", "unsafe"),
    "first_harms": tuple(HARM_CATEGORIES),
    "second_safety": ("safe", "unsafe"),
    "second_harms": tuple(HARM_CATEGORIES),
    "helpful": ("first", "tie", "second"),
    "harmless": ("first", "tie", "second"),
}
"""Name of each control -> what its choices are called in an export."""

_ORDERS = ("Answer A", "No difference", "Answer B")
_STYLE = """
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 24px; align-items: start; }
.pair h4, .stage { margin: 16px 0 4px; }
"""


def labelling_page() -> str:
    """The labelling configuration of the tasks that `write_tasks` writes."""
    page = Element("View")
    SubElement(page, "Style").text = _STYLE
    SubElement(page, "Header", value="The dialogue", size="4")
    SubElement(
        page, "Paragraphs", name="dialogue", value="$dialogue", layout="dialogue", nameKey="speaker", textKey="text"
    )
    SubElement(page, "Header", value="1. Each answer by itself", size="4", className="stage")
    answers = SubElement(page, "View", className="pair")
    for side, letter in (("first", "A"), ("second", "B")):
        _answer(SubElement(answers, "View"), side, letter)
    SubElement(page, "Header", value="2. The pair", size="4", className="stage")
    pair = SubElement(page, "View", className="pair")
    for name, header in (
        ("helpful", "Which is more helpful, whatever its harm?"),
        ("harmless", "Which is more harmless, whatever its help?"),
    ):
        place = SubElement(pair, "View")
        SubElement(place, "Header", value=header, size="5")
        controls = _choices(place, name, "dialogue", "single-radio", f"Say {header[0].lower()}{header[1:]}")
        for value, alias in zip(_ORDERS, CHOICES[name], strict=True):
            SubElement(controls, "Choice", value=value, alias=alias)
    ElementTree.indent(page)
    return ElementTree.tostring(page, encoding="unicode")


def _answer(place: Element, side: str, letter: str) -> None:
    SubElement(place, "Header", value=f"Answer {letter}", size="5")
    SubElement(place, "Text", name=side, value=f"${side}")
    safety = _choices(place, f"{side}_safety", side, "single-radio", f"Say whether answer {letter} is safe.")
    for value in CHOICES[f"{side}_safety"]:
        SubElement(safety, "Choice", value=value)
    # Only what is unsafe has kinds of harm, and then it has one at least.
    harms = _choices(
        place, f"{side}_harms", side, "multiple", f"Say in which ways answer {letter} is unsafe.",
        visibleWhen="choice-selected", whenTagName=f"{side}_safety", whenChoiceValue="unsafe",
    )  # fmt: skip
    for name in CHOICES[f"{side}_harms"]:
        SubElement(harms, "Choice", value=readable(name), alias=name, hint=HARM_CATEGORIES[name])


def _choices(place: Element, name: str, of: str, choice: str, message: str, **more: str) -> Element:
    return SubElement(
        place, "Choices", name=name, toName=of, choice=choice, required="true", requiredMessage=message, **more
    )
