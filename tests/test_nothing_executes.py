"""Configurations, checkpoints and artefacts are read as data: nothing in the library can execute what a file says."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {'pickle', 'cloudpickle', 'dill', 'marshal', 'shelve', 'joblib'}
BUILT_IN = {'eval', 'exec', 'compile', '__import__'}


def executes(node):
    """Whether a node of a syntax tree imports or calls what turns data into code."""
    if isinstance(node, ast.Import):
        return any(alias.name.split('.')[0] in MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or '').split('.')[0] in MODULES
    if isinstance(node, ast.keyword):
        return node.arg == 'allow_pickle' and getattr(node.value, 'value', None) is not False
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILT_IN


@pytest.mark.parametrize(
    'code', ['import os, pickle', 'from marshal import loads', 'eval(x)', 'f(exec(x))', 'np.load(file, allow_pickle=True)']
)
def test_the_search_finds_what_it_is_for(code):
    assert any(map(executes, ast.walk(ast.parse(code))))


@pytest.mark.parametrize('code', ['jax.jit(f).lower(x).compile()', 'jax.eval_shape(f)', 'np.load(file, allow_pickle=False)'])
def test_the_search_passes_what_is_harmless(code):
    assert not any(map(executes, ast.walk(ast.parse(code))))


def test_no_file_of_the_library_or_the_experiments_can_execute_data():
    files = [file for folder in ('kdjax', 'experiments') for file in sorted((ROOT / folder).rglob('*.py'))]
    assert len(files) > 50
    found = [
        f'{file.relative_to(ROOT)}: {ast.unparse(node)}'
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if executes(node)
    ]
    assert found == []
