r"""Symbolic Discovery of Optimization Algorithms: the program search that found Lion.

Xiangning Chen, Chen Liang, Da Huang, Esteban Real et al. NeurIPS 2023, arXiv 2302.06675.

Idea
----
An optimizer is a short program of tensor functions. Starting from AdamW, ageing evolution mutates programs and keeps
those that train a small proxy task best; most children are never trained, since abstract execution shows that they are
invalid or compute the same as a program seen before.

Algorithm
---------
A program maps weights, gradient, two slots (zero at first, shaped like w) and the schedule's multiplier to an update::

    u, m, v = train(w, g, m, v, lr);   w <- w - u                    flat, one function a line, no branches

Ageing evolution over the sequence of all programs p_0, p_1, ... ever born (every p_i with i < 0 is `init_program`)::

    parent(i) = argmax fitness over T draws, uniform, from { p_j : i - L - P < j <= i - L }
    p_i       = mutate(parent(i))           insert : delete : modify = 1 : 1 : 1, until abstract execution accepts it
    f_i       = cache[hash(p_i)], or evaluate(p_i) if there is none

P is `population_size`, T `tournament_size`: the population is the last P programs, the oldest drops out. L is
`in_flight`: child i does not wait for the L - 1 before it, which may be in evaluation. So the window and the random
numbers (a generator for each i, from `random_state` and i) do not depend on timing, and the search is the same for
every `n_jobs`, and the same in one `fit`, in several, or after a Ctrl-C and `load`. L = 1 is the textbook's.

Mutation: a new statement has a uniform place, function, arguments (a visible variable, or a new constant ~ N(0, 1)) and
target (a fresh name, or a visible variable of the same kind); a modified argument becomes another variable of its kind,
a modified constant is multiplied by 2^a, a ~ N(0, 1), within +-1e10.

Abstract execution (i) finds the kind of every value, number < one number per leaf < tensor, and refuses what is not
defined; (ii) hashes values: inputs by position, fn(args) by the name and the hashes of its arguments, the program by
what it returns. The hash does not see names, dead statements or the order of independent ones. As in the released
code it does see the order of arguments: a + b and b + a differ; (iii) marks the live statements: the others stay in
the genome, where mutation may revive them, and are never executed.

Code and paper
--------------
Read: google/automl ``hero`` (the space, without the evolution) and the card of this project, not the paper's text.

* ``hero`` divides by b + 1e-8. So "AdamW without bias correction and eps" has eps = 1e-8 after all, and weights that
  never had a gradient stay finite. Followed; `shoestring.search._program_functions` lists what else differs.
* ``hero`` inserts the constant 1.0 and then mutates it; the paper draws from N(0, 1). The paper is followed.
* ``hero`` hashes constants as printed in float32, here all digits count.
* A fourth mutation weight, 0 by default, is for `hero`'s ``hparam_tune``: multiply one constant, change nothing else.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import os
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from torch import Tensor

from shoestring._files import atomic_path
from shoestring._signals import uninterrupted
from shoestring.search._program_functions import FUNCTIONS, NUMBER, TENSOR
from shoestring.search._program_workers import Here, Outcome, Workers

__all__ = [
    "ADAMW",
    "DEFAULT",
    "LION",
    "Program",
    "ProgramSearch",
    "Statement",
    "mutate",
    "program_to_optimizer",
    "random_program",
]

DEFAULT = tuple(FUNCTIONS)  # names of the 44 functions
MAX_CONSTANT = 1e10
BLOCK = 2**15  # elements of a block that an optimizer takes through a program at a time: its temporaries stay in cache
TRIES = 1000  # draws of one kind of mutation before another kind is drawn

ADAMW = """\
def train(w, g, m, v, lr):
    g2 = square(g)
    m = interp(g, m, 0.9)
    v = interp(g2, v, 0.999)
    s = sqrt(v)
    u = m / s
    wd = w * 0.01
    u = u + wd
    lr = lr * 0.001
    u = u * lr
    return u, m, v
"""
LION = """\
def train(w, g, m, v, lr):
    m = interp(g, v, 0.9)
    v = interp(g, m, 1.1)
    u = sign(m)
    wd = w * 0.1
    u = u + wd
    lr = lr * 0.0001
    u = u * lr
    return u, m, v
