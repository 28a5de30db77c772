"""Data flows one way: a module imports only from layers below its own."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mst_ds"

# From the bottom up. Modules of one line may import each other; each may import any line above this one.
LAYERS = [
    {"command_line", "dtypes", "files", "flash_attn_package", "geometry", "optimizers"},
    {
        "adapter_flags",
        "adapters",
        "cpu_threads",
        "document_table",
        "kept_in_fp32",
        "objective_flags",
        "recompute",
        "result_flags",
        "token_layout",
    },
    {"attention", "config"},
    {"config_parser", "rows"},
    {"dataset_files", "gpus", "model_shape", "settings", "topology"},
    {"zero"},
    {"planner", "minisequence", "metrics", "data"},
    {"answers", "layer_stream"},
    {"sequence_parallel"},
    {"eager_attention", "mixers"},
    {"structure", "model_folder", "objectives"},
    {"patching", "checkpoint"},
    {"preflight", "memory", "scaling"},
    {"engine", "resilience"},
    {"training"},
    {"commands", "integrations"},
]
# These are read before a process group or an accelerator exists, also on a laptop without either.
PURE = {"command_line", "config", "dataset_files", "files", "geometry", "gpus", "model_shape", "planner", "settings"}
PURE |= {
    "adapter_flags",
    "answers",
    "config_parser",
    "flash_attn_package",
    "objective_flags",
    "optimizers",
    "result_flags",
    "rows",
    "topology",
    "zero",
}
# Within a layer these have nothing to do with each other.
APART = {"planner", "minisequence", "metrics", "data"}


def modules():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def top(parts):
    """ "planner" for mst_ds.planner.search."""
    return parts[1] if len(parts) > 1 else ""


def name_parts(path):
    return path.relative_to(PACKAGE.parent).with_suffix("").parts


def imported_parts(path):
    """The dotted names that a file imports, anywhere in it, as tuples; relative ones made absolute."""
    package = name_parts(path)[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, alias.name) for alias in node.names)


def layer_of(name):
    return next((index for index, layer in enumerate(LAYERS) if name in layer), None)


def test_every_module_has_a_layer():
    assert {top(name_parts(path)) for path in modules()} <= set().union(*LAYERS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: ".".join(name_parts(path)[1:]))
def test_nothing_imports_upward(path):
    own = top(name_parts(path))
    for parts in imported_parts(path):
        if parts[0] != "mst_ds" or top(parts) == own:
            continue
        assert layer_of(top(parts)) is not None, f"{path} imports {'.'.join(parts)}: import from the module itself"
        assert layer_of(top(parts)) <= layer_of(own), f"{path} imports {'.'.join(parts)} from above"
        assert not {own, top(parts)} <= APART, f"{path} imports {'.'.join(parts)} from beside"


def test_planning_names_neither_torch_nor_deepspeed():
    pure = [path for path in modules() if top(name_parts(path)) in PURE]
    assert len(pure) > len(PURE)
    for path in pure:
        assert not {"torch", "deepspeed"} & {parts[0] for parts in imported_parts(path)}, path


def test_the_package_imports_no_tools_of_tests():
    for path in modules():
        assert not {"unittest", "pytest"} & {parts[0] for parts in imported_parts(path)}, path


def test_flags_and_files_load_no_library_and_planning_neither_deepspeed_nor_a_process_group():
    script = """
import sys
import mst_ds.command_line.entry_point, mst_ds.dataset_files
assert not {"torch", "transformers", "deepspeed", "datasets"} & set(sys.modules)
import mst_ds.answers
assert "deepspeed" not in sys.modules
mst_ds.planner.make_plan("small_llama", {}, world_size=2, seq_len=4096, device_memory=2**33)
assert "deepspeed" not in sys.modules
if "torch" in sys.modules:
    import torch
    assert not (torch.distributed.is_available() and torch.distributed.is_initialized())
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PACKAGE.parent, timeout=120)
