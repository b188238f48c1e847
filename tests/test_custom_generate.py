"""The exported `custom_generate` repository decodes as this one does, where this one cannot be imported."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs import thin
from tiny_causal import CAUSAL_FAMILIES, prompts, tiny_causal
from tiny_models import FAMILIES, padded_inputs, tiny_model
from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_imports

from models import (
    Calm,
    Free,
    MetaClassifier,
    SoftmaxGap,
    StaticExit,
    UserError,
    attach_exit_adapter,
    custom_generate,
    early_exit_decode,
    load_model,
    make_exit_adapter,
    save_exit_adapter,
    view_for,
)
from models.choices import EXIT_ADAPTERS
from models.exit_adapter import exit_adapter_of
from models.exit_heads import ExitConfig, attach_exit_heads
from scripts import export_custom_generate

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY, COMMIT = "org/free-decoding", "0" * 40
T5, LLAMA = "debian-t5-free", "debian-llama-free"
TEXTS = {T5: "Entwicklungsdateien für die {}", LLAMA: "Entwicklungsdateien für die {}\n\nTranslation:"}
RANDOM = (*FAMILIES, *CAUSAL_FAMILIES)
ALWAYS = ("t5-tied", "llama-tied", "gpt2-tied")  # models of the tests that are not slow
PLACES = {"HF_HOME": "", "HF_HUB_CACHE": "hub", "HF_MODULES_CACHE": "modules"}
ALONE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
LENGTH = {"max_new_tokens": 14, "do_sample": False}
METHODS = {  # keywords of the export -> our policy
    "free": ({"shallow_layer": 2, "threshold": 0.4}, lambda: Free(2, SoftmaxGap(), 0.4)),
    "waiting": (
        {"shallow_layer": 2, "threshold": 0.1, "max_pending_tokens": 2},
        lambda: Free(2, SoftmaxGap(), 0.1, max_pending=2),
    ),
    "copying": (
        {"shallow_layer": 2, "threshold": 0.2, "copy_skipped": True},
        lambda: Free(2, SoftmaxGap(), 0.2, copy_skipped=True),
    ),
    "calm": ({"method": "calm", "threshold": 0.3, "min_layer": 2}, lambda: Calm(SoftmaxGap(), 0.3, 2)),
    "static": ({"method": "static", "shallow_layer": 3}, lambda: StaticExit(3)),
}
EXACT = {"lossless": {"shallow_layer": 2, "threshold": 0.2, "lossless": True}, "full": {"method": "full"}}
CASES = thin(  # families x methods
    itertools.product(RANDOM, (*METHODS, *EXACT)),
    [*itertools.product(RANDOM, ("free", *EXACT)), *itertools.product(ALWAYS[:2], [*METHODS][1:])],
)
WRONG = {  # keywords -> what the one error names
    "misspelt": ({"shallow_layers": 2}, "UserError: custom_generate has no option shallow_layers: did you"),
    "toolkit": ({"auto_exit": True}, "UserError: custom_generate does not serve auto_exit"),
    "unknown": (
        {"shallow_layer": 2, "colour": 2},
        "ValueError: The following `model_kwargs` are not used by the model: ['colour']",
    ),
    "idle": ({"method": "calm", "lossless": True}, "UserError: method='calm' does not read lossless"),
    "default": ({"method": "full", "threshold": 0.9}, "UserError: method='full' does not read threshold"),
    "method": ({"method": "fre"}, "UserError: method must be one of free, calm, static, full, got 'fre'."),
    "meta": ({"shallow_layer": 2, "confidence": "meta"}, "UserError: confidence='meta' needs a checkpoint"),
    "layer": ({}, "UserError: Give shallow_layer: the checkpoint does not say"),
    "beams": ({"shallow_layer": 2, "num_beams": 2}, "UserError: early_exit_decode decodes one beam"),
}


def random_model(family):
    return tiny_model(family) if family in FAMILIES else tiny_causal(family)


def random_inputs(family, batch=2):
    return padded_inputs(batch) if family in FAMILIES else prompts(batch)


def embedded(name):
    """A checkpoint, and inputs for it."""
    loaded = load_model(str(ROOT / "checkpoints" / name))
    texts = [TEXTS[name].format(word) for word in ("Bibliothek", "Dokumentation zu diesem Paket")]
    inputs = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    return loaded.model, {key: inputs[key] for key in ("input_ids", "attention_mask")}


def with_heads():
    """A model and the configuration of its heads, which plain transformers knows nothing of."""
    model = tiny_model("t5-tied")
    exits = ExitConfig(shallow_exit_layer=2, train_meta_cm_head=True, per_exit_head="projection")
    attach_exit_heads(model, exits)
    torch.manual_seed(1)
    for weight in (*model.cm_head.parameters(), *model.per_exit_heads.parameters()):
        torch.nn.init.normal_(weight, std=0.3)
    return model, exits


def with_adapter():
    model = tiny_causal("llama-tied")
    adapter = make_exit_adapter(view_for(model), EXIT_ADAPTERS[0], 2)
    torch.manual_seed(1)
    torch.nn.init.normal_(adapter.projection.weight, std=0.3)
    attach_exit_adapter(model, adapter)
    return model


def make_folders(path, families):
    """Models, and an export as a hub's cache holds it."""
    cached = path / "home/hub/models--org--free-decoding"
    export_custom_generate.main(["--output_dir", str(cached / "snapshots" / COMMIT)])
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    for family in families:
        random_model(family).save_pretrained(path / family)
    for name in (T5, LLAMA):
        (path / name).symlink_to(ROOT / "checkpoints" / name)
    model, exits = with_heads()
    model.save_pretrained(path / "heads")
    exits.save(path / "heads")
    save_exit_adapter(with_adapter(), path / "adapter")
    shutil.copytree(path / "gpt2-tied", path / "own")
    export_custom_generate.main(["--output_dir", str(path / "own")])


