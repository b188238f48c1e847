"""Run by test_parallel_training: loss and gradients of sharded weights (FSDP) against whole ones."""

from __future__ import annotations

import copy
import functools
import os
import socket
import tempfile

import torch
import torch.distributed as dist
from pairs import thin
from tiny_causal import CAUSAL_SHAPES, prompts, tiny_causal
from tiny_models import padded_inputs, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.multiprocessing import start_processes
from transformers import Seq2SeqTrainingArguments

from models.exit_heads import ExitConfig, attach_exit_heads
from models.families import view_for
from models.losses import build_confidence_head_loss, build_exit_loss
from util.training.trainer import EarlyExitTrainer

PROCESSES = 2
CHOSEN = [
    ("t5-tied", "shallowdeep_kd_dyna"),
    ("bart-tied", "ce"),
    ("t5-tied", "confidence head"),
    ("llama-tied", "shallowdeep_kd_dyna"),
    ("gpt2-untied", "sum_l"),
]
CASES = thin([*CHOSEN, ("t5v1.1-untied", "weighted_ce")], CHOSEN)
DROPLESS = {"gpt2-untied": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}


def main(rank: int, port: int) -> None:
    """As torchrun would start it."""
    addresses = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= addresses | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    dist.init_process_group("gloo")
    arguments = Seq2SeqTrainingArguments(
        tempfile.gettempdir(), use_cpu=True, ddp_backend="gloo", report_to="none"
    )
    for shape, name in CASES:
        make = tiny_causal if shape in CAUSAL_SHAPES else tiny_model
        model = make(shape, num_layers=4, **DROPLESS.get(shape, {})).double().train()
        attach_exit_heads(model, ExitConfig("ce", 2, train_meta_cm_head=True, do_layer_transformation=True))
        for shard in (shard_1, shard_2):
            whole, sharded = copy.deepcopy(model), shard(copy.deepcopy(model))
            expected, found = step(whole, name, arguments), step(sharded, name, arguments)
            for key, value in expected.items():
                torch.testing.assert_close(found[key], value, msg=f"{shape} {name} {shard.__name__} {key}")
    dist.destroy_process_group()


def shard_1(model):
    """As fsdp_version 1 does."""
    blocks = {type(layer) for layer in [*view_for(model).layers, *encoder_layers(model)]}
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks)
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=device)


def shard_2(model):
    """As fsdp_version 2 does."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [*view_for(model).layers, *encoder_layers(model)]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh, reshard_after_forward=True)


def encoder_layers(model):
    if not model.config.is_encoder_decoder:
        return []
    encoder = model.get_encoder()
    return getattr(encoder, "block", None) or encoder.layers


def step(model, name, arguments):
    """The loss of one batch and its gradients, whole."""
    view = view_for(model.module if isinstance(model, FullyShardedDataParallel) else model)
    confidence = name == "confidence head"
    loss = build_confidence_head_loss(view, 2) if confidence else build_exit_loss(view, name, 2)
    trainer = EarlyExitTrainer(model=view.model, args=arguments, exit_loss=loss)
    total = trainer.compute_loss(model, batch_for(view.model))
    total.backward()
    return {"total": total.detach(), **gradients_of(model)}


def batch_for(model):
    labels = torch.randint(2, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    labels[1, 4:] = -100
    if not model.config.is_encoder_decoder:
        inputs = {name: values[:1].repeat(2, 1) for name, values in prompts(2, length=7).items()}
        return inputs | {"labels": labels}
    decoder_inputs = model.prepare_decoder_input_ids_from_labels(labels.clamp(min=0))
    return padded_inputs(2) | {"decoder_input_ids": decoder_inputs, "labels": labels}


def gradients_of(model):
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {
                name.replace("_fsdp_wrapped_module.", ""): weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }
    return {
        name: weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
        for name, weight in model.named_parameters()
        if weight.grad is not None
    }


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":  # what is imported by now, both processes have
    start_processes(main, (free_port(),), PROCESSES, start_method="fork")
