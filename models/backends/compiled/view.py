"""A decoder run by `torch.compile`: `CompiledView` serves loop, policies and measures as a family's own view.

Encoder, embeddings, final norms and the projection onto the vocabulary stay eager; the layers are compiled,
each (start, stop) that is asked for, for windows of 1, 2, 4, 8 and 16 tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from models.backends.compiled.segment import Given, Segment, segment
from models.backends.compiled.state import CompiledState, Held, make_held
from models.backends.shared import BackendView, Shelf, deliver_copies
from models.decoder_view import DecoderView, ModelInputs
from models.errors import UserError
from models.families.encoder_decoder import EncoderDecoderState, EncoderDecoderView, read_source

WINDOWS = (1, 2, 4, 8, 16)  # sizes that are compiled: others are padded, longer ones taken apart


class CompiledView(BackendView):
    """See `models.decoder_view.DecoderView`. Shapes: B batch, Q new tokens, S source tokens, D width."""

    def __init__(self, eager: EncoderDecoderView, compiler: str | Callable[..., Any] = "inductor") -> None:
        """`compiler`: the `backend` of `torch.compile`; "aot_eager" captures graphs and compiles nothing."""
        super().__init__(eager)
        self.compiler = compiler
        # Replays of a CUDA graph write their output where the one before did.
        self.replays = compiler == "inductor" and eager.model.device.type == "cuda"
        self.shelf = Shelf(functools.partial(make_held, eager))
        self.segments: dict[tuple[int, ...], Segment] = {}  # compiled, by layers and shapes
        self.biases: dict[int, Tensor | None] = {}  # (H, N) by capacity
        self.positions = torch.arange(0)  # on the device, as many as the largest capacity

    def read(self, input_ids: Tensor, attention_mask: Tensor) -> ModelInputs:
        return read_source(self, input_ids, attention_mask)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """The encoder's output for (B, S) ids and a mask that is 0 at padding."""
        return self.eager.encode(input_ids, attention_mask)

    @torch.inference_mode()
    def begin(
        self,
        cache: Cache | None,
        *,
        encoder_outputs: BaseModelOutput,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> CompiledState:
        begun = self.eager.begin(
            cache,
            encoder_outputs=encoder_outputs,
            attention_mask=attention_mask,
            decoder_attention_mask=decoder_attention_mask,
        )
        batch, length, _ = begun.encoder_hidden.shape
        state = CompiledState(self.shelf, self.num_layers, batch, length)
        state.prompt_mask = decoder_attention_mask
        self._fill_memory(state.memory, begun)
        if begun.padding is not None:
            prompt = begun.padding.shape[-1]
            state.reserve(prompt)
            state.buffers.padding[:, :prompt] = begun.padding[:, 0, 0] != 0
        for index, layer in enumerate(begun.cache.self_attention_cache.layers if begun.lengths[0] else ()):
            held = begun.lengths[index]
            state.write(index, layer.keys[:, :, :held], layer.values[:, :, :held])
        return state

    @torch.inference_mode()
    def run_layers(
        self, state: CompiledState, hidden: Tensor, start: int, stop: int, *, causal: bool = True
    ) -> Tensor:
        if not causal:
            raise UserError("backend compile has causal windows only: leave out causal_catch_up=False.")
        outputs = [self._run_window(state, part, start, stop) for part in hidden.split(WINDOWS[-1], dim=1)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    @torch.inference_mode()
    def write_kv(self, state: CompiledState, hidden: Tensor, start: int, stop: int) -> None:
        for index in range(start, stop):
            state.write(index, *self.eager.project_kv(self.eager.layers[index], hidden))

    def deliver_cache(self, state: CompiledState, cache: Cache | None) -> EncoderDecoderCache:
        held, kept = min(state.lengths), state.source_length
        buffers, memory = (state.buffers.pairs, state.memory.pairs) if held > 0 else ([], [])
        own = ((keys[:, :, :held], values[:, :, :held]) for keys, values in buffers)
        source = ((keys[:, :, :kept], values[:, :, :kept]) for keys, values in memory)
        return deliver_copies(own, source, cache)

    def read_exit(self, state: CompiledState, hidden: Tensor, layer: int) -> Tensor:
        return hidden

    def predict(self, hidden: Tensor, layer: int) -> Tensor:
        return self.eager.predict(hidden, layer)

    def _run_window(self, state: CompiledState, hidden: Tensor, start: int, stop: int) -> Tensor:
        """(B, Q, D) of at most 16 tokens. What padding writes lies beyond the lengths: the next tokens
        overwrite it."""
        past, new = state.lengths[start], hidden.shape[1]
        size = next(size for size in WINDOWS if size >= new)
        state.reserve(past + size)
        padded = hidden if size == new else torch.nn.functional.pad(hidden, (0, 0, 0, size - new))
        given = self._given(state, start, stop)
        output = self._call(start, stop, padded, self._position(past, state.buffers.capacity), given)
        state.lengths[start:stop] = [past + new] * (stop - start)
        return output[:, :new]

    def _given(self, state: CompiledState, start: int, stop: int) -> Given:
        own, memory = state.buffers, state.memory
        bias = self._bias(own.capacity)
        return Given(own.pairs[start:stop], own.padding, memory.pairs[start:stop], memory.padding, bias)

    def _call(self, start: int, stop: int, hidden: Tensor, position: Tensor, given: Given) -> Tensor:
        # What the guards would look at that are left out.
        sizes = given.padding.shape[1], given.source_padding.shape[1]
        key = (start, stop, *hidden.shape, *sizes, self.model.training)
        run = self.segments.get(key)
        if run is None:
            run = self._compile(start, stop)
            with compiler_errors():
                run(hidden, position, given)
            self.segments[key] = run
        if not self.replays:
            return run(hidden, position, given)
        torch.compiler.cudagraph_mark_step_begin()
        return run(hidden, position, given).clone()

    def _compile(self, start: int, stop: int) -> Segment:
        options: dict[str, Any] = torch._inductor.list_mode_options("reduce-overhead") if self.replays else {}
        # Guards on hundreds of modules, which nobody changes while decoding, take longer than a graph.
        options["guard_filter_fn"] = torch.compiler.keep_tensor_guards_unsafe
        function = segment(self.eager, start, stop)
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self.compiler, options=options)

    def _fill_memory(self, memory: Held, begun: EncoderDecoderState) -> None:
        """Write what cross-attention makes of the source, as layers would at their first step."""
        memory.padding[:, : begun.encoder_hidden.shape[1]] = begun.source_mask[:, 0, 0] != 0
        for index, layer in enumerate(self.eager.layers):
            memory.write(index, 0, *self.eager.project_memory(layer, begun.encoder_hidden))

    def _bias(self, capacity: int) -> Tensor | None:
        """(H, N) of families whose layers share one relative bias."""
        if capacity not in self.biases:
            shared = len({self.eager.bias_owner(index) for index in range(self.num_layers)}) == 1
            with torch.inference_mode(False), torch.no_grad():
                bias = self.biases[capacity] = self.eager.distance_bias(0, capacity) if shared else None
            if bias is not None:
                torch._dynamo.mark_static_address(bias)
        return self.biases[capacity]

    def _position(self, past: int, capacity: int) -> Tensor:
        """() on the device, without a transfer."""
        if len(self.positions) < capacity:
            with torch.inference_mode(False):
                self.positions = torch.arange(capacity, device=self.model.device)
        return self.positions[past]


def why_not_compiled(view: DecoderView) -> str | None:
    """What keeps a model from being compiled; None if nothing does."""
    config, dtype = view.model.config, view.model.dtype
    if not isinstance(view, EncoderDecoderView):
        return f"there are no compiled layers for model family {config.model_type!r}"
    if view.exit_adapter is not None:
        return "it runs no exit adapter"
    if config.model_type == "longt5" and dtype == torch.float16:
        return "LongT5's layers branch on their states in float16: load it in bfloat16 or float32"
    return None


@contextmanager
def compiler_errors() -> Iterator[None]:
    """Raise UserError where what compiles is not installed."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InvalidCxxCompiler, TritonMissing

    try:
        yield
    except (TorchDynamoException, TritonMissing) as error:
        cause = getattr(error, "inner_exception", error)
        if isinstance(cause, InvalidCxxCompiler):
            missing = "a C++ compiler, such as g++"
        elif isinstance(cause, TritonMissing):
            missing = "Triton"
        else:
            raise
        raise UserError(f"backend compile needs {missing}: install it, or take backend torch.") from error