"""
_INFIX = {"+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div}
_OPERATORS = {node: name for name, node in _INFIX.items()}
Argument = str | float  # a variable, or a constant


@dataclass(frozen=True)
class Statement:
    """``target = function(*args)``."""

    target: str
    function: str
    args: tuple[Argument, ...]

    def __str__(self) -> str:
        args = [a if isinstance(a, str) else repr(a) for a in self.args]
        if self.function in _INFIX:
            return f"{self.target} = {args[0]} {self.function} {args[1]}"
        return f"{self.target} = {self.function}({', '.join(args)})"


@dataclass(frozen=True)
class Program:
    """An optimizer as a list of statements. ``str`` prints it, `parse` reads it.

    Attributes
    ----------
    statements : tuple of Statement
    inputs : 5 names: weights, gradient, first slot, second slot, multiplier of the learning rate
    outputs : 3 names: update, first slot, second slot

    Examples
    --------
    >>> program = Program.parse(LION)
    >>> print(program.simplify())
    def train(w, g, m, v, lr):
        m = interp(g, v, 0.9)
        v = interp(g, m, 1.1)
        u = sign(m)
        wd = w * 0.1
        u = u + wd
        lr = lr * 0.0001
        u = u * lr
        return u, m, v
    >>> update, m, v = program.compile()(0.0, -2.0, 0.0, 0.0, 1.0)
    >>> update
    -0.0001
    """

    statements: tuple[Statement, ...]
    inputs: tuple[str, ...] = ("w", "g", "m", "v", "lr")
    outputs: tuple[str, ...] = ("u", "m", "v")

    @classmethod
    def parse(cls, text: str) -> Program:
        """Read what ``str`` prints. The text is never executed as Python.

        Raises
        ------
        ValueError
            With the line: for what is not of the form above; an unknown function (with the nearest known one), a wrong
            number of arguments, a variable before its assignment, a constant that is not finite, a value of the wrong
            kind, a missing return.
        """
        try:
            body = ast.parse(text).body
        except SyntaxError as error:
            raise ValueError(f"line {error.lineno}: not a program: {error.msg}") from None
        if len(body) != 1 or not isinstance(body[0], ast.FunctionDef):
            raise ValueError("a program must be one function, `def train(w, g, m, v, lr):`")
        train = body[0]
        inputs = tuple(a.arg for a in train.args.args)
        if len(inputs) != 5 or ast.unparse(train.args) != ", ".join(inputs):
            raise ValueError(
                f"line {train.lineno}: a program takes 5 inputs (w, g, m, v, lr), got `{ast.unparse(train.args)}`"
            )
        *nodes, last = train.body
        if not isinstance(last, ast.Return):
            raise ValueError(f"line {last.lineno}: the last line must be `return u, m, v`: the return is missing")
        names = last.value.elts if isinstance(last.value, ast.Tuple) else []
        outputs = tuple(name.id for name in names if isinstance(name, ast.Name))
        if len(outputs) != 3 or len(names) != 3:
            raise ValueError(f"line {last.lineno}: a program must return three variables, `return u, m, v`")
        statements = tuple(_statement(node) for node in nodes)
        program = cls(statements, inputs, outputs)
        program.check([node.lineno for node in train.body])
        return program

    def __str__(self) -> str:
        lines = [f"def train({', '.join(self.inputs)}):", *map(str, self.statements)]
        return "\n    ".join([*lines, f"return {', '.join(self.outputs)}"])

    def check(self, lines: Sequence[int] | None = None) -> None:
        """Abstract execution: raise a ValueError, with the line as printed, if the program is not valid."""
        fault = _abstract(self)[1]
        if fault is not None:
            i, message = fault
            raise ValueError(f"line {lines[i] if lines else i + 2}: {message}")

    def live(self) -> tuple[Statement, ...]:
        """The statements that what is returned depends on."""
        return _liveness(self)[0]

    def hash(self) -> str:
        """Equal for programs that compute the same by the same functions of the same arguments in the same order."""
        values = {name: f"input {i}" for i, name in enumerate(self.inputs)}
        for s in self.live():
            args = ",".join(values[a] if isinstance(a, str) else repr(a) for a in s.args)
            values[s.target] = blake2b(f"{s.function}({args})".encode(), digest_size=12).hexdigest()
        return blake2b(" ".join(values[o] for o in self.outputs).encode(), digest_size=12).hexdigest()

    def simplify(self, evaluate: Callable[[Program], float] | None = None) -> Program:
        """Strip dead statements; with `evaluate`, then also each statement without which the fitness does not drop.

        The first form changes no bit of what is returned. Both are idempotent (the second, if `evaluate` is
        deterministic). An exception of `evaluate` is not caught.
        """
        program = replace(self, statements=self.live())
        if evaluate is None:
            return program
        fitness, i = evaluate(program), 0
        while i < len(program.statements):
            shorter = replace(program, statements=_without(program.statements, i))
            shorter = replace(shorter, statements=shorter.live())
            if _abstract(shorter)[1] is None and (found := evaluate(shorter)) >= fitness:
                program, fitness, i = shorter, found, 0
            else:
                i += 1
        return program

    def compile(self) -> Callable[..., tuple[Any, Any, Any]]:
        """A function ``(w, g, m, v, lr) -> (update, m, v)`` of the live statements.

        w, g, m, v are numpy arrays, torch tensors, or lists of such, a leaf for each parameter; lr is a float (or a
        0-d tensor). Its inputs are not written to. Invalid operations give NaN, without a warning.
        """
        needed, steps = set(self.outputs), []
        for s in reversed(self.live()):
            last_uses = {a for a in (*_variables(s), s.target) if a not in needed}  # free them: they are large
            steps.append((s.target, FUNCTIONS[s.function].run, s.args, tuple(last_uses - {s.target})))
            needed.discard(s.target)
            needed.update(_variables(s))
        steps.reverse()

        def train(w: Any, g: Any, m: Any, v: Any, lr: Any) -> tuple[Any, Any, Any]:
            values = dict(zip(self.inputs, (w, g, m, v, lr), strict=True))
            with np.errstate(all="ignore"):
                for target, run, args, last_uses in steps:
                    found = run(*[values[a] if a.__class__ is str else a for a in args])
                    for name in last_uses:
                        del values[name]
                    values[target] = found
            u, m, v = (values[name] for name in self.outputs)
            return u, m, v

        return train


def _statement(node: ast.stmt) -> Statement:
    line = f"line {node.lineno}"
    if isinstance(node, ast.Return):
        raise ValueError(f"{line}: `return` must be the last line")
    if not (isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)):
        raise ValueError(f"{line}: a statement must be `variable = function(arguments)`, got `{ast.unparse(node)}`")
    call = node.value
    if isinstance(call, ast.BinOp) and type(call.op) in _OPERATORS:
        name, args = _OPERATORS[type(call.op)], [call.left, call.right]
    elif isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.keywords:
        name, args = call.func.id, call.args
    else:
        raise ValueError(f"{line}: expected one function of the search, or + - * /, got `{ast.unparse(call)}`")
    return Statement(node.targets[0].id, name, tuple(_argument(a, line) for a in args))


def _argument(node: ast.expr, line: str) -> Argument:
    if isinstance(node, ast.Name):
        return node.id
    sign, number = 1.0, node
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, number = -1.0, node.operand
    if not (isinstance(number, ast.Constant) and type(number.value) in (int, float)):
        raise ValueError(f"{line}: an argument must be a variable or a number, got `{ast.unparse(node)}`")
    try:
        value = sign * float(number.value)  # type: ignore[arg-type]
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{line}: a constant must be finite, got `{ast.unparse(node)}`")
    return value


def _liveness(program: Program) -> tuple[tuple[Statement, ...], set[str]]:
    """The live statements, and the inputs that they (or what is returned) read."""
    needed, live = set(program.outputs), []
    for s in reversed(program.statements):
        if s.target in needed:
            needed.remove(s.target)
            needed.update(_variables(s))
            live.append(s)
    return tuple(reversed(live)), needed


def _variables(s: Statement) -> list[str]:
    return [a for a in s.args if isinstance(a, str)]


def _without(statements: tuple[Statement, ...], i: int) -> tuple[Statement, ...]:
    return statements[:i] + statements[i + 1 :]


# ---- abstract execution and mutation


def _abstract(program: Program) -> tuple[list[dict[str, int]], tuple[int, str] | None]:
    """Kinds of the visible variables before each statement and at the end, and the first fault: its place, and what."""
    kinds = dict.fromkeys(program.inputs[:4], TENSOR) | {program.inputs[4]: NUMBER}
    before: list[dict[str, int]] = []
    if len(kinds) != 5:
        return before, (-1, f"the inputs must have five different names, got {', '.join(program.inputs)}")
    for i, s in enumerate(program.statements):
        before.append(kinds.copy())
        if s.function not in FUNCTIONS:
            return before, (i, _unknown(s.function))
        function = FUNCTIONS[s.function]
        if len(s.args) != function.arity:
            plural = "s" * (function.arity != 1)
            return before, (i, f"{s.function} takes {function.arity} argument{plural}, got {len(s.args)}")
        for a in s.args:
            if isinstance(a, str) and a not in kinds:
                return before, (i, f"variable {a!r} is used before it is assigned")
            if isinstance(a, float) and not math.isfinite(a):
                return before, (i, f"a constant must be finite, got {a}")
        found = function.result(*(kinds[a] if isinstance(a, str) else NUMBER for a in s.args))
        if found is None:
            return before, (i, f"{s.function} is not defined for arguments of these kinds: `{s}`")
        kinds[s.target] = found
    before.append(kinds)
    for name in program.outputs:
        if name not in kinds:
            return before, (len(program.statements), f"variable {name!r} is returned but never assigned")
        if kinds[name] != TENSOR:
            return before, (len(program.statements), f"{name!r} is returned and must have the shape of the weights")
    return before, None


def _unknown(function: Any) -> str:
    nearest = difflib.get_close_matches(str(function), DEFAULT, 1, cutoff=0.0)[0]
    return f"unknown function {function!r}; the nearest known one is {nearest!r}"


def mutate(
    program: Program,
    rng: np.random.Generator,
    weights: Sequence[float] = (1, 1, 1),
    functions: Sequence[str] = DEFAULT,
    max_statements: int | None = None,
) -> Program:
    """A valid program, one mutation away.

    Parameters
    ----------
    program : Program
        A valid one.
    rng : numpy.random.Generator
    weights : of insertion, deletion, modification; and, optionally, of multiplying a constant (0 if not given)
    functions : what an inserted statement may call
    max_statements : int, optional
        No insertion into a program as long as this.

    Raises
    ------
    ValueError
        If no mutation of a kind with a weight > 0 is possible, e.g. of constants in a program without any.

    Examples
    --------
    >>> child = mutate(Program.parse(ADAMW), np.random.default_rng(0), (0, 0, 0, 1))
    >>> [str(s) for s in child.statements if s not in Program.parse(ADAMW).statements]
    ['wd = w * 0.0155...']
    """
    left = dict(zip((_insert, _delete, _modify, _tune), map(float, weights), strict=False))
    if max_statements is not None and len(program.statements) >= max_statements:
        left[_insert] = 0.0
    before = _abstract(program)[0]
    while total := sum(left.values()):
        kinds = list(left)
        kind = kinds[rng.choice(len(kinds), p=[left[k] / total for k in kinds])]
        for _ in range(TRIES):
            child = kind(program, before, rng, functions)
            if child is not None and _abstract(child)[1] is None:
                return child
        left[kind] = 0.0
    raise ValueError(f"no mutation with weights {tuple(weights)} is possible of\n{program}")


def _insert(program: Program, before: list[dict[str, int]], rng: np.random.Generator, functions: Any) -> Program:
    place = int(rng.integers(len(program.statements) + 1))
    s = _random_statement(program, before[place], rng, functions)
    return replace(program, statements=program.statements[:place] + (s,) + program.statements[place:])


def _random_statement(program: Program, kinds: dict[str, int], rng: np.random.Generator, functions: Any) -> Statement:
    visible = list(kinds)
    while True:
        function = functions[rng.integers(len(functions))]
        chosen = [int(rng.integers(len(visible) + 1)) for _ in range(FUNCTIONS[function].arity)]
        args = tuple(visible[j] if j < len(visible) else float(rng.standard_normal()) for j in chosen)
        kind = FUNCTIONS[function].result(*(kinds[a] if isinstance(a, str) else NUMBER for a in args))
        if kind is not None:
            taken = {*program.inputs, *(s.target for s in program.statements)}
            fresh = next(f"t{i}" for i in range(len(taken) + 1) if f"t{i}" not in taken)
            targets = [fresh, *(name for name in visible if kinds[name] == kind)]
            return Statement(targets[rng.integers(len(targets))], function, args)


def _delete(program: Program, before: Any, rng: np.random.Generator, functions: Any) -> Program | None:
    if not program.statements:
        return None
    return replace(program, statements=_without(program.statements, int(rng.integers(len(program.statements)))))


def _modify(program: Program, before: list[dict[str, int]], rng: np.random.Generator, functions: Any) -> Program | None:
    candidates = [i for i, s in enumerate(program.statements) if s.args]
    if not candidates:
        return None
    i = candidates[rng.integers(len(candidates))]
    j = int(rng.integers(len(program.statements[i].args)))
    old = program.statements[i].args[j]
    if isinstance(old, float):
        return _with_argument(program, i, j, _scaled(old, rng))
    others = [name for name, kind in before[i].items() if name != old and kind == before[i][old]]
    return _with_argument(program, i, j, others[rng.integers(len(others))]) if others else None


def _tune(program: Program, before: Any, rng: np.random.Generator, functions: Any) -> Program | None:
    places = [(i, j) for i, s in enumerate(program.statements) for j, a in enumerate(s.args) if isinstance(a, float)]
    if not places:
        return None
    i, j = places[rng.integers(len(places))]
    return _with_argument(program, i, j, _scaled(program.statements[i].args[j], rng))


def _scaled(constant: Any, rng: np.random.Generator) -> float:
    return float(np.clip(constant * 2.0 ** rng.standard_normal(), -MAX_CONSTANT, MAX_CONSTANT))


def _with_argument(program: Program, i: int, j: int, new: Argument) -> Program:
    s = program.statements[i]
    s = replace(s, args=(*s.args[:j], new, *s.args[j + 1 :]))
    return replace(program, statements=(*program.statements[:i], s, *program.statements[i + 1 :]))


def random_program(rng: np.random.Generator, n_statements: int = 9, functions: Sequence[str] = DEFAULT) -> Program:
    """`n_statements` statements drawn one after another as mutation draws them; the update is the last tensor assigned.

    The paper's yardstick: of two million random programs none trained better than AdamW.

    Examples
    --------
    >>> program = random_program(np.random.default_rng(0), 5)
    >>> len(program.statements)
    5
    """
    program = Program((), outputs=("g", "m", "v"))
    while True:
        kinds = _abstract(program)[0][-1]
        if len(program.statements) == n_statements:
            return program
        s = _random_statement(program, kinds, rng, functions)
        longer = replace(program, statements=(*program.statements, s))
        if _abstract(longer)[0][-1][s.target] == TENSOR:
            longer = replace(longer, outputs=(s.target, "m", "v"))
        program = longer


# ---- optimizers


def program_to_optimizer(program: Program) -> type[_ProgramOptimizer]:
    """The program as a `torch.optim.Optimizer`: ``w <- w - update``.

    Parameters
    ----------
    program : Program

    Returns
    -------
    A class ``(params, lr=1.0, *, maximize=False)``
        `lr` is the program's input: 1.0 for the program's own learning rate, and what a scheduler multiplies. State is
        one zero tensor per slot and parameter, called as the program calls its slots (``m``, ``v``), in the dtype of
        the parameter; a slot that no update ever depends on is left out (a Lion program has one).

    Notes
    -----
    A leaf is a parameter with a gradient; ``global_norm``, ``clip_by_global_norm``, ``dot`` and ``cosine_sim`` are over
    all leaves of one param group, which must then be on one device. Without these and ``norm`` a program runs in
    blocks of 32,768 elements. NaN in a gradient is not hidden: it reaches the coordinates that the program lets it.
    Sparse gradients and complex parameters are refused. A tensor as `lr` is not read, so there is no wait for a GPU.

    Raises
    ------
    ValueError
        If the program is not valid.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> optimizer = program_to_optimizer(Program.parse(LION))([weight], lr=100)
    >>> (weight * torch.tensor([3.0, -5.0])).sum().backward()
    >>> optimizer.step()
    >>> weight
    Parameter containing:
    tensor([0.9890, 1.0090], requires_grad=True)
    """
    program.check()
    kept = _kept_slots(program)
    update, *slots = program.outputs
    trained = replace(program, outputs=(update, *(slots[k] if k in kept else update for k in (0, 1))))
    attributes = {
        "program": program,
        "_slots": [(k, program.inputs[2 + k]) for k in kept],
        "_train": staticmethod(trained.compile()),
        "_by_blocks": all(FUNCTIONS[s.function].elementwise for s in trained.live()),
    }
    return type("ProgramOptimizer", (_ProgramOptimizer,), attributes)


class _ProgramOptimizer(torch.optim.Optimizer):
    program: Program
    _slots: list[tuple[int, str]]  # those kept: number and name
    _train: Callable[..., tuple[Any, Any, Any]]
    _by_blocks: bool

    def __init__(self, params: Any, lr: float | Tensor = 1.0, *, maximize: bool = False) -> None:
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        elif isinstance(lr, bool) or not isinstance(lr, Real) or not 0 <= lr < math.inf:
            raise ValueError(f"lr must be a finite number >= 0, got {lr!r}")
        super().__init__(params, {"lr": lr, "maximize": maximize})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters with a gradient; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for p in (p for _, leaves in todo for p in leaves):
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"a program does not support sparse gradients, got layout {p.grad.layout}")
            if p.is_complex():
                raise RuntimeError(f"a program does not support complex parameters, got {p.dtype}")
        for group, leaves in todo:
            lr = group["lr"] if isinstance(group["lr"], Tensor) else float(group["lr"])
            g = [-p.grad if group["maximize"] else p.grad for p in leaves]
            for p in leaves:
                for _, name in self._slots:
                    if name not in self.state[p]:
                        self.state[p][name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            slots = [[self.state[p][name] for p in leaves] for _, name in self._slots]
            if not self._by_blocks:
                if leaves:
                    self._update(leaves, g, slots, lr)
                continue
            for tensors in zip(leaves, g, *slots, strict=True):
                blocks = [tensors]
                if all(t.is_contiguous() for t in tensors):
                    blocks = list(zip(*(t.view(-1).split(BLOCK) for t in tensors), strict=True))
                for w, gradient, *of_block in blocks:
                    self._update([w], [gradient], [[t] for t in of_block], lr)
        return loss

    def _update(self, w: list[Tensor], g: list[Tensor], slots: list[list[Tensor]], lr: Any) -> None:
        """w <- w - u, and the slots, all in place."""
        given: list[Any] = [None, None]
        for (k, _), slot in zip(self._slots, slots, strict=True):
            given[k] = slot
        u, *found = self._train(w, g, *given, lr)
        # An output may be an input that nothing was assigned to; it must not be overwritten before it is read.
        inputs = (w, g, *slots)
        new = [found[k] for k, _ in self._slots]
        new = [[t.clone() for t in x] if any(x is y for y in inputs) else x for x in new]
        for p, update in zip(w, u, strict=True):
            p.sub_(update)
        for slot, values in zip(slots, new, strict=True):
            for old, value in zip(slot, values, strict=True):
                old.copy_(value)


def _kept_slots(program: Program) -> list[int]:
    """The slots (0, 1) that some update depends on, now or later."""
    kept: list[int] = []
    while True:
        outputs = (program.outputs[0], *(program.outputs[1 + k] if k in kept else program.outputs[0] for k in (0, 1)))
        read = _liveness(replace(program, outputs=outputs))[1]
        found = [k for k in (0, 1) if program.inputs[2 + k] in read]
        if found == kept:
            return kept
        kept = found


# ---- the search


class ProgramSearch(BaseEstimator):
    """Ageing evolution of programs, from AdamW, by the fitness that `evaluate` gives them.

    Parameters
    ----------
    evaluate : callable, ``evaluate(program) -> float``
        Higher is better: e.g. minus the validation loss of a small model trained by `program_to_optimizer`. It should
        be deterministic. If it raises, returns NaN or +inf, ends its process or takes more than the time limit, the
        fitness is -inf and the search goes on.
    init_program : Program or str, default="adamw"
        A program, its text, or "adamw" or "lion". (When fitness no longer rises, the paper restarts from the best.)
    functions : sequence of str, default=DEFAULT
        What inserted statements may call: all 44.
    population_size, tournament_size : int, default=1000, 2
        The paper's.
    mutation_weights : 3 or 4 numbers, default=(1, 1, 1)
        Of insertion, deletion and modification, as released; a fourth, for multiplying a constant and nothing else:
        ``(0, 0, 0, 1)`` only tunes.
    max_statements : int, optional
        No insertion into a program as long as this.
    n_jobs : int, default=1
        Processes to evaluate in; -1 for one a core. 1, without a time limit: in this process, one thread. With workers,
        a script must keep its work under ``if __name__ == "__main__":``. Results do not depend on it.
    time_limit : float, optional
        Seconds for one evaluation; then its process is killed. (With it, or `n_jobs` > 1, nothing that `evaluate` does
        to its process can hurt this one.)
    in_flight : int, default=16
        L of the module's docstring: more than `n_jobs`, for no worker to wait. Part of what is searched; ours.
    random_state : int or None, default=0

    Attributes
    ----------
    best_program_, best_fitness_ : the first of the fittest programs, with its dead statements
    history_ : list of float, the best fitness after each child
    population_ : list of (Program, float), oldest first
    n_children_, n_evaluations_, n_failed_ : int
        Children born; evaluations run, that of the initial program too; and how many of those failed.
    failures_ : dict, how often each reason came
    cache_hit_rate_ : float, share of the children that did the same as an earlier one
    seed_ : int

    Examples
    --------
    >>> def evaluate(program):  # one step from w = 2 should lead to 0
    ...     update, m, v = program.compile()(np.full(3, 2.0), np.full(3, 4.0), np.zeros(3), np.zeros(3), 1.0)
    ...     return -float(abs(2.0 - update).sum())
    >>> search = ProgramSearch(evaluate, population_size=20).fit(200)
    >>> search.best_fitness_ > search.history_[0]
    True
    """

    best_program_: Program
    best_fitness_: float
    history_: list[float]
    n_children_: int
    n_evaluations_: int
    failures_: Counter[str]
    seed_: int
    _init: Program
    _init_fitness: float
    _cache: dict[str, float]
    _births: deque[tuple[Program, float]]
    _hits: int

    def __init__(
        self,
        evaluate: Callable[[Program], float],
        init_program: Program | str = "adamw",
        functions: Sequence[str] = DEFAULT,
        population_size: int = 1000,
        tournament_size: int = 2,
        mutation_weights: Sequence[float] = (1, 1, 1),
        max_statements: int | None = None,
        n_jobs: int = 1,
        time_limit: float | None = None,
        in_flight: int = 16,
        random_state: int | None = 0,
    ) -> None:
        self.evaluate = evaluate
        self.init_program = init_program
        self.functions = functions
        self.population_size = population_size
        self.tournament_size = tournament_size
        self.mutation_weights = mutation_weights
        self.max_statements = max_statements
        self.n_jobs = n_jobs
        self.time_limit = time_limit
        self.in_flight = in_flight
        self.random_state = random_state

    def fit(self, n_children: int, *, progress: Callable[[float, str], None] | None = None) -> ProgramSearch:
        """Breed and evaluate `n_children` more children.

        The attributes are up to date after every child: Ctrl-C (KeyboardInterrupt) keeps what was found, and another
        `fit` goes on from there, as if nothing had happened.

        Parameters
        ----------
        n_children : int, >= 1
        progress : callable, optional
            Called after every child with the share done, 0 to 1, and a line of text.

        Raises
        ------
        ValueError, TypeError
            For arguments that make no sense, before anything is evaluated.
        """
        self._check(n_children)
        if not hasattr(self, "n_children_"):
            self._begin()
        pending: deque[tuple[Program, str, bool]] = deque()
        first, last = self.n_children_, self.n_children_ + n_children
        n_jobs = (os.cpu_count() or 1) if self.n_jobs == -1 else self.n_jobs
        here = n_jobs == 1 and self.time_limit is None
        evaluator = Here(self.evaluate) if here else Workers(self.evaluate, n_jobs, self.time_limit)

        def commit() -> None:
            program, key, hit = pending[0]
            outcome = None if hit else evaluator.result(key)
            pending.popleft()
            with uninterrupted():
                self._commit(program, key, outcome)
            if progress is not None:
                done = (self.n_children_ - first) / n_children
                progress(done, f"{self.n_children_} children, best {self.best_fitness_:.4g}, {self.n_failed_} failed")

        try:
            if not self.n_evaluations_:
                evaluator.submit("init", self._init)
                self._commit_initial(evaluator.result("init"))
            for i in range(first, last):
                if len(pending) == self.in_flight:
                    commit()
                child = self._breed(i)
                key = child.hash()
                hit = key in self._cache or any(key == other for _, other, _ in pending)
                if not hit:
                    evaluator.submit(key, child)
                pending.append((child, key, hit))
            while pending:
                commit()
        finally:
            evaluator.close()
        return self

    def _breed(self, i: int) -> Program:
        """The i-th child: a function of `seed_`, i and the programs born before i - in_flight + 1."""
        rng = np.random.default_rng([self.seed_, i])
        oldest = i - self.in_flight - self.population_size + 1
        drawn = [self._born(oldest + int(j)) for j in rng.integers(self.population_size, size=self.tournament_size)]
        parent = max(drawn, key=lambda member: member[1])[0]  # of equals, the one drawn first
        return mutate(parent, rng, self.mutation_weights, self.functions, self.max_statements)

    def _born(self, i: int) -> tuple[Program, float]:
        """Program i of all ever born, and its fitness."""
        return self._births[i - self.n_children_] if i >= 0 else (self._init, self._init_fitness)

    def _commit(self, program: Program, key: str, outcome: Outcome | None) -> None:
        if outcome is None:
            self._hits += 1
        else:
            self._cache[key] = self._count(outcome)
        fitness = self._cache[key]
        self._births.append((program, fitness))
        if fitness > self.best_fitness_:
            self.best_program_, self.best_fitness_ = program, fitness
        self.history_.append(self.best_fitness_)
        self.n_children_ += 1

    def _commit_initial(self, outcome: Outcome) -> None:
        self._init_fitness = self.best_fitness_ = self._cache[self._init.hash()] = self._count(outcome)
        if outcome[1]:
            warnings.warn(
                f"the initial program failed: {outcome[1]}; is it `evaluate` that fails?", RuntimeWarning, stacklevel=3
            )

    def _count(self, outcome: Outcome) -> float:
        fitness, reason = outcome
        self.n_evaluations_ += 1
        if reason:
            self.failures_[reason] += 1
        return fitness

    @property
    def n_failed_(self) -> int:
        return sum(self.failures_.values())

    @property
    def cache_hit_rate_(self) -> float:
        return self._hits / max(self.n_children_, 1)

    @property
    def population_(self) -> list[tuple[Program, float]]:
        return [self._born(i) for i in range(self.n_children_ - self.population_size, self.n_children_)]

    # ---- keeping it

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state of the search as JSON (programs as text), atomically."""
        if not hasattr(self, "n_children_"):
            raise ValueError("there is nothing to save: call fit first")
        state = {
            "settings": self._settings(),
            "seed": self.seed_,
            "init_fitness": _to_json(self._init_fitness),
            "best": [str(self.best_program_), _to_json(self.best_fitness_)],
            "births": [[str(program), _to_json(fitness)] for program, fitness in self._births],
            "history": [_to_json(f) for f in self.history_],
            "cache": {key: _to_json(f) for key, f in self._cache.items()},
            "hits": self._hits,
            "n_evaluations": self.n_evaluations_,
            "failures": dict(self.failures_),
        }
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(state, allow_nan=False, indent=0) + "\n")

    def load(self, path: str | os.PathLike[str]) -> ProgramSearch:
        """Read what `save` wrote by a search of the same settings; `fit` goes on from there as if never interrupted.

        Raises
        ------
        ValueError
            If the file is no saved search, or one of other settings.
        """
        self._check(1)
        try:
            state = json.loads(Path(path).read_text())
            theirs = state["settings"]
            births = [(Program.parse(text), _from_json(f)) for text, f in state["births"]]
            best = Program.parse(state["best"][0]), _from_json(state["best"][1])
            history = [_from_json(f) for f in state["history"]]
            cache = {str(key): _from_json(f) for key, f in state["cache"].items()}
            numbers = [int(state[name]) for name in ("seed", "hits", "n_evaluations")]
            failures = Counter({str(reason): int(n) for reason, n in state["failures"].items()})
            init_fitness = _from_json(state["init_fitness"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved program search: {error}") from None
        for name, ours in self._settings().items():
            if theirs.get(name) != ours:
                raise ValueError(f"{path} is of a search with {name}={theirs.get(name)!r}, got {name}={ours!r}")
        self._begin()
        self.seed_, self._hits, self.n_evaluations_ = numbers
        self._init_fitness, self._cache, self.history_, self.failures_ = init_fitness, cache, history, failures
        self.best_program_, self.best_fitness_ = best
        self._births.extend(births)
        self.n_children_ = len(history)
        return self

    def _settings(self) -> dict[str, Any]:
        names = ("population_size", "tournament_size", "max_statements", "in_flight", "random_state")
        return {
            **{name: getattr(self, name) for name in names},
            "init_program": str(_program(self.init_program)),
            "functions": list(self.functions),
            "mutation_weights": [float(w) for w in self.mutation_weights],
        }

    def _begin(self) -> None:
        self._init = self.best_program_ = _program(self.init_program)
        self._init_fitness = self.best_fitness_ = -math.inf
        self._cache = {}
        self._births = deque(maxlen=self.population_size + self.in_flight)
        self._hits = self.n_children_ = self.n_evaluations_ = 0
        self.history_ = []
        self.failures_ = Counter()
        random = self.random_state
        self.seed_ = int(np.random.SeedSequence().entropy % 2**63) if random is None else int(random)  # type: ignore

    def _check(self, n_children: int) -> None:
        _check_integer("n_children", n_children, 1)
        if not callable(self.evaluate):
            raise TypeError(f"evaluate must be a function of a program, got {self.evaluate!r}")
        _program(self.init_program)
        _check_integer("tournament_size", self.tournament_size, 1)
        _check_integer("population_size", self.population_size, 1)
        if self.population_size < self.tournament_size:
            raise ValueError(
                f"population_size must be >= tournament_size = {self.tournament_size}, got {self.population_size}"
            )
        _check_integer("in_flight", self.in_flight, 1)
        if self.n_jobs != -1:
            _check_integer("n_jobs", self.n_jobs, 1)
        if self.max_statements is not None:
            _check_integer("max_statements", self.max_statements, 1)
        if self.random_state is not None:
            _check_integer("random_state", self.random_state, 0)
        limit = self.time_limit
        if limit is not None and not (isinstance(limit, Real) and not isinstance(limit, bool) and 0 < limit < math.inf):
            raise ValueError(f"time_limit must be a finite number of seconds > 0, or None, got {limit!r}")
        weights = list(self.mutation_weights)
        good = all(isinstance(w, Real) and 0 <= w < math.inf for w in weights)
        if len(weights) not in (3, 4) or not good or not sum(weights):
            raise ValueError(f"mutation_weights must be 3 or 4 numbers >= 0, not all 0, got {self.mutation_weights!r}")
        if isinstance(self.functions, str) or not len(self.functions):
            raise ValueError(f"functions must be a sequence of names, got {self.functions!r}")
        for name in self.functions:
            if name not in FUNCTIONS:
                raise ValueError(f"functions: {_unknown(name)}")


def _program(given: Program | str) -> Program:
    if isinstance(given, Program):
        given.check()
        return given
    if not isinstance(given, str):
        raise TypeError(f"init_program must be a Program or its text, got {given!r}")
    named = {"adamw": ADAMW, "lion": LION}
    if given.isidentifier() and given not in named:
        raise ValueError(f"init_program must be a Program, its text, or one of {sorted(named)}, got {given!r}")
    return Program.parse(named.get(given, given))


def _check_integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be >= {low}, got {value}")


def _to_json(fitness: float) -> float | None:
    return None if fitness == -math.inf else fitness


def _from_json(fitness: float | None) -> float:
    return -math.inf if fitness is None else float(fitness)
