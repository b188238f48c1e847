"""Which part may import which: one way, from the ground floor up. Read from the sources; nothing is run."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = (
    "models", "models.choices", "models.errors", "models.exit_adapter", "models.decoder_view",
    "models.families",
)  # fmt: skip
GROUND = ("util",)  # the files that lie in util/ itself
DATA = (*ENGINE, *GROUND, "util.data")
EVALUATION = (*DATA, "util.evaluation")
CALIBRATION = (*EVALUATION, "util.calibration")
POLICIES = (*CALIBRATION, "util.policies")
TRAINING = (*POLICIES, "util.training")
REPORT = (*GROUND, "models.errors", "models.json_files", "util.evaluation", "util.report")
EVERYTHING = (
    *TRAINING, "util.demo", "util.exit_training", "util.exit_training.flags", "util.setup",
    "util.report", "gpt_eval", "run",
)  # fmt: skip

# Part -> what of ours it may import besides itself. The longest name that fits a module or one of its
# folders counts, on both sides.
MAY_IMPORT = {
    "models": ENGINE,
    "models.errors": (),
    "models.choices": (),
    "models.exit_adapter": ("models.choices", "models.errors"),
    "models.decoder_view": ("models.exit_adapter",),  # knows no family
    "models.families": ("models.errors", "models.exit_adapter", "models.decoder_view"),
    "util": (*ENGINE, *GROUND),
    "util.data": DATA,
    "util.demo": (*DATA, "util.demo"),
    "util.evaluation": EVALUATION,
    "util.calibration": CALIBRATION,
    "util.policies": POLICIES,  # from flags and certificates to policies
    "util.exit_training": (*EVALUATION, "util.setup", "util.exit_training.flags"),
    "util.exit_training.flags": (*GROUND, "models.choices", "models.errors"),
    "util.setup": EVALUATION,  # what programs do before the first sample
    "util.training": TRAINING,
    "util.report": REPORT,
    "gpt_eval": (*REPORT, "gpt_eval", "gpt_eval.predictions"),
    "gpt_eval.predictions": (*REPORT, "gpt_eval", "util.data"),  # the sources of what is judged
    "run": (*TRAINING, "util.setup", "run"),
    "scripts": EVERYTHING,
}
READ_THE_REGISTRY = {  # all others are handed a view
    "models", "models.decoding", "models.exit_adapter_files", "models.exit_heads", "models.gguf",
    "models.loading", "models.trace", "run", "util.evaluation", "util.policies", "util.training", "scripts",
}  # fmt: skip
HEAVY = {"torch", "transformers", "datasets"}
LIGHT = ("util.report", "gpt_eval", "scripts.report", "models.errors", "models.json_files")


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = [ROOT / "run.py"]
FILES += [path for part in ("models", "util", "gpt_eval", "scripts") for path in (ROOT / part).rglob("*.py")]
MODULES = {module_name(path): ast.parse(path.read_text()) for path in FILES}


def part_of(module, parts):
    """The longest of `parts` that is the module or one of its folders; None if there is none."""
    fitting = [part for part in parts if f"{module}.".startswith(f"{part}.")]
    return max(fitting, key=len, default=None)


def targets(statement):
    """Modules that an import statement names, ours to the file."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert statement.level == 0, "imports are absolute"
    whole = [f"{statement.module}.{alias.name}" for alias in statement.names]
    return [name if name in MODULES else statement.module for name in whole]


def all_imports(module):
    nodes = ast.walk(MODULES[module])
    return {name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for name in targets(node)}


def imports_on_loading(module):
    """Without those of functions and those that only a type checker reads."""
    found, waiting = set(), list(MODULES[module].body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(targets(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def loaded_by(module):
    """Everything that importing a module loads, as far as it is ours to say."""
    seen, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            folders = name.split(".")
            waiting += [".".join(folders[:depth]) for depth in range(1, len(folders))]
            waiting += imports_on_loading(name)
    return seen


def violations():
    for module in MODULES:
        part = part_of(module, MAY_IMPORT)
        for imported in sorted(all_imports(module) & set(MODULES)):
            target = part_of(imported, {*MAY_IMPORT, *MAY_IMPORT[part]})
            if target != part and target not in MAY_IMPORT[part]:
                yield module, imported


def test_every_module_has_its_place():
    assert {part_of(module, MAY_IMPORT) for module in MODULES} == set(MAY_IMPORT)


def test_imports_go_one_way():
    assert not set(violations())


def test_no_two_modules_import_each_other():
    graph = {module: imports_on_loading(module) & set(MODULES) for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_only_some_read_the_registry_of_families():
    readers = {module for module in MODULES if "models.families" in all_imports(module)}
    assert {part_of(module, READ_THE_REGISTRY) for module in readers} <= READ_THE_REGISTRY
    assert not {module for module in readers if module.startswith("models.")} - READ_THE_REGISTRY


@pytest.mark.parametrize("part", LIGHT)
def test_what_reads_results_loads_no_torch(part):
    heavy = {module for module in MODULES if part_of(module, [part])
             and HEAVY & {name.split(".")[0] for name in loaded_by(module)}}  # fmt: skip
    assert not heavy
