"""`make mutate`: break the product in small ways, one at a time, and print the mutations that no test notices.

`mutations.yaml` lists them: the file, the text `before`, which occurs once in it, what it becomes `after`, and the tests to
run. Each runs in a copy of the checkout. Exits 1 if a mutation survives, if the text
of one is not found any more, or if its tests fail on the product as it is.
"""

import argparse
import importlib
import os
import shlex
import shutil
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


def preload() -> None:
    """Import what every test needs, once: each mutation runs in a fork."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = True
    for name in ("torch", "diffusers", "transformers", "tokenizers", "safetensors.torch", "imageio.v3", "pytest"):
        importlib.import_module(name)
    for name, classes in (
        ("diffusers", ("AnyFlowFARPipeline", "AutoencoderKLWan", "WanTransformer3DModel", "FlowMatchLCMScheduler")),
        ("transformers", ("AutoTokenizer", "PreTrainedTokenizerFast", "UMT5EncoderModel")),
    ):
        for each in classes:
            getattr(sys.modules[name], each)


def run_tests(tests: str, folder: Path) -> tuple[bool, str]:
    """Whether all pass, and the last line of pytest."""
    log = folder / "pytest.log"
    child = os.fork()
    if child == 0:
        status = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1), os.dup2(descriptor, 2)
            os.chdir(folder)
            sys.path[:] = [str(folder / "tests"), *(each for each in sys.path if not each.startswith(str(ROOT)))]
            status = int(sys.modules["pytest"].main(["-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)]))
            sys.stdout.flush()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    return status == 0, lines[-1] if status in (0, 1) else f"pytest exits {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutations whose name or file has one of these words")
    parser.add_argument("--list", action="store_true", help="only check that the texts are found")
    parser.add_argument(
        "--trust-tests", action="store_true", help="do not run the tests on the product as it is first"
    )
    options = parser.parse_args()
    mutations = [
        each
        for each in read_mutations()
        if not options.words or any(word in f"{each.name} {each.file}" for word in options.words)
    ]
    lost = [each for each in mutations if each.text(ROOT) is None]
    survivors, passing = [], {}  # `passing`: whether tests pass on the product as it is
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_checkout(folder)
        preload()
        for mutation in [] if options.list else [each for each in mutations if each not in lost]:
            if options.trust_tests:
                passing[mutation.tests] = True
            if mutation.tests not in passing:
                passing[mutation.tests], line = run_tests(mutation.tests, folder)
                if not passing[mutation.tests]:
                    print(f"BROKEN    {mutation.tests}: {line}", flush=True)
            if not passing[mutation.tests]:
                continue
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
    return int(bool(survivors or lost or not all(passing.values())))


if __name__ == "__main__":
    sys.exit(main())
