"""`make mutate`: break the product in small ways, one at a time, and print the mutations that no test notices.

`mutations.yaml` lists them: the file, the text `before`, which occurs once in it, what it becomes `after`, and the tests to
run. Each runs in a copy of the checkout. Exits 1 if a mutation survives, if the text of one is not found any more, or if its
tests do not pass on the product as it is.
"""

import argparse
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
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "*.egg-info")
FAILED = 1  # exit status of pytest; others say that no test ran


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


def read_mutations(words: list[str]) -> list[Mutation]:
    """Those whose name or file has one of these words; without words, all."""
    mutations = [Mutation(**each) for each in yaml.safe_load(LIST.read_text())]
    return [each for each in mutations if not words or any(word in f"{each.name} {each.file}" for word in words)]


def preload() -> None:
    """Import what every test needs, but nothing of the product, once: the tests of each mutation run in a fork."""
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = True
    import imageio.v3  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    from diffusers import (  # noqa: F401
        AnyFlowFARPipeline,
        AutoencoderKLWan,
        FlowMatchLCMScheduler,
        WanTransformer3DModel,
    )
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel  # noqa: F401


def run_tests(tests: str, folder: Path) -> tuple[int, str]:
    """The exit status of pytest in a copy of the checkout, and the last line of what it printed."""
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
    return status, (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1]


def try_mutation(mutation: Mutation, folder: Path) -> tuple[str, str]:
    """Whether the tests notice a mutation, and the last line of pytest."""
    path = folder / mutation.file
    original, mutated = path.read_text(), mutation.text(folder)
    path.write_text(mutated)
    status, line = run_tests(mutation.tests, folder)
    path.write_text(original)
    return {0: "SURVIVES", FAILED: "noticed"}.get(status, f"BROKEN ({status})"), line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutations whose name or file has one of these words")
    parser.add_argument("--list", action="store_true", help="only check that the texts are found")
    parser.add_argument(
        "--trust-tests", action="store_true", help="do not run the tests on the product as it is first"
    )
    options = parser.parse_args()
    mutations, outcomes, passing = read_mutations(options.words), [], {}
    lost = [each for each in mutations if each.text(ROOT) is None]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "checkout"
        if not options.list:
            shutil.copytree(ROOT, folder, ignore=NOT_COPIED)
            preload()
        for mutation in [] if options.list else [each for each in mutations if each not in lost]:
            tests = mutation.tests
            if tests not in passing:
                passing[tests] = (0, "") if options.trust_tests else run_tests(tests, folder)
            status, line = passing[tests]
            outcome, line = ("BROKEN", line) if status else try_mutation(mutation, folder)
            outcomes.append(outcome)
            print(f"{outcome:9} {mutation.file}: {mutation.name} ({line})", flush=True)
    for mutation in lost:
        print(f"NOT FOUND {mutation.file}: {mutation.name}: {mutation.before!r}")
    counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
    print(f"{len(mutations)} mutations: {counts}, {len(lost)} not found")
    return int(bool(lost) or any(outcome != "noticed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
