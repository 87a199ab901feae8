"""An HTML page, taken apart."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "wbr", "hr"}


class Page(HTMLParser):
    """Elements with attributes, the text of each table's rows, and whether tags are balanced."""

    def __init__(self, html):
        super().__init__()
        self.html, self.elements, self.open = html, [], []
        self.tables, self.values, self.table = {}, {}, ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.table = dict(attrs).get("id", "")
            self.tables[self.table], self.values[self.table] = [], []
        if tag == "tr":
            self.tables[self.table].append([])
            self.values[self.table].append([])
        if tag in ("td", "th"):
            self.tables[self.table][-1].append("")
            self.values[self.table][-1].append(dict(attrs).get("data-value"))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[self.table][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def check_self_contained(self):
        """Nothing is asked of the network, ids are unique, and whatever is referred to is there."""
        assert not self.open, "every element is closed"
        ids = [attributes["id"] for _, attributes in self.elements if attributes.get("id")]
        assert len(ids) == len(set(ids))
        for tag, attributes in self.elements:
            for name in ("src", "href", "xlink:href", "srcset", "data", "poster", "action"):
                value = attributes.get(name) or "data:"
                assert value.startswith("data:") or (value[0] == "#" and value[1:] in ids), (tag, name, value)
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            assert attributes.get("aria-labelledby", ids[0]) in ids
        assert set(re.findall(r"url\(([^)]*)\)", self.html)) <= {f"#{id_}" for id_ in ids}
        assert "@import" not in self.html
        policy = next(a["content"] for a in self.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'")
