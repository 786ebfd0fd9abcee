"""Import msplora when PEFT is imported, so that PEFT knows its adapters. See `autoload.py`.

A copy of this file lies in site-packages, written by ``python -m msplora.autoload enable`` and
removed by ``disable``. Python imports it at every start, so it imports nothing itself.
"""

import sys


class _BeforePeft:
    """A finder of modules that finds none: it waits for PEFT, then steps aside."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "peft" or cls not in sys.meta_path:
            return None
        sys.meta_path.remove(cls)  # pyright: ignore[reportArgumentType]
        try:
            import msplora.sisters  # noqa: F401  (both register as soon as PEFT is loaded)
        except ModuleNotFoundError:
            if "msplora" not in sys.modules:  # else it is one that has no sisters yet
                return None  # no longer installed, or not on this path
        except Exception as error:
            import warnings

            warnings.warn(f"msplora could not be loaded beside PEFT: {error}", stacklevel=2)
            return None
        # What looks for PEFT next is the finder that msplora has just put first.
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)  # old finders have none
            spec = find_spec and find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


sys.meta_path.insert(0, _BeforePeft)  # pyright: ignore[reportArgumentType]
