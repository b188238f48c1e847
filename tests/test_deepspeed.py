"""What DeepSpeed's sharding needs of us: DeepSpeed itself is not among the libraries that tests have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from real_rows import ROOT

from models.errors import UserError
from util.training.deepspeed import loading_whole_weights, refuse_under_deepspeed

PATH = str(ROOT / "scripts/accelerate/zero3.yaml")


def test_configuration_is_what_accelerate_reads(monkeypatch):
    config = load_config_from_file(PATH)
    assert isinstance(config, ClusterConfig) and config.distributed_type == "DEEPSPEED"
    words = ["--config_file", PATH, "--main_process_port", "0", "run.py", "--do_train"]
    flags = launch_command_parser().parse_args(words)
    flags = _validate_launch_command(flags)[0]
    assert flags.use_deepspeed and flags.mixed_precision == "bf16"
    assert set(config.deepspeed_config) <= set(vars(flags))  # no key is misspelt
    flags.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # as its launcher does
    _, variables = prepare_deepspeed_cmd_env(flags)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 3 and plugin.zero3_save_16bit_model and not plugin.zero3_init_flag
    sharding = plugin.deepspeed_config["zero_optimization"]
    assert sharding["stage"] == 3 and sharding["stage3_gather_16bit_weights_on_model_save"]
    assert sharding["offload_optimizer"]["device"] == sharding["offload_param"]["device"] == "none"


def arguments(stage=3, **asked):
    training = {
        "do_eval": False,
        "do_predict": False,
        "predict_with_generate": False,
        "eval_strategy": "steps",
    }
    given = {"use_muon": False, "use_lora": False} | asked
    training |= {name: value for name, value in given.items() if name in training}
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    group = SimpleNamespace(use_muon=given["use_muon"], use_lora=given["use_lora"])
    return SimpleNamespace(
        training=SimpleNamespace(deepspeed_plugin=plugin, **training), loss=group, lora=group
    )


@pytest.mark.parametrize("flag", ["do_eval", "do_predict", "use_muon", "use_lora"])
def test_what_needs_whole_weights_is_refused(flag):
    refuse_under_deepspeed(arguments())
    for stage in (None, 2):
        refuse_under_deepspeed(arguments(stage, **{flag: True}))
    with pytest.raises(UserError, match=f"^--{flag}: needs whole weights, which ZeRO-3 shards"):
        refuse_under_deepspeed(arguments(**{flag: True}))


def test_models_are_loaded_whole_and_sharded_afterwards(monkeypatch):
    """transformers asks for shards while its configuration of DeepSpeed is set."""
    events = []
    monkeypatch.setattr("util.training.deepspeed.unset_hf_deepspeed_config", lambda: events.append("unset"))
    plugin = SimpleNamespace(set_deepspeed_weakref=lambda: events.append("set"))
    with loading_whole_weights(SimpleNamespace(deepspeed_plugin=plugin)):
        events.append("loaded")
    with loading_whole_weights(SimpleNamespace(deepspeed_plugin=None)):
        events.append("loaded")
    assert events == ["unset", "loaded", "set", "loaded"]
