"""Names and settings that the command checks without PyTorch are those of the registries."""

import inspect

from tokentrim.pipeline_tokentrim import TokenTrimPipeline
from tokentrim.tokentrim_files import checkpoint
from tokentrim.tokentrim_frames import mp4
from tokentrim.tokentrim_policies.registry import HOOKS, METHODS, POLICIES
from tokentrim.tokentrim_session.arguments import ROLLOUTS
from tokentrim.tokentrim_session.prompts import TRANSITIONS
from tokentrim.tokentrim_views.registry import LAYOUTS
from tokentrim.tools import loading, names
from tokentrim.tools.commands import generate


def settings(kinds):
    return {name: tuple(inspect.signature(kind).parameters) for name, kind in kinds.items()}


def test_method_and_layout_names_match_the_registries():
    assert names.METHODS == tuple(METHODS)
    assert names.PARTS == settings({**POLICIES, **HOOKS})
    assert names.LAYOUTS == settings(LAYOUTS)


def test_argument_names_match_the_call():
    parameters = set(inspect.signature(TokenTrimPipeline.__call__).parameters) - {"self"}
    assert sorted([*names.ARGUMENTS, *names.OBJECTS]) == sorted(parameters)


def test_other_choices_match_the_code():
    assert (names.ROLLOUTS, names.TRANSITIONS) == (ROLLOUTS, TRANSITIONS)
    assert (names.INDEX, names.FPS) == (checkpoint.INDEX, mp4.FPS)
    assert generate.OFFLOADS == loading.OFFLOADS
