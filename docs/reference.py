"""The pages of the API reference, written from what kdjax lists as public.

A package has one page: its docstring, then a section for each of its modules with the names that come from it, below the
paragraph that the module opens with. So a name that is added to `__all__` is in the reference, beside its family.
"""

import ast
import importlib
import inspect
import pathlib
import pkgutil
from types import ModuleType
from typing import Any

from markup import as_restructured_text

import kdjax

# From what is used first to what is used inside; whatever is not here follows, by name.
ORDER = (
    *('losses', 'objectives', 'recipes', 'networks', 'models', 'training', 'metrics', 'data', 'optimizers', 'parallel'),
    *('regimes', 'pruning', 'quantization', 'export', 'generation', 'pretrained', 'testing'),
)
ACRONYMS = ('cnn', 'mlp', 'nnx', 'onnx', 'tfds', 'vgg')


def public_modules() -> list[ModuleType]:
    """The packages and public modules of kdjax, in the order of the site; a package within a package follows it."""
    names = [
        info.name.removeprefix('kdjax.')
        for info in pkgutil.walk_packages(kdjax.__path__, 'kdjax.')
        if not any(part.startswith('_') for part in info.name.split('.'))
    ]

    def place(name: str) -> tuple[int, str]:
        package = name.split('.')[0]
        return ORDER.index(package) if package in ORDER else len(ORDER), name

    return [importlib.import_module(f'kdjax.{name}') for name in sorted(names, key=place)]


def public_names(module: ModuleType) -> list[str]:
    """The names of `__all__`; of a module that lists none, those that it defines. Packages have pages of their own."""
    listed = module.__all__ if hasattr(module, '__all__') else [name for name in definitions(module) if name[0] != '_']
    return [name for name in listed if not inspect.ismodule(getattr(module, name))]


def listed_names() -> set[str]:
    """Every public name with its module: what the reference has to hold."""
    return {f'{module.__name__}.{name}' for module in public_modules() for name in public_names(module)}


def write_pages(folder: pathlib.Path) -> None:
    """Writes a page for every public module and an index, and touches no page that stays as it is."""
    modules = public_modules()
    pages = {f'{module.__name__}.rst': page(module) for module in modules} | {'index.rst': index(modules)}
    folder.mkdir(exist_ok=True)
    for old in folder.glob('*.rst'):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        file = folder / name
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def index(modules: list[ModuleType]) -> str:
    """The page that lists the others, each with the first line of its docstring."""
    rows = [
        f'* - :doc:`{module.__name__}`\n  - {as_restructured_text(module.__doc__ or "").splitlines()[0]}' for module in modules
    ]
    table = '.. list-table::\n   :widths: 25 75\n\n' + indent('\n'.join(rows))
    tree = '.. toctree::\n   :hidden:\n\n' + indent('\n'.join(module.__name__ for module in modules))
    return '\n\n'.join([heading('API reference', '='), table, tree]) + '\n'


def page(module: ModuleType) -> str:
    """A module's docstring, and below it all that it makes public."""
    parts = [
        heading(module.__name__, '='),
        f'.. module:: {module.__name__}',
        as_restructured_text(module.__doc__ or ''),
    ]
    sections: dict[str, list[str]] = {}
    origins = {name: source for source, names in imported_names(module).items() for name in names}
    for name in public_names(module):
        sections.setdefault(origins.get(name, module.__name__), []).append(name)
    for source in sorted(sections, key=lambda source: (source != module.__name__, source)):
        home = importlib.import_module(source)
        if home is not module:
            parts += [heading(title(source), '-'), as_restructured_text(home.__doc__ or '')]
        parts += [entry(module, home, name) for name in sections[source]]
    return '\n\n'.join(parts) + '\n'


def entry(module: ModuleType, home: ModuleType, name: str) -> str:
    """The directive that documents one name: functions and classes by their docstrings, other values by their sources."""
    value = getattr(module, name)
    if inspect.isclass(value):
        return f'.. autoclass:: {name}\n   :members:'
    if inspect.isfunction(value):
        return f'.. autofunction:: {name}'
    source, annotation, text = definitions(home)[name]
    lines = [f'.. py:data:: {name}']
    if annotation:
        lines.append(f'   :type: {annotation}')
    if len(source) <= 100:
        lines.append(f'   :value: {source}')
    return '\n'.join(lines) + '\n\n' + indent(as_restructured_text(text))


def imported_names(module: ModuleType) -> dict[str, list[str]]:
    """The modules of kdjax that a module imports names from, with these names."""
    found: dict[str, list[str]] = {}
    for node in syntax(module).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith('kdjax.'):
            found.setdefault(node.module, []).extend(alias.asname or alias.name for alias in node.names)
    return found


def definitions(module: ModuleType) -> dict[str, tuple[str, str, str]]:
    """What a module defines: by name its expression, annotation and the string below; functions and classes have none."""
    found = {}
    body = syntax(module).body
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = '', '', ''
        target: Any = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, 'target', None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value:
            annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ''
            text = following.value if isinstance(following, ast.Expr) else None
            text = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ''
            found[target.id] = ast.unparse(node.value), annotation, inspect.cleandoc(text)
    return found


def syntax(module: ModuleType) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(pathlib.Path(inspect.getfile(module)).read_text())


def title(source: str) -> str:
    """What the section of a module is called: `kdjax.networks._nnx` is NNX."""
    words = source.rpartition('.')[2].strip('_').split('_')
    words = [word.upper() if word in ACRONYMS else word for word in words]
    return ' '.join([words[0][:1].upper() + words[0][1:], *words[1:]])


def heading(text: str, underline: str) -> str:
    """A heading in reStructuredText."""
    return f'{text}\n{underline * len(text)}'


def indent(text: str) -> str:
    """The text as the body of a directive."""
    return '\n'.join(f'   {line}' if line else '' for line in text.splitlines())
