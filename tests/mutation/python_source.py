"""Mutations of Python sources, Triton kernels among them, by their syntax trees."""

import ast
from collections import Counter

from tests.mutation.mutation import Mutation

FLIPPED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}
SWAPPED = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
# Error messages and declarations. Loops without a bound could run forever.
SKIPPED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.ClassDef, ast.Import, ast.ImportFrom)


def propose(file: str, text: str) -> list[Mutation]:
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:  # syntax trees count the bytes of a line
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def begin(node) -> int:
        return offset(node.lineno, node.col_offset)

    def end(node) -> int:
        return offset(node.end_lineno, node.end_col_offset)

    out: list[Mutation] = []

    def visit(node, add):
        if isinstance(node, SKIPPED):
            return
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in FLIPPED:
            strings = any(
                isinstance(n, ast.Constant) and isinstance(n.value, str) for n in (node.left, *node.comparators)
            )
            if not strings:  # names of dtypes, layouts and the like
                edit = (end(node.left), begin(node.comparators[0]), f" {FLIPPED[type(node.ops[0])]} ")
                if "(" not in text[edit[0] : edit[1]] and ")" not in text[edit[0] : edit[1]]:
                    add("flip comparison", node, edit)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Sub)):
            strings = any(
                isinstance(n, (ast.JoinedStr, ast.Tuple, ast.List, ast.Constant))
                and not (isinstance(n, ast.Constant) and isinstance(n.value, (int, float)))
                for n in (node.left, node.right)
            )
            if not strings and text[begin(node) : end(node)].count("(") == text[begin(node) : end(node)].count(")"):
                between = text[end(node.left) : begin(node.right)]
                if ")" not in between:
                    closing = ")" * between.count("(")
                    assert not closing or text[end(node.right) : end(node)].count(")") >= len(closing)
                    add("drop term", node, (end(node.left), end(node), ""))
        elif isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Add, ast.Sub)):
            add("drop term", node, (begin(node), end(node), "pass"))
        elif isinstance(node, (ast.If, ast.IfExp)):
            add(
                "negate condition",
                node,
                (begin(node.test), end(node.test), f"(not ({text[begin(node.test) : end(node.test)]}))"),
            )
        elif isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in SWAPPED and node.args:
                add("swap min/max", node, (end(node.func) - len(name), end(node.func), SWAPPED[name]))
            if name == "range" and len(node.args) in (1, 2):
                last = node.args[-1]
                add("shift edge", node, (begin(last), end(last), f"({text[begin(last) : end(last)]}) - 1"))
        for name, child in ast.iter_fields(node):
            if name in ("decorator_list", "annotation", "returns", "args") and isinstance(node, ast.FunctionDef):
                continue
            for part in child if isinstance(child, list) else [child]:
                if isinstance(part, ast.AST):
                    visit(part, add)

    tree = ast.parse(text)
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inner = {id(n) for f in found for n in ast.walk(f) if isinstance(n, ast.FunctionDef) and n is not f}
    outermost = sorted((f for f in found if id(f) not in inner), key=lambda f: f.lineno)
    for place, function in enumerate(outermost):
        count: Counter[str] = Counter()

        def add(kind, node, edit, function=function, place=place, count=count):
            statement = lines[node.lineno - 1].strip()
            out.append(Mutation(file, function.name, place, kind, count[kind], node.lineno, statement, (edit,)))
            count[kind] += 1

        for statement in function.body:
            visit(statement, add)
    return out


def mutated(text: str, mutation: Mutation) -> str:
    for begin, end, new in sorted(mutation.edits, reverse=True):
        text = text[:begin] + new + text[end:]
    return text
