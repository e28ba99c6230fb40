"""What a user brings comes in by one door: `package.module:name`, found, loaded and checked here.

A name without a colon is built in. Each `Kind` below is one place where a name is taken: its config
key, the form that a user's function or class has, and the table of what is built in. docs/extend.md
describes them. Modules are looked for on `sys.path` (PYTHONPATH) and in the working directory.
Standard library only: `check` finds a name with it and imports nothing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, TypeAlias

from sfpo_megatron.errors import InputError
from sfpo_megatron.host.unwinding import failures

Foreign: TypeAlias = object
"""A value that a user's code returned or raised with: nothing is known of it yet."""

_NAME = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
EXPECTED = "package.module:name"


class PluginError(InputError):
    """A `package.module:name` cannot be used; `key` is the config key that names it."""

    def __init__(self, key: str, *, found: str, expected: str, fix: str) -> None:
        super().__init__(key, found, expected, fix)
        self.key = key


@dataclass(kw_only=True, frozen=True, slots=True, eq=False)  # hashed, in annotations
class Kind:
    """One place where a user's own code may stand."""

    key: str
    """The config key that takes the name."""
    form: str
    """The definition that a user writes, as Python: its parameters are what it is called with."""
    built_in: Mapping[str, str]
    """Name without a colon -> `package.module:name` of what it stands for."""
    services: tuple[str, ...] = ()
    """Further names without a colon, of what is no function: who takes them knows them."""
    families: Mapping[str, str] = field(default_factory=dict)
    """Beginning of a name, with its colon -> `package.module:name` of what takes the rest of it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names without a colon."""
        return (*self.built_in, *self.services)

    def knows(self, name: str) -> bool:
        """Whether `name` is built in or has the form `package.module:name`."""
        if name.startswith(tuple(self.families)):
            return bool(self.rest_of(name))
        return name in self.names or _NAME.fullmatch(name) is not None

    def rest_of(self, name: str) -> str:
        """What a name of a family has behind its beginning; empty for other names."""
        start = next((start for start in self.families if name.startswith(start)), None)
        return "" if start is None else name.removeprefix(start)

    @property
    def expected(self) -> str:
        """The names that `knows` accepts, for a message."""
        names = (*self.names, *(f"{start}NAME" for start in self.families))
        return f"one of {', '.join(names)}, or {EXPECTED}" if names else EXPECTED

    def load(self, name: str, *, key: str | None = None) -> Any:
        """The function or class that `name` stands for; PluginError if there is none such."""
        rest = self.rest_of(name)
        name = self.families[name.removesuffix(rest)] if rest else self.built_in.get(name, name)
        return load(name, key=key or self.key, form=self.form)

    def find(self, name: str, *, key: str | None = None) -> None:
        """Raise PluginError if `load` would fail, as far as can be told without an import."""
        if name not in self.names and not self.rest_of(name):
            find(name, key=key or self.key, form=self.form)


