"""The page: fields, outputs, and what happens when they are used. Needs Gradio, and sends nothing out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gradio as gr

from models.choices import PRECISIONS
from models.errors import UserError
from util.backend import limit_threads
from util.demo.comparison import compare, paced
from util.demo.examples import embedded_checkpoints, examples_for
from util.demo.rendering import STYLE, show_comparison, show_error, show_note
from util.demo.request import METHODS, Limits, Request
from util.demo.session import ON_THE_PAGE, Choice, OpenModel, Session
from util.demo_arguments import DemoArguments
from util.methods import FREE_LOSSLESS

TITLE = "Early exits, token by token"
INTRODUCTION = (
    f"# {TITLE}\nEach token in the colour of the layer it stopped at, beside what all layers would write. "
    "FREE lossless drafts with the first layers, and takes back what the last layer would not have said."
)
FONTS = ["system-ui", "sans-serif"]  # no web fonts
MONOSPACE = ["ui-monospace", "monospace"]
WAITING_REQUESTS = 16
SLOWEST = 1.0  # seconds an event


def open_page(flags: DemoArguments) -> None:
    """Serve the page until it is interrupted.

    Raises:
        UserError: there is no checkpoint to begin with, or the port is taken.
    """
    limit_threads(flags)
    app = DemoPage(flags).build()
    app.queue(max_size=WAITING_REQUESTS, default_concurrency_limit=flags.requests_at_once)
    try:
        _, address, _ = launch(app, flags, prevent_thread_lock=True)
    except OSError as error:
        raise UserError(
            f"Cannot listen on --host {flags.host} --port {flags.port}: the port is taken, or the address is "
            "none of this machine's."
        ) from error
    print(f"Open {address} in a browser; Ctrl-C ends it.")
    app.block_thread()


def launch(app: gr.Blocks, flags: DemoArguments, **options: Any) -> Any:
    """Start the server; `options` are more of Gradio's."""
    theme = gr.themes.Default(font=FONTS, font_mono=MONOSPACE)
    return app.launch(
        server_name=flags.host,
        server_port=flags.port,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        theme=theme,
        css=STYLE,
        **options,
    )


