"""Signatures as the sources spell them: `batch: Batch`, where Python itself only keeps what the alias stands for."""

import ast
import inspect
import textwrap
from typing import Any


def signature_of(value: Any, *, bound: bool = False) -> tuple[str, str | None] | None:
    """Arguments and result of a function, or the fields of a class that lists them; None where the sources say neither.

    Args:
      value: a function or a class.
      bound: whether the first argument is `self`, which a caller does not give.
    """
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if isinstance(node, ast.FunctionDef):
        if bound:
            del (node.args.posonlyargs or node.args.args)[0]
        returned = None if node.returns is None else ast.unparse(without_quotes(node.returns))
        return f'({arguments(node.args)})', returned
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(each).replace(' = ', '=') for each in node.body if isinstance(each, ast.AnnAssign)]
        return (f'({", ".join(fields)})', None) if fields else None
    return None


def arguments(node: ast.arguments) -> str:
    """The list of arguments."""
    for argument in [*node.posonlyargs, *node.args, *node.kwonlyargs]:
        if argument.annotation is not None:
            argument.annotation = without_quotes(argument.annotation)
    return ast.unparse(node)


def without_quotes(annotation: ast.expr) -> ast.expr:
    """An annotation that may be in quotes, since what it names is defined further down."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return ast.parse(annotation.value, mode='eval').body
    return annotation