LOSS = Kind(
    key="objective.loss",
    form="def loss(tokens: PolicyTokens, config: ObjectiveConfig)"
    " -> Tensor | tuple[Tensor, dict[str, Tensor]]",
    built_in={
        name: f"sfpo_megatron.objectives.surrogate:{name}"
        for name in ("ppo_clip", "cispo", "no_clip")
    },
)
ADVANTAGE = Kind(
    key="objective.advantage",
    form="def advantages(rewards: Tensor, group_size: int, config: ObjectiveConfig) -> Tensor",
    built_in={
        name: f"sfpo_megatron.objectives.advantage:{name}"
        for name in ("grpo", "rloo", "reinforce_pp")
    },
)
REWARD = Kind(
    key="reward.function",
    form="def score(response: str, prompt: Problem) -> float | Mapping[str, float]",
    built_in={
        name: f"sfpo_megatron.rewards.{name}:score"
        for name in (
            *("reasoning_gym", "exact_match", "last_number", "math", "math_boxed"),
            *("multiple_choice", "tagged_answer", "format", "code"),
        )
    },
    services=("http",),
)
BATCHED_REWARD = Kind(  # reward.batched: true
    key="reward.function",
    form="def score(responses: list[str], prompts: list[Problem])"
    " -> list[float | Mapping[str, float]]",
    built_in={},
)
SOURCE = Kind(
    key="data.train.N.source",
    form="def rows(source: DataSource, seed: int) -> Iterator[Mapping[str, Any]]",
    built_in={
        name: f"sfpo_megatron.data.{name}:rows"
        for name in ("reasoning_gym", "jsonl", "parquet", "hf")
    },
)
SINK = Kind(
    key="tracking.sinks",
    form="class Sink:\n    def __init__(self, run: RunInfo): ...",
    built_in={
        "console": "sfpo_megatron.tracking.console:ConsoleSink",
        "jsonl": "sfpo_megatron.tracking.jsonl:JsonlSink",
        "tensorboard": "sfpo_megatron.tracking.tensorboard:TensorBoardSink",
        "wandb": "sfpo_megatron.tracking.wandb:WandbSink",
        "mlflow": "sfpo_megatron.tracking.mlflow:MlflowSink",
    },
)
ENVIRONMENT = Kind(
    key="rollout.environment",
    form="class Environment:\n"
    "    def __init__(self, tokenizer): ...\n"
    "    async def run(self, prompt: Prompt, generate: Generate, seed: int) -> Episode: ...",
    built_in={
        "single_turn": "sfpo_megatron.rollout.episodes:SingleTurn",
        "math_tool": "sfpo_megatron.rollout.environments.tool_environment:ToolEnvironment",
        "agent": "sfpo_megatron.rollout.environments.agent:AgentEnvironment",
    },
    families={
        "verifiers:": "sfpo_megatron.rollout.environments.verifiers_play:VerifiersEnvironment"
    },
)
AGENT = Kind(
    key="rollout.environment_args.agent",
    form="async def agent(base_url: str, api_key: str, prompt: Prompt, seed: int)"
    " -> float | Mapping[str, float] | None",
    built_in={},
)
TOOL = Kind(
    key="rollout.environment_args.tools",
    form="def tool(*arguments) -> str",
    built_in={
        name: f"sfpo_megatron.tools.{name}:{name}" for name in ("calculator", "python", "search")
    },
)


# ---- load --------------------------------------------------------------------------------------


def load(name: str, *, key: str, form: str) -> Any:
    """The function or class `package.module:name`; imports its module.

    Raises PluginError if the name is malformed, the module does not import, has no such name, or
    what it has cannot be called with the parameters of `form`.
    """
    module_name, attribute = _parts(name, key)
    search_working_directory()
    try:
        module = importlib.import_module(module_name)
    except failures() as error:  # whatever a user's module does while it is imported
        raise PluginError(
            key,
            found=f"{name!r}, but {module_name} does not import ({type(error).__name__}: {error})",
            expected=form,
            fix="put its folder on PYTHONPATH or correct the name",
        ) from error
    loaded = getattr(module, attribute, None)
    if not callable(loaded):
        raise _no_such_name(name, key, form, str(module.__file__))
    try:
        if not _takes_any(form):
            inspect.signature(loaded).bind(*parameters(form))
    except TypeError as error:
        raise _wrong_form(name, key, form, str(error)) from error
    except ValueError:
        pass  # a builtin without a signature: its first call will tell
    return loaded


def search_working_directory() -> None:
    """Let imports find modules in the working directory, after all else, as `python -m` does."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def search_path() -> str:
    """PYTHONPATH for a process elsewhere that is to find the same modules as this one."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    entries = [os.path.abspath(entry) for entry in given if entry] + [os.getcwd()]
    return os.pathsep.join(dict.fromkeys(entries))


def parameters(form: str) -> list[str]:
    """Names of the positional parameters of a `def` or, of a class, of its `__init__`."""
    (node,) = ast.parse(f"{form}: ..." if form.startswith(("def", "async")) else form).body
    if isinstance(node, ast.ClassDef):
        inits = [d for d in node.body if isinstance(d, ast.FunctionDef) and d.name == "__init__"]
        return _positional(inits[0])[1:] if inits else []
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), f"not a definition: {form}"
    return _positional(node)


def _takes_any(form: str) -> bool:
    """Whether what is loaded may have any parameters: a tool, which says itself what they are."""
    return "(*" in form


def _positional(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]


