"""extras/fast/young.py: the installed torch has the private and young functions that the project calls, or what takes
their place."""
import re
from pathlib import Path

import pytest
import torch

from extras.fast.young import YOUNG, arguments_of, available, find

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("path", YOUNG)
def test_the_function_takes_the_arguments_it_is_given(path):
    """fails if: this release of torch renamed the function or one of the arguments, and nothing that is here takes its
    place"""
    wanted = set(YOUNG[path].arguments.split())
    if path == "torch.nn.attention.varlen.varlen_attn" and not available(path):
        assert available(YOUNG[path].instead)       # before torch 2.13
        return
    function = find(path)
    known = arguments_of(function)
    assert wanted <= known or not known and all(word in (function.__doc__ or "") for word in wanted)


def test_what_is_not_there_is_not_available(monkeypatch):
    """fails if: a missing name, module or argument is taken for a function"""
    for path, arguments in (("torch.ops.aten._no_such_operator", ""), ("torch.no_such.function", ""),
                            ("torch.ops.aten._flash_attention_forward", "seqused_z"), ("torch.nope", "")):
        monkeypatch.setitem(YOUNG, path, YOUNG["torch.compiler.is_compiling"]._replace(arguments=arguments))
        assert not available.__wrapped__(path)
    assert "seqused_k" in arguments_of(torch.ops.aten._flash_attention_forward)


def test_every_private_name_of_torch_stands_in_the_table():
    """fails if: a file calls another private function of torch"""
    private = re.compile(r"torch(?:\.\w+)*\._[a-z]\w*(?:\.\w+)*")
    for folder in (".", "support", "extras"):
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            if path.name == "young.py":
                continue
            found = set(private.findall(path.read_text())) - set(YOUNG)
            assert not found, (path, found)
