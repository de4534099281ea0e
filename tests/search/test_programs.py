"""The program search: every property of its card, to its tolerance, and what must be refused."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from shoestring.search._program_functions import FUNCTIONS, NUMBER, PER_LEAF, TENSOR
from shoestring.search.programs import (
    ADAMW,
    BLOCK,
    DEFAULT,
    LION,
    Program,
    ProgramSearch,
    Statement,
    mutate,
    program_to_optimizer,
    random_program,
)

parse = Program.parse


def text(*lines, returns="u, m, v"):
    return "\n    ".join(["def train(w, g, m, v, lr):", *lines, f"return {returns}"])


def offspring(seed, mutations):
    """A program some mutations away from AdamW."""
    rng = np.random.default_rng(seed)
    program = parse(ADAMW)
    for _ in range(mutations):
        program = mutate(program, rng)
    return program


def arrays(seed, shape=(5, 3)):
    rng = np.random.default_rng(seed)
    w, g, m, v = (rng.standard_normal(shape) for _ in range(4))
    return w, g, m, v, 0.7


def same_bits(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def closeness(program):
    """A cheap fitness: how near one step from w = 2 leads to 0."""
    w, g, zero = np.full(3, 2.0), np.full(3, 4.0), np.zeros(3)
    return -float(abs(w - program.compile()(w, g, zero, zero, 1.0)[0]).sum())


# ---- programs


def test_adamw_program_is_torch_adamw_without_bias_correction():
    """torch's AdamW divides m by 1 - b1^t and v by 1 - b2^t: undone by an lr and eps for every step."""
    torch.manual_seed(0)
    start, gradients = torch.randn(7, 3, dtype=torch.float64), torch.randn(20, 7, 3, dtype=torch.float64)
    gradients[:, 0] = 0  # no gradient ever: 0 / 0 without the eps in the division
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = program_to_optimizer(parse(ADAMW))([ours])
    reference = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    for t, g in enumerate(gradients, 1):
        ours.grad, theirs.grad = g.clone(), g.clone()
        optimizer.step()
        correction1, correction2 = 1 - 0.9**t, 1 - 0.999**t
        # u = m / (sqrt(v) + 1e-8); torch: lr' (m / c1) / (sqrt(v / c2) + eps')
        reference.param_groups[0]["lr"] = 1e-3 * correction1 / math.sqrt(correction2)
        reference.param_groups[0]["eps"] = 1e-8 / math.sqrt(correction2)
        with torch.no_grad():
            decay = 1e-3 * 0.01 * theirs.clone()
        reference.step()
        with torch.no_grad():
            theirs.sub_(decay)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert torch.allclose(optimizer.state[ours]["m"], reference.state[theirs]["exp_avg"], rtol=0, atol=1e-12)
    assert torch.allclose(optimizer.state[ours]["v"], reference.state[theirs]["exp_avg_sq"], rtol=0, atol=1e-12)


def test_lion_program_gives_lions_iterates():
    """m = interp(g, v, .9); v = interp(g, m, 1.1) is one average with .99."""
    torch.manual_seed(0)
    w = torch.randn(6, 4, dtype=torch.float64)
    parameter = torch.nn.Parameter(w.clone())
    optimizer = program_to_optimizer(parse(LION))([parameter])
    momentum = torch.zeros_like(w)
    for _ in range(50):
        g = torch.randn(6, 4, dtype=torch.float64)
        parameter.grad = g
        optimizer.step()
        w = w - 1e-4 * ((0.9 * momentum + 0.1 * g).sign() + 0.1 * w)
        momentum = 0.99 * momentum + 0.01 * g
        assert torch.allclose(parameter, w, rtol=0, atol=1e-12)
        assert torch.allclose(optimizer.state[parameter]["v"], momentum, rtol=0, atol=1e-12)


def test_lion_program_has_one_tensor_of_state_a_parameter():
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    for program, slots in ((LION, ["v"]), (ADAMW, ["m", "v"]), (text("u = g * 0.1"), [])):
        optimizer = program_to_optimizer(parse(program))([parameter])
        optimizer.step()
        assert sorted(optimizer.state[parameter]) == slots


def test_slot_read_only_by_another_slot_is_kept():
    """u needs v, v needs the m of the step before: both stay."""
    program = parse(text("v = m * 1.0", "m = g * 1.0", "u = v * 1.0"))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = program_to_optimizer(program)([parameter])
    for g in (1.0, 10.0, 100.0):
        parameter.grad = torch.tensor([g])
        optimizer.step()
    assert parameter.item() == -11.0  # each gradient a step late


def test_slots_may_be_swapped_and_set_to_the_weights():
    program = parse(text("u = g + m", returns="u, v, w"))
    w, m, v = torch.tensor([3.0]), torch.tensor([0.0]), torch.tensor([0.0])
    parameter = torch.nn.Parameter(w.clone())
    optimizer = program_to_optimizer(program)([parameter])
    for _ in range(5):
        parameter.grad = torch.tensor([2.0])
        optimizer.step()
        w, m, v = w - (2.0 + m), v, w
    assert torch.equal(parameter.detach(), w)
    assert torch.equal(optimizer.state[parameter]["m"], m)
    assert torch.equal(optimizer.state[parameter]["v"], v)


