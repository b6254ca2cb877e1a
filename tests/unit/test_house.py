"""Rules of the house: who may import whom, recipes that differ by their technique alone."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

from tests.conftest import NO_SUCH_CASE
from tests.helpers.harness import ROOT, command

HEAVY = set(
    "deepspeed hydra lightning matplotlib mlperf_logging ray sklearn tensorboard torchmetrics torchvision wandb".split()
)
LOOP = [
    "for micro in micro_batches(batch, run.config.accumulate, model):",
    "scaler.scale(loss * micro.weight).backward()",
    "run.record(loss=loss, weight=micro.weight)",
]
LOSS = "loss = run.task.loss(model(micro.inputs), micro.targets)"
OPTIMIZER = "optimizer = build_optimizer(run.config.optim, model)"
STEPS = "for batch in run.steps(model=model, optimizer=optimizer, scheduler=scheduler):"
CLIP = "clip_gradients(model, optimizer, scaler, run.config.gradients)"
PLACE = "model = run.place(run.task.build_model())"
SCALER = ["scaler.step(optimizer)", "scaler.update()"]
# The lines of single.py that a technique replaces by its own; every other line of single.py stands in every recipe.
REPLACES: dict[str, list[str]] = {
    "activation_checkpointing": [],
    "comm_hooks": [STEPS],
    "context_parallel": [],
    "data_parallel": [],
    "deepspeed_zero": [
        STEPS,
        LOSS,
        LOOP[1],
        CLIP,
        *SCALER,
        "optimizer.zero_grad()",
    ],
    "ddp": [],
    "expert_parallel": [PLACE],
    "fsdp": [PLACE, "with run.autocast():"],
    "grad_accumulation": LOOP[:1],
    "lightning_fabric": [LOOP[0], "with run.autocast():", LOOP[1], CLIP, *SCALER],
    "lightning_trainer": [
        "scaler = run.scaler()",
        STEPS,
        LOOP[0],
        "with run.autocast():",
        LOSS,
        LOOP[1],
        CLIP,
        *SCALER,
        "scheduler.step()",
        "optimizer.zero_grad()",
    ],
    "local_sgd": [STEPS],
    "lora": [OPTIMIZER, STEPS],
    "model_parallel": [LOSS],
    "parallel_mesh": [PLACE, STEPS, LOOP[0], "with run.autocast():", CLIP],
    "pipeline_parallel": [
        OPTIMIZER,
        STEPS,
        LOOP[0],
        LOSS,
        *LOOP[1:],
        CLIP,
    ],
    "sync_batchnorm": [],
    "tensor_parallel": [PLACE],
    "transfer_learning": [OPTIMIZER],
    "zero1": [],
}
TOOLS = {"verify", "diff", "compare", "doctor", "plan", "tune"}
DEMONSTRATIONS = {"checkpoint_resume"}  # single's loop several times over, taken apart


def imports(path: Path) -> set[str]:
    """The top-level names of all modules a file imports, inside functions too; lockstep.recipes counts as recipes."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {re.sub(r"^lockstep\.(?=recipes|launchers)", "", name).partition(".")[0] for name in names}


def python_files(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ holds no Python: this test would check nothing"
    return files


def test_recipes_never_import_launchers() -> None:
    for path in python_files("recipes"):
        assert "launchers" not in imports(path), path


def test_launchers_import_nothing_of_training() -> None:
    own = {
        "torchrun.py": {"torch"},
        "children.py": {"torch"},
        "lightning_start.py": {"lightning"},
        "loopback.py": {"torch"},
        "slurm.py": {"submitit"},
    }
    for path in python_files("launchers"):
        assert not imports(path) & ({"recipes", "torch", "lightning", "submitit"} - own.get(path.name, set())), path
        known = set(re.findall(r"(?:from|import) lockstep\.(\w+)", path.read_text()))
        assert known <= {"errors", "utils", "config", "distributed", "launch", "diagnose", "launchers"}, path


def test_the_library_imports_neither() -> None:
    for path in python_files("src/lockstep"):
        assert not imports(path) & {"recipes", "launchers"}, path


def test_a_recipe_loads_no_heavy_package_before_it_needs_one() -> None:
    """What `import recipes.ddp` loads is what every rank waits for."""
    unasked = HEAVY | {"lockstep.callbacks.profiler", "lockstep.callbacks.communication"}
    script = f"import sys, recipes.ddp; print(sorted({unasked!r} & set(sys.modules)))"
    said = command("-c", script)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr


# src/lockstep ---------------------------------------------------------------------------------------------------------

SOURCE = ROOT / "src"
Graph = dict[str, set[str]]


def import_graph() -> Graph:
    """Which module of lockstep imports which: at the top, inside functions, and for type checkers alone."""
    modules = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in python_files("src/lockstep")
    }
    graph: Graph = {}
    for name, path in modules.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{path}: a relative import hides what it imports"
                for alias in node.names:  # `from package import module` imports the module
                    module = f"{node.module}.{alias.name}"
                    found.add(module if module in modules else node.module)
        graph[name] = (found & modules.keys()) - {name}
    return graph


