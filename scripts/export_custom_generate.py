"""Write a `custom_generate` repository: transformers then decodes with FREE, CALM or Static without exitlm.

python scripts/export_custom_generate.py --output_dir save/free-decoding --repo_id your-name/free-decoding

The folder holds the modules of `models/` that PyTorch decoding needs, as they are but for their imports,
which become relative ones between files side by side: transformers copies no others. In the folder of a
model, only `custom_generate/` is written.
"""

from __future__ import annotations

import ast
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.flag_help import answer_help
from util.script_arguments import CustomGenerateArguments

if __name__ == "__main__":
    answer_help((CustomGenerateArguments,), __doc__)  # before torch is imported

from models.custom_generate import ExitOptions
from models.errors import UserError
from models.families import VIEWS
from util.console import command
from util.files import locked_output_dir
from util.flags import parse_groups
from util.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "models.custom_generate"  # becomes generate.py, whose `generate` transformers calls
REQUIRED = {"torch": "", "transformers": ">=", "numpy": "", "scipy": ""}  # the version here is the least
CARD = """\
---
library_name: transformers
license: apache-2.0
tags:
- custom_generate
---
# Early exits in `generate`

Decodes with FREE (Bae et al., 2023), CALM (Schuster et al., 2022) or Static-Exiting: tokens that a shallow
layer is sure of skip the deeper ones. Models: {families}.

```python
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{model}")
model = {auto_class}.from_pretrained("{model}")
inputs = tokenizer("Entwicklungsdateien für die Bibliothek", return_tensors="pt")
stats = {{}}
output = model.generate(
    **inputs,
    max_new_tokens=30,
    custom_generate="{repo_id}",
    trust_remote_code=True,
    shallow_layer=2,
    threshold=0.4,
    lossless=True,
    decode_stats=stats,
)
print(tokenizer.batch_decode(output, skip_special_tokens=True), stats["exit_share"])
```

{options}

`lossless=True` verifies the shallow tokens: the output is that of full depth. Without it, and with the other
methods, a checkpoint must be trained for its exits. Sampling, logits processors, stopping criteria and
streamers work as in `generate`; what does not, such as beams, is refused by name.

`generate` looks for the code with every call. Who calls often looks once:

```python
decode = model.load_custom_generate("{repo_id}", trust_remote_code=True)
output = decode(model=model, **inputs, max_new_tokens=30, shallow_layer=2, threshold=0.4)
```

Written by `scripts/export_custom_generate.py` of exitlm for transformers {transformers}; do not edit.
"""
MEANINGS = {
    "method": "`free`, `calm`, `static`, or `full` (no exits)",
    "shallow_layer": "free, static: the exit, from 1; left out, the exit adapter's or the checkpoint's own",
    "threshold": "free, calm: a token whose confidence exceeds it exits",
    "confidence": "free, calm: `softmax`, or `meta` (a trained head)",
    "lossless": "free: verify shallow tokens, so that the output is full depth's",
    "max_pending_tokens": "free: run the deep layers once this many tokens wait",
    "lookup_tokens": "free, full: propose so many tokens that followed earlier in the text, and verify them",
    "copy_skipped": "free: copy states to skipped layers instead of catching up",
    "rollback_threshold": "free: take back tokens whose cross-entropy under the deep model exceeds it",
    "min_layer": "calm: no exit before this layer",
    "exit_layers": "calm: the only layers to exit after",
    "exit_adapter": "free, static: folder or repository of one that was taught for the model",
}


def main(argv: list[str] | None = None) -> None:
    with command():
        (flags,) = parse_groups((CustomGenerateArguments,), __doc__, argv)
        with locked_output_dir(flags.output_dir):
            export(flags)
    print(f"Wrote {flags.output_dir}. Next: hf upload {flags.repo_id} {flags.output_dir}")


def export(flags: CustomGenerateArguments) -> None:
    """Write modules and requirements and, unless the folder is a model's, the card and the license."""
    folder = flags.output_dir / "custom_generate"
    if folder.exists():
        shutil.rmtree(folder)  # lest modules of another version stay
    folder.mkdir()
    for module in import_closure(ENTRY):
        text = rewrite(module, module_path(module).read_text(encoding="utf8"))
        (folder / f"{flat_name(module)}.py").write_text(text, encoding="utf8")
    (folder / "requirements.txt").write_text(requirements(), encoding="utf8")
    if not (flags.output_dir / "config.json").exists():
        (flags.output_dir / "README.md").write_text(card(flags), encoding="utf8")
        shutil.copyfile(ROOT / "LICENSE", flags.output_dir / "LICENSE")


def card(flags: CustomGenerateArguments) -> str:
    rows = [[f"`{name}`", f"`{default!r}`", MEANINGS[name]] for name, default in vars(ExitOptions()).items()]
    return CARD.format(
        families=", ".join(sorted(VIEWS)),
        auto_class=flags.auto_class,
        model=flags.example_model,
        repo_id=flags.repo_id,
        options=markdown_table(["option", "default", "meaning"], rows),
        transformers=version("transformers"),
    )


def requirements() -> str:
    """One line a package, as transformers checks them before it loads the code."""
    lines = [f"{name}{bound}{version(name) if bound else ''}" for name, bound in REQUIRED.items()]
    return "\n".join(lines) + "\n"


# Modules


def import_closure(entry: str) -> list[str]:
    """The module and all of ours that it imports, directly or not."""
    found, waiting = set(), [entry]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            tree = ast.parse(module_path(module).read_text(encoding="utf8"))
            waiting += [node.module for node in own_imports(tree)]
    names = {flat_name(module) for module in found}
    assert len(names) == len(found), "two modules would get one name"
    return sorted(found)


def own_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    """Its `from models.x import ...`, in functions too, but for those that only a type checker reads."""
    unread = {id(node) for block in typing_blocks(tree) for node in ast.walk(block)}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in unread]
    return [node for node in nodes if (node.module or "").startswith("models.")]


def typing_blocks(tree: ast.Module) -> list[ast.If]:
    return [node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]


def rewrite(module: str, text: str) -> str:
    """The module with relative imports, and without what only a type checker reads.

    Raises:
        UserError: it imports ours in a way that transformers cannot follow.
    """
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    for node in own_imports(tree):
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from .{flat_name(node.module)} ", 1)
    for block in typing_blocks(tree):
        lines[block.lineno - 1 : block.end_lineno] = [""] * len(lines[block.lineno - 1 : block.end_lineno])
    result = "".join(lines)
    left = [node for node in ast.walk(ast.parse(result)) if names_ours(node)]
    if left:
        raise UserError(f"{module}: {ast.unparse(left[0])}: write from models.x import y.")
    return result


def names_ours(node: ast.AST) -> bool:
    """Whether it imports ours by an absolute name."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "models" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == "models"


def flat_name(module: str) -> str:
    """Its file's name in a folder without subfolders."""
    return "generate" if module == ENTRY else module.removeprefix("models.").replace(".", "_")


def module_path(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


if __name__ == "__main__":
    main()