def make_jobs_of_slow_tests():
    """(what, how): (model, inputs, keywords) of every family and of trained models."""
    given = {method: keywords for method, (keywords, _) in METHODS.items()} | EXACT
    jobs = {(family, how): (family, random_inputs(family), given[how]) for family, how in CASES}
    for name in (T5, LLAMA):
        _, inputs = embedded(name)
        jobs |= {(name, how): (name, inputs, given[how]) for how in given}
        jobs[name, "trained"] = (name, inputs, {"threshold": 0.4})  # after the layer that it names
    return jobs


def make_jobs(path):
    """(what, how): (model, inputs, keywords) of what the other tests look at."""
    free, _ = METHODS["free"]
    adapter = {"threshold": 0.05, "exit_adapter": str(path / "adapter")}
    jobs = {("heads", "softmax"): ("heads", padded_inputs(2), {"threshold": 0.0})}
    jobs["heads", "meta"] = ("heads", padded_inputs(2), {"threshold": 0.3, "confidence": "meta"})
    jobs["adapter", "softmax"] = ("llama-tied", prompts(2), adapter)
    jobs["adapter", "none"] = ("llama-tied", prompts(2), free)  # after that
    jobs["own", "free"] = ("own", prompts(2), free)
    for family in ("t5-tied", "llama-tied"):
        for how in EXACT:
            looking = EXACT[how] | {"lookup_tokens": 4}
            jobs[family, f"{how}, looking up"] = (family, random_inputs(family, batch=1), looking)
    jobs |= {("wrong", name): ("t5-tied", padded_inputs(), keywords) for name, (keywords, _) in WRONG.items()}
    return jobs