def room(module: str) -> str:
    """The sub-package that a module belongs to, or the module itself where it stands beside them."""
    return ".".join(module.split(".")[:2])


def rooms(graph: Graph) -> Graph:
    found: Graph = {}
    for module, imported in graph.items():
        found.setdefault(room(module), set()).update({room(each) for each in imported} - {room(module)})
    return found


def circle(graph: Graph) -> list[str]:
    """A way from a node back to itself, or nothing where there is none."""
    done: set[str] = set()

    def search(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for following in sorted(graph[node]):
                if found := search(following, [*way, node]):
                    return found
            done.add(node)
        return []

    return next(filter(None, (search(node, []) for node in sorted(graph))), [])


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    graph = import_graph()
    assert "lockstep.config.schema" in graph["lockstep.run"]
    assert "lockstep.config" in rooms(graph)["lockstep.run"]


def test_imports_have_no_circle() -> None:
    graph = import_graph()
    found = circle(graph)
    assert not found, f"modules import each other: {' -> '.join(found)}"
    found = circle(rooms(graph))
    steps = set(pairwise(found))
    ways = [f"{one} imports {other}" for one in graph for other in graph[one] if (room(one), room(other)) in steps]
    assert not found, f"sub-packages import each other: {' -> '.join(found)}; {'; '.join(ways)}"


def test_the_lower_floors_know_nothing_of_the_tools() -> None:
    tools = {f"lockstep.{name}" for name in ("diagnose", "compare", "plan", "tune", "verify", "integrations")}
    for module, imported in import_graph().items():
        if room(module) in ("lockstep.config", "lockstep.data", "lockstep.distributed"):
            assert not {room(each) for each in imported} & tools, f"{module} imports {sorted(imported)}"


def test_no_merge_is_half_done() -> None:
    """Ruff sees it in Python; a page would be published so."""
    for path in [*ROOT.glob("*.*"), *(ROOT / "docs").glob("*.*"), *(ROOT / "conf").rglob("*.yaml")]:
        found = (
            re.search(r"^(<{7} |>{7} |={7}$)", path.read_text(errors="replace"), re.MULTILINE)
            if path.is_file()
            else None
        )
        assert not found, f"{path.relative_to(ROOT)} has a line that a merge has left: {found and found[0]}"


def test_no_module_is_too_long_to_read() -> None:
    limits = {"run.py": 250}
    lengths = {path: len(path.read_text().splitlines()) for path in python_files("src/lockstep")}
    too_long = [f"{path}: {length} lines" for path, length in lengths.items() if length > limits.get(path.name, 400)]
    assert not too_long, "\n".join(too_long)


def test_every_text_file_is_opened_in_utf_8() -> None:
    """Not in what the locale says: a run of one machine is read on another."""
    for path in [each for root in ("src/lockstep", "recipes", "launchers") for each in python_files(root)]:
        for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
            name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            modes = [value.value for value in call.args if isinstance(value, ast.Constant)]
            text = name in ("read_text", "write_text") or (name == "open" and {"r", "r+", "w", "a", "x"} & {*modes})
            assert not text or "encoding" in {each.arg for each in call.keywords}, f"{path}: line {call.lineno}"


# Names with several definitions on purpose: {name: why}.
SEVERAL: dict[str, str] = {}


def definitions(path: Path) -> set[str]:
    """The functions, classes and constants that a module defines at its top; TypeVars and __all__ are none."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and "TypeVar(" not in ast.unparse(node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
    return names - {"__all__"}


def test_a_name_has_one_meaning() -> None:
    """No function, class or constant is defined in two modules of src/lockstep, or in one of them and a recipe."""
    found: dict[str, list[str]] = {}
    for path in [*python_files("src/lockstep"), *python_files("recipes")]:
        for name in definitions(path):
            found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    library = {name for name, places in found.items() if any(place.startswith("src/") for place in places)}
    twice = {name: places for name, places in found.items() if len(places) > 1 and name in library}
    assert not twice.keys() - SEVERAL.keys(), "\n".join(
        f"{name}: {', '.join(twice[name])}" for name in sorted(twice.keys() - SEVERAL)
    )
    assert not SEVERAL.keys() - twice, "these have one definition each, and are no exceptions any more"


# Recipes ----------------------------------------------------------------------------------------------------------------


def code_lines(name: str) -> list[str]:
    """A recipe's lines of code, unparsed, so that comments and layout do not count."""
    tree = ast.parse((ROOT / "recipes" / f"{name}.py").read_text())
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    # An import of more names is still the import that single.py has.
    statements = [node for node in body if not isinstance(node, ast.Import | ast.ImportFrom)]
    code = re.sub(r"Run\[\w+\]", "Run", "\n".join(map(ast.unparse, statements)))  # with keys of its own or without
    lines = [line.strip() for line in code.splitlines()]
    return [line for line in lines if line and not line.startswith("@recipe")]


@pytest.mark.parametrize("name", REPLACES)
def test_a_recipe_without_its_technique_is_single(name: str) -> None:
    base, mine = code_lines("single"), code_lines(name)
    assert len(base) >= 15
    rest = iter(mine)
    missing = [line for line in base if line not in mine]
    assert missing == REPLACES[name]
    # What is left of single.py stands in the recipe in the same order.
    assert all(any(line == other for other in rest) for line in base if line not in missing)
    assert len(mine) > len(base) - len(missing), "a technique adds something"


def test_every_recipe_is_compared() -> None:
    recipes = {path.stem for path in (ROOT / "recipes").glob("[!_]*.py")} - {"single"} - TOOLS - DEMONSTRATIONS
    assert recipes == set(REPLACES)
    assert recipes


def test_every_recipe_opens_with_command_expectation_and_source() -> None:
    for path in (ROOT / "recipes").glob("[!_]*.py"):
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        for part in (f"python -m recipes.{path.stem}", "Expect: ", "Source: https://"):
            assert part in doc, f"{path.name} lacks {part!r}"


# Tests ------------------------------------------------------------------------------------------------------------------

# `make test` takes minutes and yet goes through everything once: what, and a test of it of which a case is not slow.
EVERYTHING = {
    "a real Slurm job": "cluster/test_slurm.py::test_two_nodes_of_two_ranks_train_what_this_machine_trains",
    "the cluster itself": "cluster/test_box.py::test_srun_reaches_two_hosts",
    "the documents' commands": "docs/test_commands.py::test_every_command_of_the_documents_runs",
    "torchrun": "ranks/test_start_paths.py::test_every_start_gives_the_same_run",
    "DDP": "ranks/test_same_training.py::test_ddp_has_the_loss_curve_of_one_process",
    "verify": "ranks/test_verify.py::test_on_other_numbers_of_ranks",
    "verify of something broken": "ranks/test_verify.py::test_a_broken_recipe_is_named",
    "verify of a program that is no recipe": "ranks/test_your_program.py::test_a_broken_program_is_named_by_its_row",
    "DeepSpeed": "ranks/test_deepspeed.py::test_every_stage_trains_what_ddp_does_to_the_last_bit",
    "Fabric": "ranks/test_fabric.py::test_fabric_trains_what_ddp_trains_to_the_last_bit",
    "Lightning's Trainer": "ranks/test_lightning_trainer.py::test_the_bits_are_those_of_the_same_technique",
    "Ray": "ranks/test_tune.py::test_a_search_ends_with_a_table_and_the_best_settings_as_a_command",
    "resuming": "ranks/test_resume.py::test_a_run_in_three_parts_is_the_run_in_one",
    "resuming on other ranks": "ranks/test_resume.py::test_one_four_two_three_ranks_train_as_one",
    "a kill and a restart": "ranks/test_preemption.py::test_a_rank_that_dies_is_started_again_from_the_last_checkpoint",
    "kills in a save": "ranks/test_fuzz.py::test_nothing_is_lost",
    "a damaged checkpoint": "ranks/checkpoints/test_checkpoint_faults.py::test_a_damaged_checkpoint_is_passed_over_by_name",
    "a hang": "ranks/test_hang.py::test_one_message_says_who_and_where",
    "a crash": "ranks/test_failures.py::test_an_exception_is_shown_once_from_the_rank_that_raised_it",
    "the doctor before a run": "ranks/test_preflight.py::test_this_machine_passes",
    "the doctor after a run": "ranks/test_postmortem.py::test_a_run_that_died_is_read",
    "compare": "ranks/test_compare.py::test_runs_take_turns",
    "compare's page in a browser": "ranks/test_compare.py::test_the_page_opens_in_a_browser_without_a_network",
    "out of memory": "ranks/test_fit.py::test_out_of_memory_ends_with_one_page",
}


def test_the_default_tests_go_through_everything() -> None:
    for what, test in EVERYTHING.items():
        file, _, name = test.partition("::")
        body = ast.parse((ROOT / "tests" / file).read_text()).body
        found = [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert found, f"{what}: there is no {test}"
        late = {"pytest.mark.slow", "pytest.mark.soak"} & set(map(ast.unparse, found[0].decorator_list))
        assert not late, f"{what}: {test} is left out of `make test`"


def test_the_cases_that_slow_except_names_are_there(pytestconfig: pytest.Config) -> None:
    """Of the files that run with this one. A case that was renamed would be left out of `make test` in silence."""
    assert pytestconfig.stash.get(NO_SUCH_CASE, []) == []


def test_unit_tests_start_no_ranks() -> None:
    for path in python_files("tests/unit"):
        code = path.read_text()
        assert not re.search(r"^from tests\.(ranks|cluster)", code, re.MULTILINE), path
        started = re.search(r"^from tests\.helpers\.harness import .*\b(run_ranks|execute|train)\b", code, re.MULTILINE)
        assert not started, f"{path} starts ranks: it belongs into tests/ranks"
