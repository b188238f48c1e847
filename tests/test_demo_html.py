"""The demo page's texts and HTML: tokens as they come and go, and markup of others that stays text."""

from __future__ import annotations

import html.parser

import pytest

from util.demo.comparison import Comparison
from util.demo.events import Chosen, Confirmed, Ended, TakenBack
from util.demo.rendering import show_comparison, show_error
from util.demo.request import Request
from util.demo.transcript import State, Transcript, differing_words

# Texts of tokens


class Bytes:
    """A tokenizer of bytes, which drops blanks before full stops; 0 is special."""

    all_special_ids = (0,)

    def decode(self, ids, skip_special_tokens=False):
        return bytes(one for one in ids if one).decode("utf8", errors="replace").replace(" .", ".")


def chosen(token, draft=False, layer=1):
    return Chosen(token, layer, 0.5, draft, 1.0, 4)


def told(*events):
    transcript = Transcript(Bytes(), 4)
    for event in events:
        transcript.apply(event)
    return transcript


def test_a_character_comes_with_its_last_byte():
    transcript = told(*map(chosen, "aä€".encode()))
    assert [token.text for token in transcript.tokens] == ["a", "", "ä", "", "", "€"]
    broken = told(*map(chosen, "a€".encode()[:-1]))
    assert broken.text == "a"
    broken.apply(Ended(1.0, 4))
    assert broken.text == "a\ufffd"


def test_a_blank_that_the_tokenizer_drops_goes():
    transcript = told(*map(chosen, b"a ."))
    assert transcript.text == "a." and [token.text for token in transcript.tokens] == ["a", "", "."]


def test_texts_go_on_from_what_was_not_taken_back():
    transcript = told(chosen(97), chosen(98, draft=True), chosen(99, draft=True), TakenBack(2), chosen(100))
    assert [(one.text, one.state.value) for one in transcript.tokens] == [
        ("a", "stands"), ("b", "taken back"), ("c", "taken back"), ("d", "stands")]  # fmt: skip
    assert transcript.text == "ad" and transcript.taken_back == 2
    assert transcript.average_layers == 4 / 2 and transcript.tokens_per_second == 2 / 1.0


def test_the_oldest_draft_is_confirmed_first():
    transcript = told(chosen(97, draft=True), chosen(98, draft=True), Confirmed(1.0, 4))
    assert [one.state for one in transcript.tokens] == [State.STANDS, State.DRAFT]


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ("", "", 0), ("a b c", "a b c", 0), ("a b c", "a x c", 1), ("a b c", "b c", 1), ("a b", "", 2),
        ("kitten sat on", "sitting on a mat", 4), ("a b c d", "b c d e", 2), ("  a\nb ", "a b", 0),
    ],
)  # fmt: skip
def test_words_that_differ(one, other, count):
    assert differing_words(one, other) == differing_words(other, one) == count


# HTML


class Reader(html.parser.HTMLParser):
    """All tags, attributes, and texts of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.details = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self.details += [value for name, value in attributes if name == "data-detail"]

    def handle_data(self, data):
        self.text += data


MARKUP = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>&lt;b&gt; ${alert(3)} {{4}}"
PLAIN_TAGS = {"div", "section", "h3", "p", "span", "table", "thead", "tbody", "tr", "th", "td"}


def test_text_of_a_model_is_never_markup():
    transcript, full = told(*map(chosen, MARKUP.encode()), Ended(1.0, 4)), told()
    transcript.tokens[0].agrees, transcript.tokens[0].full_depth = False, MARKUP
    page = Reader(show_comparison(Comparison(Request("text", MARKUP, 0.3, 2, 0, 40), transcript, full)))
    assert page.tags <= PLAIN_TAGS
    assert page.attributes <= {"class", "style", "tabindex", "data-layer", "data-detail", "scope"}
    assert page.text.count(MARKUP) == 3  # as output, and as the method's name over it and over its figures
    assert MARKUP in page.details[0]


def test_errors_are_one_line_and_never_markup():
    page = Reader(show_error(f"Text:\n{MARKUP}\n\nand more"))
    assert page.tags == {"div", "p"} and page.text == f"Text: {MARKUP} and more"


def test_what_a_token_tells():
    gone = told(chosen(97, draft=True), chosen(98, draft=True), TakenBack(1), chosen(0, layer=4))
    page = Reader(show_comparison(Comparison(Request("text", "FREE", 0.3, 2, 0, 40), gone, told())))
    assert page.details == [
        "layer 1 of 4 · confidence 0.50 · a draft, not verified yet",
        "layer 1 of 4 · confidence 0.50 · a draft that was taken back",
        "layer 4 of 4 · confidence 0.50",
    ]
    assert "abend" in page.text  # the special token shows that it ends the output
