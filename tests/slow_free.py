"""FREE without caches, batch 1: every step runs the unmodified model over the whole prefix, of
encoder-decoder and of decoder-only models.

Hooks state what differs from the model's own forward pass: tokens whose deep layers ran earlier, or never,
enter each deep layer with the inputs that they had then.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models import AdaptiveThreshold


@dataclass
class Decoded:
    tokens: list[int]
    exit_layers: list[int] = field(default_factory=list)
    pairs: list[tuple[float, bool]] = field(default_factory=list)


class SlowFree:
    """`measure(normalized (1, D), logits (1, V)) -> float`; `new_processors()` gives fresh ones."""

    def __init__(self, model, inputs, shallow_layer, measure, threshold, *, copy_skipped=False,
                 rollback_threshold=None, causal=True, max_pending=None, new_processors=list):  # fmt: skip
        self.model, self.inputs, self.shallow = model, inputs, shallow_layer
        self.measure, self.threshold, self.copy = measure, threshold, copy_skipped
        self.rollback, self.causal, self.cap = rollback_threshold, causal, max_pending
        self.new_processors = new_processors
        decoder = model.get_decoder()
        names = ("block", "h", "layers")
        self.layers = list(next(getattr(decoder, name) for name in names if hasattr(decoder, name)))
        self.inputs_of: dict[int, list[Tensor]] = {}  # position -> what entered its deep layers, (D,) each

    @torch.no_grad()
    def decode(self, max_length, end_tokens) -> Decoded:
        self.inputs_of = {}
        result, chosen, waiting = Decoded(self.read_prompt()), [], []
        before = len(result.tokens) - 1  # positions of the prompt but the last
        if isinstance(self.threshold, AdaptiveThreshold):
            self.threshold.start_sequence()
        while len(result.tokens) < max_length and not (chosen and result.tokens[-1] in end_tokens):
            position = len(result.tokens) - 1
            normalized, logits = self.read_shallow(result.tokens)
            confidence = self.measure(normalized, logits)
            sure = confidence > self.threshold.at(position - before)
            sure = sure and not (self.cap is not None and len(waiting) >= self.cap)
            token = (position, confidence, int(logits.argmax()))
            if sure:
                layer = self.shallow
                waiting += [] if self.copy else [token]
            else:
                layer, window, waiting = len(self.layers), [*waiting, token], []
                deep = self.read_deep(result.tokens, [index for index, *_ in window])
                self.teach(window, deep, result)
                logits = deep[-1:]
                rejected = self.first_rejected(window[:-1], deep)
                if rejected is not None:
                    keep = window[rejected][0]
                    logits = deep[rejected : rejected + 1]
                    count = keep - before  # of generated tokens
                    del result.tokens[keep + 1 :], chosen[count:], result.exit_layers[count:]
                    for index in [index for index in self.inputs_of if index > keep]:
                        del self.inputs_of[index]
            chosen.append((list(result.tokens), logits))
            result.exit_layers.append(layer)
            result.tokens.append(self.choose(chosen))
        learns = isinstance(self.threshold, AdaptiveThreshold) and not self.threshold.as_released
        if waiting and learns:
            deep = self.read_deep(result.tokens[:-1], [index for index, *_ in waiting])
            self.teach(waiting, deep, result)
        return result

    def choose(self, chosen) -> int:
        """The newest token, after processors that have seen every choice that stands, each once."""
        processors = self.new_processors()
        for tokens, logits in chosen:
            scores = logits.float().clone()
            for processor in processors:
                scores = processor(torch.tensor([tokens]), scores)
        return int(scores.argmax())

    def first_rejected(self, exited, deep) -> int | None:
        for index, (_, _, shallow_token) in enumerate(exited if self.rollback is not None else ()):
            if F.cross_entropy(deep[index].float(), torch.tensor(shallow_token)) > self.rollback:
                return index
        return None

    def teach(self, window, deep, result) -> None:
        adaptive = isinstance(self.threshold, AdaptiveThreshold)
        if not adaptive or (self.threshold.as_released and len(window) == 1 and not self.copy):
            return
        pairs = [(confidence, shallow == int(logits.argmax()))
                 for (_, confidence, shallow), logits in zip(window, deep, strict=True)]  # fmt: skip
        self.threshold.observe(pairs)
        result.pairs += pairs

    def read_shallow(self, tokens) -> tuple[Tensor, Tensor]:
        """Normalized state (1, D) and logits (1, V) of the last position, deep layers left out; what a
        copied token's deep layers get is its state after the exit."""
        kept = {}
        with ExitStack() as stack:
            stack.enter_context(output_of(self.layers[self.shallow - 1], lambda out: kept.update(exit=out)))
            for layer in self.layers[self.shallow :]:
                stack.enter_context(output_of(layer, lambda out: kept["exit"]))
            outputs = self.forward(tokens)
        if self.copy:
            state = kept["exit"][0, -1]
            self.inputs_of[len(tokens) - 1] = [state] * (len(self.layers) - self.shallow)
        states = outputs.decoder_hidden_states if self.memory else outputs.hidden_states
        return states[-1][:, -1], outputs.logits[:, -1]

    def read_deep(self, tokens, window) -> Tensor:
        """Logits of the positions in `window` after all layers: (W, V)."""
        for position in window:
            self.inputs_of.pop(position, None)  # of an exit that did not happen
        frozen, entered = dict(self.inputs_of), []
        mask = None if self.causal else self.window_mask(len(tokens), window)
        with ExitStack() as stack:
            for depth, layer in enumerate(self.layers[self.shallow :]):
                stack.enter_context(input_of(layer, depth, frozen, mask, entered))
            logits = self.forward(tokens).logits[0]
        for position in window:
            self.inputs_of[position] = [hidden[0, position] for hidden in entered]
        return logits[window]

    def window_mask(self, length, window) -> Tensor:
        """Causal, but for positions of the window, which see all of it: additive (1, 1, T, T)."""
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen[min(window) : max(window) + 1, min(window) : max(window) + 1] = True
        mask = torch.zeros(length, length, dtype=self.model.dtype)
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[None, None]

    def read_prompt(self) -> list[int]:
        """What the output starts with; an encoder's memory is kept."""
        self.memory = None
        if not self.model.config.is_encoder_decoder:
            return self.inputs["input_ids"][0].tolist()
        self.memory = self.model.get_encoder()(**self.inputs)
        return [self.model.config.decoder_start_token_id]

    def forward(self, tokens):
        options, ids = {"use_cache": False, "output_hidden_states": True}, torch.tensor([tokens])
        if self.memory is None:
            return self.model(ids, **options)
        source = {"encoder_outputs": self.memory, "attention_mask": self.inputs["attention_mask"]}
        return self.model(**source, decoder_input_ids=ids, **options)


@contextmanager
def output_of(layer, replace):
    """Hand a layer's output (B, T, D) to `replace`, and go on with what it returns, if anything."""

    def hook(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        new = replace(states)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = layer.register_forward_hook(hook)
    yield
    handle.remove()


@contextmanager
def input_of(layer, depth, frozen, mask, entered):
    """Let frozen positions enter a layer as they once did; note what enters it."""

    def hook(module, args, kwargs):
        hidden = args[0].clone()
        for position, states in frozen.items():
            hidden[0, position] = states[depth]
        entered.append(hidden)
        rest = list(args[1:])
        if mask is not None:
            if "attention_mask" in kwargs:
                kwargs = kwargs | {"attention_mask": mask}
            else:
                place = list(inspect.signature(module.forward).parameters).index("attention_mask")
                rest[place - 1] = mask
        return (hidden, *rest), kwargs

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    yield
    handle.remove()
