"""Sessions of ONNX Runtime over the pieces of one model: made when they are first asked for, then kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import onnx_ir as ir
import onnxruntime

from models.backends.onnx.cuts import Cuts
from models.backends.onnx.grouping import Groups, group_heads
from models.backends.onnx.pieces import (
    DecoderLayer,
    EncoderLayer,
    ExitEntry,
    ExitHead,
    Head,
    KeysValues,
    Memory,
    Piece,
)
from models.backends.onnx.quantization import graphs_of, precision_of, quantize
from models.backends.onnx.segments import bundle, chain
from models.backends.onnx.store import (
    Store,
    fingerprint,
    foreign_code,
    hash_weights,
    makers,
    processor,
    writing,
)
from models.backends.onnx.tracing import Kinds
from models.choices import EXACT_PRECISIONS, MIXED
from models.families.encoder_decoder import EncoderDecoderView
from models.families.stack import StackView

Session: TypeAlias = Any  # onnxruntime.InferenceSession, which declares no types
ExactLayer = partial(DecoderLayer, exact=True)
PIECES: dict[str, Callable[[Any, int], Piece]] = {
    "layer": DecoderLayer,
    "exact-layer": ExactLayer,
    "prompt-layer": ExactLayer,  # in other precisions
    "keys-values": KeysValues,
    "memory": Memory,
    "encoder": EncoderLayer,
    "head": lambda view, index: Head(view),
    "exit-entry": lambda view, index: ExitEntry(view),
    "exit-head": lambda view, index: ExitHead(view),
}
LAYER_KINDS = ("layer", "exact-layer", "prompt-layer")
KINDS = f"kinds-{makers()}"
ERRORS_ONLY = 3  # of ONNX Runtime's severities


class Engine:
    """Graphs of `view`'s model in one precision, run by `threads` threads."""

    def __init__(
        self,
        view: StackView,
        cache_dir: Path,
        precision: str,
        threads: int,
        exit_precision: str | None = None,
    ) -> None:
        """`exit_precision`: of the exit adapter, where it is another."""
        self.view = view
        foreign = foreign_code(view)
        self.store = Store(cache_dir / fingerprint(view.model, graphs_of(precision), foreign))
        self.precision = precision
        self.exit_precision = exit_precision or precision
        self.threads = threads
        self.exact = precision in EXACT_PRECISIONS
        self.layer_kind = "exact-layer" if self.exact else "layer"
        reads_prompts = precision == MIXED and not isinstance(view, EncoderDecoderView)
        self.prompt_kind = "prompt-layer" if reads_prompts else self.layer_kind
        self.kinds = Kinds(Store(cache_dir / f"{KINDS}{foreign and '-'}{foreign}"))
        adapter = view.exit_adapter
        self.adapted = None
        if adapter is not None:  # whose layer may do by its place what no weight tells, as SmolLM3's rotate
            context = [repr(adapter), str(adapter.origin), graphs_of(self.exit_precision)]
            self.adapted = hash_weights(adapter.state_dict(), *context)
        self.checked = self.store.folder / f"checked-{processor()}-{self.adapted}"  # exists once it was
        self.cuts = Cuts.of(view, precision)
        self.apart = self.store.folder / f"apart-{processor()}"  # exists where heads must not be grouped
        self.groups = Groups.of(view) if self.exact and not self.apart.exists() else None
        self.sessions: dict[tuple[str, int, int], Session] = {}
        self.lock = Lock()

    def export_all(self) -> bool:
        """Export every piece that decoding may need, unless it is stored already; whether any was not."""
        before, view = self.store.made, self.view
        kinds, encoder = [*{self.layer_kind, self.prompt_kind}, "keys-values"], 0
        if isinstance(view, EncoderDecoderView):
            kinds.append("memory")
            encoder = len(view.encoder_layers) if view.exports_encoder else 0
        for kind in kinds:
            for index in range(len(view.layers)):
                self._piece(kind, index)
        for index in range(encoder):
            self._piece("encoder", index)
        self._piece("head", 0)
        if self.adapted is not None:
            self._piece("exit-head", 0)
        if self._has_entry:
            self._piece("exit-entry", 0)
        return self.store.made > before

    def doubt(self) -> None:
        """Let what is exported count as not checked, in later processes, too."""
        with writing(self.store.folder):
            self.checked.unlink(missing_ok=True)

    def trust(self) -> None:
        """From now on it counts as checked."""
        with writing(self.store.folder):
            self.checked.touch()

    def keep_heads_apart(self) -> None:
        """From now on, and in later processes on this processor."""
        with writing(self.store.folder):
            self.apart.touch()
        self.groups = None
        self.sessions.clear()

    def layers(self, start: int, stop: int, of_prompt: bool = False) -> Session:
        """Decoder layers `start`..`stop - 1`, one of the stretches of `cuts`, and the exit adapter that reads
        what they make if it is in their graph."""
        return self._session(self.prompt_kind if of_prompt else self.layer_kind, start, stop)

    def keys_values(self, start: int, stop: int) -> Session:
        """What those layers make of states as keys/values, without running."""
        return self._session("keys-values", start, stop)

    def memory(self) -> Session:
        """Keys/values that all decoder layers make of the source."""
        return self._session("memory", 0, len(self.view.layers))

    def encoder(self) -> Session:
        """All layers of the encoder."""
        assert isinstance(self.view, EncoderDecoderView)
        return self._session("encoder", 0, len(self.view.encoder_layers))

    def head(self) -> Session:
        """Final norm and projection onto the vocabulary."""
        return self._session("head", 0, 1)

    def exit_head(self) -> Session:
        """The exit adapter's norm and projection, onto its shortlist where it has one."""
        return self._session("exit-head", 0, 1)

    def branches(self, stop: int) -> bool:
        """Whether an exit adapter runs beside what follows layer `stop`."""
        adapter = self.view.exit_adapter
        return adapter is not None and adapter.block is not None and adapter.layer == stop

    def fuses(self, stop: int) -> bool:
        """Whether that exit adapter is in the graph of the layers before it. Where others share these, it has
        one of its own, which runs right after them."""
        return self.branches(stop) and not self.cuts.heavy

    def _session(self, kind: str, start: int, stop: int) -> Session:
        key = (kind, start, stop)
        session = self.sessions.get(key)
        if session is None:
            with self.lock:
                session = self.sessions.get(key)
                if session is None:
                    self._drop_cut_layers()
                    session = self.sessions[key] = self._open(self._assemble(kind, range(start, stop)))
        return session

    def _drop_cut_layers(self) -> None:
        for kind, start, stop in [*self.sessions]:
            if kind in LAYER_KINDS and not self.cuts.keeps(start, stop):
                del self.sessions[kind, start, stop]

    def _assemble(self, kind: str, indices: range) -> ir.Model:
        pieces = ((index, self._piece(kind, index)) for index in indices)
        if kind in LAYER_KINDS:
            return self._assemble_layers(kind, indices, pieces)
        return (chain if kind == "encoder" else bundle)(pieces, self.view.bias_owner)

    def _assemble_layers(self, kind: str, indices: range, pieces: Iterator[tuple[int, ir.Model]]) -> ir.Model:
        if indices.start == self.view.num_layers:
            model = chain(self._exit_pieces(kind), self.view.bias_owner)
        else:
            aside = self._exit_pieces(kind) if self.fuses(indices.stop) else []
            model = chain(pieces, self.view.bias_owner, aside)
        if self.groups is not None and kind == self.layer_kind:
            group_heads(model.graph, self.view.key_value_shape[1])
        return model

    @property
    def _has_entry(self) -> bool:
        adapter = self.view.exit_adapter
        return adapter is not None and adapter.entry is not None

    def _exit_pieces(self, kind: str) -> list[tuple[int, ir.Model]]:
        """The exit adapter's layer, and what comes before it."""
        last = self.view.num_layers
        entry = [(last + 1, self._piece("exit-entry", 0))] if self._has_entry else []
        return [*entry, (last, self._piece(kind, last))]

    def _piece(self, kind: str, index: int) -> ir.Model:
        name = f"{kind}-{self.adapted if self._is_exits(kind, index) else index}"
        return self.store.piece(name, lambda: self._export(kind, index))

    def _export(self, kind: str, index: int) -> ir.Model:
        precision = self.exit_precision if self._is_exits(kind, index) else self.precision
        return quantize(self.kinds.model(PIECES[kind](self.view, index)), precision_of(kind, precision))

    def _is_exits(self, kind: str, index: int) -> bool:
        """Whether a piece is a part of the exit adapter."""
        return kind.startswith("exit") or (kind != "encoder" and index == self.view.num_layers)

    def _open(self, model: ir.Model) -> Session:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = ERRORS_ONLY
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self.store.folder)
        )
        serialized = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