def _parts(name: str, key: str) -> tuple[str, str]:
    if _NAME.fullmatch(name) is None:
        raise PluginError(
            key,
            found=repr(name),
            expected=EXPECTED,
            fix="name your module and what to take from it, like my_code:my_function",
        )
    module, _, attribute = name.partition(":")
    return module, attribute


def _no_such_name(name: str, key: str, form: str, file: str) -> PluginError:
    module, _, attribute = name.partition(":")
    return PluginError(
        key,
        found=f"nothing that can be called {attribute!r} in {module} ({file})",
        expected=form,
        fix="correct the name",
    )


def _wrong_form(name: str, key: str, form: str, why: str) -> PluginError:
    return PluginError(
        key,
        found=f"{name}, which cannot be called with ({', '.join(parameters(form))}) ({why})",
        expected=form,
        fix="change its parameters",
    )


# ---- find, without an import -------------------------------------------------------------------


def find(name: str, *, key: str, form: str) -> None:
    """Raise PluginError if `load` would fail, as far as the module's source tells: nothing of it
    is run."""
    module_name, attribute = _parts(name, key)
    spec = _spec(module_name)
    if spec is None:
        raise PluginError(
            key,
            found=f"{name!r}, but no module {module_name} on PYTHONPATH or in {os.getcwd()}",
            expected=form,
            fix="put its folder on PYTHONPATH or correct the name",
        )
    if spec.origin is None or not spec.origin.endswith(".py"):
        return  # compiled, or a namespace: only an import can tell
    try:
        tree = ast.parse(Path(spec.origin).read_bytes(), filename=spec.origin)
    except (SyntaxError, ValueError) as error:
        raise PluginError(
            key,
            found=f"{name!r}, but {spec.origin} is not Python ({error})",
            expected=form,
            fix="correct the file",
        ) from error
    defined: dict[str, list[ast.AST]] = {}
    for one, node in _definitions(tree):
        defined.setdefault(one, []).append(node)
    if attribute in defined:
        _check_any_form(defined[attribute], name, key, form)
    elif "*" not in defined and "__getattr__" not in defined:
        raise _no_such_name(name, key, form, spec.origin)


def _spec(module_name: str) -> ModuleSpec | None:
    """The module's spec; `importlib.util.find_spec` would import the packages above it."""
    path: list[str] | None = [entry or os.getcwd() for entry in sys.path] + [os.getcwd()]
    spec = None
    for part in module_name.split("."):
        # By its own name alone: a folder without __init__.py would ask sys.modules for its parent.
        spec = PathFinder.find_spec(part, path)
        if spec is None:
            return None
        found = spec.submodule_search_locations
        path = list(found) if found is not None else []
    return spec


def _definitions(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of everything that a module's top level defines, `*` for a star import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield (alias.asname or alias.name).split(".")[0], node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        elif not isinstance(node, ast.Lambda):
            yield from _definitions(node)


def _check_any_form(nodes: list[ast.AST], name: str, key: str, form: str) -> None:
    """Check that one of several definitions, in the branches of an `if` or a `try`, fits."""
    for node in nodes[:-1]:
        try:
            return _check_form(node, name, key, form)
        except PluginError:
            continue
    _check_form(nodes[-1], name, key, form)


def _check_form(node: ast.AST, name: str, key: str, form: str) -> None:
    """A definition whose parameters do not take those of the form; decorators may change them."""
    if isinstance(node, ast.ClassDef):
        if node.bases or node.decorator_list:
            return  # __init__ may be inherited or made
        inits = [d for d in node.body if isinstance(d, ast.FunctionDef) and d.name == "__init__"]
        if not inits:
            if parameters(form):
                raise _wrong_form(name, key, form, "its class has no __init__")
            return
        node, own = inits[0], 1
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        own = 0
    else:
        return
    if node.decorator_list or _takes_any(form):
        return
    arguments, given = node.args, len(parameters(form)) + own
    positional = len(arguments.posonlyargs) + len(arguments.args)
    if given > positional and arguments.vararg is None:
        raise _wrong_form(name, key, form, f"it takes {positional - own}")
    required = positional - len(arguments.defaults)
    if given < required:
        raise _wrong_form(name, key, form, f"it wants {required - own}")
    if any(default is None for default in arguments.kw_defaults):
        raise _wrong_form(name, key, form, "it has a keyword-only parameter without a default")