@pytest.mark.parametrize("program", [ADAMW, LION], ids=["adamw", "lion"])
def test_text_round_trips(program):
    assert str(parse(program)) + "\n" == program
    assert str(parse(str(parse(program)))) == str(parse(program))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), mutations=st.integers(0, 40))
def test_any_program_round_trips_as_text_and_keeps_its_hash(seed, mutations):
    program = offspring(seed, mutations)
    again = parse(str(program))
    assert again == program
    assert again.hash() == program.hash()


def test_text_is_never_executed():
    for line in ("u = __import__('os').getcwd()", "u = g.sum()", "u = (lambda: g)()", "u = [g][0]"):
        with pytest.raises(ValueError, match="line 2"):
            parse(text(line))


FAULTS = {
    "unknown function": (text("m = interp(g, m, 0.9)", "u = sqr(m)"), r"line 3: unknown function 'sqr'.*'sqrt'"),
    "too many arguments": (text("u = sqrt(g, m)"), "line 2: sqrt takes 1 argument, got 2"),
    "too few arguments": (text("u = interp(g, m)"), "line 2: interp takes 3 arguments, got 2"),
    "use before assignment": (text("u = s * g", "s = sqrt(v)"), "line 2: variable 's' is used before"),
    "after blank lines": (text("", "# a remark", "u = s * g"), "line 4: variable 's'"),
    "never assigned": (text("s = sqrt(v)"), "line 3: variable 'u' is returned but never assigned"),
    "missing return": ("def train(w, g, m, v, lr):\n    u = g * 2.0", "line 2: .*return is missing"),
    "early return": (text("return g, m, v", "u = g * 2.0"), "line 2: `return` must be the last"),
    "two returned": (text("u = g * 2.0", returns="u, m"), "line 3: a program must return three"),
    "infinite constant": (text("u = g * 1e999"), "line 2: a constant must be finite"),
    "constant as long as an infinite one": (text(f"u = g * 1{'0' * 400}"), "line 2: a constant must be finite"),
    "nan": (text("u = g * nan"), "line 2: variable 'nan'"),
    "a truth value": (text("u = g * True"), "line 2: an argument must be a variable or a number"),
    "nested": (text("u = m / sqrt(v)"), "line 2: an argument must be a variable or a number"),
    "a copy": (text("u = g"), "line 2: expected one function"),
    "power operator": (text("u = g ** 2"), "line 2: expected one function"),
    "keyword": (text("u = sqrt(x=g)"), "line 2: expected one function"),
    "several targets": (text("u = a = sqrt(g)"), "line 2: a statement must be"),
    "no assignment": (text("sqrt(g)"), "line 2: a statement must be"),
    "four inputs": ("def train(w, g, m, v):\n    u = g * 2.0\n    return u, m, v", "line 1: a program takes 5 inputs"),
    "more inputs": ("def train(w, g, m, v, lr, *more):\n    return g, m, v", "line 1: a program takes 5 inputs"),
    "one name twice": ("def train(w, g, m, m2, g):\n    return g, m, m2", "argument 'g'|different names"),
    "not Python": (text("u = g *"), "line 2: not a program"),
    "not a function": ("u = 1", "must be one function"),
    "empty": ("", "must be one function"),
    "a number returned": (text("u = norm(g)"), "line 3: 'u' is returned and must have the shape"),
    "tensor as weight": (text("u = interp(g, m, v)"), "line 2: interp is not defined for arguments of these kinds"),
    "tensor as norm to clip to": (text("u = clip_by_global_norm(g, m)"), "line 2: clip_by_global_norm is not defined"),
    "dot of a number": (text("a = dot(g, lr)", "u = g * a"), "line 2: dot is not defined"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named_with_their_line(name):
    program, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        parse(program)


def test_programs_built_by_hand_are_checked_too():
    for statement, message in (
        (Statement("u", "sqr", ("g",)), "unknown function 'sqr'"),
        (Statement("u", "*", ("g",)), "takes 2 arguments"),
        (Statement("u", "*", ("g", math.nan)), "must be finite"),
    ):
        program = Program((statement,))
        with pytest.raises(ValueError, match=message):
            program.check()
        with pytest.raises(ValueError, match=message):
            program_to_optimizer(program)


def _rename(program, names):
    def new(a):
        return names.get(a, a) if isinstance(a, str) else a

    statements = tuple(Statement(new(s.target), s.function, tuple(map(new, s.args))) for s in program.statements)
    return Program(statements, tuple(map(new, program.inputs)), tuple(map(new, program.outputs)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), mutations=st.integers(0, 30))
def test_hash_does_not_see_names_dead_code_or_the_order_of_independent_statements(seed, mutations):
    program = offspring(seed, mutations)
    names = {s.target for s in program.statements} | set(program.inputs)
    renamed = _rename(program, {name: f"x{i}" for i, name in enumerate(sorted(names))})
    assert renamed.hash() == program.hash()
    rng = np.random.default_rng(seed)
    statements = list(program.statements)
    statements.insert(rng.integers(len(statements) + 1), Statement("dead", "sqrt", ("w",)))
    assert Program(tuple(statements)).hash() == program.hash()
    for i in range(len(statements) - 1):
        a, b = statements[i], statements[i + 1]
        if a.target not in (*b.args, b.target) and b.target not in a.args:
            statements[i], statements[i + 1] = b, a
    assert Program(tuple(statements)).hash() == program.hash()


def test_hash_sees_what_a_program_computes():
    different = [
        text("u = g + m"),
        text("u = m + g"),  # as released, arguments are not sorted
        text("u = g - m"),
        text("u = g + v"),
        text("u = g + m", "m = g * 0.1"),
        text("u = g + m", returns="u, v, m"),
        text("u = g + m", "u = u + m"),
        text("u = g * 0.1"),
        text("u = g * 0.10000000000000002"),
        text("s = dot(g, m)", "u = g * s"),
    ]
    assert len({parse(p).hash() for p in different}) == len(different)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), mutations=st.integers(0, 40))
