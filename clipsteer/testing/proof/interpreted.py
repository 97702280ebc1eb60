"""Triton's interpreter, patched once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def patched_once() -> Iterator[None]:
    """Inside, Triton's interpreter puts its functions in place of the language's once.

    By itself it does so for every launch and again in every call of a jitted function, which finds
    the language patched already: half of the time. Does nothing where the interpreter is not in
    use, or is of a version that works in another way.
    """
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "tl")):
        yield
        return
    original: Callable[[Any], Any] = interpreter._patch_lang
    language = interpreter.tl
    patched: set[int] = set()  # modules of the language
    scopes: list[Any] = []

    def patch(function: Any) -> Any:
        seen = {id(v) for v in function.__globals__.values() if v is language or v is language.core}
        if not seen or not seen <= patched:
            scopes.append(original(function))
            patched.update(seen)
        # nothing that the end of a launch would put back
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch
    try:
        yield
    finally:
        interpreter._patch_lang = original
        for scope in reversed(scopes):
            scope.restore()
