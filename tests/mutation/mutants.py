"""The mutants of a module, with one changed expression each, and the process in which one is tried."""

import ast
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import types

OPPOSITE = {"Eq": "NotEq", "Is": "IsNot", "In": "NotIn", "Lt": "GtE", "LtE": "Gt"}
OPPOSITE |= {value: key for key, value in OPPOSITE.items()}
BOUNDARY = {"Lt": "LtE", "LtE": "Lt", "Gt": "GtE", "GtE": "Gt"}
OPERATOR = {"Add": "Sub", "Sub": "Add", "Mult": "Div", "Div": "Mult", "And": "Or", "Or": "And"}


def mutants(node, returns):
    """The mutants of one node. `returns` is the annotation of its function."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for table in (OPPOSITE, BOUNDARY):
            if name := table.get(type(node.ops[0]).__name__):
                yield ast.Compare(node.left, [getattr(ast, name)()], node.comparators)
    elif isinstance(node, (ast.BoolOp, ast.BinOp)) and (name := OPERATOR.get(type(node.op).__name__)):
        yield type(node)(**dict(ast.iter_fields(node)) | {"op": getattr(ast, name)()})
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)) and node.value in (0, 1):
        yield ast.Constant(type(node.value)(1 - node.value))
    elif isinstance(node, ast.Return) and node.value and any(word in returns for word in ("None", "bool", "Any")):
        if ast.unparse(node) != "return None":
            yield ast.Return(None)  # where a tensor is expected, this would be an error that every test sees
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()


def sites(node, statement=None, returns=None):
    """Yield (parent, field, index, statement, mutant) for all mutants inside functions, messages left out."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list") or isinstance(value, ast.arguments):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.JoinedStr, ast.Raise)):
                continue
            inner = child if isinstance(child, ast.stmt) else statement
            for mutant in mutants(child, returns) if returns is not None else ():
                yield node, field, index, inner, ast.copy_location(mutant, child)
            told = getattr(child, "returns", None)
            is_function = isinstance(child, (ast.FunctionDef, ast.Lambda))
            yield from sites(child, inner, str(told and ast.unparse(told)) if is_function else returns)


def exchange(path, number):
    """Give the functions of a module the code of one of its mutants."""
    tree = ast.parse(path.read_text())
    parent, field, index, _, mutant = list(sites(tree))[number]
    if index is None:
        setattr(parent, field, mutant)
    else:
        getattr(parent, field)[index] = mutant
    todo, found = [compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)], {}
    while todo:
        code = todo.pop()
        found[code.co_name, code.co_firstlineno] = code
        todo += [value for value in code.co_consts if isinstance(value, types.CodeType)]
    for function in gc.get_objects():
        if type(function) is types.FunctionType and function.__code__.co_filename == str(path):
            function.__code__ = found[function.__code__.co_name, function.__code__.co_firstlineno]


def in_child(function, limit=float("inf")):
    """What `function` returns in a forked child; "timeout" if it takes longer than `limit` seconds."""
    with tempfile.TemporaryFile("w+") as answer:
        if not (child := os.fork()):
            try:
                json.dump(function(), answer)
                answer.flush()
            except BaseException:
                traceback.print_exc(file=sys.__stderr__)
            os._exit(0)
        end = time.monotonic() + limit
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout"
            time.sleep(0.01)
        answer.seek(0)
        return json.loads(answer.read() or '"crash"')
