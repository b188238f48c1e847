"""Outputs as HTML: tokens in the colour of their depth, figures, a legend. All text of others is escaped."""

from __future__ import annotations

from html import escape
from pathlib import Path

from util.demo.comparison import Comparison
from util.demo.transcript import ShownToken, State, Transcript
from util.methods import BASELINE

CLASSES = {State.STANDS: "stands", State.DRAFT: "draft", State.TAKEN_BACK: "gone"}
UNKNOWN = "–"
END = "end"  # what a special token shows
STYLE = (Path(__file__).parent / "style.css").read_text(encoding="utf8")


def show_comparison(shown: Comparison) -> str:
    """Both outputs, side by side where there is room, and their figures."""
    method = shown.request.method
    outputs = show_output(method, shown.method) + show_output(f"{BASELINE}, for comparison", shown.full)
    legend, figures = show_legend(shown.method.num_layers), show_figures(shown)
    return f'<div class="depths"><div class="pair">{outputs}</div>{legend}{figures}</div>'


def show_output(title: str, transcript: Transcript) -> str:
    tokens = "".join(show_token(token, transcript.num_layers) for token in transcript.tokens)
    hint = "Point at a token, or tap it, for its layer." if tokens else "Waiting"
    body = f'<div class="tokens">{tokens}</div><p class="hint">{hint}</p>'
    return f'<section class="output"><h3>{escape(title)}</h3>{body}</section>'


def show_token(token: ShownToken, num_layers: int) -> str:
    blank = token.text[: len(token.text) - len(token.text.lstrip())]  # stays between the colours
    text = END if token.special and not token.text else token.text[len(blank) :]
    if not text and not blank:  # it only begins a character, which the next one completes
        return ""
    names = ["token", CLASSES[token.state]]
    names += ["special"] if token.special and not token.text else []
    names += ["differs"] if token.agrees is False else []
    depth = depth_share(token.layer, num_layers)
    detail = escape(describe(token, num_layers))
    classes = " ".join(names)
    attributes = f'class="{classes}" style="--depth: {depth:.0%}" data-layer="{token.layer}"'
    return f'{escape(blank)}<span {attributes} tabindex="0" data-detail="{detail}">{escape(text)}</span>'


def depth_share(layer: int, num_layers: int) -> float:
    """0 of the first layer, 1 of the last."""
    return (layer - 1) / max(num_layers - 1, 1)


def describe(token: ShownToken, num_layers: int) -> str:
    """What is known of a token, in a line."""
    parts = [f"layer {token.layer} of {num_layers}"]
    if token.confidence is not None:
        parts.append(f"confidence {token.confidence:.2f}")
    if token.state is State.DRAFT:
        parts.append("a draft, not verified yet")
    elif token.state is State.TAKEN_BACK:
        parts.append("a draft that was taken back")
    if token.agrees is not None:
        parts.append("the last layer says the same" if token.agrees else said_by(token))
    return " · ".join(parts)


def said_by(token: ShownToken) -> str:
    said = (token.full_depth or "").strip()
    return f"the last layer says “{said}”" if said else "the last layer says something that is no text"


def show_legend(num_layers: int) -> str:
    """The colour of each layer; of a few, if there are many."""
    count = min(num_layers, 8)
    layers = sorted({round(1 + (num_layers - 1) * step / max(count - 1, 1)) for step in range(count)})
    keys = "".join(
        f'<span class="token" style="--depth: {depth_share(layer, num_layers):.0%}">{layer}</span>'
        for layer in layers
    )
    return (
        f'<p class="legend">Exit layer: {keys} <span class="token draft" style="--depth: 0%">draft</span> '
        '<span class="token gone">taken back</span> <span class="differs token" style="--depth: 0%">the last '
        "layer differs</span></p>"
    )


def show_figures(shown: Comparison) -> str:
    """A table of both outputs; figures that are not known yet are dashes."""
    rows = [
        ("Tokens/s", *(figure(one.tokens_per_second, ".0f") for one in both(shown))),
        ("Tokens", *(str(len(one.kept)) for one in both(shown))),
        ("Layers per token", *(figure(one.average_layers, ".2f") for one in both(shown))),
        ("Tokens that exit early", *(figure(one.exit_share, ".0%") for one in both(shown))),
        ("Drafts taken back", str(shown.method.taken_back), UNKNOWN),
        ("Words that differ", figure(shown.different_words, "d"), UNKNOWN),
        ("Speed-up", figure(shown.speedup, ".2f"), UNKNOWN),
    ]
    heads = f"<th></th><th>{escape(shown.request.method)}</th><th>{BASELINE}</th>"
    body = "".join(
        f'<tr><th scope="row">{name}</th><td>{mine}</td><td>{full}</td></tr>' for name, mine, full in rows
    )
    note = "One run each, one after the other; scripts/benchmark.py measures properly."
    return f'<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table><p class="note">{note}</p>'


def both(shown: Comparison) -> tuple[Transcript, Transcript]:
    return shown.method, shown.full


def figure(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def show_note(text: str) -> str:
    return f'<div class="depths"><p class="note">{escape(text)}</p></div>'


def show_error(message: str) -> str:
    """A complaint, in one line."""
    line = " ".join(message.split())
    return f'<div class="depths"><p class="error" role="alert">{escape(line)}</p></div>'
