"""Extras: finds what extras/ offers, so that nothing else has to know whether that folder is there.

extras/__init__.py lists modules in the order in which they attach. A module may offer any of

    Flags                   a dataclass of settings (support.flags.opt); they leave --help with the module
    RECIPES                 name -> support.flags.recipe(...)
    around(command)         the command as a function without arguments, and something before or after it
    rules(cfg)              [(whether it holds, what to say if not)], asked before anything is loaded
    on_model(model)         every model that is loaded, wherever: faster ways of the same passes
    teacher(cfg, setup)     a support.setup.TeacherKind when this configuration wants one of its kind, else None
    served_folder(name)     a folder of the small files, for a model's name that is neither folder nor hub id, else None
    served_model(folder, dtype, device)     what reads in place of a Transformer, for such a folder without weights
    before_loading(cfg, setup)  looks at the small files, or says where teachers are loaded (Setup.teacher_device)
    attach(run)             puts its own before, around or in place of what the Run is made of
"""
import functools
import importlib.util
from pathlib import Path


@functools.cache
def load_extras() -> tuple:
    if importlib.util.find_spec("extras") is None or not (Path(__file__).parents[1] / "extras/__init__.py").exists():
        return ()
    import extras
    return tuple(extras.ALL)


def offers(hook: str) -> list:
    """The functions (or classes) of this name, in order. A module of this name is none: extras import teacher.py."""
    return [getattr(extra, hook) for extra in load_extras() if callable(getattr(extra, hook, None))]