def test_programs_of_one_hash_compute_the_same_and_simplify_changes_no_bit(seed, mutations):
    program = offspring(seed, mutations)
    simple = program.simplify()
    assert simple.hash() == program.hash()
    assert simple.simplify() == simple
    assert len(simple.live()) == len(simple.statements) <= len(program.statements)
    given = arrays(seed)
    assert same_bits(simple.compile()(*given), program.compile()(*given))
    tensors = [torch.from_numpy(a) for a in given[:4]]
    assert same_bits(simple.compile()(*tensors, 0.7), program.compile()(*tensors, 0.7))


def test_dead_statements_are_kept_and_skipped():
    program = parse(text("u = exp(g)", "u = g * 0.1", "t = sqrt(v)", "t = t + u", "u = u * 2.0"))
    assert [str(s) for s in program.live()] == ["u = g * 0.1", "u = u * 2.0"]
    assert len(program.statements) == 5
    calls = []

    class Spy(np.ndarray):
        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            calls.append(ufunc.__name__)
            inputs = [np.asarray(x) if isinstance(x, Spy) else x for x in inputs]
            return getattr(ufunc, method)(*inputs, **kwargs)

    w, g, m, v, lr = arrays(0)
    program.compile()(w, g.view(Spy), m, v, lr)
    assert calls == ["multiply"]  # the next one has a plain array


def test_simplify_by_fitness_deletes_what_does_not_help_and_is_idempotent():
    program = parse(text("d = exp(w)", "u = g * 1.0", "u = u + m", "u = u * 0.5", "u = u - v"))
    simple = program.simplify(closeness)  # m = v = 0 and 4 * 0.5 = 2: the fitness is 0 without them
    assert [str(s) for s in simple.statements] == ["u = g * 1.0", "u = u * 0.5"]
    assert closeness(simple) == closeness(program) == 0.0
    assert simple.simplify(closeness) == simple
    # the first statement helps as long as the second one is there
    again = parse(text("g = g * 0.5", "g = g * 8.0", "u = g * 0.5")).simplify(closeness)
    assert [str(s) for s in again.statements] == ["u = g * 0.5"]
    rng = np.random.default_rng(0)
    for _ in range(20):
        child = offspring(int(rng.integers(2**31)), 15)
        if math.isfinite(closeness(child)):
            shorter = child.simplify(closeness)
            assert closeness(shorter) >= closeness(child)
            assert shorter.simplify(closeness) == shorter


# ---- functions

REFERENCE = {
    "log": lambda x: np.log(np.abs(x)),
    "log2": lambda x: np.log2(np.abs(x)),
    "log10": lambda x: np.log10(np.abs(x)),
    "log1p": lambda x: np.log(np.abs(1 + x)),
    "sqrt": lambda x: np.sqrt(np.abs(x)),
    "cube": lambda x: x**3,
    "cbrt": np.cbrt,
    "exp10": lambda x: 10.0**x,
    "/": lambda a, b: a / (b + 1e-8),
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "max": np.maximum,
    "min": np.minimum,
    "power": np.power,
    "norm": np.linalg.norm,
    "global_norm": np.linalg.norm,
    "dot": lambda a, b: (a * b).sum(),
    "cosine_sim": lambda a, b: (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b),
    "interp": lambda x, y, a: (1 - a) * x + a * y,
    "clip_by_global_norm": lambda x, c: x * min(1.0, c / np.linalg.norm(x)),
    "get_pi": lambda: math.pi,
    "get_e": lambda: math.e,
    "get_eps": lambda: 1e-8,
}


