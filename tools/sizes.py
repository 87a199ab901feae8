"""Print how large the code is: the package, its core, the tests, and files that are too short or too long."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ("losses", "models", "evaluation", "engine", "distillation")
SHORTEST, LONGEST = 25, 500


def lines_of(folder: Path) -> dict[str, int]:
    """Return the lines of each Python file below a folder, by its path from the checkout."""
    return {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(folder.rglob("*.py"))
    }


package, tests = lines_of(ROOT / "nst_det"), lines_of(ROOT / "tests")
core = sum(sum(lines_of(ROOT / "nst_det" / room).values()) for room in CORE)
print(f"nst_det: {sum(package.values())} lines in {len(package)} files ({', '.join(CORE)}: {core})")
print(f"tests: {sum(tests.values())} lines in {len(tests)} files")
odd = [name for name, count in package.items() if not name.endswith("__init__.py") and not SHORTEST <= count <= LONGEST]
print(f"files of the package under {SHORTEST} or over {LONGEST} lines: {', '.join(odd) or 'none'}")
