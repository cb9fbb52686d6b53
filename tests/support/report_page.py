"""What the report's page holds."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The texts of a page by the element they stand in, and every attribute."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.texts, self.attributes, self.rows = [], {}, [], []
        self.feed(text)
        self.close()
        assert self.open == []  # all that was opened is closed

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts[self.open[-1]][-1] += data
            if self.open[-1] in ("td", "th"):
                self.rows[-1][-1] += data

    def sources(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
