"""What runs a model's layers.

    fast = prepare(loaded, backend="onnx", precision="w8")
    fast.generate(**inputs, exit_policy=Free(...))

- torch: the unmodified modules; every model and device, and training;
- onnx: exported graphs in ONNX Runtime; models in float32 on a CPU;
- compile: `torch.compile` over buffers of fixed size; on CUDA as CUDA graphs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from models.checks import as_count
from models.choices import BACKENDS, EXIT_PRECISIONS, PRECISIONS
from models.decoder_view import DecoderView
from models.errors import UserError
from models.families.causal import CausalView
from models.families.encoder_decoder import EncoderDecoderView
from models.loading import LoadedModel
from models.lora import is_adapted

if TYPE_CHECKING:
    from models.backends.compiled.causal import CompiledCausalView
    from models.backends.compiled.encoder_decoder import CompiledEncoderDecoderView
    from models.backends.onnx.causal import OnnxCausalView
    from models.backends.onnx.encoder_decoder import OnnxEncoderDecoderView


def prepare(
    loaded: LoadedModel,
    backend: str = "onnx",
    precision: str = "fp32",
    *,
    exit_precision: str | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
) -> LoadedModel:
    """The same model, run by another backend; `loaded` itself stays as it is.

    Prepare again after changing the model: onnx copies weights as they are now, compile some. Other models
    may decode meanwhile; this one not, as the exporter puts stand-ins in the place of its weights.

    Args:
        precision: of weights, backend onnx: fp32 gives torch's tokens; w8 and int8 round weights and
            activations to 8 bits, with a scale for each 64 or for a column and a row; w8+int8 reads sources
            and prompts as int8 does and decodes as w8; w4 has weights of 4 bits. All but w4 decode the same
            bits alone, in windows and in batches, as `lossless` needs.
        exit_precision: of an exit adapter's own weights, where it is another, w8+int8 aside. What an exit
            drafts need not be exact: in fewer bits, `lossless` decodes the same, faster.
        threads: that onnx uses; default: as many as torch.
        cache_dir: where onnx keeps what it has exported; default: ~/.cache/exitlm/onnx.

    Raises:
        UserError: a backend or precision that does not exist, or cannot run this model; a `cache_dir` that
            cannot be written.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend: {backend!r} is none of {', '.join(BACKENDS)}.")
    if backend != "onnx":
        refuse_options_of_onnx(backend, precision, exit_precision, threads, cache_dir)
        compiled = open_compiled(loaded) if backend == "compile" else None
        return replace(loaded, backend=backend, precision=precision, exit_precision=None, _view=compiled)
    if precision not in PRECISIONS:
        raise UserError(f"precision: {precision!r} is none of {', '.join(PRECISIONS)}.")
    reason = why_not_onnx(loaded)
    if reason is not None:
        raise UserError(f"backend onnx: {reason}; use backend torch.")
    check_exit_precision(loaded, exit_precision)
    count = torch.get_num_threads() if threads is None else as_count("threads", threads)
    view = open_onnx(loaded, precision, count, cache_dir, exit_precision)
    return replace(loaded, backend=backend, precision=precision, exit_precision=exit_precision, _view=view)


def refuse_options_of_onnx(backend: str, precision: str, *others: object) -> None:
    if precision != "fp32":
        raise UserError(f"precision {precision} needs backend onnx; {backend} computes in the model's dtype.")
    if any(option is not None for option in others):
        raise UserError(
            f"exit_precision, threads and cache_dir are options of backend onnx, not of {backend}."
        )


def check_exit_precision(loaded: LoadedModel, exit_precision: str | None) -> None:
    if exit_precision is None:
        return
    if exit_precision not in EXIT_PRECISIONS:
        raise UserError(f"exit_precision: {exit_precision!r} is none of {', '.join(EXIT_PRECISIONS)}.")
    if modules_of(loaded).exit_adapter is None:
        raise UserError("exit_precision is of an exit adapter, and this model has none: leave it out.")


def why_not_onnx(loaded: LoadedModel) -> str | None:
    """What keeps the model from being exported; None if nothing does."""
    if is_adapted(loaded.model):
        return "the adapter is kept apart from the weights (merge_adapter=False)"
    if loaded.model.device.type != "cpu":
        return f"the model is on {loaded.model.device}, and onnx runs on the CPU"
    if loaded.model.dtype != torch.float32:
        return f"the model is in {loaded.model.dtype}, and float32 is what is exported"
    if not isinstance(modules_of(loaded), EncoderDecoderView | CausalView):
        return f"there is no export for model family {loaded.model.config.model_type!r}"
    return None


def modules_of(loaded: LoadedModel) -> DecoderView:
    """The view of the modules themselves, as they are now, also of a model that another backend runs."""
    if loaded.backend == "torch":
        return loaded.view
    return replace(loaded, backend="torch", _view=getattr(loaded._view, "eager", None)).view


def open_compiled(loaded: LoadedModel) -> CompiledCausalView | CompiledEncoderDecoderView:
    from models.backends.compiled.causal import CompiledCausalView
    from models.backends.compiled.encoder_decoder import CompiledEncoderDecoderView
    from models.backends.compiled.view import why_not_compiled

    view = modules_of(loaded)
    reason = why_not_compiled(view)
    if reason is not None:
        raise UserError(f"backend compile: {reason}; use backend torch.")
    assert isinstance(view, EncoderDecoderView | CausalView)
    return CompiledCausalView(view) if isinstance(view, CausalView) else CompiledEncoderDecoderView(view)


def open_onnx(
    loaded: LoadedModel,
    precision: str,
    threads: int,
    cache_dir: str | Path | None,
    exit_precision: str | None,
) -> OnnxCausalView | OnnxEncoderDecoderView:
    try:
        from models.backends.onnx.causal import OnnxCausalView
        from models.backends.onnx.check import check_export
        from models.backends.onnx.encoder_decoder import OnnxEncoderDecoderView
        from models.backends.onnx.engine import Engine
        from models.backends.onnx.store import default_cache_dir
    except ImportError as error:
        raise UserError(
            f"backend onnx needs onnxruntime, onnx and onnxscript ({error}); or use backend torch."
        ) from error
    view = modules_of(loaded)
    assert isinstance(view, EncoderDecoderView | CausalView)
    folder = default_cache_dir() if cache_dir is None else Path(cache_dir)
    engine = Engine(view, folder, precision, threads, exit_precision)
    exported = OnnxCausalView(engine) if isinstance(view, CausalView) else OnnxEncoderDecoderView(engine)
    if engine.export_all() or not engine.checked.exists():
        engine.doubt()  # what is not checked to the end is checked again
        check_export(exported)
        engine.trust()
    return exported