@pytest.fixture(scope="module")
def outputs(request, tmp_path_factory):
    """(what, how): what comes of all jobs, in one process that sees no module of ours."""
    path = tmp_path_factory.mktemp("hub")
    slow = any(
        item.path == request.path and item.get_closest_marker("slow") for item in request.session.items
    )
    make_folders(path, RANDOM if slow else ALWAYS)
    given = make_jobs(path) | (make_jobs_of_slow_tests() if slow else {})
    jobs = {
        "/".join(key): {
            "model": str(path / model),
            "encoder": json.loads((path / model / "config.json").read_text()).get(
                "is_encoder_decoder", False
            ),
            "repository": None if model == "own" else REPOSITORY,
            "options": LENGTH | options,
            **{name: value.tolist() for name, value in inputs.items()},
        }
        for key, (model, inputs, options) in given.items()
    }
    (path / "jobs.json").write_text(json.dumps(jobs))
    here = path / "elsewhere"
    here.mkdir()
    driver = shutil.copy(ROOT / "tests/custom_generate_jobs.py", here)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {name: str(path / "home" / end) for name, end in PLACES.items()} | ALONE
    command = [sys.executable, "-I", driver, str(path)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    decoded = json.loads((path / "outputs.json").read_text())
    return {tuple(key.split("/")): output for key, output in decoded.items()}


def decode_here(model, inputs, policy):
    options = {"custom_generate": early_exit_decode, "exit_policy": policy} | LENGTH
    return model.generate(**inputs, **options).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", [T5, LLAMA])
def test_embedded_checkpoints_decode_as_here(outputs, name):
    model, inputs = embedded(name)
    policies = {method: policy for method, (_, policy) in METHODS.items()}
    policies["trained"] = policies["free"]
    for method, policy in policies.items():
        assert outputs[name, method]["tokens"] == decode_here(model, inputs, policy()), method
        assert outputs[name, method]["exit_share"] > 0, method
    greedy = model.generate(**inputs, **LENGTH).tolist()
    assert outputs[name, "lossless"]["tokens"] == outputs[name, "full"]["tokens"] == greedy
    assert outputs[name, "lossless"]["exit_share"] > outputs[name, "full"]["exit_share"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", RANDOM)
def test_every_family_decodes_as_here(outputs, family):
    model, inputs = random_model(family), random_inputs(family)
    for method in [how for one, how in CASES if one == family and how in METHODS]:
        expected = decode_here(model, inputs, METHODS[method][1]())
        assert outputs[family, method]["tokens"] == expected, method
    full = decode_here(model, inputs, None)  # which tests over families compare with Hugging Face's
    assert outputs[family, "lossless"]["tokens"] == outputs[family, "full"]["tokens"] == full


@pytest.mark.parametrize("family", ["t5-tied", "llama-tied"])
def test_lookups_change_nothing(outputs, family):
    full = decode_here(random_model(family), random_inputs(family, batch=1), None)
    for how in EXACT:
        assert outputs[family, f"{how}, looking up"]["tokens"] == full


def test_heads_come_along(outputs):
    (model, _), inputs = with_heads(), padded_inputs(2)
    policies = {"softmax": Free(2, SoftmaxGap(), 0.0), "meta": Free(2, MetaClassifier(model.cm_head), 0.3)}
    for name, policy in policies.items():
        assert outputs["heads", name]["tokens"] == decode_here(model, inputs, policy), name
        assert outputs["heads", name]["exit_share"] > 0, name
    without = decode_here(tiny_model("t5-tied"), inputs, policies["softmax"])
    assert outputs["heads", "softmax"]["tokens"] != without, "heads that say nothing show nothing"


def test_exit_adapters_serve_the_calls_that_name_them(outputs):
    plain, inputs, policy = tiny_causal("llama-tied"), prompts(2), Free(2, SoftmaxGap(), 0.05)
    assert outputs["adapter", "softmax"]["tokens"] == decode_here(with_adapter(), inputs, policy)
    assert outputs["adapter", "softmax"]["exit_share"] > 0
    assert outputs["adapter", "softmax"]["tokens"] != decode_here(plain, inputs, policy)
    assert outputs["adapter", "none"]["tokens"] == decode_here(plain, inputs, METHODS["free"][1]())


def test_an_exit_adapter_follows_a_model_that_changes(tmp_path):
    plain, taught, inputs = tiny_causal("llama-tied"), with_adapter(), prompts(2)
    save_exit_adapter(taught, tmp_path)
    options = {"model": plain, "threshold": 0.05, "exit_adapter": str(tmp_path)} | LENGTH
    custom_generate.generate(**inputs, **options)
    plain.double()
    plain.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=2, suppress_tokens=[3, 5, 8])
    taught.double().generation_config = plain.generation_config
    expected = decode_here(taught, inputs, Free(2, SoftmaxGap(), 0.05))
    assert custom_generate.generate(**inputs, **options).tolist() == expected
    assert not hasattr(plain, "exit_adapter")


def test_an_exit_adapter_is_rounded_for_half_precision_alone(tmp_path):
    plain, inputs = tiny_causal("llama-tied"), prompts(2)
    save_exit_adapter(with_adapter(), tmp_path)
    options = {"model": plain, "threshold": 0.05, "exit_adapter": str(tmp_path)} | LENGTH
    stored = {name: weight.clone() for name, weight in plain.state_dict().items()}
    custom_generate.generate(**inputs, **options)
    custom_generate.generate(**inputs, **options | {"model": plain.bfloat16()})
    plain.float().load_state_dict(stored)
    adapter = exit_adapter_of(custom_generate.twin_with(plain, str(tmp_path)))
    expected = with_adapter().exit_adapter.projection.weight
    assert torch.equal(adapter.projection.weight, expected)


def test_a_layer_that_there_is_not_is_refused():
    with pytest.raises(UserError, match=r"shallow_layer.* 0"):
        custom_generate.generate(**prompts(1), model=with_adapter(), shallow_layer=0)


def test_a_model_with_the_code_generates_with_it(outputs):
    """Loaded with trust_remote_code, its own `generate` takes the keywords."""
    expected = decode_here(tiny_causal("gpt2-tied"), prompts(2), METHODS["free"][1]())
    assert outputs["own", "free"]["tokens"] == expected


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_served_is_refused_by_name(outputs, name):
    _, start = WRONG[name]
    assert outputs["wrong", name].get("error", "").startswith(start), outputs["wrong", name]


@pytest.mark.slow
def test_the_files_stand_alone(tmp_path):
    """Side by side, importing nothing but what the requirements bring; the card lists every option."""
    export_custom_generate.main(["--output_dir", str(tmp_path)])
    code = tmp_path / "custom_generate"
    required = {re.split("[>=]", line)[0] for line in (code / "requirements.txt").read_text().split()}
    allowed = sys.stdlib_module_names | required | {"huggingface_hub", "safetensors"}
    for path in code.glob("*.py"):
        assert set(get_imports(path)) <= allowed, path.name
        for name in re.findall(r"^\s*from \.(\S*) import", path.read_text(), re.MULTILINE):
            assert (code / f"{name}.py").is_file(), f"{path.name}: {name}"
    assert not [path for path in code.iterdir() if path.is_dir()]
    (tmp_path / "config.json").touch()
    (tmp_path / "README.md").write_text("of the model")
    export_custom_generate.main(["--output_dir", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == "of the model"
    (tmp_path / "config.json").unlink()
    export_custom_generate.main(["--output_dir", str(tmp_path)])
    card = (tmp_path / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)`", card, re.MULTILINE)) == set(export_custom_generate.MEANINGS)


def test_stale_modules_go(tmp_path):
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate/old.py").write_text("")
    export_custom_generate.main(["--output_dir", str(tmp_path)])
    assert not (tmp_path / "custom_generate/old.py").exists()


@pytest.mark.parametrize("line", ["import models.errors", "from models import UserError"])
def test_imports_that_cannot_be_made_relative_are_refused(line):
    with pytest.raises(UserError, match="write from models"):
        export_custom_generate.rewrite("models.x", f"{line}\n")


@pytest.mark.slow
def test_the_blocks_of_the_card_run(tmp_path, capsys):
    model, code = str(ROOT / "checkpoints" / T5), str(tmp_path / "free-decoding")
    export_custom_generate.main(["--output_dir", code, "--repo_id", code, "--example_model", model])
    card = (tmp_path / "free-decoding/README.md").read_text()
    scope = {}
    for block in re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE):
        exec(compile(block, "card", "exec"), scope)
    greedy = scope["model"].generate(**scope["inputs"], max_new_tokens=30)
    text = scope["tokenizer"].batch_decode(greedy, skip_special_tokens=True)
    assert str(text) in capsys.readouterr().out and scope["stats"]["exit_share"] > 0
    assert scope["output"].shape[0] == 1