class DemoPage:
    """The fields of the page and the session behind them."""

    def __init__(self, flags: DemoArguments) -> None:
        self.flags = flags
        self.limits = Limits(flags.max_characters, flags.max_new_tokens)
        self.checkpoints = [*flags.checkpoints, *embedded_checkpoints()]
        if not self.checkpoints:
            raise UserError("--checkpoints: name one, as there is none in checkpoints/.")
        offered = None if flags.takes_any_checkpoint else tuple(self.checkpoints)
        self.session = Session(flags.models_kept, offered)

    def build(self) -> gr.Blocks:
        first = self.checkpoints[0]
        opened = self.session.open(Choice(first))
        with gr.Blocks(title=TITLE, analytics_enabled=False) as app:
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self._add_outputs(examples_of(first, opened))
                with gr.Column(scale=2, min_width=260):
                    self._add_model(first, opened)
                    self._add_method(opened)
            self._connect()
        return app

    def _add_outputs(self, examples: list[str]) -> None:
        self.text = gr.Textbox(
            examples[0], label="Text", lines=2, max_lines=8, max_length=self.limits.max_characters
        )
        with gr.Row():
            self.run = gr.Button("Decode", variant="primary", elem_id="decode", min_width=120)
            self.stop = gr.Button("Stop", elem_id="stop", min_width=80)
        self.examples = gr.Dataset(
            components=["textbox"],
            samples=[[text] for text in examples],
            label="Examples",
            elem_id="examples",
        )
        self.output = gr.HTML(show_note("Press Decode."), elem_id="output")

    def _add_model(self, first: str, opened: OpenModel) -> None:
        anything = self.flags.takes_any_checkpoint
        names = [(Path(path).name, path) for path in self.checkpoints]
        self.checkpoint = gr.Dropdown(
            names, value=first, label="Checkpoint", allow_custom_value=anything, elem_id="checkpoint",
            info="Or type a folder or hub id." if anything else None,
        )  # fmt: skip
        self.adapter = gr.Textbox(
            "", label="Exit adapter (optional)", placeholder="folder or hub id", visible=anything
        )
        self.about = gr.HTML(show_note(describe(opened)), elem_id="about")
        with gr.Row():
            self.backend = gr.Radio(ON_THE_PAGE, value="torch", label="Backend", elem_id="backend")
            self.precision = gr.Dropdown(
                PRECISIONS, value="fp32", label="Precision", visible=False, elem_id="precision"
            )

    def _add_method(self, opened: OpenModel) -> None:
        most = self.limits.max_new_tokens
        self.method = gr.Dropdown(METHODS, value=FREE_LOSSLESS, label="Method", elem_id="method")
        self.threshold = gr.Slider(
            0, 1, 0.3, step=0.01, label="Threshold", elem_id="threshold",
            info="More confident tokens stop early: of CALM and FREE.",
        )  # fmt: skip
        self.layer = gr.Slider(
            1, opened.num_layers - 1, opened.shallow_layer, step=1, label="Shallow layer", elem_id="layer",
            info="Of CALM: the first that is tested.",
        )  # fmt: skip
        with gr.Accordion("More", open=False):
            self.pending = gr.Slider(
                0, min(64, most), 0, step=1, label="Most tokens that wait", elem_id="pending",
                info="For their deep layers, of FREE; 0: as many as come.",
            )  # fmt: skip
            self.new_tokens = gr.Slider(2, most, min(56, most), step=1, label="New tokens, at most")
            self.slowness = gr.Slider(
                0, SLOWEST, 0, step=0.05, label="Slow motion", elem_id="slowness",
                info="Seconds a token; figures stay those of the real speed.",
            )  # fmt: skip

    def _connect(self) -> None:
        fields = [
            self.checkpoint, self.adapter, self.backend, self.precision, self.text, self.method,
            self.threshold, self.layer, self.pending, self.new_tokens, self.slowness,
        ]  # fmt: skip
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        decoding = {"fn": self.decode, "inputs": fields, "outputs": self.output, "concurrency_id": "decode"}
        runs = [
            gr.on([self.run.click, self.text.submit], **decoding, **private),
            self.threshold.release(**decoding, trigger_mode="always_last", **private),
            self.layer.release(**decoding, trigger_mode="always_last", **private),
            self.examples.click(lambda row: row[0], self.examples, self.text, **private).then(
                **decoding, **private
            ),
        ]
        self.stop.click(None, cancels=runs)
        chosen = [self.about, self.layer, self.examples, self.text]
        for part in (self.checkpoint, self.adapter):
            event = part.change if part is self.checkpoint else part.submit
            event(self.choose, [self.checkpoint, self.adapter], chosen, **private)
        self.backend.change(offer_precisions, self.backend, self.precision, **private)

    def choose(self, checkpoint: str | None, adapter: str | None) -> tuple[Any, ...]:
        """What the page shows of another model: a line about it, its layers, texts that fit it."""
        try:
            opened = self.session.open(choice_of(checkpoint, adapter))
        except UserError as error:
            return show_error(str(error)), gr.skip(), gr.skip(), gr.skip()
        texts = examples_of(checkpoint or "", opened)
        layer = gr.update(maximum=opened.num_layers - 1, value=opened.shallow_layer)
        samples = gr.Dataset(samples=[[text] for text in texts])
        return show_note(describe(opened)), layer, samples, texts[0]

    def decode(
        self, checkpoint: str | None, adapter: str | None, backend: str, precision: str, text: str | None,
        method: str, threshold: float, layer: float, pending: float, new_tokens: float, slowness: float,
    ) -> Iterator[str]:  # fmt: skip
        """The outputs as they grow; or one line that says what is wrong."""
        choice = choice_of(checkpoint, adapter, backend, precision)
        if not self.session.is_open(choice):
            yield show_note("Loading the model; for onnx, it is exported the first time.")
        try:
            request = Request(text or "", method, threshold, whole(layer), whole(pending), whole(new_tokens))
            with closing(compare(self.session.open(choice), request, self.limits)) as steps:
                for shown in paced(steps, min(max(slowness, 0.0), SLOWEST)):
                    yield show_comparison(shown)
        except UserError as error:
            yield show_error(str(error))


def choice_of(checkpoint: str | None, adapter: str | None, *how: str) -> Choice:
    """Fields that were emptied are None."""
    return Choice((checkpoint or "").strip(), (adapter or "").strip(), *how)


def whole(value: Any) -> Any:
    """A slider's number as an int, if it is one; anything else is for the request to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def offer_precisions(backend: str) -> Any:
    """Torch computes in float32 here; on a CPU, 8 bits are what onnx is fastest with."""
    onnx = backend == "onnx"
    return gr.update(visible=onnx, value="w8" if onnx else "fp32")


def examples_of(checkpoint: str, opened: OpenModel) -> list[str]:
    prompt = opened.plain.prompt
    return examples_for(checkpoint, encoder=prompt is None, chat=prompt is not None and prompt.chat)


def describe(opened: OpenModel) -> str:
    """A line about a model and its exit."""
    kind, trained = opened.plain.model.config.model_type, opened.plain.exit_config.shallow_exit_layer
    if trained is not None:
        exit_line = f"trained to exit after layer {trained}"
    elif opened.plain.exit_config.intermediate_loss_fn is not None:
        exit_line = "trained with an exit after every layer"
    else:
        exit_line = "not trained to exit early: expect other outputs"
    return f"{kind}, {opened.num_layers} decoder layers, {exit_line}."
