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

from models.backends.compiled.segment import Given, Segment, Window, segment
from models.backends.compiled.state import CompiledState, make_held
from models.backends.shared import BackendView, Shelf
from models.decoder_view import DecoderView
from models.errors import UserError
from models.families.causal import CausalView
from models.families.encoder_decoder import EncoderDecoderView
from models.families.stack import StackView

WINDOWS = (1, 2, 4, 8, 16)  # sizes that are compiled: others are padded, longer ones taken apart
LONGEST = 64  # a longer one is a prompt, which the layers read at once, as they are


class CompiledView(BackendView):
    """See `models.decoder_view.DecoderView`: each kind of models adds `read`, `begin`, `write_kv`,
    `deliver_cache`, and what its layers are called with. Shapes: B batch, Q new tokens, D width."""

    def __init__(self, eager: StackView, compiler: str | Callable[..., Any] = "inductor") -> None:
        """`compiler`: the `backend` of `torch.compile`; "aot_eager" captures graphs and compiles nothing."""
        super().__init__(eager)
        self.compiler = compiler
        # Replays of a CUDA graph write their output where the one before did.
        self.replays = compiler == "inductor" and eager.model.device.type == "cuda"
        self.shelf = Shelf(functools.partial(make_held, eager))
        self.segments: dict[tuple[int, ...], Segment] = {}  # compiled, by layers and shapes
        self.positions = torch.arange(0)  # on the device, as many as the largest capacity

    @staticmethod
    def layer_inputs(eager: Any, window: Window, given: Given) -> dict[str, Any]:
        """What layers are called with besides states and cache: traced."""
        raise NotImplementedError

    def given(self, state: Any, start: int, stop: int) -> Given:
        """What a segment reads of the state."""
        raise NotImplementedError

    @torch.inference_mode()
    def run_layers(
        self, state: CompiledState, hidden: Tensor, start: int, stop: int, *, causal: bool = True
    ) -> Tensor:
        if not causal:
            raise UserError("backend compile has causal windows only: leave out causal_catch_up=False.")
        if hidden.shape[1] > LONGEST:
            return self._run_window(state, hidden, start, stop, hidden.shape[1])
        outputs = [
            self._run_window(
                state, part, start, stop, next(size for size in WINDOWS if size >= part.shape[1])
            )
            for part in hidden.split(WINDOWS[-1], dim=1)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def read_exit(self, state: CompiledState, hidden: Tensor, layer: int) -> Tensor:
        adapter = self.eager.adapter_of(layer)
        if adapter is None or adapter.block is None:
            return hidden
        return self.run_layers(state, adapter.enter(hidden), self.num_layers, self.num_layers + 1)

    def predict(self, hidden: Tensor, layer: int) -> Tensor:
        return self.eager.predict(hidden, layer)

    def _run_window(self, state: CompiledState, hidden: Tensor, start: int, stop: int, size: int) -> Tensor:
        """(B, Q, D), padded to `size` tokens. What padding writes lies beyond the lengths: the next tokens
        overwrite it."""
        past, new = state.lengths[start], hidden.shape[1]
        state.reserve(len(hidden), past + size)
        padded = hidden if size == new else torch.nn.functional.pad(hidden, (0, 0, 0, size - new))
        given, position = self.given(state, start, stop), self._position(past, state.capacity)
        if size > LONGEST:
            run = segment(self.eager, start, stop, self.layer_inputs)
            output = run(padded, position, given.up_to(past + new, alike=state.padded is None))
        else:
            output = self._call(start, stop, with_own_strides(padded), position, given)
        state.lengths[start:stop] = [past + new] * (stop - start)
        return output[:, :new]

    def _call(self, start: int, stop: int, hidden: Tensor, position: Tensor, given: Given) -> Tensor:
        # What the guards would look at that are left out.
        source = 0 if given.source is None else given.source.padding.shape[1]
        rows = [len(cosines) for cosines, _ in (given.tables or {}).values()]
        key = (start, stop, *hidden.shape, given.padding.shape[1], source, *rows, self.model.training)
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
        function = segment(self.eager, start, stop, self.layer_inputs)
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self.compiler, options=options)

    def _position(self, past: int, capacity: int) -> Tensor:
        """() on the device, without a transfer."""
        if len(self.positions) < capacity:
            with torch.inference_mode(False):
                self.positions = torch.arange(capacity, device=self.model.device)
        return self.positions[past]


def with_own_strides(tensor: Tensor) -> Tensor:
    """The same numbers with the strides of their shape: graphs are guarded by strides, and those of a part of
    a prompt are the prompt's."""
    shape = torch.empty(tensor.shape, device="meta")
    if tensor.stride() == shape.stride():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def why_not_compiled(view: DecoderView) -> str | None:
    """What keeps a model from being compiled; None if nothing does."""
    config, dtype = view.model.config, view.model.dtype
    if not isinstance(view, EncoderDecoderView | CausalView):
        return f"there are no compiled layers for model family {config.model_type!r}"
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