@pytest.mark.parametrize("name", DEFAULT)
def test_function_of_arrays_tensors_and_numbers(name):
    rng = np.random.default_rng(0)
    reference = REFERENCE.get(name) or getattr(np, name)
    function = FUNCTIONS[name]
    for _ in range(5):
        args = [rng.standard_normal((4, 3)) for _ in range(function.arity)]
        if name == "interp":
            args[2] = 1.1
        if name == "clip_by_global_norm":
            args[1] = 0.7
        with np.errstate(all="ignore"):
            expected = reference(*args)
            assert np.allclose(function.run(*args), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
            tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
            assert np.allclose(function.run(*tensors), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
            # numbers: the same as arrays of one element, and Python floats again
            numbers = [a if isinstance(a, float) else float(a[0, 0]) for a in args]
            found = function.run(*numbers)
            assert type(found) is float
            expected = reference(*(np.array([a]) if name != "interp" or i < 2 else a for i, a in enumerate(numbers)))
            assert np.allclose(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_functions_are_the_released_45_without_invert():
    assert len(DEFAULT) == 44


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_abstract_execution_tells_the_shapes_of_the_concrete_one(seed):
    """Kinds as predicted: on two leaves of different shapes, for numpy and torch."""
    rng = np.random.default_rng(seed)
    program = random_program(rng, 6)
    w, g, m, v = ([rng.standard_normal(s) for s in ((2, 3), (4,))] for _ in range(4))
    values: dict = {"w": w, "g": g, "m": m, "v": v, "lr": 0.5}
    kinds = {"w": TENSOR, "g": TENSOR, "m": TENSOR, "v": TENSOR, "lr": NUMBER}
    with np.errstate(all="ignore"):
        for s in program.statements:
            args = [values[a] if isinstance(a, str) else a for a in s.args]
            kind = FUNCTIONS[s.function].result(*(kinds[a] if isinstance(a, str) else NUMBER for a in s.args))
            values[s.target], kinds[s.target] = FUNCTIONS[s.function].run(*args), kind
            found = values[s.target]
            if kind == NUMBER:
                assert not isinstance(found, list)
                assert np.ndim(found) == 0
            else:
                shapes = [np.shape(x) for x in found]
                assert shapes == ([(2, 3), (4,)] if kind == TENSOR else [(), ()]), s
    assert PER_LEAF not in [kinds[o] for o in program.outputs]


def test_global_functions_see_all_leaves_and_norm_each():
    leaves = [np.array([3.0, 0.0]), np.array([[4.0]])]
    assert FUNCTIONS["global_norm"].run(leaves) == 5.0
    assert FUNCTIONS["norm"].run(leaves) == [3.0, 4.0]
    assert FUNCTIONS["dot"].run(leaves, leaves) == 25.0
    assert FUNCTIONS["cosine_sim"].run(leaves, [-x for x in leaves]) == -1.0
    clipped = FUNCTIONS["clip_by_global_norm"].run(leaves, 1.0)
    assert np.allclose(clipped[0], [0.6, 0.0])
    assert np.allclose(clipped[1], [[0.8]])
    assert np.array_equal(FUNCTIONS["clip_by_global_norm"].run(leaves, 6.0)[0], leaves[0])


def test_compiled_program_writes_to_no_input_and_does_not_warn():
    program = parse(text("m = interp(g, m, 0.9)", "u = arcsin(m)", "s = reciprocal(v)", "u = u * s"))
    given = arrays(0)
    given[3][0] = 0.0
    before = copy.deepcopy(given)
    with np.errstate(all="raise"):
        u, _, _ = program.compile()(*given)
    assert not np.isfinite(u[0]).all()
    assert same_bits(given[:4], before[:4])


# ---- mutation


def test_every_mutated_child_is_valid_over_thousands():
    rng = np.random.default_rng(0)
    programs = [parse(ADAMW)]
    with np.errstate(all="ignore"):
        for n in range(3000):
            child = mutate(programs[rng.integers(len(programs))], rng)
            child.check()
            parse(str(child)).check()
            if n % 10 == 0:  # and it runs
                u, m, v = child.compile()(*arrays(n, (2, 2)))
                assert np.shape(u) == np.shape(m) == np.shape(v) == (2, 2)
            programs.append(child)
    assert max(len(p.statements) for p in programs) > 12


def _difference(parent, child):
    return len(child.statements) - len(parent.statements)


def test_mutation_kinds_are_uniform():
    parent, rng = parse(ADAMW), np.random.default_rng(1)
    n = 3000
    counts = Counter(_difference(parent, mutate(parent, rng)) for _ in range(n))
    assert set(counts) == {-1, 0, 1}
    for kind in (-1, 0, 1):
        assert abs(counts[kind] / n - 1 / 3) < 4 * math.sqrt(2 / 9 / n)


def test_mutation_weights_decide_the_kind():
    parent, rng = parse(ADAMW), np.random.default_rng(0)
    for weights, difference in (((1, 0, 0), 1), ((0, 1, 0), -1), ((0, 0, 1), 0), ((0, 0, 0, 1), 0)):
        assert {_difference(parent, mutate(parent, rng, weights)) for _ in range(50)} == {difference}
    for _ in range(50):
        child = mutate(parent, rng, max_statements=9)
        assert _difference(parent, child) <= 0


def test_insertion_draws_every_place_function_and_fresh_or_old_targets_of_the_kind():
    parent, rng = parse(ADAMW), np.random.default_rng(0)
    places, functions, targets, constants = Counter(), Counter(), Counter(), []
    for _ in range(3000):
        child = mutate(parent, rng, (1, 0, 0))
        place = next(i for i in range(10) if i == 9 or child.statements[i] != parent.statements[i])
        new = child.statements[place]
        assert child.statements[place + 1 :] == parent.statements[place:]
        places[place] += 1
        functions[new.function] += 1
        targets[new.target] += 1
        constants += [a for a in new.args if isinstance(a, float)]
    assert set(places) == set(range(10))
    assert set(functions) == set(DEFAULT)
    assert targets["t0"] > 300
    assert targets["w"] > 30
    assert targets["lr"] > 30
    assert abs(np.mean(constants)) < 0.15
    assert abs(np.std(constants) - 1) < 0.1


def test_modified_constants_are_multiplied_by_a_power_of_two_and_bounded():
    parent, rng = parse(text("u = g * 3.0")), np.random.default_rng(0)
    exponents = []
    for _ in range(2000):
        child = mutate(parent, rng, (0, 0, 0, 1))
        exponents.append(math.log2(child.statements[0].args[1] / 3.0))
    assert abs(np.mean(exponents)) < 0.1
    assert abs(np.std(exponents) - 1) < 0.07
    for sign in (1, -1):
        large = parse(text(f"u = g * {sign * 9.9e9}"))
        found = [mutate(large, rng, (0, 0, 0, 1)).statements[0].args[1] for _ in range(50)]
        assert max(map(abs, found)) == 1e10
        assert all(sign * c > 0 for c in found)


def test_modified_variable_is_replaced_by_another_of_its_kind():
    parent, rng = parse(text("a = norm(g)", "b = global_norm(g)", "u = g * b")), np.random.default_rng(0)
    seen = {mutate(parent, rng, (0, 0, 1)).statements[2].args for _ in range(300)}
    # b, a number, can become lr only; a is one number per leaf
    assert seen == {("g", "b"), ("g", "lr"), ("w", "b"), ("m", "b"), ("v", "b")}


def test_impossible_mutations_are_an_error():
    with pytest.raises(ValueError, match="no mutation"):
        mutate(parse(text("u = g * m")), np.random.default_rng(0), (0, 0, 0, 1))
    with pytest.raises(ValueError, match="no mutation"):  # without it, u is never assigned
        mutate(parse(text("u = g * m")), np.random.default_rng(0), (0, 1, 0))


def test_functions_limit_insertions():
    parent, rng = parse(ADAMW), np.random.default_rng(0)
    for _ in range(100):
        child = mutate(parent, rng, (1, 0, 0), functions=("sign", "+"))
        (new,) = Counter(child.statements) - Counter(parent.statements) or [Statement("", "+", ())]
        assert new.function in ("sign", "+")


def test_random_programs_are_valid_different_and_of_their_length():
    rng = np.random.default_rng(0)
    programs = [random_program(rng, 9) for _ in range(300)]
    for program in programs:
        program.check()
        assert len(program.statements) == 9
    assert len({p.hash() for p in programs}) > 150


# ---- search


def small(evaluate=closeness, **more):
    return ProgramSearch(evaluate, **{"population_size": 20, "random_state": 3, **more})


def test_best_so_far_is_monotone_and_is_the_best_of_all():
    seen = []

    def evaluate(program):
        seen.append(closeness(program))
        return seen[-1]

    search = small(evaluate).fit(300)
    assert len(search.history_) == search.n_children_ == 300
    assert all(a <= b for a, b in zip(search.history_, search.history_[1:], strict=False))
    assert search.best_fitness_ == search.history_[-1] == np.nanmax(seen) > seen[0]
    assert closeness(search.best_program_) == search.best_fitness_
    assert search.n_evaluations_ == len(seen)


def test_cache_hits_return_the_identical_fitness_and_train_nothing():
    calls = Counter()

    def noisy(program):  # not a function of the program: the cache alone makes fitnesses agree
        calls[program.hash()] += 1
        return float(len(calls) + np.random.default_rng(len(calls)).random())

    search = small(noisy, population_size=400).fit(400)
    assert set(calls.values()) == {1}
    assert search.n_evaluations_ == len(calls)
    assert round(400 * search.cache_hit_rate_) == 400 - (search.n_evaluations_ - 1) > 40
    fitness: dict = {}
    for program, f in search.population_:
        assert fitness.setdefault(program.hash(), f) == f


def test_oldest_drops_out_although_it_is_the_fittest():
    """With one member, the parent of a child is the child before it, whatever its fitness."""
    search = ProgramSearch(lambda p: -float(len(p.statements)), population_size=1, tournament_size=1, in_flight=1)
    search.set_params(mutation_weights=(1, 0, 0)).fit(5)
    assert len(search.population_[0][0].statements) == 9 + 5
    assert search.best_fitness_ == -9.0


def test_population_is_the_last_programs_born():
    search = small(population_size=7)
    born = []
    for _ in range(12):
        born.append(search.fit(1).population_[-1])
        assert search.population_ == ([(parse(ADAMW), closeness(parse(ADAMW)))] * 7 + born)[-7:]


def test_tournament_takes_the_fittest_of_those_drawn():
    """With a tournament of the whole population (nearly), the children come from the best member."""
    fitness = {}

    def evaluate(program):
        fitness[program] = len(fitness)
        return float(len(fitness))  # the newest is the fittest

    search = ProgramSearch(
        evaluate, population_size=50, tournament_size=50, in_flight=1, mutation_weights=(1, 0, 0), random_state=0
    )
    search.fit(40)
    lengths = [len(p.statements) for p, _ in search.population_]
    assert lengths[-1] > 9 + 15  # nearly each is a child of the one before; by chance alone it would be a few


@pytest.mark.parametrize("in_flight", [1, 16])
def test_search_does_not_depend_on_how_it_is_cut(in_flight):
    whole = small(in_flight=in_flight).fit(90)
    parts = small(in_flight=in_flight).fit(1).fit(50).fit(39)
    assert parts.population_ == whole.population_
    assert parts.history_ == whole.history_
    assert parts.cache_hit_rate_ == whole.cache_hit_rate_
    assert parts.n_evaluations_ == whole.n_evaluations_
    other = small(in_flight=in_flight, random_state=4).fit(90)
    assert other.population_ != whole.population_


def _spoilt(program):
    """Some programs raise, hang, end their process, or answer NaN."""
    functions = {s.function for s in program.statements}
    if functions & {"sin", "cos", "tan"}:
        raise ZeroDivisionError("no angles")
    if functions & {"exp", "exp2"}:
        return math.nan
    return closeness(program)


def test_search_is_the_same_for_any_number_of_jobs():
    searches = [small(_spoilt, n_jobs=n, time_limit=limit).fit(60) for n, limit in ((1, None), (2, None), (1, 60))]
    first = searches[0]
    assert first.n_failed_ == sum(first.failures_.values()) > 0
    for search in searches[1:]:
        assert search.population_ == first.population_
        assert search.history_ == first.history_
        assert search.failures_ == first.failures_
        assert (search.best_program_, search.cache_hit_rate_) == (first.best_program_, first.cache_hit_rate_)


def test_runaway_and_dying_programs_cost_their_fitness_only():
    # by live statements: a program that has them dead does what an earlier one did, and has its fitness
    def evaluate(program):
        functions = {s.function for s in program.live()}
        if functions & {"sign", "abs", "negative", "cube"}:
            while True:
                time.sleep(1)
        if functions & {"arcsin", "arccos", "arctan", "sinh", "cosh", "tanh"}:
            os._exit(7)
        if functions & {"log", "log2", "log10", "log1p", "exp", "exp2", "exp10", "expm1"}:
            raise SystemExit("enough")
        return closeness(program)

    start = time.monotonic()
    search = small(evaluate, n_jobs=2, time_limit=0.3, mutation_weights=(1, 0, 0)).fit(40)
    assert time.monotonic() - start < 30
    reasons = " ".join(search.failures_)
    assert "over the time limit of 0.3 s" in reasons
    assert "exit code 7" in reasons
    assert "SystemExit: enough" in reasons
    spoilt = {"sign", "abs", "negative", "cube", "arcsin", "sinh", "tanh", "log", "log1p", "exp", "expm1"}
    bad = [f for p, f in search.population_ if spoilt & {s.function for s in p.live()}]
    assert bad
    assert set(bad) == {-math.inf}
    assert search.n_children_ == 40
    assert search.best_fitness_ >= closeness(parse(ADAMW))


@pytest.mark.parametrize("answer", ["raises", math.nan, math.inf, "word", None], ids=str)
def test_failures_are_counted_and_the_search_goes_on(answer):
    def evaluate(program):
        if answer == "raises":
            raise KeyError("lost")
        return answer

    with pytest.warns(RuntimeWarning, match="initial program failed"):
        search = small(evaluate).fit(20)
    assert search.n_failed_ == search.n_evaluations_ > 1
    assert search.best_fitness_ == -math.inf
    assert search.best_program_ == parse(ADAMW)
    assert search.n_children_ == 20
    (reason,) = search.failures_
    assert {"raises": "KeyError: 'lost'", "word": "ValueError: ", "None": "TypeError: "}.get(
        str(answer), f"returned {answer}"
    ) in reason


def test_minus_infinity_is_an_answer_not_a_failure():
    search = small(lambda program: -math.inf if program != parse(ADAMW) else 0.0).fit(10)
    assert search.n_failed_ == 0
    assert search.best_fitness_ == 0.0


def test_interrupted_search_keeps_what_it_found_and_goes_on():
    whole = small().fit(60)
    calls = []

    def evaluate(program):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return closeness(program)

    search = small(evaluate)
    with pytest.raises(KeyboardInterrupt):
        search.fit(60)
    n = search.n_children_
    assert 0 < n < 60
    assert search.history_ == whole.history_[:n]
    assert search.best_fitness_ == whole.history_[n - 1]
    search.fit(60 - n)
    assert search.population_ == whole.population_
    assert (search.history_, search.cache_hit_rate_) == (whole.history_, whole.cache_hit_rate_)


def test_saved_search_goes_on_as_if_never_interrupted(tmp_path):
    whole = small(_spoilt).fit(80)
    path = tmp_path / "search.json"
    small(_spoilt).fit(45).save(path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    search = small(_spoilt).load(path).fit(35)
    assert search.population_ == whole.population_
    assert (search.history_, search.failures_) == (whole.history_, whole.failures_)
    assert (search.n_evaluations_, search.cache_hit_rate_) == (whole.n_evaluations_, whole.cache_hit_rate_)
    assert (search.best_program_, search.best_fitness_) == (whole.best_program_, whole.best_fitness_)
    with pytest.raises(ValueError, match="population_size=20, got population_size=21"):
        small(population_size=21).load(path)
    with pytest.raises(ValueError, match="nothing to save"):
        small().save(path)
    path.write_text(path.read_text()[:1000])
    with pytest.raises(ValueError, match="not a saved program search"):
        small().load(path)


def test_random_state_none_draws_a_seed_and_keeps_it():
    search = small(random_state=None).fit(20)
    again = small(random_state=search.seed_).fit(20)
    assert again.population_ == search.population_
    assert small(random_state=None).fit(1).seed_ != search.seed_


def test_progress_is_monotone_and_ends_at_one():
    seen = []
    small().fit(30, progress=lambda done, line: seen.append((done, line)))
    shares = [done for done, _ in seen]
    assert shares == sorted(shares)
    assert (len(shares), shares[-1]) == (30, 1.0)
    assert "30 children" in seen[-1][1]


def test_init_only_stores_and_clone_works():
    search = ProgramSearch(closeness, population_size=-1, functions=None)
    copied = clone(search)
    assert copied.get_params() == search.get_params()
    assert not hasattr(copied, "n_children_")


def test_warm_start_from_a_given_program():
    for init in (LION, "lion", parse(LION)):
        search = small(init_program=init).fit(1)
        assert search.population_[0][0] == parse(LION)


BAD = {
    "population_size": [(0, ValueError), (1, ValueError), (2.5, TypeError)],
    "tournament_size": [(0, ValueError), (21, ValueError)],
    "in_flight": [(0, ValueError)],
    "n_jobs": [(0, ValueError), (-2, ValueError), (True, TypeError)],
    "time_limit": [(0, ValueError), (-1.0, ValueError), (math.nan, ValueError), (math.inf, ValueError)],
    "max_statements": [(0, ValueError)],
    "random_state": [(-1, ValueError), (0.5, TypeError)],
    "mutation_weights": [((0, 0, 0), ValueError), ((1, 1), ValueError), ((1, 1, -1), ValueError)],
    "functions": [((), ValueError), (("sqr",), ValueError), ("sign", ValueError)],
    "init_program": [("adam", ValueError), (3, TypeError), (text("u = sqr(g)"), ValueError)],
    "evaluate": [(None, TypeError)],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named_before_anything_is_evaluated(name):
    def never(program):
        raise AssertionError("evaluated")

    for value, error in BAD[name]:
        with pytest.raises(error, match="sqr" if "sqr" in str(value) else name):
            small(never).set_params(**{name: value}).fit(1)


@pytest.mark.parametrize("n", [0, -3, 1.5, None], ids=str)
def test_n_children_must_be_positive(n):
    with pytest.raises((ValueError, TypeError), match="n_children must be"):
        small().fit(n)


# ---- optimizers

CLIPPED = text("g = clip_by_global_norm(g, 1.0)", "m = interp(g, m, 0.9)", "n = norm(m)", "u = m / n", "u = u * lr")


def _model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2)).double()


def _train(model, optimizer, steps, scheduler=None, first=0):
    for t in range(first, first + steps):
        x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("program", [ADAMW, LION, CLIPPED], ids=["adamw", "lion", "clipped"])
def test_state_dict_goes_on_bit_for_bit(program):
    optimizer_class = program_to_optimizer(parse(program))
    model = _model()
    optimizer = optimizer_class(model.parameters(), lr=0.5)
    _train(model, optimizer, 5)
    twin = copy.deepcopy(model)
    twin_optimizer = optimizer_class(twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(model, optimizer, 5, first=5)
    _train(twin, twin_optimizer, 5, first=5)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("program", [ADAMW, CLIPPED], ids=["adamw", "clipped"])
def test_optimizer_is_the_compiled_program_over_all_leaves(program):
    model = _model()
    optimizer = program_to_optimizer(parse(program))(model.parameters(), lr=0.3)
    train = parse(program).compile()
    w = [p.detach().numpy().copy() for p in model.parameters()]
    m, v = [0 * x for x in w], [0 * x for x in w]
    for t in range(4):
        _train(model, optimizer, 1, first=t)
        u, m, v = train(w, [p.grad.numpy() for p in model.parameters()], m, v, 0.3)
        w = [a - b for a, b in zip(w, u, strict=True)]
    for p, expected in zip(model.parameters(), w, strict=True):
        assert np.allclose(p.detach().numpy(), expected, rtol=1e-12, atol=1e-13)


def test_scheduler_multiplies_the_programs_learning_rate():
    steps = []
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = program_to_optimizer(parse(text("u = sign(g)", "lr = lr * 0.25", "u = u * lr")))(model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    for _ in range(5):
        before = model.weight.item()
        model.weight.grad = torch.ones(1, 1)
        optimizer.step()
        scheduler.step()
        steps.append(before - model.weight.item())
    assert np.allclose(steps, [0.25, 0.25, 0.125, 0.125, 0.0625], atol=1e-6)


def test_param_groups_closure_maximize_and_lr_tensor():
    a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    optimizer = program_to_optimizer(parse(text("u = g * lr")))(
        [{"params": [a]}, {"params": [b], "lr": torch.tensor(0.5)}, {"params": [c], "lr": 2, "maximize": True}]
    )

    def closure():
        optimizer.zero_grad()
        loss = (a + b + c).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 0.0
    assert [p[0].item() for p in (a, b, c)] == [-1.0, -0.5, 2.0]


@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_blocks_change_nothing(n):
    """A contiguous parameter goes in blocks, a transposed one whole."""
    w, g = torch.randn(2, n), torch.randn(2, n)
    parameters = []
    for as_given in (lambda x: x, lambda x: x.t().contiguous().t()):
        p = torch.nn.Parameter(as_given(w.clone()))
        optimizer = program_to_optimizer(parse(ADAMW))([p])
        for _ in range(2):
            p.grad = as_given(g.clone())
            optimizer.step()
        parameters.append(p)
    assert torch.allclose(*parameters, rtol=1e-6, atol=1e-7)
    if n:
        assert not torch.equal(parameters[0], w)


def test_scalars_bfloat16_and_parameters_without_gradient():
    scalar, half, idle = (torch.nn.Parameter(x) for x in (torch.tensor(1.0), torch.ones(3).bfloat16(), torch.ones(2)))
    optimizer = program_to_optimizer(parse(ADAMW))([scalar, half, idle])
    for p in (scalar, half):
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert {x.dtype for x in optimizer.state[half].values()} == {torch.bfloat16}
    assert 0.003 <= optimizer.state[half]["v"][0].item() <= 0.005  # 0.001 * 4: 0.999 is not rounded to 1
    assert idle not in optimizer.state
    assert torch.equal(idle, torch.ones(2))
    assert scalar.item() == pytest.approx(1 - 1e-3 * (0.2 / math.sqrt(0.004) + 0.01), rel=1e-6)


def test_nan_gradient_is_not_hidden():
    for program in (ADAMW, LION):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.tensor([1.0, math.nan, 1.0])
        program_to_optimizer(parse(program))([p]).step()
        assert p.isnan().tolist() == [False, True, False]


def test_refused_gradients_change_nothing():
    embedding, other = torch.nn.Embedding(4, 2, sparse=True), torch.nn.Parameter(torch.ones(2))
    (embedding(torch.tensor([1])).sum() + other.sum()).backward()
    optimizer = program_to_optimizer(parse(ADAMW))([other, embedding.weight])
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(other, torch.ones(2))
    assert not optimizer.state
    z = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="complex"):
        program_to_optimizer(parse(ADAMW))([z]).step()
    for lr in (-1.0, math.nan, math.inf, "1", torch.ones(2)):
        with pytest.raises(ValueError, match="lr"):
            program_to_optimizer(parse(ADAMW))([other], lr=lr)


def test_optimizer_can_be_copied_and_extended():
    model = _model()
    optimizer = program_to_optimizer(parse(ADAMW))(model.parameters())
    _train(model, optimizer, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    _train(model, optimizer, 2, first=2)
    _train(twin_model, twin, 2, first=2)
    for a, b in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(a, b)
    extra = torch.nn.Parameter(torch.ones(1))
    extra.grad = torch.ones(1)
    optimizer.add_param_group({"params": [extra], "lr": 0.0})
    optimizer.step()
    assert extra.item() == 1.0
