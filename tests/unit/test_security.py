"""What the package may not do: read or write pickles that nobody asked for."""

import ast
from pathlib import Path

import de_ray

PACKAGE = Path(de_ray.__file__).parent
SOURCES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
ASKED_FOR = "problem/ultralytics.py"
"""Opens that package's checkpoints, with problem.trust_checkpoint=true alone."""
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def calls(tree, name):
    """Calls of `module.name(...)` by their keyword arguments."""
    return [{word.arg: ast.unparse(word.value) for word in node.keywords} for node in ast.walk(tree)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name]


def test_no_module_writes_a_pickle():
    for name, tree in SOURCES.items():
        imported = {alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import)
                    for alias in node.names}
        imported |= {(node.module or "").partition(".")[0] for node in ast.walk(tree)
                     if isinstance(node, ast.ImportFrom)}
        assert not imported & (PICKLERS - {"pickle"}), name
        used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        # Names of errors to catch, where others' readers raise them.
        assert {text for text in used if text.startswith("pickle.")} <= {"pickle.UnpicklingError"}, name
        assert not calls(tree, "torch.save"), name


def test_weights_are_read_as_data_unless_the_user_trusts_their_origin():
    for name, tree in SOURCES.items():
        for given in calls(tree, "torch.load"):
            assert given.get("weights_only") == ("False" if name == ASKED_FOR else "True"), name
        for given in calls(tree, "np.load"):
            assert given.get("allow_pickle") == "False", name
