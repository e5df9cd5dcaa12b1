"""`make mutate`: break the product in small ways, one at a time, and print the mutations that no test notices.

`mutations.yaml` lists them: the file, the text `before`, which occurs once in it, what it becomes `after`, and the tests to
run. Each runs in a copy of the checkout. Exits 1 if a mutation survives, or if the text of one is not found any more.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("mutations.yaml")
COPIED = ("*.py", "*.cfg", "*.toml", "tokentrim_*", "tools", "tests", "configs", "research", "space")


@dataclass(frozen=True)
class Mutation:
    """A small fault.

    Args:
        name (`str`): what it breaks.
        file (`str`): where, from the root of the checkout.
        before (`str`), after (`str`): the text of the product, which occurs once, and of the mutation.
        tests (`str`): arguments of pytest.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str

    def text(self, root: Path) -> str | None:
        """The mutated file, or `None` where the text does not occur once."""
        text = (root / self.file).read_text() if (root / self.file).exists() else ""
        return text.replace(self.before, self.after) if text.count(self.before) == 1 else None


def read_mutations() -> list[Mutation]:
    return [Mutation(**each) for each in yaml.safe_load(LIST.read_text())]


def copy_checkout(folder: Path) -> None:
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            copy = shutil.copytree if path.is_dir() else shutil.copy2
            copy(
                path,
                folder / path.name,
                **({"ignore": shutil.ignore_patterns("__pycache__")} if path.is_dir() else {}),
            )
    for name in ("checkpoints", "docs", "README.md", "examples"):
        (folder / name).symlink_to(ROOT / name)


def run_tests(tests: str, folder: Path) -> tuple[bool, str]:
    """Whether all pass, and the last line of pytest."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1, 2):  # no tests, a wrong path
        raise RuntimeError(f"pytest could not run {tests}: {(done.stdout + done.stderr)[-500:]}")
    return done.returncode == 0, (done.stdout.strip().splitlines() or ["no output"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutations whose name or file has one of these words")
    parser.add_argument("--list", action="store_true", help="only check that the texts are found")
    options = parser.parse_args()
    mutations = [
        each
        for each in read_mutations()
        if not options.words or any(word in f"{each.name} {each.file}" for word in options.words)
    ]
    lost = [each for each in mutations if each.text(ROOT) is None]
    survivors = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_checkout(folder)
        for mutation in [] if options.list else [each for each in mutations if each not in lost]:
            path = folder / mutation.file
            original, mutated = path.read_text(), mutation.text(folder)
            path.write_text(mutated)
            passed, line = run_tests(mutation.tests, folder)
            path.write_text(original)
            print(f"{'SURVIVES' if passed else 'noticed '}  {mutation.file}: {mutation.name} ({line})", flush=True)
            survivors += [mutation] if passed else []
    for mutation in lost:
        print(f"NOT FOUND {mutation.file}: {mutation.name}: {mutation.before!r}")
    print(f"{len(mutations)} mutations, {len(survivors)} survive, {len(lost)} not found")
    return int(bool(survivors or lost))


if __name__ == "__main__":
    sys.exit(main())
