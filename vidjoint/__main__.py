"""python -m vidjoint: lists the commands."""

import ast
import pkgutil
import sys
from pathlib import Path

from vidjoint.errors import command

FOLDER = Path(__file__).parent


def commands() -> dict[str, str]:
    """Name -> the first line of what it says of itself, of every module that is a command."""
    found = {}
    for module in pkgutil.iter_modules([str(FOLDER)]):
        file = FOLDER / module.name / "__main__.py" if module.ispkg else FOLDER / f"{module.name}.py"
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) if file.is_file() else None
        if text and f"\npython -m vidjoint.{module.name} " in text:
            found[module.name] = text.partition("\n")[0]
    return found


@command
def main(argv: list[str]) -> int:
    print("python -m vidjoint.NAME --help tells more of each; README.md and docs/ of all.\n")
    width = max(map(len, found := commands()))
    print("\n".join(f"{name:<{width}}  {line}" for name, line in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
